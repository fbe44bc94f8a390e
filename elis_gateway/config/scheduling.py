"""The order, the windows, the classes and the queue."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag
from pydantic import model_validator as validates_all

from elis_gateway.config.section import EXTERNAL, Name, NonNegative, Rank, Seconds, Section, Tokens, by_name, kind_among

__all__ = ["ExternalPolicy", "Scheduler"]


class FCFS(Section):
    """First come, first served."""

    kind: Literal["fcfs"]


class RoundRobin(Section):
    """Windows in turn, without any estimate."""

    kind: Literal["round_robin"]


class LAS(Section):
    """Least attained service first: whoever has received the fewest tokens so far."""

    kind: Literal["las"]


class SJF(Section):
    """Shortest predicted answer first, estimated once and never interrupted."""

    kind: Literal["sjf"]
    order: Literal["mean", "gittins"] = "gittins"
    """Order by the estimate's mean, or by its Gittins index where the predictor knows a distribution."""


class ISRTF(Section):
    """Shortest predicted remaining time first, re-estimated after every window."""

    kind: Literal["isrtf"]
    order: Literal["mean", "gittins"] = "gittins"
    """Order by the estimate's mean, or by its Gittins index where the predictor knows a distribution."""


class ExternalPolicy(Section):
    """Code of your own."""

    kind: Name
    """`package.module:Class`, or the name of an entry point in the group `elis_gateway.policies`."""
    options: dict[str, Any] = {}
    """Keyword arguments for its constructor."""


Policy = Annotated[
    Annotated[FCFS, Tag("fcfs")]
    | Annotated[RoundRobin, Tag("round_robin")]
    | Annotated[LAS, Tag("las")]
    | Annotated[SJF, Tag("sjf")]
    | Annotated[ISRTF, Tag("isrtf")]
    | Annotated[ExternalPolicy, Tag(EXTERNAL)],
    kind_among(("fcfs", "round_robin", "las", "sjf", "isrtf"), "policies"),
    BeforeValidator(by_name),
]


class NoAging(Section):
    """A waiting job's key is its remaining work alone. Long jobs may wait as long as short ones keep coming."""

    kind: Literal["none"]


class LinearAging(Section):
    """Key: arrival + remaining seconds / a. Between FCFS (a large) and plain ISRTF (a small)."""

    kind: Literal["linear"]
    a: Annotated[float, Field(gt=0)] = 0.2
    """Seconds of remaining work that one second of waiting makes up for."""


class BoostAging(Section):
    """Boost (Yu and Scully 2024): short jobs jump far, long ones are nearly first-come."""

    kind: Literal["boost"]
    factor: Annotated[float, Field(gt=0)] = 0.35
    """g as a multiple of the decay rate γ, which is learned from the traffic. Smaller: a better mean; larger:
    a better tail."""


Aging = Annotated[
    NoAging | LinearAging | BoostAging,
    Field(discriminator="kind"),
    BeforeValidator(by_name),
]


class Queue(Section):
    """What may wait, and for how long."""

    max_jobs: Annotated[int, Field(ge=1)] = 10_000
    """Jobs waiting before new ones are refused with 429."""
    ttl: Seconds | None = None
    """Longest time in the queue before a job that never ran is given up. Default: no limit."""
    unavailable_timeout: Seconds = 30.0
    """How long jobs wait while no upstream of their model is healthy before they get 503."""


class Scheduler(Section):
    """Who goes next, for how long, and who may be interrupted."""

    policy: Policy = ISRTF(kind="isrtf")
    """The order."""
    window: Tokens = 50
    """Tokens between two estimates of one job."""
    mode: Literal["fixed", "elastic"] = "elastic"
    """fixed: every upstream call asks for at most one window (the published method). elastic: a call goes on
    until a waiting job deserves its slot by more than the seam's cost."""
    rescore: Literal["always", "contended"] = "contended"
    """always: a job waits for a fresh estimate after every fixed window, whether or not anyone else waits.
    contended: only when somebody waits."""
    seam_cost: Literal["auto"] | NonNegative = "auto"
    """What interrupting and resuming costs, in decoded tokens. auto: learned while serving."""
    overcommit: Annotated[int, Field(ge=0)] | None = None
    """Calls kept in flight beyond an upstream's slots, unless the upstream says otherwise. One in hand lets the engine
    refill a slot in the step in which it comes free; more pay only where the engine orders its queue by priority.
    Default: 1, and 0 with fixed windows or fair sharing."""
    aging: Aging = BoostAging(kind="boost")
    """How waiting makes up for length; for the policies that order by estimates (sjf, isrtf)."""
    tail: Annotated[float, Field(ge=1)] | None = None
    """Promise: the 99th percentile of completion time stays within this multiple of what plain first-come
    would have given on the same traffic. Default: no promise."""
    classes: dict[Name, Rank] = {"default": 0}
    """Priority classes and their ranks, lower first; a client names its class in X-Elis-Class. Classes stand
    above the policy."""
    default_class: Name = "default"
    """The class of a request that names none."""
    class_tail: dict[Name, Annotated[float, Field(ge=1)]] = {}
    """The promise of single classes, in place of `tail`: {interactive: 1.1}. It is held within the class: a better
    class may still go first."""
    fair: bool = False
    """Share fairly between keys, above the policy and below the classes: in every round each key has room for
    `fair_round` tokens times its `weight`, and the policy orders within the round. Not together with overcommit."""
    fair_round: Tokens = 2000
    """Tokens of answers a key has in a round. Smaller: fairer sooner; larger: more for the policy to order."""
    queue: Queue = Queue()
    retries: Annotated[int, Field(ge=0)] = 3
    """Interrupted calls in a row without a token of progress before a job fails."""
    retry_budget: NonNegative = 0.2
    """Calls that may be repeated without progress, as a share of all jobs; 100 more are allowed at the start, and one
    more every second. When it is spent, failures are told at once instead of multiplying the load."""

    @validates_all(mode="after")
    def _default_class_exists(self) -> Scheduler:
        if self.default_class not in self.classes:
            raise ValueError(f"expected default_class to be one of the classes ({', '.join(self.classes)})")
        if unknown := sorted(set(self.class_tail) - set(self.classes)):
            raise ValueError(f"expected class_tail to name classes of classes; unknown: {', '.join(unknown)}")
        if self.fair and self.overcommit:
            raise ValueError("expected fair or overcommit, not both: an engine's own queue knows no rounds")
        return self

    @property
    def in_hand(self) -> int:
        """``overcommit``, or its default."""
        if self.overcommit is not None:
            return self.overcommit
        return 0 if self.fair or self.mode == "fixed" else 1
