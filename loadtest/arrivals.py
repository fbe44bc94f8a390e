"""When requests arrive: seconds after the start. Pure and seeded.

Knows: the processes and their short names. Never: a clock, what is asked.

Every process has a *mean rate* that the caller sets, so that one load can be offered in many shapes. A rate that
changes over time (on/off, ramp, stages) is a Poisson process of rate 1 whose clock is bent: the k-th arrival comes
when the area under the rate has reached the k-th arrival of the straight one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import inf, sqrt

from elis_gateway.errors import ConfigError
from loadtest.spec import Spec, parse

__all__ = ["KINDS", "bent", "constant", "draw", "gamma", "poisson", "replayed", "times"]


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
    gaps = [gap * scale for block in blocks for scale in (len(block) / sum(block),) for gap in block]
    start = rng.randrange(len(gaps))
    return [gaps[(start + i) % len(gaps)] / rate for i in range(n)]


def times(gaps: Sequence[float]) -> list[float]:
    """Arrival times in seconds; the first request arrives after the first gap."""
    return list(accumulate(gaps))


Piece = tuple[float, float, float]
"""(seconds, rate at its beginning, rate at its end); linear in between."""


def bent(n: int, pieces: Iterable[Piece], rng: random.Random) -> list[float]:
    """Arrival times of a Poisson process whose rate follows ``pieces``; the last rate goes on for ever.

    Raises ValueError where the rate ends at 0 before all have arrived.
    """
    found: list[float] = []
    wanted = rng.expovariate(1.0)
    begin = area = rate = 0.0
    for length, first, last in (*pieces, (inf, -1.0, -1.0)):
        if first < 0:
            first = last = rate
        whole = inf if length == inf and last > 0 else length * (first + last) / 2 if last + first > 0 else 0.0
        while wanted <= area + whole:
            found.append(begin + _moment(wanted - area, length, first, last))
            if len(found) == n:
                return found
            wanted += rng.expovariate(1.0)
        begin, area, rate = begin + length, area + whole, last
    raise ValueError(f"after {begin:g} s nothing arrives any more: {len(found)} of {n} requests")


def _moment(area: float, length: float, first: float, last: float) -> float:
    """Seconds into a piece at which the area under its rate is reached."""
    slope = 0.0 if length == inf else (last - first) / length
    if abs(slope) < 1e-12:
        return area / first
    return (sqrt(max(first * first + 2 * slope * area, 0.0)) - first) / slope


# ---- by name --------------------------------------------------------------------------------------------------------


def _constant(n: int, rate: float, rng: random.Random, spec: Spec) -> list[float]:
    spec.only()
    return times(constant(n, rate))


def _poisson(n: int, rate: float, rng: random.Random, spec: Spec) -> list[float]:
    spec.only()
    return times(poisson(n, rate, rng))


def _gamma(n: int, rate: float, rng: random.Random, spec: Spec) -> list[float]:
    spec.only("shape")
    return times(gamma(n, rate, spec.number("shape", 1.0), rng))


def _onoff(n: int, rate: float, rng: random.Random, spec: Spec) -> list[float]:
    """``on`` seconds of arrivals, ``off`` seconds at ``idle`` times the mean rate, and so on, by turns."""
    spec.only("on", "off", "idle")
    on, off, idle = spec.number("on"), spec.number("off"), spec.number("idle", 0.0, above=-1e-12)
    if idle >= 1:
        raise ConfigError(f"{spec.text!r}: idle: expected less than 1 (times the mean rate), got {idle:g}")
    busy = rate * ((on + off) - idle * off) / on
    turns = int(n / (rate * (on + off)) * 4) + 50
    return bent(n, [(on, busy, busy), (off, idle * rate, idle * rate)] * turns, rng)


def _ramp(n: int, rate: float, rng: random.Random, spec: Spec) -> list[float]:
    """From ``from`` to ``to`` times the rate, evenly, over the time that ``n`` requests take."""
    spec.only("from", "to")
    first, last = spec.number("from", 0.0, above=-1e-12), spec.number("to")
    middle = (first + last) / 2
    return bent(n, [(n / (rate * middle), first * rate, last * rate)], rng)


def _stages(n: int, rate: float, rng: random.Random, spec: Spec) -> list[float]:
    """``60@0.5,60@2``: seconds at so many times the rate; the last goes on."""
    spec.only(rest=10**6)
    pieces = []
    for word in spec.rest:
        seconds, _, times_rate = word.partition("@")
        try:
            pieces.append((float(seconds), rate * float(times_rate), rate * float(times_rate)))
        except ValueError:
            raise ConfigError(f"{spec.text!r}: expected SECONDS@TIMES, got {word!r}") from None
        if pieces[-1][0] <= 0 or pieces[-1][1] < 0:
            raise ConfigError(f"{spec.text!r}: {word!r}: expected seconds above 0 and a rate of 0 or more")
    if not pieces or pieces[-1][1] <= 0:
        raise ConfigError(f"{spec.text!r}: expected stages such as 60@0.5,60@2, the last with a rate above 0")
    return bent(n, pieces, rng)


def _once(n: int, rate: float, rng: random.Random, spec: Spec) -> list[float]:
    """Everything at the beginning: a backlog."""
    spec.only()
    return [0.0] * n


KINDS: dict[str, Callable[[int, float, random.Random, Spec], list[float]]] = {
    "constant": _constant,
    "poisson": _poisson,
    "gamma": _gamma,
    "onoff": _onoff,
    "ramp": _ramp,
    "stages": _stages,
    "once": _once,
}
"""Processes that need nothing but a rate; ``azure`` and ``trace`` are replays and live in ``make``."""


def draw(text: str, n: int, rate: float, rng: random.Random) -> list[float]:
    """``n`` arrival times of a described process with the given mean rate (requests/s). Raises ConfigError."""
    spec = parse(text, KINDS, "arrivals")
    try:
        found = KINDS[spec.name](n, rate, rng, spec)
    except ValueError as error:
        raise ConfigError(f"arrivals {text!r}: {error}") from None
    assert all(a <= b for a, b in pairwise(found))
    return found
