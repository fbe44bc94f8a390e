"""Live runs for ``benchmarks.capacity``: an engine and gateways as child processes, and two ways to load them.

Knows: how to start what is measured, forced answer lengths, a backlog that keeps every slot at work, and what its
tokens per second are. Never: which settings are compared, in which order, or what the figures mean.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import orjson
import uvloop
import yaml

from benchmarks.capacity_probe import Spent, session_of
from benchmarks.vllm_engine import MODEL, vllm
from elis_gateway.errors import UpstreamUnavailable
from elis_gateway.sim.engine import EngineModel
from elis_gateway.tasks import spawn
from elis_gateway.wire.sse import DONE, EventDecoder
from loadtest import runner
from loadtest.engines import Child, free_port, wait_ready
from loadtest.records import Row
from loadtest.workload import Request, Workload

__all__ = ["Engine", "Figures", "backlog", "embedded", "gateway", "open_loop", "real", "seams"]

Figures = dict[str, float]

_GATEWAY = """
from loadtest.engines import die_with_parent
from elis_gateway.cli import main
die_with_parent()
main()
"""

_ENGINE = """
import sys
import uvloop
from loadtest.engines import die_with_parent
from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.server import serve
from elis_gateway.sim.server_config import ServerConfig
die_with_parent()
port, model, speed = sys.argv[1:]
config = ServerConfig(port=int(port), engine=EngineModel.load(model), speed=float(speed), priority="honour")
uvloop.run(serve(config))
"""


class Engine(NamedTuple):
    """What is asked, and how."""

    url: str
    model: str
    slots: int
    name: str
    """What stands in the results."""
    session: int | None = None
    """The process session whose processor time is the engine's; None: not watched."""


# ---- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def real(folder: Path, slots: int, url: str | None) -> Iterator[Engine]:
    """vLLM on this machine's CPU, ``url`` where one runs already. It orders its queue by priority; requests that name
    none are first come."""
    name = f"vLLM 0.32 (CPU, float32), {slots} slots"
    if url is not None:
        yield Engine(url, MODEL, slots, name, session_of(urlsplit(url).port or 80))
        return
    with vllm(slots=slots, priority=True, log=folder / "vllm.log") as made:
        yield Engine(made, MODEL, slots, name, session_of(urlsplit(made).port or 80))


@contextmanager
def embedded(folder: Path, slots: int, model: str, speed: float) -> Iterator[Engine]:
    """The embedded engine; it orders its queue by priority as well."""
    numbers = replace(EngineModel.load(model), slots=slots)
    file = folder / "engine.json"
    numbers.save(file)
    port = free_port()
    argv = [sys.executable, "-c", _ENGINE, str(port), str(file), str(speed)]
    with Child(argv, log=folder / "engine.log") as child:
        wait_ready(child, f"http://127.0.0.1:{port}/health", timeout=30)
        name = f"embedded engine ({model}, seam {numbers.seam_tokens:g}), {slots} slots, speed {speed:g}"
        yield Engine(f"http://127.0.0.1:{port}", "sim", slots, name)


@contextmanager
def gateway(
    folder: Path,
    name: str,
    engine: Engine,
    upstream: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    predictor: str | Mapping[str, Any],
) -> Iterator[tuple[str, str]]:
    """The gateway in front of ``engine``: base URLs of its public and its admin listener."""
    port, admin = free_port(), free_port()
    health = {"interval": 10}
    config = {
        "server": {"host": "127.0.0.1", "port": port, "shutdown_grace": 1},
        "admin": {"port": admin},
        "upstreams": [{"url": engine.url, "slots": engine.slots, "health": health, **upstream}],
        "scheduler": dict(scheduler),
        "predictor": {"kind": predictor} if isinstance(predictor, str) else dict(predictor),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    with Child([sys.executable, "-c", _GATEWAY, "serve", str(file)], log=folder / f"{name}.log") as child:
        wait_ready(child, f"http://127.0.0.1:{port}/ready", timeout=60)
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"


def seams(admin: str) -> tuple[float, float]:
    """(upstream calls made, of which preempted) by a gateway so far."""
    text = urllib.request.urlopen(f"{admin}/metrics").read().decode()

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))

    return total("elis_slices_total"), total("elis_preemptions_total")


# ---- asking ---------------------------------------------------------------------------------------------------------


class Forced:
    """Streamed chat requests whose answers are as long as the workload says; every token is counted by its id."""

    def __init__(self, engine: Engine, url: str, session: aiohttp.ClientSession, *, start: float, mark: str) -> None:
        """``mark`` begins every prompt, so that no run finds the prompts of another one in the prefix cache."""
        self._engine = engine
        self._url = url + "/v1/chat/completions"
        self._session = session
        self._start = start
        self._mark = mark
        self.arrived: list[tuple[float, int]] = []
        """(seconds since the start, tokens) of everything that came."""

    def _body(self, request: Request) -> dict[str, Any]:
        return {
            "model": self._engine.model,
            "messages": [{"role": "user", "content": f"{self._mark} {request.id}: {request.prompt}"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": request.tokens,
        }

    async def send(self, request: Request, row: Row) -> None:
        headers = {"Content-Type": "application/json"}
        body = orjson.dumps(self._body(request))
        try:
            async with self._session.post(self._url, data=body, headers=headers) as reply:
                if reply.status != 200:
                    row.error = f"status {reply.status}: {(await reply.text())[:200]}"
                    return
                await self._read(reply, row)
        except (aiohttp.ClientError, UpstreamUnavailable) as error:
            row.error = type(error).__name__
        if not row.error and (row.end is None or row.tokens != request.tokens):
            row.error = f"{row.tokens} tokens instead of {request.tokens}"

    async def _read(self, reply: aiohttp.ClientResponse, row: Row) -> None:
        decoder = EventDecoder()
        async for data in reply.content.iter_any():
            now = time.perf_counter() - self._start
            for payload in decoder.feed(data):
                if payload == DONE:
                    row.end = now
                    continue
                chunk = orjson.loads(payload)
                if "error" in chunk:
                    row.error = str(chunk["error"])
                    return
                if usage := chunk.get("usage"):
                    row.tokens = usage["completion_tokens"]
                for choice in chunk["choices"]:
                    if ids := choice.get("token_ids"):
                        self.arrived.append((now, len(ids)))
                        if row.first is None:
                            row.first = now


# ---- loads ----------------------------------------------------------------------------------------------------------


def backlog(engine: Engine, url: str, requests: Sequence[Request], outstanding: int, mark: str) -> Figures:
    """Keep ``outstanding`` requests (more than slots) unanswered until there are no more; tokens per second under
    backlog: from the first moment that every slot streams until nothing waits for a slot. The drain is not counted."""

    async def run() -> Figures:
        start = time.perf_counter()
        rows: list[Row] = []
        waiting = iter(requests)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            target = Forced(engine, url, session, start=start, mark=mark)

            async def client() -> None:
                for request in waiting:
                    now = time.perf_counter() - start
                    row = Row(request.id, now, now)
                    rows.append(row)
                    await target.send(request, row)

            spent = Spent(engine.url, engine.session, start=start)
            watching = spawn(spent.watch(session), name="watch the engine")
            tasks = []
            for n in range(outstanding):
                tasks.append(spawn(client(), name=f"client {n}"))
                await asyncio.sleep(0.003)  # so that they arrive in this order
            for task in tasks:
                await task
            watching.cancel()
        return _under_backlog(rows, target.arrived, engine.slots, spent)

    return uvloop.run(run())


def _under_backlog(rows: Sequence[Row], arrived: Sequence[tuple[float, int]], slots: int, spent: Spent) -> Figures:
    errors = [row.error for row in rows if row.error]
    if errors:
        return {"errors": len(errors), "rate": float("nan"), "first_error": errors[0]}  # type: ignore[dict-item]
    firsts = sorted(row.first for row in rows if row.first is not None)
    ends = sorted(row.end for row in rows if row.end is not None)
    full, over = firsts[slots - 1], ends[len(rows) - slots - 1]
    tokens = sum(n for at, n in arrived if full < at <= over)
    begun = sum(full < at <= over for at in firsts)
    seconds = over - full
    return {
        "rate": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "begun": begun,
        "errors": 0,
        "finished_after": ends[-1],
        **spent.between(full, over),
    }


def open_loop(engine: Engine, url: str, requests: Sequence[Request], mark: str) -> Figures:
    """Send every request at its time and follow it to its end: completion times in seconds."""

    async def run() -> Figures:
        start = time.perf_counter() + 0.1
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            target = Forced(engine, url, session, start=start, mark=mark)
            done = await runner.run(Workload(tuple(requests)), target, start=start)
        errors = [row.error for row in done.rows if row.error]
        if errors:
            return {"errors": len(errors), "first_error": errors[0]}  # type: ignore[dict-item]
        jct = [row.jct for row in done.rows]
        ttft = [row.ttft for row in done.rows if row.ttft is not None]
        return {
            "mean": fmean(jct),
            "p50": median(jct),
            "worst": max(jct),
            "ttft": fmean(ttft),
            "tokens": sum(row.tokens for row in done.rows),
            "lag": done.lag,
            "errors": 0,
        }

    return uvloop.run(run())
