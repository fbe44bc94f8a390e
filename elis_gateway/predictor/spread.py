"""How far the truth lay from what a line said, as ratios: hazards, and the distribution of what remains that they make.

Knows: log ratios in bins, and how far to follow a line. Never: what the line was made of, jobs, models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from math import erfc, log, sqrt
from operator import neg
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CLIP", "RENEW", "UNIT", "Spread", "ceiling", "within"]

CLIP = 2.0
"""Log ratio beyond which a surprise counts as one of this size, and beyond which no line is followed."""
RENEW = 0.1
"""Share of new answers after which a line, a slope or a table is made anew. At half of it tau is 0.001 better."""
UNIT = 1e9
"""How large a growing unit may become."""
_LOW, _HIGH, _STEP = -4.0, 2.5, 0.125
"""Log ratios. No further up: what lasts 12 times as long as expected is a loop, and must not become the mean."""
_BINS = round((_HIGH - _LOW) / _STEP)
_EDGES: list[float] = np.exp(np.linspace(_LOW, _HIGH, _BINS + 1)).tolist()
"""Bin i holds the ratios from _EDGES[i] to _EDGES[i + 1]; what lies outside counts in the bins at the ends."""
_WIDTHS = [high - low for low, high in pairwise(_EDGES)]
_HIGHEST = _EDGES[-1]
_STRENGTH = 30.0
"""Answers that what is known at the level above counts as. The shape of an error is much alike everywhere, and a median
made of a few answers of one application puts all of its jobs in the wrong place."""
_GROWTH = 300.0 / 299.0
"""How much more the next surprise counts: the line gets better, how wrong it was at first is of no interest."""
_SLOPE = 0.5
"""How far a line is followed of which nothing is known."""
_SLOPE_STRENGTH, _SLOPE_VARIANCE = 100.0, 0.09
"""The same for slope and shift of the line, and the variance of what it says that goes with it."""


def _prior() -> list[float]:
    """Hazards of a log-normal ratio around 1."""
    beyond = [0.5 * erfc((_LOW + i * _STEP) / (0.7 * sqrt(2.0))) for i in range(_BINS + 1)]
    beyond[0] = 1.0
    return [1.0 - after / before for before, after in pairwise(beyond)]


_PRIOR = _prior()


def _coming(hazards: Sequence[float]) -> list[float]:
    """Of each bin: the share of all that comes so far."""
    left, shares = 1.0, []
    for hazard in hazards:
        shares.append(left)
        left = max(left * (1.0 - hazard), 1e-9)
    return shares


class Spread:
    """How far to follow the line, and the distribution of (what remained / what was then said), with look-ups in it.

    A line fitted to few answers says too much: what it says of answers it was not fitted to is to be taken by a slope
    below one, the smaller the later in an answer. Slope, hazards and table are made anew where enough was learned,
    each only when it is asked for: plain floats, since a numpy array of five costs more than what is in it.
    """

    __slots__ = (
        "_built", "_hazards", "_placed", "_slope", "_table", "changes", "ended", "lasted", "line", "line_line",
        "line_true", "parent", "shift", "slope", "true", "unit", "weight",
    )  # fmt: skip

    def __init__(self, parent: Spread | None) -> None:
        self.parent = parent
        self.ended = [0.0] * _BINS
        self.lasted = [0.0] * _BINS
        self.weight = self.line = self.true = self.line_line = self.line_true = 0.0
        """Sums of weights, of what the line said, of what was true, and of the former's products with both."""
        self.unit = 1.0
        """What one surprise counts now."""
        self.changes = 0
        self.slope: float = _SLOPE if parent is None else parent.slope
        self.shift: float = 0.0 if parent is None else parent.shift
        self._placed = self._built = 0
        """``changes`` at which slope, and hazards, are due."""
        self._hazards: list[float] = _PRIOR
        self._table: _Table | None = None

    def place(self, line: float) -> float:
        """What to make of what the line says: log of (what remains / origin)."""
        if self.changes >= self._placed:
            self._calibrate()
        return self.shift + self.slope * line

    def _slant(self) -> tuple[float, float]:
        if self.changes >= self._placed:
            self._calibrate()
        return self.slope, self.shift

    def _calibrate(self) -> None:
        self._placed = self._next()
        slope, shift = (_SLOPE, 0.0) if self.parent is None else self.parent._slant()
        count = self.weight / self.unit
        if count > 0.0:
            lines, trues = self.line / self.unit, self.true / self.unit
            spread = self.line_line / self.unit - lines * lines / count
            together = self.line_true / self.unit - lines * trues / count
            believed = _SLOPE_STRENGTH * _SLOPE_VARIANCE
            slope = min(max((together + believed * slope) / (spread + believed), 0.1), 1.2)
            ours = (trues - slope * lines) / count
            shift = (count * ours + _SLOPE_STRENGTH * shift) / (count + _SLOPE_STRENGTH)
        self.slope, self.shift = slope, shift

    def learn(self, line: float, true: float, complete: bool, weight: float, share: float) -> tuple[float, float]:
        """The line said one thing, and another was true, or with ``complete`` False a bound of it. ``weight``: what
        that counts for the distribution, ``share``: for the slope. Returns what the line is to learn, and how much
        that is worth."""
        placed = self.place(line)
        off = bound = true - placed
        if not complete:
            # What it would have come to, given that it came so far.
            off, sure = self.beyond(bound)
            share *= sure
        target = placed + (CLIP if off > CLIP else -CLIP if off < -CLIP else off)
        self.changes += 1
        self.unit *= _GROWTH
        at = int((bound - _LOW) / _STEP)
        counts = self.ended if complete else self.lasted
        counts[0 if at < 0 else at if at < _BINS else _BINS - 1] += weight * self.unit
        now = share * self.unit
        self.weight += now
        self.true += now * target
        now *= line
        self.line += now
        self.line_line += now * line
        self.line_true += now * target
        if self.unit > UNIT:
            self._rescale()
        return target, share

    def _rescale(self) -> None:
        ended, lasted = self.counts()
        self.ended, self.lasted = list(ended), list(lasted)
        self.weight, self.line, self.true, self.line_line, self.line_true = self.slopes()
        self.unit = 1.0

    def _next(self) -> int:
        return self.changes + 1 + int(RENEW * min(self.changes, 2000))

    def hazards(self) -> list[float]:
        """Of each bin: the share of those that came so far which end in it."""
        if self.changes >= self._built:
            self._built = self._next()
            self._table = None
            prior = _PRIOR if self.parent is None else self.parent.hazards()
            strength = _STRENGTH * self.unit
            hazards = [0.0] * _BINS
            own = 0.0
            for i, share in zip(range(_BINS - 1, -1, -1), reversed(_coming(prior)), strict=True):
                ended = self.ended[i]
                own += ended
                believed = strength * share
                hazards[i] = (ended + believed * prior[i]) / (own + believed)
                own += self.lasted[i]
            self._hazards = hazards
        return self._hazards

    def table(self) -> _Table:
        hazards = self.hazards()
        if self._table is None:
            self._table = _Table(hazards)
        return self._table

    def beyond(self, off: float) -> tuple[float, float]:
        """(expected log ratio given that it exceeds ``off``, how much a bound there says, 0 … 1)."""
        survival = self.table().survival
        at = min(max(int((off - _LOW) / _STEP), 0), _BINS - 1)
        left = survival[at]
        if left <= 1e-9:
            return off, 1.0
        ends = (survival[i] - survival[i + 1] for i in range(at, _BINS))
        expected = sum(share * (_LOW + (i + 0.5) * _STEP) for i, share in enumerate(ends, at)) / left
        return max(expected, off), 1.0 - left

    def counts(self) -> tuple[list[float], list[float]]:
        """Surprises and bounds by bin, as they count today."""
        return [n / self.unit for n in self.ended], [n / self.unit for n in self.lasted]

    def slopes(self) -> tuple[float, ...]:
        """The sums from which slope and shift follow, as they count today."""
        sums = (self.weight, self.line, self.true, self.line_line, self.line_true)
        return tuple(each / self.unit for each in sums)

    def restore(self, counts: npt.NDArray[Any], slopes: npt.NDArray[Any]) -> None:
        """Take up what ``counts`` and ``slopes`` gave. Raises ValueError for arrays of another shape."""
        if counts.shape != (2, _BINS) or slopes.shape != (5,):
            raise ValueError(f"spreads of shape {counts.shape}, slopes of {slopes.shape}")
        self.ended, self.lasted = counts.tolist()
        self.weight, self.line, self.true, self.line_line, self.line_true = slopes.tolist()
        self.unit = 1.0
        self.changes = int(counts.sum())


_Shape = tuple[float, float, float, float, float]
"""Mean, Gittins index, median, and the bounds of the four fifths in the middle."""


class _Table:
    """``scale`` times the ratio, cut off anywhere: mean, Gittins index and three quantiles."""

    __slots__ = ("index", "mean", "means", "quantiles", "survival")

    def __init__(self, hazards: Sequence[float]) -> None:
        left, mean, best = 1.0, _EDGES[0], float("inf")
        survival, means, index = [left], [mean], [best]
        for hazard, width in zip(hazards, _WIDTHS, strict=True):
            stays = left * (1.0 - min(hazard, 0.999999))
            # E[min(ratio, edge)]: what lasts beyond a bin adds its width, what ends in it half of that.
            if len(means) == _BINS:
                stays = 0.0
            mean += width * 0.5 * (left + stays)
            left = stays
            best = min(best, mean / (1.0 - left)) if left < 1.0 else best
            survival.append(left)
            means.append(mean)
            index.append(best)
        self.survival, self.means, self.index = survival, means, index
        self.mean = mean
        self.quantiles = [_EDGES[_first_below(survival, share)] for share in (0.5, 0.9, 0.1)]

    def __call__(self, scale: float, allowed: int | None) -> _Shape:
        mean, index = self.mean * scale, self.index[-1] * scale
        if allowed is not None and allowed < scale * _HIGHEST:
            cut = allowed / scale
            at = (log(cut) - _LOW) / _STEP if cut > 0.0 else 0.0
            if at <= 0.0:
                mean = index = float(allowed)
            else:
                i = min(int(at), _BINS - 1)
                into = (cut - _EDGES[i]) / (_EDGES[i + 1] - _EDGES[i])
                mean = scale * (self.means[i] + into * (self.means[i + 1] - self.means[i]))
                index = min(scale * self.index[i], mean)
        top = ceiling(allowed)
        median, low, high = self.quantiles
        return (
            within(mean, top),
            within(index, top),
            within(median * scale, top),
            within(low * scale, top),
            within(high * scale, top),
        )


def _first_below(survival: list[float], share: float) -> int:
    return bisect_left(survival, -share, key=neg)


def ceiling(allowed: int | None) -> float:
    """The most tokens that may remain."""
    return float("inf") if allowed is None else max(float(allowed), 1.0)


def within(tokens: float, top: float) -> float:
    """One at least."""
    return min(max(tokens, 1.0), top)
