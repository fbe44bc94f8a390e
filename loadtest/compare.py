"""What one setting does that another does not, on the same work. Pure.

The unit is the workload seed: each figure is compared seed by seed, and the interval is over seeds, because requests of
one run share busy periods. Requests are paired too, but only to say who won and who lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from elis_gateway.errors import ConfigError
from loadtest.figures import flat
from loadtest.records import Row, Run
from loadtest.stats import Comparison, compare, deciles

__all__ = ["AGAIN", "METRICS", "Arm", "Difference", "contrast", "unequal_work"]

AGAIN = "again"
"""Arm of the second run of an A/A pair."""

METRICS: dict[str, str] = {
    "jct.mean": "JCT, mean",
    "jct.p50": "JCT, p50",
    "jct.p90": "JCT, p90",
    "jct.p99": "JCT, p99",
    "jct.max": "JCT, worst",
    "wait.mean": "queue wait, mean",
    "ttft.mean": "TTFT, mean",
    "ttft.p90": "TTFT, p90",
    "tpot.mean": "TPOT, mean",
    "slowdown.mean": "slowdown, mean",
    "slowdown.longest_decile": "slowdown of the longest tenth",
    "throughput.tokens_per_second": "tokens/s over the whole run",
    "goodput.share": "goodput, share of offered",
}
"""What is compared, by the path of ``figures``, with its name in tables."""

MORE_IS_BETTER = {"throughput.tokens_per_second", "goodput.share", "goodput.per_second"}
WORST = 5
"""Regressions named."""


@dataclass
class Arm:
    """One setting: its runs and their figures, by seed."""

    name: str
    runs: dict[int, Run] = field(default_factory=dict)
    figures: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def whole(self) -> set[int]:
        """Seeds whose run was followed to its end. Of one that was stopped the long answers are missing, which flatters
        whoever serves the short ones first."""
        return {seed for seed, run in self.runs.items() if run.complete}


@dataclass(frozen=True)
class Difference:
    """One arm against another."""

    arm: str
    base: str
    seeds: tuple[int, ...]
    metrics: dict[str, Comparison]
    """By path; a metric that one seed lacks (too few samples) is left out."""
    wins: float
    """Share of the paired requests that ended sooner, over all seeds; ties count half."""
    by_decile: list[Comparison]
    """Mean JCT by tenth of the length, shortest first; empty where a seed has fewer than ten requests."""
    worst: list[dict[str, Any]]
    """Requests that got slowest, by factor."""
    unequal: int
    """Requests whose answers differ in length, or that only one of the two completed: not the same work."""

    def as_json(self) -> dict[str, Any]:
        return {
            "setting": self.arm,
            "base": self.base,
            "seeds": list(self.seeds),
            "metrics": {name: _json(found) for name, found in self.metrics.items()},
            "wins": self.wins,
            "by_decile": [_json(found) for found in self.by_decile],
            "worst": self.worst,
            "unequal_work": self.unequal,
        }


def _json(found: Comparison) -> dict[str, Any]:
    half = found.half_width
    return {
        "ratio": found.ratio,
        "half_width": half if half < float("inf") else None,
        "low": found.low,
        "high": found.high,
        "seeds_below_1": found.better,
        "seeds": found.seeds,
        "differs": found.differs,
    }


def contrast(arm: Arm, base: Arm) -> Difference:
    """Compare on the seeds that both ran to their end. Raises ConfigError where there is none, or their workloads
    differ."""
    seeds = tuple(sorted(arm.whole & base.whole))
    if not seeds:
        raise ConfigError(f"{arm.name} and {base.name} have no seed in common that both ran to its end")
    for seed in seeds:
        ours, theirs = arm.runs[seed].workload, base.runs[seed].workload
        if ours != theirs:
            raise ConfigError(f"seed {seed}: {arm.name} ran workload {ours}, {base.name} {theirs}: not the same work")
    pairs = {seed: _paired(arm.runs[seed], base.runs[seed]) for seed in seeds}
    return Difference(
        arm.name,
        base.name,
        seeds,
        _metrics(arm, base, seeds),
        _wins([pair for found in pairs.values() for pair in found]),
        _by_decile(list(pairs.values())),
        _worst(pairs),
        sum(_unequal([arm.runs[seed], base.runs[seed]]) for seed in seeds),
    )


def _metrics(arm: Arm, base: Arm, seeds: Sequence[int]) -> dict[str, Comparison]:
    ours, theirs = ([flat(side.figures[seed]) for seed in seeds] for side in (arm, base))
    found = {}
    for name in METRICS:
        if all(name in figures and figures[name] > 0 for figures in (*ours, *theirs)):
            found[name] = compare([figures[name] for figures in ours], [figures[name] for figures in theirs])
    return found


Pair = tuple[Row, Row]


def _paired(ours: Run, theirs: Run) -> list[Pair]:
    """Rows of the same request, both completed."""
    by_id = {row.id: row for row in theirs.rows if not row.error}
    return [(row, by_id[row.id]) for row in ours.rows if not row.error and row.id in by_id]


_SAME = 1e-5
"""Seconds: well above the microseconds that times are stored in, so that a comparison of stored runs says the same."""


def _wins(pairs: Sequence[Pair]) -> float:
    if not pairs:
        return 0.5
    return fmean(0.5 if abs(ours.jct - theirs.jct) < _SAME else float(ours.jct < theirs.jct) for ours, theirs in pairs)


def _by_decile(seeds: Sequence[Sequence[Pair]]) -> list[Comparison]:
    if any(len(pairs) < 10 for pairs in seeds):
        return []
    means: list[list[tuple[float, float]]] = []
    for pairs in seeds:
        tenth = deciles([theirs.tokens for _, theirs in pairs])
        groups: list[list[Pair]] = [[] for _ in range(10)]
        for number, pair in zip(tenth, pairs, strict=True):
            groups[number].append(pair)
        means.append([(fmean(a.jct for a, _ in group), fmean(b.jct for _, b in group)) for group in groups])
    return [compare([seed[n][0] for seed in means], [seed[n][1] for seed in means]) for n in range(10)]


def _worst(pairs: Mapping[int, Sequence[Pair]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "seed": seed,
            "id": ours.id,
            "tokens": ours.tokens,
            "jct": ours.jct,
            "base_jct": theirs.jct,
            "factor": ours.jct / theirs.jct,
        }
        for seed, found in pairs.items()
        for ours, theirs in found
        if theirs.jct > 0
    ]
    return sorted(rows, key=lambda row: -row["factor"])[:WORST]


def unequal_work(arms: Sequence[Arm]) -> int:
    """Requests that got answers of different length under two of the settings, or none under one of them."""
    seeds = set().union(*(arm.whole for arm in arms))
    return sum(_unequal([arm.runs[seed] for arm in arms if seed in arm.whole]) for seed in seeds)


def _unequal(runs: Sequence[Run]) -> int:
    lengths: dict[str, set[int | None]] = {}
    for run in runs:
        for row in run.rows:
            lengths.setdefault(row.id, set()).add(None if row.error else row.tokens)
    return sum(len(found) > 1 for found in lengths.values())
