"""What plain first-come would have given on the same traffic: a queue that exists only on paper.

A fluid model of the pool's slots: arrivals are replayed in order, each taking the slot that is free first, for the
slot time it turned out to need (without what seams cost, its own and others': first-come would have cut nobody). A job
can only be replayed when it and everybody before it is over; what lies before the first unfinished job is *settled*,
and only settled jobs count. Two things follow from the figures: what the order has gained so far, and when a job is
due.

*Due times.* The promise ``tail: r`` is about the 99th percentile alone, so the due time is nearly the same for all: the
job's arrival + 0.92 r x (the shadow's 99th percentile over a long memory) - the work it still needs. The 0.92 makes up
for jobs that are due at the same moment. What lies beyond a 99th percentile may be late, so the 0.7 % of jobs with the
most work, which would block many others, have three times as long; that is also the bound on what they suffer.
Worse in the same runs (``benchmarks/tail.py``): a percentile of the recent past, because near saturation the percentile
*is* the worst busy period; a target per job (its own finish on paper, times r), which spends the allowance on jobs
first-come would have served late anyway; feedback from the achieved percentile, which adds noise and gains nothing.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heapreplace

from elis_gateway.core.job import Job, Outcome
from elis_gateway.core.lengths import Quantile

__all__ = ["Shadow"]

_MARGIN = 0.92
_LONGEST = 0.007
_LONGEST_MARGIN = 3.0
_COMPLETED = Outcome.COMPLETED
_OPEN = 10_000
"""A job that is served for ages must not keep ten thousand others from being settled."""


class Shadow:
    """First-come on paper, for one pool. Times in seconds."""

    __slots__ = ("_free", "_long", "_open", "_slot_time", "p99", "real_mean", "real_p99", "settled", "shadow_mean")

    def __init__(self) -> None:
        self._free = [0.0]
        """A heap: when each slot is free, after the settled jobs."""
        self._open: deque[Job] = deque()
        """Arrivals from the first unfinished job on."""
        self._slot_time: dict[str, float] = {}
        """Slot time of jobs that are over but not settled."""
        self._long = Quantile(1.0 - _LONGEST)
        """Work that only the longest jobs have, as estimated when they arrived."""
        self.settled = 0
        """Completed jobs that are settled."""
        self.p99 = Quantile(0.99)
        """Completion time under first-come."""
        self.real_p99 = Quantile(0.99)
        """Completion time of the same jobs as they were really served."""
        self.shadow_mean = 0.0
        self.real_mean = 0.0

    def resize(self, slots: int, now: float) -> None:
        """The pool has another number of slots from now on."""
        free = sorted(self._free)[: max(slots, 1)]
        free += [now] * (max(slots, 1) - len(free))
        heapify(free)
        self._free = free

    def arrived(self, job: Job) -> None:
        """In the order of arrival."""
        self._open.append(job)
        if len(self._open) > _OPEN:
            self._settle(self._open.popleft())

    def over(self, job: Job, slot_time: float) -> None:
        """``job`` is over; ``slot_time``: how long it would have held a slot uncut."""
        waiting = self._open
        if not waiting or job.arrival < waiting[0].arrival:
            return  # settled before its time
        self._slot_time[job.spec.id] = slot_time
        while waiting and waiting[0].outcome is not None:
            self._settle(waiting.popleft())

    def due(self, job: Job, remaining: float, ratio: float) -> float:
        """When ``job`` must start for the promise, with ``remaining`` seconds of work left.

        Before anything is settled every job is overdue: first-come until the traffic is known.
        """
        work = job.served + remaining
        if job.due is None:
            self._long.add(work)
        margin = _LONGEST_MARGIN if work > self._long.value and self._long.count > 100 else _MARGIN
        return job.arrival + margin * ratio * self.p99.value - remaining

    def _settle(self, job: Job) -> None:
        slot_time = self._slot_time.pop(job.spec.id, job.served)
        free = self._free
        arrival, finished = job.arrival, job.finished
        start = free[0] if free[0] > arrival else arrival
        end = start + slot_time
        heapreplace(free, end)
        if job.outcome is not _COMPLETED or finished is None:
            return
        response, real = end - arrival, finished - arrival
        self.p99.add(response)
        self.real_p99.add(real)
        self.settled += 1
        share = 1.0 / self.settled if self.settled < 10_000 else 1e-4
        self.shadow_mean += share * (response - self.shadow_mean)
        self.real_mean += share * (real - self.real_mean)
