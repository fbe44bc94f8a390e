"""Jobs that wait: a heap with immutable keys and lazy deletion. Never: what a key means.

The heap holds ``(rank, key, seq, job)``. A job that is re-estimated, taken or cancelled leaves its entry behind; the
entry is recognised as stale because ``job.entry`` no longer equals its ``seq``. Keys are therefore never changed in
place, which is what silently breaks heaps of mutable objects.

A second heap, ordered by due time, exists only where jobs have one: while any waiting job of the best class is overdue,
overdue jobs of that class go first, the longest overdue before the others.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import NamedTuple

from elis_gateway.core.job import Job

__all__ = ["Head", "ReadyQueue"]

_Entry = tuple[int, float, int, Job]


class Head(NamedTuple):
    """The best waiting job, comparable between queues: class, overdue before not, due time or key, age of entry."""

    rank: int
    late: int
    """0 when overdue, 1 when not."""
    key: float
    seq: int
    job: Job


class ReadyQueue:
    """Waiting jobs in the order they should run."""

    __slots__ = ("_due", "_heap", "live")

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._due: list[_Entry] = []
        self.live = 0
        """Number of waiting jobs; the heap itself may also hold stale entries."""

    def push(self, job: Job, key: float, seq: int) -> None:
        """Add ``job``, or give a waiting job a new key: ``seq`` must be larger than any before."""
        job.entry = seq
        heap = self._heap
        heappush(heap, (job.spec.rank, key, seq, job))
        if job.due is not None:
            heappush(self._due, (job.spec.rank, job.due, seq, job))
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
            self._heap.clear()
            self._due.clear()
            return None
        heap = self._heap
        entry = heap[0]
        while entry[3].entry != entry[2]:
            heappop(heap)
            entry = heap[0]
        due = self._due
        if due:
            while due and due[0][3].entry != due[0][2]:
                heappop(due)
            if due and due[0][1] <= now and due[0][0] == entry[0]:
                rank, when, seq, job = due[0]
                return Head(rank, 0, when, seq, job)
        return Head(entry[0], 1, entry[1], entry[2], entry[3])

    def best(self, count: int, now: float) -> list[Head]:
        """The ``count`` jobs that should run next, in order, without taking them. O(count log count)."""
        first = self.head(now)
        if first is None:
            return []
        if count == 1:
            return [first]
        found: list[Head] = []
        seen: set[int] = set()
        for late, source in ((0, self._due), (1, self._heap)):
            wanted = count
            frontier = [(source[0][:3], 0)] if source else []
            while frontier and wanted:
                _, at = heappop(frontier)
                rank, key, seq, job = source[at]
                if late == 0 and key > now:
                    # Children of a job not due yet may belong to a lower class, but that class has to wait anyway.
                    continue
                if job.entry == seq and seq not in seen:
                    seen.add(seq)
                    found.append(Head(rank, late, key, seq, job))
                    wanted -= 1
                for child in (2 * at + 1, 2 * at + 2):
                    if child < len(source):
                        heappush(frontier, (source[child][:3], child))
        found.sort(key=lambda h: h[:4])
        return found[:count]

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
        return [e[3] for e in sorted(self._heap, key=lambda e: e[2]) if e[3].entry == e[2]]

    def _compact(self) -> None:
        for heap in (self._heap, self._due):
            heap[:] = [e for e in heap if e[3].entry == e[2]]
            heapify(heap)
