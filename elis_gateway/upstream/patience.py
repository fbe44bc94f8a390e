"""How long an upstream may be silent before its call counts as hung: configured, and shorter where it is learned.

Knows: how long first tokens and gaps took lately. Never: clocks, sockets.

An engine that answers within a second all day does not need five minutes to be found dead. What is learned is a
multiple of the longest silence among the last calls that ended well, so a slow hour makes it patient again, and so
does every call that was given up too early.
"""

from __future__ import annotations

from collections import deque

from elis_gateway import config

__all__ = ["Patience"]

_FACTOR = 10.0
_CALLS = 256
"""Calls remembered."""
_ENOUGH = 32
"""Calls before anything is learned from them."""
_LEAST_FIRST = 20.0
_LEAST_GAP = 5.0
"""Seconds below which nothing counts as hung, however quick it usually is."""


class _Longest:
    """The longest of the last values, and the limit that follows from it."""

    __slots__ = ("_least", "_limit", "_stale", "_values")

    def __init__(self, least: float) -> None:
        self._least = least
        self._values: deque[float] = deque(maxlen=_CALLS)
        self._limit = 0.0
        self._stale = 0

    def add(self, value: float) -> None:
        self._values.append(value)
        self._stale -= 1
        if value * _FACTOR > self._limit:
            self._stale = 0

    def limit(self, configured: float) -> float:
        """Seconds; 0: any. Never above what is configured."""
        if len(self._values) < _ENOUGH:
            return configured
        if self._stale <= 0:
            self._limit = max(_FACTOR * max(self._values), self._least)
            self._stale = _ENOUGH
        return min(self._limit, configured) if configured > 0 else self._limit


class Patience:
    """One upstream's limits in seconds."""

    __slots__ = ("_first", "_gap", "timeouts")

    def __init__(self, timeouts: config.Timeouts) -> None:
        self.timeouts = timeouts
        self._first = _Longest(_LEAST_FIRST)
        self._gap = _Longest(_LEAST_GAP)

    def first_byte(self) -> float:
        """Longest wait for the first byte of a stream; 0: any."""
        configured = self.timeouts.first_byte
        return self._first.limit(configured) if self.timeouts.learn else configured

    def inter_token(self) -> float:
        """Longest silence within a stream; 0: any."""
        configured = self.timeouts.inter_token
        return self._gap.limit(configured) if self.timeouts.learn else configured

    def heard(self, first: float, gap: float) -> None:
        """A stream ended well: how long its first byte took, and its longest silence after that."""
        self._first.add(first)
        self._gap.add(gap)

    def gave_up(self, limit: float, *, first: bool) -> None:
        """A call was given up after so much silence: perhaps too early."""
        (self._first if first else self._gap).add(limit)
