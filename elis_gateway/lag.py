"""How late the event loop runs what is due: the first sign of a gateway that cannot keep up.

Knows: one timer. Never: who wants to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["LagMeter"]

_EVERY = 0.25
"""Seconds between two looks: often enough for a percentile over a minute, too rare to cost anything."""


class LagMeter:
    """Tells ``observe``, four times a second, how many seconds late its own timer was run."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to look."""
        self._set()

    def stop(self) -> None:
        """Look no more; again is fine."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        self._due = self._loop.time() + _EVERY
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._observe(max(self._loop.time() - self._due, 0.0))
        self._set()
