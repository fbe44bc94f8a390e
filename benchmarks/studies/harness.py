"""One simulated run as a row of JSON, and running many of them: resumable, within a budget of CPU seconds.

A *cell* is everything but the seed. Works: ``azure`` (answer lengths of Azure's conversation trace, shipped sample),
``code`` (of its code trace, where ``--code-trace`` names the file), ``chat`` (log-normal, median 120, sigma 1.1, as
recorded chats with many models have it), ``heavy`` (Pareto, alpha 1.5 from 40 tokens, at most 8,000), ``six`` (six
applications, log-normal with medians 8 to 800), ``equal`` (200 tokens each). Arrivals are gamma of shape 0.8, or
bursts: a quarter of the time 2.5 times the rate, half the rate in between, over forty mean services. Slots make 30
tokens/s whatever the batch. Load is offered work over capacity: (mean length + one seam) x arrivals / (slots x rate),
of the lengths drawn.

The unit is the seed: figures are ratios to first come first served on the same jobs, averaged over seeds, with a 95 % t
interval.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.capacity_virtual import APPS
from benchmarks.rows import save
from benchmarks.studies.knowledge import predictor
from benchmarks.tail import RATE, ROOT, SAMPLE, about, azure, code, scheduler
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import Record, SimJob, simulate
from loadtest.stats import interval, percentile

__all__ = ["RESULTS", "Cell", "Ratio", "measure", "ratios", "run"]

RESULTS = ROOT / "benchmarks" / "results"
JOBS, DROPPED = 1500, 250
"""A run; the first ones, while the queue fills and things are learned, do not count. p99 is over 1,250."""
FIRST_COME = "fcfs"
CODE_TRACE: Path | None = None


@dataclass(frozen=True)
class Cell:
    """One question."""

    work: str = "azure"
    load: float = 0.95
    slots: int = 4
    workers: int = 1
    setting: str = "isrtf:order=mean"
    """As ``benchmarks.tail`` writes settings."""
    knows: str = "noisy0.6"
    seam: float = 1.5
    arrivals: str = "gamma"
    delay: float = 0.0
    """Seconds from gateway to engine, each way."""
    overcommit: int = 0
    latency: float = 0.0
    """Seconds that an estimate takes."""
    pace: float = 1.0
    """Model speed: times 30 tokens/s."""
    rate: float | None = None
    """Requests per second, instead of ``load``."""

    @property
    def base(self) -> Cell:
        """The same traffic, first come, first served."""
        return Cell(
            work=self.work, load=self.load, slots=self.slots, workers=self.workers, setting=FIRST_COME, knows="none",
            seam=self.seam, arrivals=self.arrivals, delay=self.delay, pace=self.pace, rate=self.rate,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


# ---- one run --------------------------------------------------------------------------------------------------------


@lru_cache
def _code_lengths(path: Path) -> list[int]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [max(int(row["GeneratedTokens"]), 1) for row in csv.DictReader(file)]


def lengths(work: str, n: int, rng: random.Random) -> list[tuple[str, int]]:
    """(application, tokens) of ``n`` requests."""
    if work == "six":
        names = list(APPS)
        drawn = [(name, *APPS[name]) for name in (rng.choice(names) for _ in range(n))]
        return [(name, min(max(round(exp(rng.gauss(log(middle), sigma))), 1), 2000)) for name, middle, sigma in drawn]
    if work == "azure":
        pool = azure(str(SAMPLE))
        return [("one", rng.choice(pool)) for _ in range(n)]
    if work == "code":
        if CODE_TRACE is None:
            raise SystemExit(
                "the work `code` needs --code-trace: AzureLLMInferenceTrace_code.csv, which is not shipped"
            )
        pool = _code_lengths(CODE_TRACE)
        return [("one", rng.choice(pool)) for _ in range(n)]
    one: dict[str, Callable[[], float]] = {
        "chat": lambda: exp(rng.gauss(log(120), 1.1)),
        "heavy": lambda: 40 * rng.paretovariate(1.5),
        "equal": lambda: 200,
    }
    top = 8000 if work == "heavy" else 2000
    return [("one", min(max(round(one[work]()), 1), top)) for _ in range(n)]


@lru_cache(maxsize=4)
def _jobs(
    work: str, load: float, slots: int, seam: float, arrivals: str, pace: float, rate: float | None, seed: int
) -> list[SimJob]:
    drawn = lengths(work, JOBS, random.Random(f"lengths {seed}"))
    mean = fmean(tokens for _, tokens in drawn)
    per_second = rate if rate is not None else load * slots * RATE * pace / (mean + seam)
    rng = random.Random(f"arrivals {seed}")
    now, jobs = 0.0, []
    for number, (app, tokens) in enumerate(drawn):
        factor = 1.0
        if arrivals == "burst":
            period = 40 * mean / RATE / pace
            factor = 2.5 if now % period < period / 4 else 0.5
        now += rng.gammavariate(0.8, 1 / (0.8 * per_second * factor))
        jobs.append(SimJob(f"{number}", now, 0, tokens, app=app))
    return jobs


_runs: OrderedDict[tuple[str, int], tuple[list[Record], dict[str, float]]] = OrderedDict()
"""The last first-come runs, which others are held against."""


def _simulated(cell: Cell, seed: int) -> tuple[list[Record], dict[str, float]]:
    if cell.setting == FIRST_COME and (cell.name, seed) in _runs:
        return _runs[cell.name, seed]
    slots = cell.slots * cell.workers
    jobs = _jobs(cell.work, cell.load, slots, cell.seam, cell.arrivals, cell.pace, cell.rate, seed)
    model = EngineModel(cell.slots, ((1, RATE * cell.pace),), seam_tokens=cell.seam, orders=cell.overcommit > 0)
    past = lengths(cell.work, JOBS, random.Random(f"past {seed}")) if cell.knows.endswith("calibrated") else []
    known = predictor(cell.knows, jobs, seed, [tokens for _, tokens in past])
    core, in_hand = scheduler(cell.setting)
    result = simulate(
        jobs, core, {f"e{n}": Engine(model) for n in range(cell.workers)}, known,
        delay=cell.delay, overcommit=cell.overcommit or in_hand, latency=cell.latency,
    )  # fmt: skip
    more = {name: float(value) for name, value in getattr(known, "told", dict)().items()}
    more["end"] = result.end
    more["tokens"] = float(sum(totals.tokens for totals in result.totals.values()))
    if cell.setting == FIRST_COME:
        _runs[cell.name, seed] = result.records, more
        if len(_runs) > 4:
            _runs.popitem(last=False)
    return result.records, more


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """Everything of one run, and how it differs from first come, job by job."""
    records, more = _simulated(cell, seed)
    kept = records[DROPPED:]
    jct = sorted(record.jct for record in kept)
    pace = RATE * cell.pace
    slow = [record.jct / ((record.output_tokens + cell.seam) / pace) for record in kept]
    row = {
        "mean": fmean(jct),
        "p50": median(jct),
        "p99": percentile(jct, 99) or 0.0,
        "worst": jct[-1],
        "wait": fmean(record.wait for record in kept),
        "slow_mean": fmean(slow),
        "slow_above_10": sum(value > 10 for value in slow) / len(slow),
        "slow_worst": max(slow),
        "preemptions": sum(record.preemptions for record in kept) / len(kept),
        **more,
    }
    if cell.setting != FIRST_COME:
        base = _simulated(cell.base, seed)[0][DROPPED:]
        starved = [ours.jct - theirs.jct for ours, theirs in zip(kept, base, strict=True) if ours.jct > 3 * theirs.jct]
        row["starved"] = len(starved) / len(kept)
        row["starved_seconds"] = fmean(starved) if starved else 0.0
        row["starved_worst"] = max(starved, default=0.0)
    return {name: round(value, 6) for name, value in row.items()}


# ---- many runs ------------------------------------------------------------------------------------------------------

Rows = dict[tuple[str, int], dict[str, float]]


def digest() -> str:
    """Of everything that a row depends on."""
    found = hashlib.sha256(code().encode())
    for name in ("harness.py", "knowledge.py"):
        found.update(Path(__file__).with_name(name).read_bytes())
    return found.hexdigest()[:12]


def _known(path: Path, code: str) -> Rows:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    # Rows of other code stay in the file, and do not count.
    return {(line["cell"], line["seed"]): line["result"] for line in lines if line["code"] == code}


def run(study: str, cells: Sequence[Cell], seeds: Sequence[int], budget: float, *, only: str | None = None) -> Rows:
    """Run what is not there yet, for at most ``budget`` CPU seconds; each run is stored as soon as it is done.

    ``only``: use stored rows of this digest and run nothing.
    """
    path = RESULTS / f"study-{study}.jsonl"
    stamp = {**about(), "code": digest()}
    rows = _known(path, only or stamp["code"])
    if only is not None:
        return rows
    whole = list(dict.fromkeys([*(cell.base for cell in cells), *cells]))
    # Cells of the same traffic together, so that its first-come run is made once.
    order = sorted(whole, key=lambda cell: (cell.base.name, cell.setting != FIRST_COME, cell.name))
    todo = [(cell, seed) for base in dict.fromkeys(c.base.name for c in order) for seed in seeds
            for cell in order if cell.base.name == base and (cell.name, seed) not in rows]  # fmt: skip
    begun = time.process_time()
    for number, (cell, seed) in enumerate(todo):
        if time.process_time() - begun > budget:
            print(
                f"study {study}: the budget of {budget:.0f} s is spent, {len(todo) - number} of {len(todo)} runs left"
            )
            break
        result = rows[cell.name, seed] = measure(cell, seed)
        save(path, {**stamp, "cell": cell.name, "seed": seed, "result": result})
        if sys.stderr.isatty():
            print(f"\rstudy {study}: {number + 1}/{len(todo)}", end="", file=sys.stderr, flush=True)
    return rows


# ---- what came out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}" if self.seeds > 1 else f"{self.mean:.2f}"


def ratios(
    rows: Mapping[tuple[str, int], Mapping[str, float]], cell: Cell, figure: str = "mean", base: Cell | None = None
) -> Ratio | None:
    """A figure over first come's (or ``base``'s), by seed; None: not run yet."""
    other = (base or cell.base).name
    seeds = [seed for name, seed in rows if name == cell.name and (other, seed) in rows]
    if not seeds:
        return None
    found = [rows[cell.name, seed][figure] / rows[other, seed][figure] for seed in seeds]
    mean, half = interval(found)
    return Ratio(mean, half, len(found))


def plain(rows: Mapping[tuple[str, int], Mapping[str, float]], cell: Cell, figure: str) -> Ratio | None:
    """A figure as it is, over seeds."""
    found = [row[figure] for (name, _), row in rows.items() if name == cell.name]
    if not found:
        return None
    mean, half = interval(found)
    return Ratio(mean, half, len(found))


def table(heads: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    lines += ["| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in body]
    return "\n".join(lines)
