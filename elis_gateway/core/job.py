"""What a job is, the states it passes through, and which moves between them are legal.

Knows: JobSpec, Job, JobState, Outcome, the transition table. Never: wire formats, text, clocks.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from elis_gateway.core.placement import Pool, Upstream

__all__ = ["Estimate", "Job", "JobSpec", "JobState", "Outcome"]


class JobState(StrEnum):
    """Who owns the job now: the predictor, the ready queue, an upstream slot, or nobody."""

    ESTIMATING = "estimating"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"


class Outcome(StrEnum):
    """How a job ended. Low cardinality, a metric label; the cause travels separately."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"
    REJECTED = "rejected"


class JobSpec(NamedTuple):
    """What the client asked, wire-neutral and immutable."""

    id: str
    model: str
    """The pool: every upstream that serves this name may run the job."""
    app: str = ""
    """Whose history of answer lengths applies (client key, system prompt, route, ... condensed to one string)."""
    prompt: str = ""
    """The text a predictor may read."""
    prompt_tokens: int = 0
    """Length of the prompt in tokens, as well as it is known; prices a move to a cold replica."""
    limit: int | None = None
    """Most tokens the answer may have; None: only the engine's context bounds it."""
    rank: int = 0
    """Priority class as a number, lower first; classes stand above the policy."""
    deadline: float | None = None
    """Absolute time (the clock of ``now``) after which the answer is worth nothing."""
    sliceable: bool = True
    """May the answer be produced by several calls?"""
    conversation: str | None = None
    """Jobs of one conversation share a prefix; the next turn prefers the replica that ran the last."""
    payload: object | None = None
    """Opaque to the core: what the driver needs to run the job."""
    tail: float | None = None
    """Its class's own promise, instead of the scheduler's ``tail``."""


class Estimate(NamedTuple):
    """Advice on how much of a job is left, in tokens of the served model."""

    remaining: float
    """Mean remaining tokens, within 1 .. tokens still allowed."""
    gittins: float | None = None
    """Gittins index of the remaining length (tokens) where the predictor knows a distribution."""
    source: str = ""
    """Who said so: a metric label and a line in the job's history."""


class Job:
    """The mutable record of one request's life. Only the scheduler changes it; drivers read it.

    Timestamps are stored, durations derived. Token counts are of the answer, not the prompt.
    """

    __slots__ = (
        "arrival", "attained", "avoid", "cause", "disturbed", "due", "entry", "estimate", "estimate_at", "failures",
        "finished", "first_run", "first_token", "held", "home", "outcome", "pool", "preemptions", "ready_since",
        "seams", "served", "slice", "slices", "spec", "state", "waited",
    )  # fmt: skip

    def __init__(self, spec: JobSpec, arrival: float, pool: Pool) -> None:
        self.spec = spec
        self.arrival = arrival
        self.pool = pool
        """The upstreams that serve its model."""
        self.state = JobState.ESTIMATING
        self.attained = 0
        """Answer tokens that arrived and were kept."""
        self.estimate: Estimate | None = None
        self.estimate_at = 0
        """``attained`` when the estimate was made; it is counted down from there."""
        self.home: str | None = None
        """The upstream whose prefix cache is warm for this job."""
        self.avoid: str | None = None
        """The upstream that failed it last; left alone while another is up."""
        self.held: Upstream | None = None
        """Where a slot is kept free until its fresh estimate has come."""
        self.slice: int | None = None
        """Id of the slice in flight."""
        self.slices = 0
        self.preemptions = 0
        self.failures = 0
        """Interruptions in a row without a token of progress."""
        self.entry = 0
        """Sequence number of the live heap entry; others are stale."""
        self.due: float | None = None
        self.ready_since = arrival
        self.waited = 0.0
        """Seconds spent READY so far."""
        self.served = 0.0
        """Seconds its slices held a slot."""
        self.seams = 0
        """Times it went on after an interruption or a window's end; a call that never began is none."""
        self.disturbed = 0
        """Continuations of others that began beside its slices."""
        self.first_run: float | None = None
        self.first_token: float | None = None
        self.finished: float | None = None
        self.outcome: Outcome | None = None
        self.cause = ""

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def allowed(self) -> int | None:
        """Tokens it may still produce; None where only the engine knows."""
        return None if self.spec.limit is None else self.spec.limit - self.attained

    @property
    def jct(self) -> float | None:
        """Job completion time in seconds."""
        return None if self.finished is None else self.finished - self.arrival

    def __repr__(self) -> str:
        return f"<Job {self.spec.id} {self.state} attained={self.attained} slices={self.slices}>"
