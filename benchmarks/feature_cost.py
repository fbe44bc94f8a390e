"""What keys, limits, fair sharing and tracing cost the whole gateway, in processor time per request.

    python -m benchmarks.feature_cost [--rounds 15] [--count 150] [--output benchmarks/results/feature-cost.jsonl]

One gateway process per setting, all at once behind one stub engine: nothing (twice, the noise floor), each feature
alone, all of them. In every round each gateway in turn, in an order drawn anew and then backwards, serves the same
requests, and its own count of processor nanoseconds (every thread's) is read before and after. (The order is drawn
because who always comes first also always follows itself, on warm caches.) Time on the clock does not enter, so a busy
machine only widens the range. The overhead beside a bare proxy is ``overhead``'s, the parts of the cost
``access_cost``'s (where metrics, which cannot be switched off, are told from nobody).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import uvloop

from benchmarks import overhead
from benchmarks.overhead import FEATURES, Client, free_port, request_bytes, wait_for
from benchmarks.rows import show

SETTINGS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "nothing again": (),
    "keys": ("keys",),
    "keys and limits": ("keys", "limits"),
    "keys, limits, fair": ("keys", "limits", "fair"),
    "tracing": ("tracing",),
    "all": ("keys", "limits", "fair", "tracing"),
}
CLIENTS = 8
REQUESTS = {"whole, 16 tokens": (16, False), "streamed, 128 tokens": (128, True)}


class Gateway:
    """A process, and what it has used."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port, self.process = port, process

    def used(self) -> float:
        """Seconds of processor time, of every thread."""
        tasks = Path("/proc") / str(self.process.pid) / "task"
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


@contextmanager
def running(port: int, ready: str, *words: str, **how: Any) -> Iterator[Gateway]:
    """``python WORDS``, which listens at ``port``, from when the path ``ready`` answers there. ``how``: Popen's."""
    process = subprocess.Popen([sys.executable, *words], **how)
    try:
        wait_for(port, ready)
        yield Gateway(port, process)
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def stub() -> Iterator[int]:
    """The engine that answers at once; as a collector of traces it takes everything."""
    port = free_port()
    with running(port, "/health", overhead.__file__, "--role", "stub", "--port", str(port)):
        yield port


@contextmanager
def gateway(folder: Path, engine: int, features: tuple[str, ...], tree: Path | None = None) -> Iterator[Gateway]:
    """``tree``: where the gateway's package is, if not where this script's is."""
    port = free_port()
    settings: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": port},
        "admin": {"port": free_port()},
        "upstreams": [{"url": f"http://127.0.0.1:{engine}", "slots": 256}],
    }
    for feature in features:
        settings |= FEATURES[feature]
    if "tracing" in features:
        settings["tracing"] = {"enabled": True, "endpoint": f"http://127.0.0.1:{engine}"}
    path = folder / f"{port}.json"
    path.write_text(json.dumps(settings))
    how: dict[str, Any] = {} if tree is None else {"cwd": tree, "env": {**os.environ, "PYTHONPATH": str(tree)}}
    words = ("-m", "elis_gateway", "serve", str(path))
    with (folder / "log").open("ab") as log, running(port, "/ready", *words, stdout=log, stderr=log, **how) as found:
        yield found


async def served(port: int, count: int, request: bytes) -> int:
    """Send ``count`` requests over a few connections; returns how many were answered."""
    left = count

    def wants(client: Client) -> bool:
        nonlocal left
        left -= 1
        return left >= CLIENTS

    loop = asyncio.get_running_loop()
    clients = [Client(request, wants) for _ in range(CLIENTS)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), 120)
    return sum(len(client.latencies) for client in clients)


def cost(gateway: Gateway, asking: Coroutine[Any, Any, int]) -> float:
    """Microseconds of its processor time a request. ``asking`` returns how many it answered."""
    before = gateway.used()
    answered = uvloop.run(asking)
    return (gateway.used() - before) / answered * 1e6


def compared(gateways: dict[str, Gateway], rounds: int, count: int, request: bytes) -> dict[str, Any]:
    """Each setting beside the first: the median over rounds of its difference within the round."""
    found: dict[str, list[float]] = {name: [] for name in gateways}
    for each in gateways.values():
        cost(each, served(each.port, count, request))
    rng = random.Random(rounds)
    for _ in range(rounds):
        order = rng.sample(list(gateways), len(gateways))
        there, back = (
            {name: cost(gateways[name], served(gateways[name].port, count, request)) for name in names}
            for names in (order, order[::-1])
        )
        for name, values in found.items():
            values.append((there[name] + back[name]) / 2)
    first = next(iter(found.values()))
    more = {name: [b - a for a, b in zip(first, values, strict=True)] for name, values in found.items()}
    return {
        name: {
            "microseconds": round(median(values), 1),
            "more": round(median(more[name]), 1),
            "quartiles_of_more": [round(_quantile(more[name], q), 1) for q in (0.25, 0.75)],
        }
        for name, values in found.items()
    }


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--count", default=150, show_default=True, help="Requests of one gateway in one turn.")
@click.option("--output", type=click.Path(path_type=Path), help="Append the result to this file of JSON lines.")
def main(rounds: int, count: int, output: Path | None) -> None:
    """Measure."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(stub())
        gateways = {name: stack.enter_context(gateway(folder, engine, features)) for name, features in SETTINGS.items()}
        result: dict[str, Any] = {"rounds": rounds, "count": count}
        for name, (tokens, stream) in REQUESTS.items():
            result[name] = compared(gateways, rounds, count, request_bytes(tokens, stream=stream))
    result["load_average"] = [round(value, 1) for value in os.getloadavg()]
    result["machine"] = f"{os.cpu_count()} cores, shared"
    show(result, output)


if __name__ == "__main__":
    main()
