"""What a pool has learned about answer lengths and arrivals: a percentile for missing estimates, and Boost's gamma.

Knows: two decaying statistics. Never: single jobs, applications (that is the predictors' business).
"""

from __future__ import annotations

from bisect import insort
from math import exp, log2

__all__ = ["Lengths", "Quantile", "Slope", "solve_gamma"]

_BINS_PER_OCTAVE = 4
_BINS = 18 * _BINS_PER_OCTAVE + 1  # up to 2**18 tokens
_CENTRES = tuple(2 ** (i / _BINS_PER_OCTAVE) for i in range(_BINS))


class Lengths:
    """Decaying histogram of answer lengths, quarter octaves wide; constant memory."""

    __slots__ = ("_counts", "_p95", "_since", "_weight", "total")

    def __init__(self) -> None:
        self._counts = [0.0] * _BINS
        self._weight = 1.0
        self.total = 0.0
        self._p95: float | None = None
        self._since = 0

    def add(self, tokens: int) -> None:
        """Count one complete answer. Older ones fade with a half-life of about 1,400 answers."""
        at = round(log2(tokens) * _BINS_PER_OCTAVE) if tokens > 1 else 0
        self._counts[at if at < _BINS else _BINS - 1] += self._weight
        self.total += self._weight
        self._weight *= 1.0005
        if self._weight > 1e12:
            self._counts = [c / self._weight for c in self._counts]
            self.total /= self._weight
            self._weight = 1.0
        self._since += 1
        if self._p95 is None or self._since >= 64:
            self._p95 = self.quantile(0.95)
            self._since = 0

    @property
    def p95(self) -> float | None:
        """95th percentile in tokens (within a bin's width); None before the first answer."""
        return self._p95

    def quantile(self, q: float) -> float:
        """The ``q`` quantile in tokens; 1.0 before the first answer."""
        left = q * self.total
        for centre, count in zip(_CENTRES, self._counts, strict=True):
            left -= count
            if left <= 0.0:
                return centre
        return _CENTRES[-1]

    def shares(self) -> list[tuple[float, float]]:
        """``(tokens, probability)`` of every bin that has samples."""
        return [(c, n / self.total) for c, n in zip(_CENTRES, self._counts, strict=True) if n > 0.0]


def solve_gamma(arrival_rate: float, shares: list[tuple[float, float]], seconds_per_token: float) -> float:
    """The decay rate of first-come's response tail: the positive root of γ = λ(E[exp(γS)] - 1), in 1/s.

    ``shares``: answer lengths in tokens with probabilities; S is their service time at ``seconds_per_token`` *of the
    whole pool* (one slot's seconds per token over the number of slots). Yu and Scully 2024. At load 1 and above there
    is no positive root; the load is then taken as 0.99, so the result stays positive and small.
    """
    if not shares or arrival_rate <= 0.0:
        return 0.0
    mean = sum(n * p for n, p in shares) * seconds_per_token
    rate = min(arrival_rate, 0.99 / mean)
    longest = max(n for n, _ in shares) * seconds_per_token
    low, high = 0.0, 50.0 / longest
    for _ in range(50):
        middle = 0.5 * (low + high)
        grown = rate * (sum(p * exp(middle * n * seconds_per_token) for n, p in shares) - 1.0)
        if grown > middle:
            high = middle
        else:
            low = middle
    return low


class Slope:
    """By how much y grows with x where z is the same, in y = a + b x + c z with noise: least squares over the recent
    past, in nine sums."""

    __slots__ = ("_n", "_x", "_xx", "_xy", "_xz", "_y", "_z", "_zy", "_zz")

    def __init__(self) -> None:
        self._n = self._x = self._y = self._z = 0.0
        self._xx = self._xy = self._xz = self._zy = self._zz = 0.0

    def add(self, x: float, z: float, y: float, weight: float) -> None:
        """Count one observation; older ones fade over about 2,000."""
        keep = 0.9995
        wx, wz = weight * x, weight * z
        self._n = self._n * keep + weight
        self._x = self._x * keep + wx
        self._z = self._z * keep + wz
        self._y = self._y * keep + weight * y
        self._xx = self._xx * keep + wx * x
        self._xz = self._xz * keep + wx * z
        self._zz = self._zz * keep + wz * z
        self._xy = self._xy * keep + wx * y
        self._zy = self._zy * keep + wz * y

    @property
    def value(self) -> float:
        """b, at least 0; 0.0 until there is enough to tell."""
        n = self._n
        xx = self._xx * n - self._x * self._x
        zz = self._zz * n - self._z * self._z
        xz = self._xz * n - self._x * self._z
        xy = self._xy * n - self._x * self._y
        zy = self._zy * n - self._z * self._y
        # Where z never varies, x alone explains.
        spread = xx * zz - xz * xz
        if spread > 1e-9 * xx * zz and zz > 1e-12:
            return max((xy * zz - zy * xz) / spread, 0.0)
        return max(xy / xx, 0.0) if xx > 1e-12 else 0.0


_STEP = 1.02
_LOG_STEP = log2(_STEP)


class Quantile:
    """A decaying quantile of positive numbers (times in seconds), within 1 %; constant memory, cheap to read."""

    __slots__ = ("_bins", "_counts", "_decay", "_total", "_weight", "count", "q", "value")

    def __init__(self, q: float, *, memory: float = 20_000.0) -> None:
        """``memory``: samples after which a sample's weight has fallen to 1/e."""
        self.q = q
        self.count = 0
        self.value = 0.0
        """The quantile; 0.0 before the first sample."""
        self._counts: dict[int, float] = {}
        self._bins: list[int] = []
        """The keys of the counts, sorted."""
        self._decay = exp(1.0 / memory)
        self._weight = 1.0
        self._total = 0.0

    def add(self, x: float) -> None:
        at = round(log2(x if x > 1e-3 else 1e-3) / _LOG_STEP)
        try:
            self._counts[at] += self._weight
        except KeyError:
            insort(self._bins, at)
            self._counts[at] = self._weight
        self._total += self._weight
        self.count += 1
        self._weight *= self._decay
        if self._weight > 1e12:
            self._counts = {k: c / self._weight for k, c in self._counts.items()}
            self._total /= self._weight
            self._weight = 1.0
        if self.count < 64 or self.count % 8 == 0:
            self._read()

    def _read(self) -> None:
        left = (1.0 - self.q) * self._total
        counts = self._counts
        for at in reversed(self._bins):
            left -= counts[at]
            if left <= 0.0:
                self.value = _STEP**at
                return
