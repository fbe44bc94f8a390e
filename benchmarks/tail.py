#!/usr/bin/env python3
"""The tail promise: mean and 99th percentile of completion time relative to plain first-come, in virtual time.

    python benchmarks/tail.py --settings isrtf isrtf:aging=boost,factor=0.35 isrtf:aging=boost,tail=1.25
    python benchmarks/tail.py --loads 0.95 --slots 4 16 --lengths lognormal --output tail.jsonl

A setting is ``policy[:key=value,...]``; keys are the scheduler's (tail, mode, window, rescore, seam_cost), overcommit,
the policy's (order) and aging's (aging, a, factor). ``fcfs`` and ``isrtf:order=mean``, the pure one that shares are of,
are always run.

What is modelled: gamma arrivals of shape 0.8 (``--wobble 0.2`` swings their rate by a fifth either way over
``--period`` seconds), answer lengths of the Azure conversation trace (``--csv``, or the shipped sample) or log-normal
with sigma 1.2 and the same mean, estimates off by e^±0.6 and fixed per job, a seam of 1.5 tokens, slots of 30
tokens/s. Load is offered work over capacity: (mean length + one seam) x arrivals / (slots x rate). 8,000 jobs a seed,
the first 1,500 dropped.

The unit is the seed: ratios are taken per seed against first-come on the same jobs, then averaged, with a 95 % t
interval over seeds. The share of the gain is (1 - mean ratio) over that of pure ISRTF, both averaged over seeds,
jackknifed. With ``--output`` each run is appended as a row of JSON as soon as it is done, and rows of the same code and
question are not run again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import hashlib
import json
import platform
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import product
from math import exp, log, pi, sin, sqrt
from multiprocessing import Pool
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from elis_gateway.core.policy import Aging, make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "loadtest" / "data" / "azure_conv_sample.csv"
RATE = 30.0
FIRST_COME, PURE = "fcfs", "isrtf:order=mean"
T95 = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


class Question(NamedTuple):
    """One cell of the study, apart from setting and seed."""

    load: float
    slots: int
    lengths: str
    wobble: float
    sigma: float
    seam: float
    jobs: int
    dropped: int
    period: float
    csv: str

    def __str__(self) -> str:
        wobble = f", rate ±{self.wobble:.0%} over {self.period:.0f} s" if self.wobble else ""
        return (
            f"load {self.load}, {self.slots} slots, {self.lengths} lengths, estimates off by e^±{self.sigma}, "
            f"seam {self.seam}{wobble}"
        )


# ---- one run --------------------------------------------------------------------------------------------------------


@lru_cache
def azure(path: str) -> list[int]:
    """Answer lengths of a trace: column GeneratedTokens or generated_tokens; .gz is fine."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(ROOT / path, "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or []
        column = next((name for name in ("GeneratedTokens", "generated_tokens") if name in names), None)
        if column is None:
            raise SystemExit(f"{path}: expected a column GeneratedTokens, found {', '.join(names)}")
        return [int(row[column]) for row in rows]


def workload(question: Question, seed: int) -> list[SimJob]:
    """Arrivals and lengths have generators of their own, so that changing one leaves the other as it was."""
    arrivals, lengths = random.Random(f"arrivals {seed}"), random.Random(f"lengths {seed}")
    pool = azure(question.csv)
    mean = fmean(pool)
    mu, sigma = log(mean) - 1.2**2 / 2, 1.2
    per_second = question.load * question.slots * RATE / (mean + question.seam)
    now, jobs = 0.0, []
    for number in range(question.jobs):
        rate = per_second * (1 + question.wobble * sin(2 * pi * now / question.period))
        now += arrivals.gammavariate(0.8, 1 / (0.8 * rate))
        tokens = lengths.choice(pool) if question.lengths == "azure" else round(exp(lengths.gauss(mu, sigma)))
        jobs.append(SimJob(f"{number}", now, 0, max(1, tokens)))
    return jobs


def scheduler(setting: str) -> tuple[Scheduler, int]:
    """``policy[:key=value,...]`` -> a fresh scheduler, and how many calls it may have beyond the slots."""
    kind, _, rest = setting.partition(":")
    options = dict(item.split("=", 1) for item in rest.split(",") if item)
    config: dict[str, Any] = {"seconds_per_token": 1 / RATE}
    for field in fields(SchedulerConfig):
        if field.name in options:
            text = options.pop(field.name)
            config[field.name] = text if field.name in ("mode", "rescore") else json.loads(text)
    policy: dict[str, Any] = {"order": options.pop("order")} if "order" in options else {}
    if "aging" in options:
        numbers = {name: float(options.pop(name)) for name in ("a", "factor") if name in options}
        policy["aging"] = Aging(options.pop("aging"), **numbers)  # type: ignore[arg-type]
    overcommit = int(options.pop("overcommit", "0"))
    if options:
        raise SystemExit(f"setting {setting!r}: unknown {', '.join(options)}")
    return Scheduler(SchedulerConfig(**config), make_policy(kind, **policy)), overcommit


def measure(setting: str, jobs: list[SimJob], question: Question, seed: int) -> dict[str, float]:
    """Mean, p99 and worst completion time (seconds) of the jobs after the warm-up, and what it took."""
    core, overcommit = scheduler(setting)
    model = EngineModel(question.slots, ((1, RATE),), seam_tokens=question.seam)
    known = NoisyOracle({job.id: job.output_tokens for job in jobs}, question.sigma, seed=seed)
    result = simulate(jobs, core, {"engine": Engine(model)}, known, overcommit=overcommit)
    kept = result.records[question.dropped :]
    jcts = sorted(record.jct for record in kept)
    row = {
        "mean": fmean(jcts),
        "p50": quantile(jcts, 0.5),
        "p99": quantile(jcts, 0.99),
        "worst": jcts[-1],
        "preemptions": sum(record.preemptions for record in kept) / len(kept),
    }
    # What the scheduler believes first-come would have given; it saw every job, so it is held against every job of the
    # real first-come run, the first ones too.
    shadow = next(iter(core.pools.values())).shadow
    row["shadow_mean"], row["shadow_p99"] = shadow.shadow_mean, shadow.p99.value
    every = sorted(record.jct for record in result.records)
    row["mean_all"], row["p99_all"] = fmean(every), quantile(every, 0.99)
    return row


def quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def task(work: tuple[Question, int, tuple[str, ...]]) -> tuple[Question, int, dict[str, dict[str, float]]]:
    question, seed, settings = work
    jobs = workload(question, seed)
    return question, seed, {setting: measure(setting, jobs, question, seed) for setting in settings}


# ---- many runs ------------------------------------------------------------------------------------------------------


def code() -> str:
    """A digest of everything that a result depends on, so that stale rows are never mixed in."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for folder in ("core", "sim", "predictor"):
        for file in sorted((ROOT / "elis_gateway" / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def about() -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "code": code(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }


Rows = dict[tuple[Question, str], dict[int, dict[str, float]]]


def known_rows(path: Path | None, digest: str) -> Rows:
    rows: Rows = {}
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["code"] == digest:
                key = Question(**row["question"]), row["setting"]
                rows.setdefault(key, {})[row["seed"]] = row["result"]
    return rows


def run(
    questions: Sequence[Question], settings: Sequence[str], seeds: Sequence[int], processes: int, output: Path | None
) -> Rows:
    stamp = about()
    rows = known_rows(output, stamp["code"])
    todo = []
    for question, seed in product(questions, seeds):
        missing = tuple(s for s in settings if seed not in rows.get((question, s), {}))
        if missing:
            todo.append((question, seed, missing))
    for number, (question, seed, results) in enumerate(spread(todo, processes), 1):
        for setting, result in results.items():
            rows.setdefault((question, setting), {})[seed] = result
            if output is not None:
                row = {**stamp, "question": question._asdict(), "setting": setting, "seed": seed, "result": result}
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        print(f"\r{number}/{len(todo)} workloads", end="", file=sys.stderr, flush=True)
    if todo:
        print("\r\033[K", end="", file=sys.stderr)
    return rows


def spread(
    todo: list[tuple[Question, int, tuple[str, ...]]], processes: int
) -> Iterator[tuple[Question, int, dict[str, dict[str, float]]]]:
    if processes == 1:
        yield from map(task, todo)
        return
    with Pool(processes) as pool:
        yield from pool.imap_unordered(task, todo)


# ---- what came out --------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> float:
    """Half width of the 95 % t interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return T95[min(len(values) - 1, len(T95) - 1)] * stdev(values) / sqrt(len(values))


def share(gains: Sequence[float], pure: Sequence[float]) -> tuple[float, float]:
    """Ratio of mean gains and the half width of its 95 % interval, by the jackknife over seeds."""
    whole = sum(gains) / sum(pure)
    if len(gains) < 3:
        return whole, float("nan")
    left_out = [(sum(gains) - gain) / (sum(pure) - yardstick) for gain, yardstick in zip(gains, pure, strict=True)]
    centre, count = fmean(left_out), len(gains)
    error = sqrt((count - 1) / count * sum((value - centre) ** 2 for value in left_out))
    return whole, T95[min(count - 1, len(T95) - 1)] * error


def report(questions: Sequence[Question], settings: Sequence[str], seeds: Sequence[int], rows: Rows) -> None:
    width = max(map(len, settings))
    for question in questions:
        first, pure = rows[question, FIRST_COME], rows[question, PURE]
        mean, p99 = fmean(first[seed]["mean"] for seed in seeds), fmean(first[seed]["p99"] for seed in seeds)
        print(f"\n{question}\n{len(seeds)} seeds x {question.jobs - question.dropped} jobs; first-come: ", end="")
        print(f"mean {mean:.1f} s, p99 {p99:.1f} s")
        print(f"{'relative to first-come':{width}}  mean          p99           worst   share of gain  preempt./job")
        for setting in settings:
            if setting == FIRST_COME:
                continue
            found = rows[question, setting]
            ratios = {
                name: [found[seed][name] / first[seed][name] for seed in seeds] for name in ("mean", "p99", "worst")
            }
            gains = [1 - ratio for ratio in ratios["mean"]]
            kept, error = share(gains, [1 - pure[seed]["mean"] / first[seed]["mean"] for seed in seeds])
            print(
                f"{setting:{width}}  {fmean(ratios['mean']):.3f} ±{interval(ratios['mean']):.3f}  "
                f"{fmean(ratios['p99']):.3f} ±{interval(ratios['p99']):.3f}  {fmean(ratios['worst']):5.2f}   "
                f"{kept:4.0%} ±{error:4.0%}     {fmean(found[seed]['preemptions'] for seed in seeds):.2f}"
            )
            shadow = {
                n: [found[seed][f"shadow_{n}"] / first[seed][f"{n}_all"] for seed in seeds] for n in ("mean", "p99")
            }
            print(
                f"{'    its shadow of first-come':{width}}  {fmean(shadow['mean']):.3f} "
                f"±{interval(shadow['mean']):.3f}  {fmean(shadow['p99']):.3f} ±{interval(shadow['p99']):.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["isrtf:aging=boost,factor=0.35"], metavar="SETTING")
    parser.add_argument("--loads", nargs="+", type=float, default=[0.7, 0.85, 0.95, 1.05])
    parser.add_argument("--slots", nargs="+", type=int, default=[4])
    parser.add_argument("--lengths", nargs="+", choices=("azure", "lognormal"), default=["azure"])
    parser.add_argument("--wobble", nargs="+", type=float, default=[0.0])
    parser.add_argument("--period", type=float, default=1500.0, help="seconds of one swing of the rate")
    parser.add_argument("--sigma", nargs="+", type=float, default=[0.6])
    parser.add_argument("--seam", nargs="+", type=float, default=[1.5])
    parser.add_argument("--jobs", type=int, default=8000)
    parser.add_argument("--dropped", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 10 on")
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--csv", default=str(SAMPLE.relative_to(ROOT)), help="trace whose answer lengths are drawn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="file of results, appended to")
    args = parser.parse_args()
    settings = tuple(dict.fromkeys((FIRST_COME, PURE, *args.settings)))
    for setting in settings:
        scheduler(setting)  # complain now, not in an hour
    questions = [
        Question(load, slots, lengths, wobble, sigma, seam, args.jobs, args.dropped, args.period, args.csv)
        for lengths, slots, wobble, sigma, seam, load in product(
            args.lengths, args.slots, args.wobble, args.sigma, args.seam, args.loads
        )
    ]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows = run(questions, settings, seeds, args.processes, args.output)
    report(questions, settings, seeds, rows)


if __name__ == "__main__":
    main()
