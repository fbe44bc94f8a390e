"""Is there one engine behind an upstream's address? Told by what its continuations find in the prefix cache.

Knows: legs as they end. Never: calls, sockets, what is done about it.

A continuation's prompt is the last call's prompt and answer, so the engine that ran the last call has nearly all of it
cached. Where many find nothing although others find all, something in between sends them elsewhere: a load balancer, a
data-parallel engine without ranks, or a cache too small for what waits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

from elis_gateway.flight import Flight, Leg, Observer

__all__ = ["Warmth"]

_log = logging.getLogger("elis_gateway.upstream")

_WORTH = 64
"""Tokens of a prompt below which a cache of blocks says little."""
_LOOKED_AT = 64
"""Continuations remembered for each upstream."""
_ENOUGH = 16
"""Continuations before anything is said."""
_SUSPECT, _FINE = 0.2, 0.05
"""Cold shares above which an upstream is suspected, and below which it no longer is."""


class Warmth(Observer):
    """Keeps the last continuations of every upstream: warm or cold."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[bool]] = {}
        self._suspected: set[str] = set()

    def slice_ended(self, flight: Flight, leg: Leg) -> None:
        """A call is over; if it went on where the one before it had been, what it found there counts."""
        if leg.cached is None or flight.legs[-2].upstream != leg.upstream:
            return
        cached, prompt = leg.cached
        if prompt < _WORTH:
            return
        seen = self._seen.get(leg.upstream)
        if seen is None:
            seen = self._seen[leg.upstream] = deque(maxlen=_LOOKED_AT)
        seen.append(cached < prompt / 2)
        self._judge(leg.upstream, seen)

    def cold(self) -> Iterable[tuple[str, float]]:
        """The share of each upstream's last continuations that found their prompt not cached."""
        return [(upstream, sum(seen) / len(seen)) for upstream, seen in self._seen.items() if len(seen) >= _ENOUGH]

    def suspected(self, upstream: str) -> bool:
        """Do continuations sent there seem to land on several engines?"""
        return upstream in self._suspected

    def forget(self, upstream: str) -> None:
        """It is gone."""
        self._seen.pop(upstream, None)
        self._suspected.discard(upstream)

    def _judge(self, upstream: str, seen: deque[bool]) -> None:
        if len(seen) < _ENOUGH:
            return
        share = sum(seen) / len(seen)
        if share <= _FINE:
            self._suspected.discard(upstream)
        elif share >= _SUSPECT and upstream not in self._suspected:
            self._suspected.add(upstream)
            _log.warning(
                "upstream %s: %.0f %% of the last %d continuations did not find their prompt cached where it had just "
                "been: %s",
                upstream, 100 * share, len(seen),
                "a load balancer or a data-parallel engine behind one address (name the engines themselves, or "
                "data_parallel_size), or a prefix cache too small" if share < 1.0
                else "its prefix cache seems to be off, so every seam costs a whole prefill",
            )  # fmt: skip
