"""Exact percentiles, summaries of a run, and what several seeds agree on. Pure.

Two rules. A percentile with fewer than ten samples beyond it is not given out. The unit of comparison is the workload
seed, not the request: requests of one run share busy periods and are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from loadtest.records import Run

__all__ = ["BEYOND", "Comparison", "Summary", "compare", "mean_of", "percentile", "summarise", "t95"]

BEYOND = 10
"""Samples that must lie beyond a percentile for it to mean anything."""

_T95 = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def percentile(values: Sequence[float], q: float, *, beyond: int = BEYOND) -> float | None:
    """The ``q``-th percentile (0..100), linear between neighbours; None: fewer than ``beyond`` samples exceed it."""
    if not values or len(values) * (1 - q / 100) < beyond - 1e-9:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Seconds; ``None``: too few samples."""

    requests: int
    completed: int
    mean: float
    p50: float | None
    p90: float | None
    p99: float | None
    ttft_mean: float
    ttft_p50: float | None
    ttft_p90: float | None
    throughput: float
    """Answer tokens per second from the first arrival to the last end; the end of a finite run drains half-empty."""
    tokens: int
    preemptions: int
    """Calls closed early for somebody else; the seams of fixed windows are no preemptions, see ``calls``."""
    calls: int
    """Upstream calls made."""


def summarise(run: Run) -> Summary:
    """Over every request that completed; all of them are followed to their end, none is cut off."""
    done = [row for row in run.rows if not row.error]
    jct = [row.jct for row in done]
    ttft = [row.ttft for row in done if row.ttft is not None]
    tokens = sum(row.tokens for row in done)
    span = max((row.end or 0.0 for row in done), default=0.0) - min((row.intended for row in run.rows), default=0.0)
    return Summary(
        requests=len(run.rows),
        completed=len(done),
        mean=fmean(jct) if jct else math.nan,
        p50=percentile(jct, 50),
        p90=percentile(jct, 90),
        p99=percentile(jct, 99),
        ttft_mean=fmean(ttft) if ttft else math.nan,
        ttft_p50=percentile(ttft, 50),
        ttft_p90=percentile(ttft, 90),
        throughput=tokens / span if span > 0 else math.nan,
        tokens=tokens,
        preemptions=sum(row.preemptions for row in run.rows),
        calls=sum(row.slices for row in run.rows),
    )


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean over seeds, or None where one of them has no value."""
    present = [value for value in values if value is not None]
    return fmean(present) if present and len(present) == len(values) else None


def t95(n: int) -> float:
    """Student's t for a two-sided interval of 95 % over ``n`` independent units; beyond the table its end."""
    return math.inf if n < 2 else _T95[n - 1] if n <= len(_T95) else _T95[-1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure under one setting over the same figure under another, paired by seed."""

    ratio: float
    """Mean of the per-seed ratios."""
    half_width: float
    """Half of the 95 % interval of that mean."""
    low: float
    high: float
    """Smallest and largest ratio of a single seed."""
    better: int
    """Seeds with a ratio under 1."""
    seeds: int

    def __str__(self) -> str:
        spread = f"seeds {self.low:.2f} to {self.high:.2f}, {self.better} of {self.seeds} better"
        return f"{self.ratio:.2f} ± {self.half_width:.2f} ({spread})"


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Pairwise by seed; both in the same order."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    half = t95(len(ratios)) * stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    return Comparison(fmean(ratios), half, min(ratios), max(ratios), sum(ratio < 1 for ratio in ratios), len(ratios))
