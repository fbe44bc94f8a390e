#!/usr/bin/env python3
"""How many requests a second the load generator sends on time, against a stub that answers at once.

    python -m benchmarks.generator_speed --rates 1000 2000 5000 --seconds 4 --repeats 3 --json FILE

Stub and generator are a process each, on one machine, both on uvloop; the generator is the one of `loadtest run` with
everything a live run keeps. Lag is send time minus intended time. With other work on the machine a run measures that
work: the load average stands beside the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import uvloop

from loadtest import runner
from loadtest.client import Client
from loadtest.stats import percentile
from loadtest.targets import HttpTarget
from loadtest.workload import Request, Workload


def _event(text: str) -> bytes:
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


_ANSWER = b"".join(
    (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
        _event('{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'),
        *(_event('{"choices":[{"index":0,"delta":{"content":" word"}}]}') for _ in range(4)),
        _event('{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":4}}'),
        _event("[DONE]"),
        b"0\r\n\r\n",
    )
)


class Stub(asyncio.Protocol):
    """Every request is answered with the same stream, in one write."""

    def __init__(self) -> None:
        self.buffer = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            found = re.search(rb"\r\nContent-Length: *(\d+)", self.buffer[:end])
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(self.buffer) < whole:
                return
            self.buffer = self.buffer[whole:]
            self.transport.write(_ANSWER)


async def stub(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


async def measure(url: str, rate: float, seconds: float) -> dict[str, float]:
    count = round(rate * seconds)
    work = Workload(tuple(Request(f"r{n}", n / rate, "hello there", 5, "", 4) for n in range(count)))
    async with Client(url) as client:
        await client.warm(64)
        target = HttpTarget(client, "m", debug=True, gaps=True)
        target.prepare(work.requests)
        start = target.start = time.perf_counter() + runner.LEAD
        used = time.process_time()
        run = await runner.run(work, target, start=start)
        used = time.process_time() - used
    lags = [row.lag for row in run.rows]
    sent = max(row.sent for row in run.rows)
    return {
        "rate": rate,
        "sent_per_second": count / sent,
        "failed": float(sum(bool(row.error) for row in run.rows)),
        "lag_p50_ms": (percentile(lags, 50) or 0.0) * 1e3,
        "lag_p99_ms": (percentile(lags, 99) or 0.0) * 1e3,
        "lag_max_ms": max(lags) * 1e3,
        "cpu_us_per_request": used / count * 1e6,
    }


def wait(port: int) -> None:
    """Until the stub listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the stub does not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1000, 2000, 5000])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stub", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stub:
        uvloop.run(stub(given.stub))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.generator_speed", "--stub", str(port)])
    found = []
    try:
        wait(port)
        for number in range(given.repeats):
            for rate in given.rates:
                row = uvloop.run(measure(f"http://127.0.0.1:{port}", rate, given.seconds))
                row |= {"repeat": number, "load_average": os.getloadavg()[0]}
                found.append(row)
                print("  ".join(f"{name} {value:,.1f}" for name, value in row.items()), flush=True)
    finally:
        child.terminate()
        child.wait(10)
    if given.json is not None:
        given.json.write_text(json.dumps({"cores": os.cpu_count(), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
