"""Does one call in hand pay? In virtual time: mean completion time and capacity by ``overcommit``.

    python -m benchmarks.refill run [--seeds 6] [--lost 1.3]       appends to benchmarks/results/refill.jsonl
    python -m benchmarks.refill report

A slot that ends is refilled over a round trip, and a real engine admits what comes only at its next step: 1.3 decoded
tokens of one slot were lost per request on vLLM (docs/measurements.md). Here a round trip takes as long (``--lost``; at
0 nothing is lost, and what remains is the price of choosing early). With one call
more in the engine's own queue the slot is refilled at once, by that call: chosen a little earlier, and, where the
engine does not order its queue, started before a better one that came after it.

*Mean*: load 0.95, ISRTF elastic with Boost aging, gamma arrivals of shape 0.8, 2,000 jobs a seed of which the first
sixth is dropped; lengths are gamma of squared variation 0.6 cut at 1,000 ("chat"), or log-normal with sigma 1.1
("heavy").
*Capacity*: all jobs are there from the beginning; the time until the shortest 70 % are done, as a ratio of speeds.
The same seeds for every setting; ratios to ``overcommit`` 0 of the same seed.
"""

from __future__ import annotations

import json
import random
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from benchmarks.rows import save
from elis_gateway.core.policy import Aging, make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate

RESULTS = Path(__file__).parent / "results" / "refill.jsonl"
RATE = 30.0
"""Tokens per second of a slot."""
SEAM = 1.5
HANDS = {"none": (0, False), "one": (1, False), "one, ordered": (1, True)}
"""Calls beyond the slots, and whether the engine orders them."""


def workload(kind: str, seed: int, jobs: int, capacity: float, *, load: float | None) -> list[SimJob]:
    """``load`` None: all at the beginning."""
    rng = random.Random(seed)
    if kind == "chat":
        lengths = [max(1, min(1000, round(rng.gammavariate(1.7, 200 / 1.7)))) for _ in range(jobs)]
    else:
        lengths = [max(1, min(2000, round(rng.lognormvariate(4.6, 1.1)))) for _ in range(jobs)]
    gap = 0.0 if load is None else (mean(lengths) + SEAM) / (load * capacity)
    now, made = 0.0, []
    for number, tokens in enumerate(lengths):
        now += rng.gammavariate(0.8, gap / 0.8) if gap else 0.0
        made.append(SimJob(str(number), now, 100, tokens))
    return made


def serve(jobs: list[SimJob], slots: int, sigma: float, seed: int, hand: str, lost: float) -> list[float]:
    """Completion times, in the order of arrival."""
    overcommit, orders = HANDS[hand]
    model = EngineModel(slots, ((1, RATE),), seam_tokens=SEAM, orders=orders)
    scheduler = Scheduler(SchedulerConfig(seconds_per_token=1 / RATE), make_policy("isrtf", aging=Aging("boost")))
    oracle = NoisyOracle({job.id: job.output_tokens for job in jobs}, sigma, seed=seed)
    delay = lost / RATE / 2
    done = simulate(jobs, scheduler, {"engine": Engine(model)}, oracle, delay=delay, overcommit=overcommit)
    return [record.jct for record in done.records]


def one(kind: str, slots: int, sigma: float, seed: int, jobs: int, lost: float) -> dict[str, Any]:
    capacity = slots * RATE
    row: dict[str, Any] = {"kind": kind, "slots": slots, "sigma": sigma, "seed": seed, "jobs": jobs}
    row["lost"] = lost
    steady = workload(kind, seed, jobs, capacity, load=0.95)
    backlog = workload(kind, seed, jobs // 2, capacity, load=None)
    for hand in HANDS:
        jct = sorted(serve(steady, slots, sigma, seed, hand, lost)[jobs // 6 :])
        ends = sorted(serve(backlog, slots, 0.0, seed, hand, lost))
        row[hand] = {
            "mean": mean(jct),
            "p50": jct[len(jct) // 2],
            "p99": jct[int(0.99 * len(jct))],
            "speed": 1.0 / ends[int(0.7 * len(ends))],
        }
    return row


@click.group()
def cli() -> None:
    """One call in hand."""


@cli.command()
@click.option("--seeds", default=6, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--jobs", default=3000, show_default=True)
@click.option("--lost", default=1.3, show_default=True, help="Decoded tokens that a refill loses.")
def run(seeds: int, first_seed: int, jobs: int, lost: float) -> None:
    """Measure, and append one line per case and seed."""
    for seed in range(first_seed, first_seed + seeds):
        for kind, slots, sigma in product(("chat", "heavy"), (4, 16), (0.0, 0.6)):
            row = one(kind, slots, sigma, seed, jobs, lost)
            save(RESULTS, row)
    report.callback()  # type: ignore[misc]


@cli.command()
def report() -> None:
    """Ratios to no call in hand, with the 95 % interval over seeds."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    print(f"{'':46}{'mean':>16}{'p50':>16}{'p99':>16}{'capacity':>18}{'seeds':>7}")
    for case in sorted({(row["kind"], row["slots"], row["sigma"], row["lost"]) for row in rows}):
        mine = [row for row in rows if (row["kind"], row["slots"], row["sigma"], row["lost"]) == case]
        for hand in list(HANDS)[1:]:
            name = f"{case[0]}, {case[1]} slots, e^±{case[2]:g}, lost {case[3]:g}, {hand}"
            cells = [interval(mine, hand, what) for what in ("mean", "p50", "p99", "speed")]
            print(f"{name:46}" + "".join(f"{cell:>16}" for cell in cells) + f"{len(mine):>9}")


def interval(rows: list[dict[str, Any]], hand: str, what: str) -> str:
    values = [row[hand][what] / row["none"][what] for row in rows if what in row["none"]]
    if len(values) < 2:
        return "-"
    t = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(len(values), 2.2)
    return f"{mean(values):.3f} ± {t * stdev(values) / sqrt(len(values)):.3f}"


if __name__ == "__main__":
    cli()
