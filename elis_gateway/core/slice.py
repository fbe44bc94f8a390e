"""A slice (what to run) and its result (what came back). Knows nothing of how it is run."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from elis_gateway.core.job import Job

__all__ = ["Slice", "SliceEnd", "SliceResult"]


class SliceEnd(StrEnum):
    """Why a slice ended; decides what becomes of its job."""

    FINISHED = "finished"
    """The answer is complete: the model stopped, or the client's token limit is reached."""
    WINDOW = "window"
    """The slice's own token limit was reached; the answer goes on."""
    PREEMPTED = "preempted"
    """Closed because the scheduler asked for it (Preempt or Abort)."""
    INTERRUPTED = "interrupted"
    """The upstream failed or vanished; every kept token is safe and the job can continue anywhere."""
    FAILED = "failed"
    """Refused or broken in a way no other call can mend."""


class Slice(NamedTuple):
    """Run this job for at most ``limit`` more tokens on this upstream. A slot is held by a slice, not by a job."""

    id: int
    job: Job
    upstream: str
    limit: int | None
    """Tokens to ask for; None: all the engine allows."""
    window: int | None
    """Report ``window_passed`` after every so many tokens; None: never."""
    priority: int = 0
    """For engines that order their own queue: lower first."""


class SliceResult(NamedTuple):
    """What a slice brought. ``attained`` is the job's total of kept tokens, all slices together."""

    end: SliceEnd
    attained: int
    cause: str = ""
    """Low-cardinality reason where ``end`` is INTERRUPTED or FAILED."""
    limit: int | None = None
    """Most tokens the answer may have, where the engine's context has revealed it."""
