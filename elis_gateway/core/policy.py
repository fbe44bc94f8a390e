"""The policies: a job and its pool in, a key in seconds out, lowest first. Never: the queue, other jobs, the predictor.

A key is made once and stays while the job waits. That works because aging is written as ``arrival - boost(remaining)``:
everyone ages at the same rate, so waiting never changes who is ahead of whom.
"""

from __future__ import annotations

from collections.abc import Callable
from math import expm1, log
from typing import Literal, Protocol

from elis_gateway.core.compiled import mypyc_attr
from elis_gateway.core.job import Job

__all__ = [
    "FCFS",
    "ISRTF",
    "LAS",
    "SJF",
    "Aging",
    "Policy",
    "PoolView",
    "RoundRobin",
    "make_policy",
    "remaining_tokens",
]


class PoolView(Protocol):
    """What a policy may know of the upstreams that serve a job's model."""

    @property
    def seconds_per_token(self) -> float:
        """Measured time per output token of one running job."""

    @property
    def slots(self) -> int:
        """Sequences the pool runs at once."""

    @property
    def gamma(self) -> float:
        """Decay rate of first-come's response tail, 1/s; 0.0 until known."""

    @property
    def long_answer(self) -> float | None:
        """95th percentile of the model's answer lengths in tokens; None until known."""


@mypyc_attr(native_class=False)
class Policy(Protocol):
    """Bring your own: two flags and one pure function."""

    needs_estimates: bool
    """Ask the predictor; without one, such a policy is first-come."""
    preempts: bool
    """Serve a job in windows, so that a better one may take its slot."""

    def key(self, job: Job, pool: PoolView, now: float) -> float:
        """Seconds; the waiting job with the lowest key runs next. Must depend on nothing but its arguments."""


def remaining_tokens(job: Job, pool: PoolView, index: bool = False) -> float:
    """Tokens left by the last estimate, counted down; at least 1, at most what is allowed.

    ``index``: the Gittins index in place of the mean, where the estimate has one. A job without any estimate counts as
    the model's 95th percentile, or what it is allowed where that is less or no lengths are known, so its key is finite.
    """
    estimate = job.estimate
    limit = job.spec.limit
    attained = job.attained
    if estimate is None:
        long_answer = pool.long_answer
        if long_answer is None:
            return float(limit - attained) if limit is not None and limit > attained else 1000.0
        left = long_answer - attained
    else:
        best = estimate.gittins if index else None
        left = (estimate.remaining if best is None else best) - (attained - job.estimate_at)
    if limit is not None and left > limit - attained:
        left = float(limit - attained)
    return left if left > 1.0 else 1.0


@mypyc_attr(allow_interpreted_subclasses=True)
class FCFS:
    """First come, first served."""

    name = "fcfs"
    needs_estimates = False
    preempts = False

    def __init__(self) -> None:
        """No options."""

    def key(self, job: Job, pool: PoolView, now: float) -> float:
        return job.arrival


@mypyc_attr(allow_interpreted_subclasses=True)
class RoundRobin:
    """Everyone gets a window in turn: the value of preempting without predicting."""

    name = "round_robin"
    needs_estimates = False
    preempts = True

    def __init__(self) -> None:
        """No options."""

    def key(self, job: Job, pool: PoolView, now: float) -> float:
        return now


@mypyc_attr(allow_interpreted_subclasses=True)
class LAS:
    """Least attained service first (foreground-background): short jobs are found by running them."""

    name = "las"
    needs_estimates = False
    preempts = True

    def __init__(self) -> None:
        """No options."""

    def key(self, job: Job, pool: PoolView, now: float) -> float:
        return job.attained * pool.seconds_per_token


@mypyc_attr(allow_interpreted_subclasses=True)
class Aging:
    """How the time waited counts against the work left: ``arrival - boost(remaining seconds)``.

    ``none``: not at all, the key is the remaining work. ``linear``: boost = -remaining / a, between ISRTF (a near 0)
    and first-come (large a). ``boost``: (1/g) log(1 / (1 - exp(-g remaining / k))), k slots, g = ``factor`` x gamma
    (Yu and Scully, "Strongly tail-optimal scheduling in the light-tailed M/G/1", 2024): short jobs jump far, long ones
    are nearly first-come.
    """

    __slots__ = ("a", "factor", "kind")

    def __init__(
        self, kind: Literal["none", "linear", "boost"] = "none", *, a: float = 0.2, factor: float = 0.35
    ) -> None:
        if kind not in ("none", "linear", "boost"):
            raise ValueError(f"aging kind {kind!r}: expected none, linear or boost")
        if a <= 0 or factor <= 0:
            raise ValueError("aging: a and factor must be positive")
        self.kind = kind
        self.a = a
        self.factor = factor

    def key(self, job: Job, seconds: float, pool: PoolView) -> float:
        if self.kind == "none":
            return seconds
        if self.kind == "linear":
            return job.arrival + seconds / self.a
        # 1/g is the scale over which waiting counts; without a measured gamma a pool-wide 100 s keeps keys comparable.
        g = self.factor * (pool.gamma or 0.01)
        x = g * seconds / max(pool.slots, 1)
        return job.arrival + log(-expm1(-x)) / g


@mypyc_attr(allow_interpreted_subclasses=True)
class SJF:
    """Shortest predicted job first, never interrupted."""

    name = "sjf"
    needs_estimates = True
    preempts = False

    def __init__(self, order: Literal["mean", "gittins"] = "gittins", aging: Aging | None = None) -> None:
        if order not in ("mean", "gittins"):
            raise ValueError(f"order {order!r}: expected mean or gittins")
        self.order = order
        self.aging = aging or Aging()
        self._index = order == "gittins"

    def key(self, job: Job, pool: PoolView, now: float) -> float:
        seconds = remaining_tokens(job, pool, self._index) * pool.seconds_per_token
        return seconds if self.aging.kind == "none" else self.aging.key(job, seconds, pool)


@mypyc_attr(allow_interpreted_subclasses=True)
class ISRTF(SJF):
    """Iterative shortest remaining time first (ELIS, arXiv 2505.09142): re-predicted, re-ordered every window."""

    name = "isrtf"
    preempts = True


_BUILT_IN: dict[str, Callable[..., Policy]] = {
    "fcfs": FCFS,
    "round_robin": RoundRobin,
    "las": LAS,
    "sjf": SJF,
    "isrtf": ISRTF,
}


def make_policy(kind: str, **options: object) -> Policy:
    """A built-in policy by name. Raises ValueError for a bad name or value, TypeError for an unknown option."""
    try:
        build = _BUILT_IN[kind]
    except KeyError:
        raise ValueError(f"unknown policy {kind!r}: expected one of {', '.join(_BUILT_IN)}") from None
    return build(**options)
