"""What a request costs in processor time, by several trees of the gateway in turns, beside a bare proxy.

    python -m benchmarks.request_cost now=. before=OTHER_TREE [--rounds 20] [--output FILE]
    python -m deploy.compiled --keep /tmp/c && python -m benchmarks.request_cost plain=. compiled=/tmp/c/site

One process each, all at once behind one stub engine, with the default predictor: in every round each serves the same
load for half a second, every other round backwards, and its own count of processor nanoseconds (every thread's) is
read before and after. Figures are medians of rounds, ratios of neighbouring turns with their quartiles. Time on the
clock does not enter, so a busy machine only widens the range. Requests a second are ``overhead``'s; on one core they
are at best what these figures say.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from benchmarks import overhead
from benchmarks.feature_cost import Gateway, cost, gateway, running, stub
from benchmarks.overhead import free_port, get, load, request_bytes
from benchmarks.rows import show

LOADS: dict[str, tuple[int, int, bool, str]] = {
    "whole, 16 tokens, 64 clients": (64, 16, False, ""),
    "whole, 16 tokens, 1 client": (1, 16, False, ""),
    "streams of 128 tokens, a write each, 32 clients": (32, 128, True, "0"),
    "streams of 128 tokens at once, 32 clients": (32, 128, True, "burst"),
}
"""Clients, tokens, streamed, and how the stub paces its writes."""
BARE = "bare proxy"


@contextmanager
def bare(engine: int) -> Iterator[Gateway]:
    """The pass-through proxy of ``overhead``."""
    port = free_port()
    words = (overhead.__file__, "--role", "bare", "--port", str(port), "--upstream", f"http://127.0.0.1:{engine}")
    with running(port, "/health", *words) as found:
        yield found


async def answered(port: int, clients: int, seconds: float, request: bytes) -> int:
    """How many requests ``clients`` got answered in that time."""
    return len((await load(port, clients, seconds, request)).latencies)


def compared(ways: dict[str, Gateway], rounds: int, seconds: float, clients: int, request: bytes) -> dict[str, Any]:
    """Each way's microseconds, over the bare proxy's and over the first tree's."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for each in ways.values():
        cost(each, answered(each.port, clients, seconds, request))
    for turn in range(rounds):
        for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            found[name].append(cost(ways[name], answered(ways[name].port, clients, seconds, request)))
    proxy, first = found[BARE], next(values for name, values in found.items() if name != BARE)
    return {
        name: {"microseconds": round(median(values)), **over(values, proxy, "bare"), **over(values, first, "first")}
        for name, values in found.items()
    }


def over(values: list[float], others: list[float], name: str) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return {f"over_{name}": round(middle, 3), f"over_{name}_quartiles": [round(low, 3), round(high, 3)]}


@click.command()
@click.argument("trees", nargs=-1, required=True, metavar="NAME=FOLDER...")
@click.option("--rounds", default=20, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="Of one turn.")
@click.option("--output", type=click.Path(path_type=Path), help="Append the result to this file of JSON lines.")
def main(trees: tuple[str, ...], rounds: int, seconds: float, output: Path | None) -> None:
    """Measure."""
    named = {name: Path(folder).resolve() for name, _, folder in (tree.partition("=") for tree in trees)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(stub())
        ways = {BARE: stack.enter_context(bare(engine))}
        ways |= {name: stack.enter_context(gateway(folder, engine, (), tree)) for name, tree in named.items()}
        busy = [round(value, 1) for value in os.getloadavg()]
        result: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "load_average": busy}
        for name, (clients, tokens, stream, pace) in LOADS.items():
            if pace:
                get(engine, f"/stub/step/{pace}")
            result[name] = compared(ways, rounds, seconds, clients, request_bytes(tokens, stream=stream))
    result["machine"] = f"{os.cpu_count()} cores, shared"
    show(result, output)


if __name__ == "__main__":
    main()
