"""A run in figures: everything the summary, the tables and the comparison say of it. Pure.

Failed requests are always in: they count as offered, as missing every objective, and in percentiles of completion time
as requests that never ended. Means are over what completed, and stand beside the number that failed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from elis_gateway.sim.model import EngineModel
from loadtest.records import Row, Run
from loadtest.stats import jain, kendall, percentile, weighted_percentile

__all__ = ["Alone", "Objectives", "alone_in", "alone_on", "figures", "flat", "itl", "seam_gaps", "waits"]

PERCENTILES = (50, 90, 95, 99, 99.9)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service levels, in seconds; None: not asked for."""

    jct: float | None = None
    ttft: float | None = None
    tpot: float | None = None

    def __bool__(self) -> bool:
        return (self.jct, self.ttft, self.tpot) != (None, None, None)

    def met(self, row: Row) -> bool:
        """By this request. A failed one meets none; one token has no time per token and so cannot be late there."""
        if row.error or row.end is None:
            return False
        pairs = ((self.jct, row.jct), (self.ttft, row.ttft), (self.tpot, row.tpot))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Alone:
    """What a request takes with the server to itself: the ideal that slowdown is measured against."""

    first: float
    """Seconds to the first token, beyond the prompt's share."""
    per_token: float
    per_prompt_token: float = 0.0

    def seconds(self, tokens: int, prompt_tokens: int) -> float:
        return self.first + tokens * self.per_token + prompt_tokens * self.per_prompt_token


def alone_on(engine: EngineModel) -> Alone:
    """On a modelled engine: its rates with one sequence."""
    rate = engine.rate(1)
    prefill = engine.prefill_tokens_per_second
    return Alone(engine.seam_tokens / rate, 1 / rate, 0.0 if prefill is None else 1 / prefill)


def alone_in(runs: Sequence[Run]) -> Alone | None:
    """On a server, as near as a loaded run tells: the quickest first token, and the 5th percentile of time per token.

    From all runs together, so that every setting is held against the same ideal. None: too little to go by.
    """
    done = [row for run in runs for row in run.rows if not row.error]
    paces = [row.tpot for row in done if row.tokens >= 10 and row.tpot is not None]
    firsts = [row.ttft for row in done if row.ttft is not None]
    pace = percentile(paces, 5, beyond=0) if len(paces) >= 10 else None
    return Alone(min(firsts), pace) if firsts and pace is not None else None


def figures(
    run: Run, *, objectives: Objectives | None = None, alone: Alone | None = None, interval: int = 50
) -> dict[str, Any]:
    """Everything of one run, ready for JSON. None: too few samples. ``interval``: tokens per window."""
    done = [row for row in run.rows if not row.error and row.end is not None]
    lost = len(run.rows) - len(done)
    span = _span(run)
    tokens = sum(row.tokens for row in done)
    found: dict[str, Any] = {
        "requests": {
            "offered": len(run.rows),
            "completed": len(done),
            "failed": lost,
            "unsent": run.unsent,
            "errors": dict(Counter(row.error for row in run.rows if row.error)),
        },
        "jct": spread([row.jct for row in done], lost),
        "wait": spread(waits(done)),
        "ttft": spread(_present(row.ttft for row in done), lost),
        "tpot": spread(_present(row.tpot for row in done)),
        "itl": spread_weighted(itl(done)),
        "seam_gap": spread(seam_gaps(done)),
        "lag": spread([row.lag for row in run.rows]),
        "throughput": {
            "seconds": span,
            "requests_per_second": len(done) / span if span > 0 else None,
            "tokens_per_second": tokens / span if span > 0 else None,
            "offered_requests_per_second": _offered(run),
        },
        "tokens": tokens,
        "preemptions": sum(row.preemptions for row in run.rows),
        "calls": sum(row.slices for row in run.rows),
        "windows": sum(-(-row.tokens // interval) for row in run.rows),
        "predictions": predictions(done, interval),
    }
    if objectives:
        met = sum(objectives.met(row) for row in run.rows)
        found["goodput"] = {
            "objectives": {name: getattr(objectives, name) for name in ("jct", "ttft", "tpot")},
            "met": met,
            "share": met / len(run.rows) if run.rows else None,
            "per_second": met / span if span > 0 else None,
        }
    if alone is not None:
        found["slowdown"] = _slowdowns(done, alone)
    return found


def _span(run: Run) -> float:
    """From the first arrival to the last end; the end of a finite run drains half-empty."""
    ends = [row.end for row in run.rows if row.end is not None]
    return max(ends) - min(row.intended for row in run.rows) if ends else 0.0


def _offered(run: Run) -> float | None:
    at = [row.intended for row in run.rows]
    return (len(at) - 1) / (max(at) - min(at)) if len(at) > 1 and max(at) > min(at) else None


def spread(values: Sequence[float], lost: int = 0) -> dict[str, Any]:
    """A distribution: mean, standard deviation, extremes, exact percentiles, and of how many samples."""
    found: dict[str, Any] = {"n": len(values), "lost": lost}
    if not values:
        return {**found, "mean": None, "std": None, "min": None, **{f"p{q:g}": None for q in PERCENTILES}, "max": None}
    found |= {"mean": fmean(values), "std": pstdev(values), "min": min(values)}
    ordered = sorted(values)
    found |= {f"p{q:g}": percentile(ordered, q, lost=lost) for q in PERCENTILES}
    return {**found, "max": None if lost else ordered[-1]}


def spread_weighted(values: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The same for values that each stand for several samples."""
    n = sum(count for _, count in values)
    if not n:
        return spread([])
    mean = sum(value * count for value, count in values) / n
    variance = sum((value - mean) ** 2 * count for value, count in values) / n
    found: dict[str, Any] = {"n": n, "lost": 0, "mean": mean, "std": math.sqrt(variance), "min": min(values)[0]}
    found |= {f"p{q:g}": weighted_percentile(values, q) for q in PERCENTILES}
    return {**found, "max": max(values)[0]}


def _present(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def waits(rows: Sequence[Row]) -> list[float]:
    """Seconds in the queue, of those that the server told of."""
    return _present(row.wait for row in rows)


def itl(rows: Sequence[Row]) -> list[tuple[float, int]]:
    """Times between tokens, each with how many it stands for. Live: between deltas as they came. Simulated: the pace of
    each call, since a fluid has no steps, and the gaps between calls."""
    if any(row.gaps for row in rows):
        return [(gap, 1) for row in rows for gap in row.gaps]
    found: list[tuple[float, int]] = []
    for row in rows:
        found += [
            ((leg.end - leg.first) / (leg.tokens - 1), leg.tokens - 1)
            for leg in row.legs
            if leg.first is not None and leg.tokens > 1
        ]
    return found + [(gap, 1) for gap in seam_gaps(rows)]


def seam_gaps(rows: Sequence[Row]) -> list[float]:
    """Seconds from the end of one call to the first token of the next, waiting included."""
    found = []
    for row in rows:
        last: float | None = None
        for leg in row.legs:
            if last is not None and leg.first is not None:
                found.append(leg.first - last)
            if leg.tokens:
                last = leg.end
    return found


def predictions(rows: Sequence[Row], interval: int) -> dict[str, Any]:
    """How good the estimates were: error in tokens by window, and Kendall's tau of the order they give."""
    errors: dict[int, list[float]] = {}
    first: list[float] = []
    true: list[float] = []
    made = 0
    for row in rows:
        made += len(row.predictions)
        for at, left in row.predictions:
            if at < row.tokens:
                errors.setdefault(at // interval, []).append(left - (row.tokens - at))
        if row.predictions:
            first.append(row.predictions[0][1])
            true.append(float(row.tokens))
    whole = [error for found in errors.values() for error in found]
    return {
        "made": made,
        "mae": fmean(map(abs, whole)) if whole else None,
        "bias": fmean(whole) if whole else None,
        "kendall_tau": kendall(first, true) if len(first) > 1 else None,
        "by_window": [
            {"window": n, "n": len(found), "mae": fmean(map(abs, found)), "bias": fmean(found)}
            for n, found in sorted(errors.items())
        ],
    }


def _slowdowns(rows: Sequence[Row], alone: Alone) -> dict[str, Any]:
    slow = [row.jct / alone.seconds(row.tokens, row.prompt_tokens) for row in rows if row.tokens]
    if not slow:
        return {**spread([]), "longest_decile": None, "jain": None}
    by_length = sorted(zip((row.tokens for row in rows if row.tokens), slow, strict=True))
    tenth = by_length[-max(1, len(by_length) // 10) :]
    return {
        **spread(slow),
        "longest_decile": fmean(value for _, value in tenth),
        "jain": jain(slow),
        "above_10": sum(value > 10 for value in slow) / len(slow),
    }


def flat(figures_: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number with its path as name (``jct.mean``), lists left out: what thresholds and tables go by."""
    found: dict[str, float] = {}
    for key, value in figures_.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found
