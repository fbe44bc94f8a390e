"""Faults on real engines: one of two vLLM processes killed in the middle of answers, and clients that hang up.

    python -m benchmarks.real_faults kill [--output benchmarks/results/real-faults.jsonl]
    python -m benchmarks.real_faults hangup --engine vllm|llama [--count 100] [--output …]

*kill*: two vLLMs behind a gateway, one answer on each; `kill -9` to one of them when both have begun. What the clients
get is compared with what the engine gives undisturbed (float32, temperature 0).

*hangup*: a client after the other streams through the gateway, and closes its socket after a few tokens. How long until
the engine says that nothing runs (vLLM's gauges, llama.cpp's slots), beside the engine's own step.

Knows: real engines, their processes and gauges. Never: the embedded engine (that is ``chaos`` and ``disconnects``).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

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


async def hung_up(url: str, engine: str, count: int, seed: int) -> dict[str, Any]:
    """Clients that leave, one after the other; seconds until the engine says that nothing runs."""
    pick = random.Random(seed)
    took, looks, gaps = [], [], []
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        front = await stack.enter_async_context(gateway([{"name": "engine", "url": url, "slots": 4}], session))
        await _both_up(session, front)
        for n in range(count):
            await _idle(session, url, engine)
            wanted = pick.randrange(2, 25)
            response = await session.post(front.url + COMPLETIONS, json=body(f"{n}: {PROMPTS[n % 4]}", 1200))
            assert response.status == 200
            seen, at = 0, time.monotonic()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    if seen:
                        gaps.append(now - at)
                    seen, at = seen + 1, now
                    if seen >= wanted:
                        break
            gone = time.monotonic()
            response.close()
            while True:
                looked = time.monotonic()
                busy = await _busy(session, url, engine)
                if not busy:
                    break
            took.append(looked - gone)
            looks.append(time.monotonic() - looked)
        async with session.get(front.admin + "/admin/jobs") as response:
            left = orjson.loads(await response.read())["live"]
    step = median(gaps)
    return {
        "what": f"clients of {engine} that hang up in the middle of a stream",
        "disconnects": count,
        "milliseconds_until_nothing_runs": percentiles(took),
        "engine_step_milliseconds": round(step * 1000, 1),
        "within_one_step": sum(value <= step for value in took),
        "within_two_steps": sum(value <= 2 * step for value in took),
        "one_look_milliseconds": round(median(looks) * 1000, 1),
        "jobs_left": left,
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


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
    if result["jobs_left"]:
        sys.exit("something was left behind")


if __name__ == "__main__":
    main()
