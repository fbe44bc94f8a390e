"""Jobs that wait: a heap with immutable keys and lazy deletion. Never: what a key means.

The heap holds heads, ``(rank, late, key, seq, job)``. A job that is re-estimated, taken or cancelled leaves its entry
behind; the entry is recognised as stale because ``job.entry`` no longer equals its ``seq``. Keys are therefore never
changed in place, which is what silently breaks heaps of mutable objects.

A second heap, ordered by due time, exists only where jobs have one: while any waiting job of the best class is overdue,
overdue jobs of that class go first, the longest overdue before the others.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf
from operator import itemgetter

from elis_gateway.core.job import Job

__all__ = ["END", "Head", "ReadyQueue"]

Head = tuple[int, int, float, int, Job]
"""A waiting job, comparable within and between queues: class, overdue (0) before not (1), due time or key, age of
entry, job. A plain tuple: a named one costs three times as much to make and to read."""

END = (inf,)
"""Every head comes before it."""


class ReadyQueue:
    """Waiting jobs in the order they should run."""

    __slots__ = ("_due", "_heap", "live")

    def __init__(self) -> None:
        self._heap: list[Head] = []
        self._due: list[Head] = []
        self.live = 0
        """Number of waiting jobs; the heap itself may also hold stale entries."""

    def push(self, job: Job, key: float, seq: int) -> None:
        """Add ``job``, or give a waiting job a new key: ``seq`` must be larger than any before."""
        job.entry = seq
        heap = self._heap
        rank = job.spec.rank
        heappush(heap, (rank, 1, key, seq, job))
        if job.due is not None:
            heappush(self._due, (rank, 0, job.due, seq, job))
        self.live += 1
        # Re-keyed jobs leave stale entries deep in the heap that popping alone never reaches.
        if len(heap) > 64 and len(heap) > 4 * self.live:
            self._compact()

    def discard(self, job: Job) -> None:
        """Take ``job`` out: its entry goes stale. The job must be waiting here."""
        job.entry = 0
        self.live -= 1

    def head(self, now: float) -> Head | None:
        """The job that should run next; it stays."""
        if self.live == 0:
            if self._heap:
                self._heap.clear()
                self._due.clear()
            return None
        heap = self._heap
        first = heap[0]
        while first[4].entry != first[3]:
            heappop(heap)
            first = heap[0]
        due = self._due
        if due:
            while due and due[0][4].entry != due[0][3]:
                heappop(due)
            if due and due[0][2] <= now and due[0][0] == first[0]:
                return due[0]
        return first

    def best(self, count: int, now: float, bound: tuple[float, ...] = END) -> list[Head]:
        """The ``count`` jobs that should run next, in order, without taking them; only those that come before
        ``bound`` (rank, late, key). O(count log count), O(1) where few do."""
        if self.head(now) is None:
            return []
        if not self._due:
            return self._walk(self._heap, count, now, bound)
        found = self._walk(self._due, count, now, bound)
        overdue = {seq for _, _, _, seq, _ in found}
        found += [head for head in self._walk(self._heap, count + len(found), now, bound) if head[3] not in overdue]
        found.sort()
        return found[:count]

    @staticmethod
    def _walk(heap: list[Head], count: int, now: float, bound: tuple[float, ...]) -> list[Head]:
        """The first ``count`` live entries of a heap, parents before children; of due times those that have passed."""
        found: list[Head] = []
        frontier = [(heap[0], 0)] if heap and heap[0] < bound else []
        while frontier and len(found) < count:
            head, at = heappop(frontier)
            _, late, key, seq, job = head
            if late == 0 and key > now:
                # What lies below is due later still, or of a class that has to wait anyway.
                continue
            if job.entry == seq:
                found.append(head)
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap) and heap[child] < bound:
                    heappush(frontier, (heap[child], child))
        return found

    def drain(self) -> list[Job]:
        """Take everything out, in the order of age."""
        jobs = self.jobs()
        for job in jobs:
            job.entry = 0
        self._heap.clear()
        self._due.clear()
        self.live = 0
        return jobs

    def jobs(self) -> list[Job]:
        """Every waiting job, oldest entry first."""
        return [job for _, _, _, seq, job in sorted(self._heap, key=itemgetter(3)) if job.entry == seq]

    def _compact(self) -> None:
        for heap in (self._heap, self._due):
            heap[:] = [head for head in heap if head[4].entry == head[3]]
            heapify(heap)
