"""Upstream slots: who holds them, which upstream a job should wait for. Never: URLs, health probing."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["UpstreamInfo"]


class UpstreamInfo(NamedTuple):
    """What the scheduler must know of an upstream."""

    id: str
    models: frozenset[str]
    """Every name a job's ``model`` may have to run here."""
    slots: int
    """Sequences the engine runs at once; 0: down or draining."""
    overcommit: int = 0
    """Calls to keep in flight beyond ``slots``, waiting in the engine's own queue."""
    orders: bool = False
    """The engine orders its waiting calls by ``Slice.priority`` (seen in its behaviour, not believed)."""
