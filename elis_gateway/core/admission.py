"""How much may wait, and for how long: accept, or say why not. Never: HTTP 429."""

from __future__ import annotations

from collections.abc import Container
from heapq import heapify, heappop, heappush
from typing import Literal

__all__ = ["Alarms", "Reason"]

Reason = Literal["queue_full", "queue_ttl", "deadline", "unavailable"]


class Alarms:
    """When which job must be looked at again. All are heaps: delays that hold for everybody fall due in order, but a
    shorter one may come to hold while longer ones run.

    Holds job ids, not jobs; an alarm of a job that is gone is dropped when it falls due.
    """

    __slots__ = ("_deadlines", "_limit", "_unavailable", "_waits", "set")

    def __init__(self) -> None:
        self._waits: list[tuple[float, str]] = []
        self._unavailable: list[tuple[float, str]] = []
        self._deadlines: list[tuple[float, str]] = []
        self._limit = 1000
        self.set = False
        """Is any alarm set?"""

    def wait_until(self, when: float, job_id: str) -> None:
        """The job must have started by then."""
        heappush(self._waits, (when, job_id))
        self.set = True

    def capacity_until(self, when: float, job_id: str) -> None:
        """Some upstream must be up by then."""
        heappush(self._unavailable, (when, job_id))
        self.set = True

    def done_until(self, when: float, job_id: str) -> None:
        """The job must be over by then."""
        heappush(self._deadlines, (when, job_id))
        self.set = True

    def forget_all_but(self, jobs: Container[str]) -> None:
        """Drop the alarms of other jobs, once most are: an alarm may be set for long after its job is over."""
        if len(self._waits) + len(self._unavailable) + len(self._deadlines) < self._limit:
            return
        self._waits = [a for a in self._waits if a[1] in jobs]
        self._unavailable = [a for a in self._unavailable if a[1] in jobs]
        self._deadlines = [a for a in self._deadlines if a[1] in jobs]
        for heap in (self._waits, self._unavailable, self._deadlines):
            heapify(heap)
        self._limit = 1000 + 2 * (len(self._waits) + len(self._unavailable) + len(self._deadlines))

    def next(self) -> float | None:
        """The earliest alarm."""
        if not self.set:
            return None
        times = [q[0][0] for q in (self._waits, self._unavailable, self._deadlines) if q]
        if not times:
            self.set = False
            return None
        return min(times)

    def due(self, now: float) -> list[tuple[str, Reason]]:
        """Take every alarm that has fallen due, in order."""
        found: list[tuple[str, Reason]] = []
        heaps: tuple[tuple[list[tuple[float, str]], Reason], ...] = (
            (self._waits, "queue_ttl"), (self._unavailable, "unavailable"), (self._deadlines, "deadline"),
        )  # fmt: skip
        for heap, reason in heaps:
            while heap and heap[0][0] <= now:
                found.append((heappop(heap)[1], reason))
        return found
