"""When requests arrive: gaps in seconds between one and the next. Pure and seeded.

Knows: the processes. Never: a clock, what is asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["constant", "gamma", "poisson", "replayed", "times"]


def constant(n: int, rate: float) -> list[float]:
    """``n`` equal gaps at ``rate`` requests/s."""
    return [1 / rate] * n


def poisson(n: int, rate: float, rng: random.Random) -> list[float]:
    """Memoryless arrivals at ``rate`` requests/s."""
    return [rng.expovariate(rate) for _ in range(n)]


def gamma(n: int, rate: float, shape: float, rng: random.Random) -> list[float]:
    """Gamma-distributed gaps with mean 1/``rate``; a shape under 1 is burstier than Poisson."""
    return [rng.gammavariate(shape, 1 / (rate * shape)) for _ in range(n)]


def replayed(n: int, rate: float, blocks: Sequence[Sequence[float]], rng: random.Random) -> list[float]:
    """``n`` consecutive gaps of a recorded trace, scaled to ``rate``; starts at a random place and wraps around.

    Each block is scaled by its own mean: a trace's bursts are kept, its drift over the hours is not.
    """
    gaps = [gap * len(block) / sum(block) for block in blocks for gap in block]
    start = rng.randrange(len(gaps))
    return [gaps[(start + i) % len(gaps)] / rate for i in range(n)]


def times(gaps: Sequence[float]) -> list[float]:
    """Arrival times in seconds; the first request arrives after the first gap."""
    return list(accumulate(gaps))
