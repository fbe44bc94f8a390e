"""Exact percentiles, summaries of a run, and what several seeds agree on. Pure.

Two rules. A percentile with fewer than ten samples beyond it is not given out. The unit of comparison is the workload
seed, not the request: requests of one run share busy periods and are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from statistics import fmean, stdev

from loadtest.records import Run

__all__ = [
    "BEYOND",
    "Comparison",
    "Summary",
    "compare",
    "deciles",
    "interval",
    "jain",
    "kendall",
    "mean_of",
    "percentile",
    "summarise",
    "t95",
    "weighted_percentile",
]

BEYOND = 10
"""Samples that must lie beyond a percentile for it to mean anything."""


def percentile(values: Sequence[float], q: float, *, beyond: int = BEYOND, lost: int = 0) -> float | None:
    """The ``q``-th percentile (0..100), linear between neighbours; None: fewer than ``beyond`` samples exceed it.

    ``lost``: samples that never ended and so lie above all others; None where the percentile is one of them.
    """
    n = len(values) + lost
    if not n or n * (1 - q / 100) < beyond - 1e-9:
        return None
    ordered = sorted(values)
    place = (n - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, n - 1) if place > low else low
    if high >= len(ordered):
        return None
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def weighted_percentile(values: Sequence[tuple[float, int]], q: float, *, beyond: int = BEYOND) -> float | None:
    """The same as ``percentile`` where each value stands for so many equal samples."""
    total = sum(count for _, count in values)
    if not total or total * (1 - q / 100) < beyond - 1e-9:
        return None
    ordered = sorted(values)
    place = (total - 1) * q / 100
    low = math.floor(place)
    share = place - low
    seen = 0
    first: float | None = None
    for value, count in ordered:
        seen += count
        if first is None and seen > low:
            first = value
        if first is not None and seen > min(low + 1, total - 1):
            return first + share * (value - first)
    return first


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


@cache
def t95(n: int) -> float:
    """Student's t for a two-sided interval of 95 % over ``n`` independent units; infinite for fewer than two."""
    if n < 2:
        return math.inf
    low, high = 1.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tails(middle, n - 1) > 0.05 else (low, middle)
    return (low + high) / 2


def _t_tails(t: float, freedom: int) -> float:
    """P(|T| > t): the regularised incomplete beta function, by its continued fraction (Lentz)."""
    a, b, x = freedom / 2, 0.5, freedom / (freedom + t * t)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(b, a, 1 - x)
    return _beta(a, b, x)


def _beta(a: float, b: float, x: float) -> float:
    if x <= 0:
        return 0.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / d
    fraction = d
    for m in range(1, 300):
        for part in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + part * d)
            c = 1 + part / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction / a


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over independent units."""
    half = t95(len(values)) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return fmean(values), half


# ---- order and fairness ---------------------------------------------------------------------------------------------


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Kendall's tau-b, which allows for ties; None where one side is all ties. O(n log n) (Knight 1966)."""
    n = len(xs)
    if n != len(ys):
        raise ValueError("as many of the one as of the other are expected")
    order = sorted(zip(xs, ys, strict=True))
    pairs = n * (n - 1) // 2
    ties_x = _ties([x for x, _ in order])
    ties_y = _ties(sorted(ys))
    ties_both = _ties(order)
    if pairs in (ties_x, ties_y):
        return None
    swaps = _swaps([y for _, y in order])
    score = pairs - ties_x - ties_y + ties_both - 2 * swaps
    return score / math.sqrt((pairs - ties_x) * (pairs - ties_y))


def _ties(ordered: Sequence[object]) -> int:
    """Pairs of equal neighbours in runs."""
    return sum(size * (size - 1) // 2 for size in (len(list(same)) for _, same in groupby(ordered)))


def _swaps(values: list[float]) -> int:
    """Exchanges that sorting takes: pairs in the wrong order."""
    if len(values) < 2:
        return 0
    middle = len(values) // 2
    left, right = values[:middle], values[middle:]
    count = _swaps(left) + _swaps(right)
    i = j = 0
    for place in range(len(values)):
        if j == len(right) or (i < len(left) and left[i] <= right[j]):
            values[place] = left[i]
            i += 1
        else:
            values[place] = right[j]
            j += 1
            count += len(left) - i
    return count


def jain(values: Sequence[float]) -> float | None:
    """Jain's index: 1 where all have the same, 1/n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares > 0 else None


def deciles(sizes: Sequence[float]) -> list[int]:
    """The decile of each entry by size, 0 to 9; equal sizes may be parted, so that every decile has its tenth."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    found = [0] * len(sizes)
    for place, i in enumerate(order):
        found[i] = place * 10 // len(sizes)
    return found


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

    @property
    def differs(self) -> bool:
        """The interval leaves 1 out."""
        return abs(self.ratio - 1) > self.half_width

    def __str__(self) -> str:
        spread = f"seeds {self.low:.2f} to {self.high:.2f}, {self.better} of {self.seeds} better"
        return f"{self.ratio:.2f} ± {self.half_width:.2f} ({spread})"


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Pairwise by seed; both in the same order."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    mean, half = interval(ratios)
    return Comparison(mean, half, min(ratios), max(ratios), sum(ratio < 1 for ratio in ratios), len(ratios))
