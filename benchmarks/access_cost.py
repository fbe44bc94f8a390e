"""What each thing at the door and each observer costs a request, in processor time.

    python -m benchmarks.access_cost [--keys 1000] [--output benchmarks/results/access-cost.jsonl]

*At the door*: the same request is parsed and made a job of, with nobody there; with keys; with rates, a limit at once
and a class limit as well; with fair sharing as well. *Looking on*: a job's whole life (100 tokens in 100 reads, two
windows, one call) is told to nobody; to the metrics; to the tracer, whose spans are made and then dropped (exporting is
its thread's and its collector's). Interleaved there and back; medians over rounds, with their range.
``benchmarks/overhead.py --with keys,limits,tracing`` measures the whole gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from benchmarks.rows import show
from elis_gateway import tracing
from elis_gateway.access import Door, hashed, new_key
from elis_gateway.config import ApiKey, Limits, Tracing
from elis_gateway.core.job import Job, JobSpec, Outcome
from elis_gateway.core.placement import Pool
from elis_gateway.flight import Flight, Leg, Observer, overriding
from elis_gateway.intake import Intake
from elis_gateway.metrics import Metrics
from elis_gateway.upstream.base import Capabilities
from elis_gateway.wire import openai
from elis_gateway.wire.continuation import Answer, Mode
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


def way(keys: int, *, limits: bool = False, fair: bool = False) -> Callable[[], None]:
    """One request, with so many keys configured (0: nobody at the door)."""
    now = time.monotonic
    made = [new_key() for _ in range(keys)]
    section = [
        ApiKey(name=f"k{n}", hash=hashed(key), models=("sim",), max_class="default") for n, key in enumerate(made)
    ]
    section_limits = Limits.model_validate(
        {
            "per_key": {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "concurrent": 1000},
            "classes": {"default": 1000},
        }
        if limits
        else {}
    )
    door = Door(section, section_limits, {"default": 0}, now, lambda model: 1.0, fair_round=2000 if fair else None)
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
            door.enter((flight,), grant)
            door.leave(flight)

    return request


def timed(request: Callable[[], None], count: int) -> float:
    """Microseconds of processor time each."""
    start = time.process_time()
    for _ in range(count):
        request()
    return (time.process_time() - start) / count * 1e6


def life(observers: Sequence[Observer]) -> Callable[[], None]:
    """One job's life, told to these: as the dispatcher tells it, to those that want to hear."""
    told = {
        name: overriding(observers, name)
        for name in ("submitted", "slice_began", "fed", "window_passed", "estimated", "slice_ended", "finished")
    }
    request = openai.parse(Route.CHAT, BODY)
    spec = JobSpec("job-1", "sim", limit=100)
    leg = Leg("engine", 1.0, 1.1, 2.0, 100, "finished", "", False)

    def one() -> None:
        flight = Flight(spec, request, Answer(request, Mode.IDS), class_name="default")
        flight.job = job = Job(spec, 1.0, Pool("sim", 0.02, 0.0))
        for tell in told["submitted"]:
            tell(flight)
        for tell in told["estimated"]:
            tell(flight, 1e-4)
        for tell in told["slice_began"]:
            tell(flight, "engine")
        for _ in range(100):
            for tell in told["fed"]:
                tell(flight, 0.01)
        for _ in range(2):
            for tell in told["window_passed"]:
                tell(flight)
        flight.legs.append(leg)
        for tell in told["slice_ended"]:
            tell(flight, leg)
        job.attained, job.slices, job.first_token, job.finished, job.outcome = 100, 1, 1.1, 2.0, Outcome.COMPLETED
        for tell in told["finished"]:
            tell(flight)

    return one


class _Nowhere(SpanExporter):
    """Takes spans and forgets them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def tracer() -> tracing.Tracer:
    """As it is in the gateway, except that nothing leaves the process."""
    kept, tracing._sink = tracing._sink, lambda section: BatchSpanProcessor(_Nowhere())
    try:
        return tracing.Tracer(Tracing(enabled=True), clock=time.monotonic, epoch=time.time() - time.monotonic())
    finally:
        tracing._sink = kept


def compared(ways: dict[str, Callable[[], None]], rounds: int, count: int) -> dict[str, Any]:
    """Microseconds of each way, and by how much it is above the first."""
    for request in ways.values():
        timed(request, count)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in (*ways, *reversed(ways)):
            found[name].append(timed(ways[name], count))
    middle = {name: median(values) for name, values in found.items()}
    first = next(iter(middle.values()))
    return {
        "microseconds": {name: round(value, 2) for name, value in middle.items()},
        "above_the_first": {name: round(value - first, 2) for name, value in middle.items()},
        "range": {name: [round(min(values), 2), round(max(values), 2)] for name, values in found.items()},
    }


async def run(keys: int, rounds: int, count: int) -> dict[str, Any]:
    traced = tracer()
    door = compared(
        {
            "open": way(0),
            "keys": way(keys),
            "keys and limits": way(keys, limits=True),
            "keys, limits, fair": way(keys, limits=True, fair=True),
        },
        rounds, count,
    )  # fmt: skip
    observers = compared({"nobody": life([]), "metrics": life([Metrics()]), "tracing": life([traced])}, rounds, count)
    traced.close()
    return {
        "keys": keys,
        "rounds": rounds,
        "door": door,
        "observers_of_100_tokens": observers,
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
