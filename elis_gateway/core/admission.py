"""How much may wait, and for how long: accept, or say why not. Never: HTTP 429."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from heapq import heapify, heappop, heappush
from typing import Literal

__all__ = ["Alarms", "Reason"]

Reason = Literal["queue_full", "queue_ttl", "deadline", "unavailable"]


class Alarms:
    """When which job must be looked at again. Fixed delays are queues (they fall due in order), the rest is a heap.

    Holds job ids, not jobs; an alarm of a job that is gone is dropped when it falls due.
    """

    __slots__ = ("_deadlines", "_limit", "_unavailable", "_waits", "set")

    def __init__(self) -> None:
        self._waits: deque[tuple[float, str]] = deque()
        self._unavailable: deque[tuple[float, str]] = deque()
        self._deadlines: list[tuple[float, str]] = []
        self._limit = 1000
        self.set = False
        """Is any alarm set?"""

    def wait_until(self, when: float, job_id: str) -> None:
        """The job must have started by then."""
        self._waits.append((when, job_id))
        self.set = True

    def capacity_until(self, when: float, job_id: str) -> None:
        """Some upstream must be up by then."""
        self._unavailable.append((when, job_id))
        self.set = True

    def done_until(self, when: float, job_id: str) -> None:
        """The job must be over by then."""
        heappush(self._deadlines, (when, job_id))
        self.set = True

    def forget_all_but(self, jobs: Container[str]) -> None:
        """Drop the alarms of other jobs, once most are: an alarm may be set for long after its job is over."""
        if len(self._waits) + len(self._unavailable) + len(self._deadlines) < self._limit:
            return
        self._waits = deque(a for a in self._waits if a[1] in jobs)
        self._unavailable = deque(a for a in self._unavailable if a[1] in jobs)
        self._deadlines = [a for a in self._deadlines if a[1] in jobs]
        heapify(self._deadlines)
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
        for queue, reason in ((self._waits, "queue_ttl"), (self._unavailable, "unavailable")):
            while queue and queue[0][0] <= now:
                found.append((queue.popleft()[1], reason))  # type: ignore[arg-type]
        while self._deadlines and self._deadlines[0][0] <= now:
            found.append((heappop(self._deadlines)[1], "deadline"))
        return found
