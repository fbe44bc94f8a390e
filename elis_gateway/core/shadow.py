"""What plain first-come would have given on the same traffic: a queue that exists only on paper.

A fluid model of the pool's slots: arrivals are replayed in order, each taking the slot that is free first, for the
slot time it turned out to need (without what seams cost, its own and others': first-come would have cut nobody). A job
can only be replayed when it and everybody before it is over; what lies before the first unfinished job is *settled*,
and only settled jobs count. Two things follow from the figures: what the order has gained so far, and when a job is
due.

*Due times.* The promise ``tail: r`` is about the 99th percentile alone, so the due time is nearly the same for all: the
job's arrival + 0.88 r x (the shadow's 99th percentile over a long memory) - the work it still needs. The 0.88 makes up
for jobs that are due at the same moment. What lies beyond a 99th percentile may be late, so the 0.7 % of jobs with the
most work, which would block many others, have three times as long; that is also the bound on what they suffer.

In overload, and in a busy period longer than any before, that percentile is of the past: nearly everybody would be
overdue, and the order first-come again. There the due time counts from what first-come would make of the job itself:
0.78 r x (its own completion time on paper, from what everybody before it still needs by the estimates).

Worse in the same runs (``benchmarks/tail.py``): a percentile of the recent past, because near saturation the percentile
*is* the worst busy period; the target per job alone, which spends the allowance on jobs first-come would have served
late anyway; feedback from the achieved percentile, which adds noise and gains nothing.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heapreplace

from elis_gateway.core.job import Job, Outcome
from elis_gateway.core.lengths import Quantile

__all__ = ["Shadow"]

_MARGIN = 0.88
_OWN_MARGIN = 0.78
_LONGEST = 0.007
_LONGEST_MARGIN = 3.0
_KEEP = 0.999
"""What is left, with every job, of what estimates were worth before."""
_COMPLETED = Outcome.COMPLETED
_OPEN = 10_000
"""A job that is served for ages must not keep ten thousand others from being settled."""


class _OnPaper:
    """What first-come would have to do for a job that is not settled; seconds of slot time."""

    __slots__ = ("response", "said", "work")

    def __init__(self, said: float, work: float, response: float) -> None:
        self.said = said
        """As estimated when it arrived."""
        self.work = work
        """As it is known now; part of the backlog."""
        self.response = response
        """Its completion time on paper, as expected when it arrived."""


class Shadow:
    """First-come on paper, for one pool. Times in seconds."""

    __slots__ = (
        "_backlog", "_expected", "_free", "_long", "_open", "_said", "_slot_time", "_turned_out", "p99", "real_mean",
        "real_p99", "settled", "shadow_mean",
    )  # fmt: skip

    def __init__(self) -> None:
        self._free = [0.0]
        """A heap: when each slot is free, after the settled jobs."""
        self._open: deque[Job] = deque()
        """Arrivals from the first unfinished job on."""
        self._slot_time: dict[str, float] = {}
        """Slot time of jobs that are over but not settled."""
        self._expected: dict[str, _OnPaper] = {}
        """Jobs in ``_open`` that have been asked about."""
        self._backlog = 0.0
        """Slot time of them all."""
        self._said = self._turned_out = 0.0
        """Slot time of recent jobs, as estimated when they arrived and as it was."""
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
        known = self._expected.get(job.spec.id)
        if known is not None:
            self._backlog += slot_time - known.work
            known.work = slot_time
            if job.outcome is _COMPLETED:
                self._said = _KEEP * self._said + known.said
                self._turned_out = _KEEP * self._turned_out + slot_time
        while waiting and waiting[0].outcome is not None:
            self._settle(waiting.popleft())

    def due(self, job: Job, remaining: float, ratio: float) -> float:
        """When ``job`` must start for the promise, with ``remaining`` seconds of work left."""
        work = job.served + remaining
        if job.due is None:
            self._long.add(work)
        margin = _LONGEST_MARGIN if work > self._long.value and self._long.count > 100 else _MARGIN
        within = max(margin * self.p99.value, _OWN_MARGIN * self._response(job, work))
        return job.arrival + ratio * within - remaining

    def _response(self, job: Job, said: float) -> float:
        """The completion time that first-come would give it, as expected when it arrived; ``said``: its work by
        the estimate of now.

        A fluid again: what everybody before it needs, spread over the slots. That is too little where slots would have
        been idle meanwhile, and without those who never waited or were promised nothing: then the percentile counts.
        """
        work = said * self._turned_out / self._said if self._said > 0.0 else said
        known = self._expected.get(job.spec.id)
        if known is not None:
            self._backlog += work - known.work
            known.work = work
            return known.response
        if not self._open or job.arrival < self._open[0].arrival:
            return 0.0  # settled before its time
        first, busy = self._open[0].arrival, self._backlog
        for free in self._free:
            if free > first:
                busy += free - first
        response = max(first + busy / len(self._free) - job.arrival, 0.0) + work
        self._expected[job.spec.id] = _OnPaper(said, work, response)
        self._backlog += work
        return response

    def _settle(self, job: Job) -> None:
        slot_time = self._slot_time.pop(job.spec.id, job.served)
        known = self._expected.pop(job.spec.id, None)
        if known is not None:
            self._backlog = self._backlog - known.work if self._expected else 0.0
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
