"""Clients that go, at every stage of a request: how long until the engine's socket is closed?

    python -m benchmarks.disconnects [--count 1000] [--output benchmarks/results/disconnects.jsonl]

One client after the other, each leaving at a stage drawn by a seed. Measured at the embedded engine, from the client's
closing of its socket to the moment the engine sees its own closed, both by the same clock. Every tenth client asks the
engine itself, without the gateway: that is what the machine and the measurement take on their own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks.chaos import CHAT, COMPLETIONS, Process, engine_config, free_port
from benchmarks.rows import show
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.server import SimServer

LIMIT = 0.1
SLOTS = 4
STAGES = (
    "body",
    "before_first_byte",
    "first_bytes",
    "middle",
    "whole",
    "unsliced",
    "unsliced_whole",
    "queued",
    "direct",
)


def body_of(stage: str, pick: random.Random) -> tuple[str, dict[str, Any]]:
    path = pick.choice((CHAT, COMPLETIONS))
    body: dict[str, Any] = {"model": "sim", "max_tokens": 3000, "ignore_eos": True, "stream": "whole" not in stage}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": f"leaving {pick.random()}"}]
    else:
        body["prompt"] = f"leaving {pick.random()}"
    if "unsliced" in stage:
        body["presence_penalty"] = 0.5
    return path, body


class Leaver:
    """One engine, one gateway, and clients that go."""

    def __init__(self, engine: SimServer, gateway: Process, session: aiohttp.ClientSession, seed: int) -> None:
        self._engine, self._gateway, self._session = engine, gateway, session
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()

    async def leave(self, stage: str) -> float | None:
        """Ask, go at this stage, and return the seconds until the engine noticed; None: it never heard of it."""
        port = self._engine.port if stage == "direct" else int(self._gateway.settings["server"]["port"])
        path, body = body_of(stage, self._random)
        data = orjson.dumps(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        seen = len(self._engine.log)
        if stage == "before_first_byte":
            self._engine.faults.add(Fault("hang"))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + (data[:-5] if stage == "body" else data))
        if stage in ("body", "queued"):
            await asyncio.sleep(self._random.uniform(0.0, 0.03))
        else:
            await self._until(lambda: len(self._engine.log) > seen)
        if stage in ("first_bytes", "middle", "unsliced", "direct"):
            wanted = 1 if stage == "first_bytes" else self._random.randrange(2, 60)
            data = b""
            while data.count(b"data: ") < wanted:
                piece = await reader.read(65536)
                assert piece, data
                data += piece
        elif stage in ("whole", "unsliced_whole"):
            await asyncio.sleep(self._random.uniform(0.0, 0.05))
        gone = self._loop.time()
        # Half of them say goodbye, half are torn away.
        if self._random.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        if stage in ("body", "queued"):
            await asyncio.sleep(0.05)
            return None
        record = self._engine.log[-1]
        await self._until(lambda: record.closed is not None)
        assert record.closed is not None
        return record.closed - gone

    async def _until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - the engine tells no event
                await asyncio.sleep(0.0005)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds; no percentile with fewer than ten values beyond it."""
    ordered = sorted(values)
    found = {"count": len(ordered), "max": round(ordered[-1] * 1000, 1)}
    for share in (0.5, 0.9, 0.99):
        if len(ordered) * (1 - share) >= 10:
            found[f"p{share * 100:.0f}"] = round(ordered[int(len(ordered) * share)] * 1000, 1)
    return found


async def run(count: int, seed: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = await stack.enter_async_context(SimServer(engine_config(200.0)))
        settings: dict[str, Any] = {
            "server": {"host": "127.0.0.1", "port": free_port()},
            "admin": {"port": free_port()},
            "upstreams": [{"name": "engine", "url": engine.url, "slots": SLOTS}],
            "logging": {"level": "warning"},
        }
        session = await stack.enter_async_context(aiohttp.ClientSession())
        gateway = Process(settings, folder)
        stack.callback(lambda: gateway.process and gateway.process.kill())
        await gateway.start(session)
        leaver = Leaver(engine, gateway, session, seed)
        pick = random.Random(seed)
        took: dict[str, list[float]] = {}
        unheard = 0
        stages = [s for s in STAGES if s not in ("queued", "direct")]
        for n in range(count * 4 // 5):
            stage = "direct" if n % 10 == 9 else pick.choice(stages)
            found = await leaver.leave(stage)
            if found is None:
                unheard += 1
            else:
                took.setdefault(stage, []).append(found)
        # The rest leave while they wait: every slot is taken by somebody who stays.
        stays = [await _stay(session, gateway) for _ in range(SLOTS)]
        calls = len(engine.log)
        for _ in range(count - count * 4 // 5):
            await leaver.leave("queued")
        reached = len(engine.log) - calls
        for response in stays:
            response.close()
        await asyncio.sleep(2.0)
        async with session.get(gateway.admin + "/admin/jobs") as response:
            left = orjson.loads(await response.read())["live"]
        held = gateway.held()
        await gateway.stop()
    through = [value for stage, values in took.items() if stage != "direct" for value in values]
    return {
        "seed": seed,
        "disconnects": count,
        "reached_the_engine": len(through),
        "left_before_the_engine_heard": unheard + count - count * 4 // 5,
        "queued_that_still_reached_the_engine": reached,
        "later_than_100_ms": sum(value > LIMIT for value in through),
        "milliseconds": percentiles(through),
        "milliseconds_without_gateway": percentiles(took.get("direct", [0.0])),
        "milliseconds_by_stage": {stage: percentiles(values) for stage, values in sorted(took.items())},
        "jobs_left": left,
        "held": held,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "machine": f"{os.cpu_count()} cores, shared",
    }


async def _stay(session: aiohttp.ClientSession, gateway: Process) -> aiohttp.ClientResponse:
    body = {"model": "sim", "prompt": "stay", "max_tokens": 3900, "ignore_eos": True, "presence_penalty": 0.1}
    response = await session.post(gateway.url + COMPLETIONS, json={**body, "stream": True})
    await response.content.readany()
    return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append the result to this file of JSON lines")
    given = parser.parse_args()
    result = asyncio.run(run(given.count, given.seed))
    show(result, given.output)
    if result["jobs_left"] or result["queued_that_still_reached_the_engine"]:
        sys.exit("something was left behind")


if __name__ == "__main__":
    main()
