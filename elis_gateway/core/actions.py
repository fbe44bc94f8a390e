"""What the scheduler wants done. A driver performs actions in order; the core never does."""

from __future__ import annotations

from dataclasses import dataclass

from elis_gateway.core.job import Job
from elis_gateway.core.slice import Slice

__all__ = ["Abort", "Action", "AskEstimate", "Finish", "Preempt", "Run"]


@dataclass(slots=True)
class AskEstimate:
    """Say how many tokens remain of this job: answer with ``Scheduler.estimated``, at once or later."""

    job: Job
    pressing: bool = True
    """False: the job runs and nobody waits for its slot. The answer may come late, or not at all."""


@dataclass(slots=True)
class Run:
    """Start this slice. Answer with ``slice_started``, ``window_passed`` and exactly one ``slice_ended``."""

    slice: Slice


@dataclass(slots=True)
class Preempt:
    """Close this slice's call and keep every token that arrived. Its ``slice_ended`` still comes."""

    slice_id: int


@dataclass(slots=True)
class Abort:
    """Close this slice's call; its job is over. Its ``slice_ended`` still comes and frees the slot."""

    slice_id: int


@dataclass(slots=True)
class Finish:
    """The job is over: ``job.outcome`` and ``job.cause`` say how."""

    job: Job


Action = AskEstimate | Run | Preempt | Abort | Finish
