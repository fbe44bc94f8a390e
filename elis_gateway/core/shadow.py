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

In overload that percentile is of the past: nearly everybody would be overdue, and the order first-come again. There the
due time counts from what first-come would make of the job itself: 0.85 r x (its own completion time on paper, from what
everybody before it still needs by the estimates) x the share of recent arrivals whose own is beyond the percentile:
nearly all in overload, and otherwise so few that the percentile decides.

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

_MARGIN = 0.92
_OWN_MARGIN = 0.85
_RECENT = 1000
"""Arrivals."""
_LONGEST = 0.007
_LONGEST_MARGIN = 3.0
_KEEP = 0.999
"""What is left, with every job, of what estimates were worth before."""
_COMPLETED = Outcome.COMPLETED
_OPEN = 10_000
"""A job that is served for ages must not keep ten thousand others from being settled."""


class _OnPaper:
    """What is to be done for a job that is not over; seconds of slot time."""

    __slots__ = ("left", "response", "said")

    def __init__(self, said: float, left: float, response: float) -> None:
        self.said = said
        """As estimated when it arrived."""
        self.left = left
        """As it is known now; part of the backlog."""
        self.response = response
        """Its completion time on paper, as expected when it arrived."""


class Shadow:
    """First-come on paper, for one pool. Times in seconds."""

    __slots__ = (
        "_backlog", "_expected", "_free", "_long", "_open", "_said", "_slot_time", "_turned_out", "beyond", "p99",
        "real_mean", "real_p99", "settled", "shadow_mean",
    )  # fmt: skip

    def __init__(self) -> None:
        self._free = [0.0]
        """A heap: when each slot is free, after the settled jobs."""
        self._open: deque[Job] = deque()
        """Arrivals from the first unfinished job on."""
        self._slot_time: dict[str, float] = {}
        """Slot time of jobs that are over but not settled."""
        self._expected: dict[str, _OnPaper] = {}
        """Jobs that have been asked about and are not over."""
        self._backlog = 0.0
        """Slot time they still need, all together."""
        self.beyond = 0.0
        """Share of recent arrivals for whom first-come would take longer than its 99th percentile."""
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
        known = self._expected.pop(job.spec.id, None)
        if known is not None:
            self._backlog = self._backlog - known.left if self._expected else 0.0
            if job.outcome is _COMPLETED:
                self._said = _KEEP * self._said + known.said
                self._turned_out = _KEEP * self._turned_out + slot_time
        waiting = self._open
        if not waiting or job.arrival < waiting[0].arrival:
            return  # settled before its time
        self._slot_time[job.spec.id] = slot_time
        while waiting and waiting[0].outcome is not None:
            self._settle(waiting.popleft())

    def due(self, job: Job, remaining: float, ratio: float) -> float:
        """When ``job`` must start for the promise, with ``remaining`` seconds of work left."""
        work = job.served + remaining
        if job.due is None:
            self._long.add(work)
        margin = _LONGEST_MARGIN if work > self._long.value and self._long.count > 100 else _MARGIN
        own = self._response(job, remaining)
        within = max(margin * self.p99.value, self.beyond * _OWN_MARGIN * own)
        return job.arrival + ratio * within - remaining

    def _response(self, job: Job, remaining: float) -> float:
        """The completion time that first-come would give it, as expected when it arrived.

        A fluid again: what everybody before it needs, spread over the slots; and since no order leaves a slot idle
        while anybody waits, what is left for first-come to do is what is really left. Those who never waited or were
        promised nothing are not counted: where they are many it is too little, and then the percentile counts.
        """
        worth = self._turned_out / self._said if self._said > 0.0 else 1.0
        left = remaining * worth
        known = self._expected.get(job.spec.id)
        if known is not None:
            self._backlog += left - known.left
            known.left = left
            return known.response
        # Who has begun before anybody asked was served as first-come would have.
        ahead = self._backlog / len(self._free) if job.first_run is None else 0.0
        response = ahead + (job.served + remaining) * worth
        self._expected[job.spec.id] = _OnPaper(job.served + remaining, left, response)
        self._backlog += left
        self.beyond += ((response > self.p99.value) - self.beyond) / _RECENT
        return response

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
