"""What a waiting client costs: thousands of streams queued behind one busy slot.

    python -m benchmarks.queued [--clients 10000] [--prompt 400] [--output benchmarks/results/queued.jsonl]

The engine serves one sequence and takes for ever; every client's stream waits and gets comments that keep it alive.
Stated: resident memory of the gateway before and after, per client, and how quickly a request is refused once the
queue is full.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks.chaos import COMPLETIONS, Process, engine_config, free_port
from benchmarks.rows import show
from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.server import SimServer


async def run(clients: int, prompt: int) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, clients + 2000)), hard))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = EngineModel(slots=1, decode=((1, 5.0), (2, 5.0)), prefill_tokens_per_second=None, seam_tokens=0.0)
        engine = await stack.enter_async_context(SimServer(replace(engine_config(5.0), engine=model)))
        settings: dict[str, Any] = {
            "server": {"host": "127.0.0.1", "port": free_port(), "keepalive_after": 15.0, "shutdown_grace": 0},
            "admin": {"port": free_port()},
            "upstreams": [{"name": "engine", "url": engine.url, "slots": 1}],
            "scheduler": {"policy": "fcfs", "queue": {"max_jobs": clients - 1}},
            "logging": {"level": "warning"},
        }
        gateway = Process(settings, folder)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        stack.callback(lambda: gateway.process and gateway.process.kill())
        await gateway.start(session)
        await asyncio.sleep(1.0)
        before = gateway.held()
        body = {"model": "sim", "prompt": "x" * prompt, "max_tokens": 3000, "ignore_eos": True, "stream": True}
        data = orjson.dumps(body)
        fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        head = f"POST {COMPLETIONS} HTTP/1.1\r\n{fields}\r\n\r\n"
        writers = []
        start = time.monotonic()
        for n in range(clients):
            _, writer = await asyncio.open_connection("127.0.0.1", settings["server"]["port"])
            writer.write(head.encode() + data)
            writers.append(writer)
            if n % 100 == 99:
                await asyncio.sleep(0)
        async with asyncio.timeout(300):
            while await _live(session, gateway) < clients:  # noqa: ASYNC110 - the gateway tells no event
                await asyncio.sleep(0.5)
        took = time.monotonic() - start
        await asyncio.sleep(1.0)
        queued = gateway.held()
        await asyncio.sleep(20.0)  # every stream has its status line and its first comments
        alive = gateway.held()
        refused = []
        for _ in range(20):
            start = time.monotonic()
            async with session.post(gateway.url + COMPLETIONS, data=data) as response:
                await response.read()
                assert response.status == 429, response.status
                wait = response.headers["Retry-After"]
            refused.append(time.monotonic() - start)
        start = time.monotonic()
        for writer in writers:
            writer.transport.abort()
        async with asyncio.timeout(300):
            while await _live(session, gateway):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        gone = time.monotonic() - start
        after = gateway.held()
        await gateway.stop()
    return {
        "clients": clients,
        "body_bytes": len(data),
        "rss_mib": {
            name: round(held["rss_kib"] / 1024, 1)
            for name, held in (("before", before), ("queued", queued), ("kept_alive", alive), ("after", after))
        },
        "kib_per_client": round((alive["rss_kib"] - before["rss_kib"]) / clients, 2),
        "seconds_to_queue_them": round(took, 1),
        "seconds_until_all_forgotten": round(gone, 1),
        "refusal_milliseconds_median": round(sorted(refused)[len(refused) // 2] * 1000, 1),
        "retry_after_told": wait,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "machine": f"{os.cpu_count()} cores, shared",
    }


async def _live(session: aiohttp.ClientSession, gateway: Process) -> int:
    async with session.get(gateway.admin + "/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith("elis_jobs_live "):
                return int(float(line.split()[1]))
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--prompt", type=int, default=400, help="characters of each prompt")
    parser.add_argument("--output", type=Path, help="append the result to this file of JSON lines")
    given = parser.parse_args()
    result = asyncio.run(run(given.clients, given.prompt))
    show(result, given.output)


if __name__ == "__main__":
    main()
