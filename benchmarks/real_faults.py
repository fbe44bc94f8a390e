"""Faults on real engines: one of two vLLM processes killed in the middle of answers, and clients that hang up.

    python -m benchmarks.real_faults kill [--output benchmarks/results/real-faults.jsonl]
    python -m benchmarks.real_faults hangup --engine vllm|llama [--count 100] [--output …]

*kill*: two vLLMs behind a gateway, one answer on each; `kill -9` to one of them when both have begun. What the clients
get is compared with what the engine gives undisturbed (float32, temperature 0).

*hangup*: a client after the other streams, and closes its socket after a few tokens: straight from the engine and
through the gateway, in turns. How long until the engine says that nothing runs (vLLM's gauges, llama.cpp's slots), how
many steps it made that nobody got (by its own count), and which part of that is the gateway's: between it and the
engine a tap notes when it hung up.

Knows: real engines, their processes and gauges. Never: the embedded engine (that is ``chaos`` and ``disconnects``).
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import aiohttp
import click
import orjson

from benchmarks import vllm_engine
from benchmarks.chaos import Process, free_port
from benchmarks.disconnects import percentiles
from benchmarks.rows import show
from elis_gateway.tasks import spawn
from elis_gateway.upstream.gauges import read
from loadtest import engines

COMPLETIONS = "/v1/completions"
MODEL = vllm_engine.MODEL
STEPS = {"vllm": r"^vllm:iteration_tokens_total_count(?:\{.*\})? (\S+)$", "llama": r"^llamacpp:n_decode_total (\S+)$"}
"""How an engine's metrics count its steps."""
LIMIT = 0.1
"""Seconds within which the gateway is to hang up when its client has."""
PROMPTS = (
    "Once upon a time there was a small lighthouse",
    "The three most important rules of a good kitchen are",
    "In the year 2150 the first ship to",
    "A letter from the captain to his sister:",
)


def body(prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


@asynccontextmanager
async def gateway(upstreams: list[dict[str, Any]], session: aiohttp.ClientSession) -> AsyncIterator[Process]:
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "server": {"host": "127.0.0.1", "port": free_port()},
            "admin": {"port": free_port()},
            "upstreams": upstreams,
            "predictor": {"kind": "history"},
            "logging": {"level": "info"},
        }
        running = Process(settings, Path(folder))
        try:
            await running.start(session)
            yield running
        finally:
            await running.stop()


async def text_of(
    session: aiohttp.ClientSession, url: str, asked: dict[str, Any], begun: asyncio.Event | None = None
) -> tuple[str, list[str]]:
    """A streamed answer's text, and the upstreams it came from; ``begun`` is set after a dozen tokens."""
    text, upstreams, pieces = "", [], 0
    async with session.post(url + COMPLETIONS, json=asked, headers={"X-Elis-Debug": "1"}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b": elis "):
                upstreams = orjson.loads(line[7:])["upstreams"]
            if not line.startswith(b"data: {"):
                continue
            chunk = orjson.loads(line[6:])
            assert "error" not in chunk, chunk
            text += "".join(choice["text"] for choice in chunk["choices"])
            pieces += 1
            if begun is not None and pieces == 12:
                begun.set()
    return text, upstreams


async def killed(tokens: int) -> dict[str, Any]:
    """One of two engines dies under an answer. Raises ``EngineFailed`` where vLLM is not installed."""
    ports = [engines.free_port(), engines.free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        # Both at once: starting is most of the time this takes.
        children = [
            stack.enter_context(vllm_engine.vllm_child(port, slots=2, log=Path(folder) / f"{port}.log"))
            for port in ports
        ]
        for child, url in zip(children, urls, strict=True):
            await asyncio.to_thread(engines.wait_ready, child, f"{url}/health", timeout=300)
        async with AsyncExitStack() as more:
            session = await more.enter_async_context(aiohttp.ClientSession())
            asked = [body(prompt, tokens) for prompt in PROMPTS]
            wanted = [(await text_of(session, urls[0], one))[0] for one in asked]
            upstreams = [{"name": f"vllm-{n}", "url": url, "slots": 2} for n, url in enumerate(urls)]
            front = await more.enter_async_context(gateway(upstreams, session))
            await _both_up(session, front)
            began = [asyncio.Event() for _ in asked]
            tasks = [
                spawn(text_of(session, front.url, one, event), name="client")
                for one, event in zip(asked, began, strict=True)
            ]
            await asyncio.gather(*(event.wait() for event in began))
            await asyncio.to_thread(children[0].kill)
            at = time.monotonic()
            got = await asyncio.gather(*tasks)
            took = time.monotonic() - at
    moved = [upstreams for _, upstreams in got if "vllm-0" in upstreams and "vllm-1" in upstreams]
    return {
        "what": "kill -9 of one of two vLLM processes under four answers",
        "answers": len(got),
        "on_the_killed_engine": sum("vllm-0" in upstreams for _, upstreams in got),
        "went_on_elsewhere": len(moved),
        "texts_equal_the_undisturbed": sum(text == right for (text, _), right in zip(got, wanted, strict=True)),
        "characters": [len(text) for text, _ in got],
        "seconds_to_the_last_end": round(took, 1),
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


async def _both_up(session: aiohttp.ClientSession, front: Process) -> None:
    async with asyncio.timeout(60):
        while True:
            # The public listener is up before the admin one.
            with suppress(aiohttp.ClientConnectorError):
                async with session.get(front.admin + "/admin/upstreams") as response:
                    shown = orjson.loads(await response.read())["upstreams"]
                if all(u["in_service"] for u in shown):
                    return
            await asyncio.sleep(0.1)


async def _busy(session: aiohttp.ClientSession, url: str, engine: str) -> float:
    """Calls the engine says it runs or queues."""
    if engine == "llama":
        async with session.get(url + "/slots") as response:
            return float(sum(bool(slot["is_processing"]) for slot in orjson.loads(await response.read())))
    async with session.get(url + "/metrics") as response:
        seen = read(await response.read())
    assert seen is not None
    return seen.running + seen.waiting


async def _steps(session: aiohttp.ClientSession, url: str, engine: str) -> int:
    """Steps the engine has made so far."""
    async with session.get(url + "/metrics") as response:
        found = re.findall(STEPS[engine], await response.text(), re.MULTILINE)
    return int(sum(map(float, found)))


class Tap:
    """A port that passes everything on to the engine's, and notes when who asked there hung up."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.hung_up = 0.0
        self._server: asyncio.Server | None = None
        self._ends: set[_End] = set()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Tap:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self._ends, self._call), "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for end in list(self._ends):
            end.transport.abort()
        await asyncio.sleep(0)

    async def _call(self, caller: _End) -> None:
        """Connect a caller to the engine."""
        loop = asyncio.get_running_loop()
        _, engine = await loop.create_connection(lambda: _End(self._ends), "127.0.0.1", self.target)
        caller.join(engine, self._noted)

    def _noted(self) -> None:
        self.hung_up = time.monotonic()


class _End(asyncio.Protocol):
    """One side of a connection through a tap; what one side has said or done, the other one does at once."""

    def __init__(self, ends: set[_End], begun: Callable[[_End], Any] | None = None) -> None:
        self.transport: asyncio.Transport
        self._ends, self._begun = ends, begun
        self._other: _End | None = None
        self._lost: Callable[[], None] | None = None
        self._early = b""
        self._calling = False
        """The last it asked for was an answer, not a probe."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._ends.add(self)
        if self._begun is not None:
            spawn(self._begun(self), name="tap")

    def join(self, engine: _End, lost: Callable[[], None]) -> None:
        self._other, engine._other, self._lost = engine, self, lost
        engine.transport.write(self._early)
        if self.transport.is_closing():
            engine.transport.abort()

    def data_received(self, data: bytes) -> None:
        if data.startswith((b"GET ", b"POST ")):
            self._calling = data.startswith(b"POST " + COMPLETIONS.encode())
        if self._other is None:
            self._early += data
        else:
            self._other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ends.discard(self)
        if self._lost is not None and self._calling:
            self._lost()
        if self._other is not None:
            self._other.transport.abort()


class Left(NamedTuple):
    """What a hang-up led to. Seconds from it."""

    idle: float
    """Until the engine said that nothing runs."""
    gateway: float | None
    """Until the gateway had hung up; None: there was none."""
    steps: int
    """The engine made and nobody got."""


class Leaver:
    """Clients of one engine that stream and go, one after the other."""

    def __init__(self, session: aiohttp.ClientSession, url: str, engine: str, tap: Tap) -> None:
        self._session, self._url, self._engine, self._tap = session, url, engine, tap
        self.gaps: list[float] = []
        self.looks: list[float] = []

    async def leave(self, front: str, asked: dict[str, Any], wanted: int) -> Left:
        """Ask at ``front``, and go with the ``wanted``-th token."""
        await _idle(self._session, self._url, self._engine)
        before = await _steps(self._session, self._url, self._engine)
        self._tap.hung_up = 0.0
        response = await self._session.post(front + COMPLETIONS, json=asked)
        assert response.status == 200, await response.text()
        seen = await self._read(response, wanted)
        gone = time.monotonic()
        response.close()
        while True:
            looked = time.monotonic()
            if not await _busy(self._session, self._url, self._engine):
                break
        self.looks.append(time.monotonic() - looked)
        steps = await _steps(self._session, self._url, self._engine) - before - seen
        through = front != self._url
        assert not through or self._tap.hung_up, "the engine is idle, and nobody hung up"
        return Left(looked - gone, self._tap.hung_up - gone if through else None, steps)

    async def _read(self, response: aiohttp.ClientResponse, wanted: int) -> int:
        seen, at = 0, 0.0
        async for line in response.content:
            if line.startswith(b"data: {"):
                now = time.monotonic()
                if seen:
                    self.gaps.append(now - at)
                seen, at = seen + 1, now
                if seen >= wanted:
                    break
        return seen


async def hung_up(url: str, engine: str, count: int, seed: int) -> dict[str, Any]:
    """Clients that leave, straight from the engine and through the gateway in turns."""
    pick = random.Random(seed)
    left: dict[str, list[Left]] = {"direct": [], "gateway": []}
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        tap = await stack.enter_async_context(Tap(urlsplit(url).port or 80))
        front = await stack.enter_async_context(gateway([{"name": "engine", "url": tap.url, "slots": 4}], session))
        await _both_up(session, front)
        leaver = Leaver(session, url, engine, tap)
        ways = [("direct", url), ("gateway", front.url)]
        for n in range(count):
            wanted = pick.randrange(2, 25)
            for way, at in ways if n % 2 else ways[::-1]:
                left[way].append(await leaver.leave(at, body(f"{n} {way}: {PROMPTS[n % 4]}", 1200), wanted))
        async with session.get(front.admin + "/admin/jobs") as response:
            jobs = orjson.loads(await response.read())["live"]
    step = median(leaver.gaps)
    ours = [each.gateway for each in left["gateway"] if each.gateway is not None]
    return {
        "what": f"clients of {engine} that hang up in the middle of a stream, straight and through the gateway",
        "disconnects_each_way": count,
        "engine_step_milliseconds": round(step * 1000, 1),
        "direct": told(left["direct"], step),
        "gateway": told(left["gateway"], step),
        "longer_by_milliseconds": longer(left),
        "milliseconds_until_the_gateway_had_hung_up": percentiles(ours),
        "later_than_100_ms": sum(value > LIMIT for value in ours),
        "one_look_milliseconds": round(median(leaver.looks) * 1000, 1),
        "jobs_left": jobs,
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def told(left: Sequence[Left], step: float) -> dict[str, Any]:
    """One way's distribution."""
    idle = [each.idle for each in left]
    steps = [each.steps for each in left]
    return {
        "milliseconds_until_nothing_runs": percentiles(idle),
        "within_one_step": sum(value <= step for value in idle),
        "within_two_steps": sum(value <= 2 * step for value in idle),
        "steps_nobody_got": {str(number): steps.count(number) for number in sorted(set(steps))},
    }


def longer(left: dict[str, list[Left]]) -> list[float]:
    """Median of through the gateway less straight, pair by pair, and its 95 % interval by the signs of the pairs."""
    pairs = sorted(b.idle - a.idle for a, b in zip(left["direct"], left["gateway"], strict=True))
    half = 0.98 * len(pairs) ** 0.5
    low, high = int(len(pairs) / 2 - half), int(len(pairs) / 2 + half)
    return [round(each * 1000, 1) for each in (median(pairs), pairs[max(low, 0)], pairs[min(high, len(pairs) - 1)])]


async def _idle(session: aiohttp.ClientSession, url: str, engine: str) -> None:
    async with asyncio.timeout(30):
        while await _busy(session, url, engine):  # noqa: ASYNC110 - the engine tells no event
            await asyncio.sleep(0.02)


@click.group()
def main() -> None:
    """Faults on real engines."""


@main.command()
@click.option("--tokens", default=120, show_default=True)
@click.option("--output", type=click.Path(path_type=Path))
def kill(tokens: int, output: Path | None) -> None:
    """One of two vLLM processes dies under answers."""
    result = asyncio.run(killed(tokens))
    show(result, output)
    if result["texts_equal_the_undisturbed"] != result["answers"] or not result["went_on_elsewhere"]:
        sys.exit("an answer is not what it would have been, or nothing was put to the test")


@main.command()
@click.option("--engine", type=click.Choice(["vllm", "llama"]), required=True)
@click.option("--url", help="An engine that runs; default: one is started.")
@click.option("--count", default=100, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path))
def hangup(engine: str, url: str | None, count: int, seed: int, output: Path | None) -> None:
    """Clients hang up; how long does the engine go on?"""
    with ExitStack() as stack:
        if url is None:
            url = stack.enter_context(vllm_engine.vllm() if engine == "vllm" else engines.llama(slots=4))
        result = asyncio.run(hung_up(url, engine, count, seed))
    show(result, output)
    if result["jobs_left"] or result["later_than_100_ms"]:
        sys.exit("something was left behind, or let go of too late")


if __name__ == "__main__":
    main()
