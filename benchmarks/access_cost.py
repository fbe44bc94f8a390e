"""What keys, limits and fair sharing cost a request: processor time from its headers to a job ready to be queued.

    python -m benchmarks.access_cost [--keys 1000] [--output benchmarks/results/access-cost.jsonl]

The same request is parsed and made a job of, once with nobody at the door and once with keys, rates, a limit at once,
a class limit and fair sharing all on, interleaved (A B B A); medians over rounds, with their range.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from benchmarks.rows import show
from elis_gateway.access import Door, hashed, new_key
from elis_gateway.config import ApiKey, Limits
from elis_gateway.intake import Intake
from elis_gateway.upstream.base import Capabilities
from elis_gateway.wire import openai
from elis_gateway.wire.openai import Route

BODY = orjson.dumps(
    {"model": "sim", "messages": [{"role": "user", "content": "hello " * 100}], "max_tokens": 100, "stream": True}
)


class Directory:
    """One model, whose upstream can do everything."""

    def __init__(self) -> None:
        self.models = {"sim": 8192}

    def knows(self, model: str) -> bool:
        return model == "sim"

    def capabilities(self, model: str) -> Capabilities:
        return Capabilities(models=frozenset({"sim"}), ids=True)


def way(keys: int) -> Callable[[], None]:
    """One request, with so many keys configured (0: nobody at the door)."""
    now = time.monotonic
    made = [new_key() for _ in range(keys)]
    section = [
        ApiKey(name=f"k{n}", hash=hashed(key), models=("sim",), max_class="default") for n, key in enumerate(made)
    ]
    limits = Limits.model_validate(
        {
            "per_key": {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "concurrent": 1000},
            "classes": {"default": 1000},
        }
        if keys
        else {}
    )
    door = Door(section, limits, {"default": 0}, now, lambda model: 1.0, fair_round=2000 if keys else None)
    intake = Intake(
        Directory(),
        now,
        aliases={},
        classes={"default": 0},
        default_class="default",
        describe=lambda flight: "",
        door=door,
    )
    headers = {"Authorization": f"Bearer {made[-1] if made else 'x'}", "Content-Type": "application/json"}

    def request() -> None:
        grant = door.who(headers)
        flight = intake.take(openai.parse(Route.CHAT, BODY), len(BODY), headers, grant).first
        if keys:
            door.enter(flight, grant)
            door.leave(flight)

    return request


def timed(request: Callable[[], None], count: int) -> float:
    """Microseconds of processor time each."""
    start = time.process_time()
    for _ in range(count):
        request()
    return (time.process_time() - start) / count * 1e6


async def run(keys: int, rounds: int, count: int) -> dict[str, Any]:
    ways = {"open": way(0), "keys": way(keys)}
    for request in ways.values():
        timed(request, count)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in ("open", "keys", "keys", "open"):
            found[name].append(timed(ways[name], count))
    middle = {name: median(values) for name, values in found.items()}
    return {
        "keys": keys,
        "rounds": rounds,
        "microseconds": {name: round(value, 2) for name, value in middle.items()},
        "range": {name: [round(min(values), 2), round(max(values), 2)] for name, values in found.items()},
        "difference_microseconds": round(middle["keys"] - middle["open"], 2),
        "ratio": round(middle["keys"] / middle["open"], 3),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "machine": f"{os.cpu_count()} cores, shared",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="append the result to this file of JSON lines")
    given = parser.parse_args()
    result = asyncio.run(run(given.keys, given.rounds, given.count))
    show(result, given.output)


if __name__ == "__main__":
    main()
