"""The scheduler's dials. Never: what turning one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SchedulerConfig"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Times in seconds, lengths in tokens."""

    window: int = 50
    mode: Literal["fixed", "elastic"] = "elastic"
    """``fixed``: every call asks for at most one window. ``elastic``: for all that remains, and yields when asked."""
    estimates: bool = True
    """There is a predictor. Without one, a policy that needs estimates is first-come."""
    rescore: Literal["always", "contended"] = "contended"
    """Fixed windows: hold the slot for a fresh estimate after every window, or only while somebody waits for it."""
    seam_cost: float | None = None
    """Tokens of work that ending one call and starting another costs; None: learned from continuations."""
    tail: float | None = None
    """Keep the 99th percentile of completion time within this ratio of what first-come would have given."""
    queue_limit: int | None = None
    """Jobs that may wait; further ones are rejected."""
    queue_ttl: float | None = None
    """Longest wait for the first slot."""
    unavailable_timeout: float = 30.0
    """Longest wait while no upstream of the model is up."""
    retries: int = 3
    """Interruptions in a row, without a token of progress, that a job survives."""
    seconds_per_token: float = 0.02
    """Assumed pace of one running job until it is measured."""
    prefill_tokens_per_second: float = 5000.0
    """Prices moving a job to a replica that has not cached its prompt."""
