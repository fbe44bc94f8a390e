"""A distribution of answer lengths, tabulated so that any remaining length is a few look-ups.

Knows: hazards by bin of length; mean remaining length and Gittins index for any tokens attained and allowed. Never:
where the hazards come from.

The Gittins index of a job that has attained ``a`` tokens is the smallest over d of E[min(X, d)] / P(X <= d), X being
what remains (Gittins 1979; Scully, Grosof and Harchol-Balter, "SOAP: One Clean Analysis of All Age-Based Scheduling
Policies", 2018): expected work invested per completion, at the best moment to look again. Geometrically it is the
smallest slope from the point of age ``a`` on the curve (F(t), integral of 1 - F up to t) to any later point, so the
indices of all ages are the tangents to a lower convex hull, found in one pass from the right.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import erfc, log, sqrt

__all__ = ["BINS", "EDGES", "LengthTable", "bin_of", "lognormal_hazards"]


def _edges() -> tuple[int, ...]:
    """Whole tokens up to 16, then eighths of an octave (9 %) up to 131,072."""
    edges = list(range(17))
    edges += [round(2 ** (4 + step / 8)) for step in range(1, 13 * 8 + 1)]
    return tuple(sorted(set(edges)))


EDGES = _edges()
"""Bin i holds the lengths X with EDGES[i] < X <= EDGES[i + 1], in tokens."""
BINS = len(EDGES) - 1
_WIDTHS = tuple(right - left for left, right in pairwise(EDGES))
_MOST = 0.999999
"""No hazard is a certainty: what lies behind must keep a meaning."""
_MEMO = 512


def bin_of(age: int) -> int:
    """The bin that a job of this age is in: EDGES[i] <= age < EDGES[i + 1]; ages beyond the last edge share a bin."""
    if age < 16:
        return age if age > 0 else 0
    return min(bisect_right(EDGES, age) - 1, BINS - 1)


def lognormal_hazards(median: float, sigma: float) -> array[float]:
    """P(X in bin i | X beyond its left edge) of a log-normal length: what is believed before anything was seen."""

    def beyond(tokens: int) -> float:
        return 1.0 if tokens <= 0 else 0.5 * erfc(log(tokens / median) / (sigma * sqrt(2.0)))

    return array(
        "d",
        (1.0 - beyond(right) / beyond(left) for left, right in pairwise(EDGES)),
    )


class LengthTable:
    """Mean remaining length and Gittins index at every age. Built in one pass over the bins; then immutable.

    Within a bin the length is taken as uniform over its whole tokens. Lengths beyond the last edge count as the edge.
    The tangents, which only the index needs, are found when it is first asked for.
    """

    __slots__ = ("_best", "_hazard", "_mean", "_means", "_medians", "_memo", "_survival")

    def __init__(self, hazards: Sequence[float]) -> None:
        hazard = array("d", [h if h < _MOST else _MOST for h in hazards])
        hazard[-1] = 1.0
        mean = array("d", bytes(8 * (BINS + 1)))
        survival = array("d", bytes(8 * (BINS + 1)))
        survival[0] = left = 1.0
        for i, h in enumerate(hazard):
            left *= 1.0 - h
            survival[i + 1] = left
        for i in range(BINS - 1, -1, -1):
            h, width = hazard[i], _WIDTHS[i]
            mean[i] = width - h * (width - 1) * 0.5 + (1.0 - h) * mean[i + 1]
        self._hazard, self._mean, self._survival = hazard, mean, survival
        self._best: array[int] | None = None
        self._memo: dict[tuple[int, int | None], tuple[float, float]] = {}
        self._means: dict[tuple[int, int | None], float] = {}
        self._medians: dict[int, float] = {}

    def _tangents(self) -> array[int]:
        """For every edge the later edge at which stopping to look again is best."""
        best = array("h", bytes(2 * (BINS + 1)))
        hull = [BINS]
        slope = self._slope
        slopes: list[float] = [float("inf")]
        # hull: edges from right to left; slopes[k]: from hull[k] to the one before it, growing to the right.
        for i in range(BINS - 1, -1, -1):
            steep = slope(i, hull[-1])
            while len(hull) > 1 and steep >= slopes[-1]:
                hull.pop()
                slopes.pop()
                steep = slope(i, hull[-1])
            best[i] = hull[-1]
            hull.append(i)
            slopes.append(steep)
        return best

    def _slope(self, i: int, j: int) -> float:
        """E[min(X, d)] / P(X <= d) at the age of edge ``i``, d reaching to edge ``j``."""
        here = self._survival[i]
        passes = self._survival[j] / here if here > 0.0 else 0.0
        stops = 1.0 - passes
        return (self._mean[i] - passes * self._mean[j]) / stops if stops > 0.0 else float("inf")

    def __call__(self, age: int, allowed: int | None = None) -> tuple[float, float]:
        """(mean remaining, Gittins index) in tokens after ``age`` tokens, if at most ``allowed`` more may come."""
        memo = self._memo
        found = memo.get((age, allowed))
        if found is None:
            if len(memo) >= _MEMO:
                memo.clear()
            found = memo[age, allowed] = self._compute(age, allowed)
        return found

    def mean(self, age: int, allowed: int | None = None) -> float:
        """The first of what a call gives, without the cost of the second."""
        found = self._means.get((age, allowed))
        if found is None:
            if len(self._means) >= _MEMO:
                self._means.clear()
            found = self._means[age, allowed] = 1.0 if age >= EDGES[-1] else self._capped(age, allowed)[0]
        return found

    def _capped(self, age: int, allowed: int | None) -> tuple[float, int]:
        """(mean remaining, the age at which it is cut off)."""
        mean, survival = self._mean_at(age, bin_of(age))
        reach = EDGES[-1] if allowed is None else min(age + max(allowed, 1), EDGES[-1])
        if reach < EDGES[-1]:
            rest, beyond = self._mean_at(reach, bin_of(reach))
            mean -= (beyond / survival if survival > 0.0 else 0.0) * rest
        # Rounding, where hardly anyone is left, must not leave the allowed range.
        return max(min(mean, float(reach - age)), 1.0), reach

    def _compute(self, age: int, allowed: int | None) -> tuple[float, float]:
        if age >= EDGES[-1]:
            return 1.0, 1.0
        if self._best is None:
            self._best = self._tangents()
        i = bin_of(age)
        mean, survival = self._mean_at(age, i)
        capped, reach = self._capped(age, allowed)
        # Being cut off at ``reach`` is certain, so capped / 1 is one candidate; the others are edges within reach.
        index = capped
        for j in {self._best[i], self._best[i + 1], i + 1}:
            if age < EDGES[j] <= reach:
                passes = self._survival[j] / survival if survival > 0.0 else 0.0
                stops = 1.0 - passes
                if stops > 1e-12:
                    index = min(index, (mean - passes * self._mean[j]) / stops)
        return capped, max(index, 1.0)

    def _mean_at(self, age: int, i: int) -> tuple[float, float]:
        """(mean remaining, P(X > age)), ``age`` being in bin ``i``."""
        into = age - EDGES[i]
        if into <= 0:
            return self._mean[i], self._survival[i]
        share = self._hazard[i] / _WIDTHS[i]
        lives = 1.0 - share * into
        passed = into - share * into * (into - 1) * 0.5
        return (self._mean[i] - passed) / lives, self._survival[i] * lives

    def median(self, age: int) -> float:
        """What remains after ``age`` tokens, at even odds; at least 1."""
        if age >= EDGES[-1]:
            return 1.0
        found = self._medians.get(age)
        if found is None:
            if len(self._medians) >= _MEMO:
                self._medians.clear()
            found = self._medians[age] = self._median(age)
        return found

    def _median(self, age: int) -> float:
        _, here = self._mean_at(age, bin_of(age))
        half = 0.5 * here
        survival = self._survival
        # survival falls from left to right: the first edge beyond which fewer than half of those at ``age`` are left.
        low, high = bin_of(age), BINS
        while low < high:
            middle = (low + high) // 2
            if survival[middle] > half:
                low = middle + 1
            else:
                high = middle
        i = max(low, 1)
        left, right = survival[i - 1], survival[i]
        into = (left - half) / (left - right) if left > right else 1.0
        at = EDGES[i - 1] + min(max(into, 0.0), 1.0) * _WIDTHS[i - 1]
        return max(at - age, 1.0)

    def survival(self, age: int) -> float:
        """P(X > age)."""
        return 0.0 if age >= EDGES[-1] else self._mean_at(age, bin_of(age))[1]
