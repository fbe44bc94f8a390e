"""Upstream slots: who holds them, who may be made to yield, where a job should go. Never: URLs, health probing."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import NamedTuple

from elis_gateway.core.job import Job
from elis_gateway.core.lengths import Lengths, Slope, solve_gamma
from elis_gateway.core.ready import ReadyQueue
from elis_gateway.core.shadow import Shadow
from elis_gateway.core.slice import Slice

__all__ = ["Pool", "Running", "Upstream", "UpstreamInfo"]


class UpstreamInfo(NamedTuple):
    """What the scheduler must know of an upstream."""

    id: str
    models: frozenset[str]
    """Every name a job's ``model`` may have to run here."""
    slots: int
    """Sequences the engine runs at once; 0: down or draining."""
    overcommit: int = 0
    """Calls to keep in flight beyond ``slots``, waiting in the engine's own queue."""
    orders: bool = False
    """The engine orders its waiting calls by ``Slice.priority`` (seen in its behaviour, not believed)."""
    leaving: bool = False
    """It is being emptied: what can go on elsewhere leaves at its next window."""


class Running:
    """A slice in flight and what is known of its progress."""

    __slots__ = (
        "base",
        "began",
        "calm",
        "cold",
        "ending",
        "id",
        "job",
        "key",
        "mark_at",
        "mark_begun",
        "mark_calm",
        "mark_full",
        "mark_tokens",
        "queued",
        "sent",
        "slice",
        "slot_at",
        "started",
        "upstream",
        "version",
    )

    def __init__(self, slice_: Slice, upstream: Upstream, key: float, now: float) -> None:
        self.slice = slice_
        self.id = slice_.id
        self.job: Job = slice_.job
        self.upstream = upstream
        self.key = key
        """The job's policy key, recomputed as it runs; decides who yields."""
        self.version = 0
        """Counts the offers of ``Upstream.offer``; negative once nothing is to be offered any more."""
        self.sent = now
        self.began = now
        """When it took a slot, as far as that can be seen."""
        self.started = False
        self.base = self.job.attained
        self.mark_at = now
        self.mark_tokens = self.base
        self.calm = self.mark_calm = upstream.continued
        """Continuations that had got a slot on the upstream when this one did, and at the last mark."""
        self.mark_begun = upstream.begun
        """Prompt tokens of first calls that had got one at the last mark."""
        self.mark_full = False
        """Every slot was taken at the last mark."""
        self.queued = upstream.full
        """It was sent when every slot was taken: to the engine's own queue."""
        self.slot_at: float | None = None
        """When the engine had a slot for it, if it was queued there and that is known."""
        self.cold = self.job.home != upstream.info.id
        """Nothing that it would need again is in the upstream's cache."""
        self.ending = False
        """Preempt or Abort was emitted; the slot frees when the slice's end is reported."""


class Upstream:
    """One upstream's slots, its slices in flight, and the jobs whose prefix it has cached."""

    __slots__ = (
        "_victims", "begun", "closing", "continued", "ending", "free", "full", "info", "lined_up", "pools", "queue",
        "running", "settling", "unstarted",
    )  # fmt: skip

    def __init__(self, info: UpstreamInfo) -> None:
        self.info = info
        self.free = _calls(info)
        """Calls that may still be sent; a slot held for an estimate is not free. Not positive while it is down."""
        self.full = info.slots <= 0
        """Every slot is taken."""
        self.running: dict[int, Running] = {}
        self.queue = ReadyQueue()
        """Jobs whose prefix it has cached."""
        self.pools: list[Pool] = []
        """Those it belongs to."""
        self.closing = 0
        """Started slices that were told to end."""
        self.ending = 0
        """All slices that were told to end, those still in the engine's queue too."""
        self.unstarted: dict[int, Running] = {}
        """Slices sent whose first token has not come: in prefill, or in the engine's own queue."""
        self.lined_up: dict[int, Running] = {}
        """Those of them that were sent to the engine's own queue and have not been seen to get a slot since."""
        self.continued = 0
        """Continuations that have got a slot here, ever."""
        self.begun = 0
        """Prompt tokens of the first calls that have got one."""
        self.settling = False
        """A job has just yielded to a call in the engine's queue, and that has not begun."""
        self._victims: list[tuple[int, float, int, int, Running]] = []

    def serves(self, model: str) -> bool:
        """Is it up, and may jobs of ``model`` run here?"""
        return self.info.slots > 0 and model in self.info.models

    def become(self, info: UpstreamInfo) -> None:
        """The upstream went up or down, or changed what it serves."""
        self.free += _calls(info) - _calls(self.info)
        self.info = info
        self.full = len(self.running) >= info.slots

    def started(self, running: Running) -> None:
        """A slice was sent here."""
        self.free -= 1
        calls = self.running
        calls[running.id] = self.unstarted[running.id] = running
        if running.queued:
            self.lined_up[running.id] = running
        else:
            self.seated(running)
            running.calm = self.continued  # its own beginning disturbs the others, not itself
        self.full = len(calls) >= self.info.slots

    def ended(self, running: Running) -> None:
        """A slice is over."""
        self.free += 1
        running.version = -1
        slice_id = running.id
        calls = self.running
        del calls[slice_id]
        self.full = len(calls) >= self.info.slots
        unstarted = self.unstarted.pop(slice_id, None) is not None
        self.lined_up.pop(slice_id, None)
        if running.ending:
            self.ending -= 1
            self.closing -= not unstarted

    def passes_on(self, now: float) -> None:
        """A slot has come free: in the engine's own queue, whoever is first gets it."""
        waiting = [r for r in self.lined_up.values() if not r.ending]
        if waiting:
            first = min(waiting, key=lambda r: (r.slice.priority, r.id)) if self.info.orders else waiting[0]
            del self.lined_up[first.id]
            first.slot_at = now
            self.seated(first)

    def seated(self, running: Running) -> None:
        """A call has got its slot: what of its prompt is not cached is read now, and may hold up the others."""
        job = running.job
        if job.first_token is None:
            self.begun += job.spec.prompt_tokens
        else:
            self.continued += 1

    @property
    def takes(self) -> bool:
        """May another call be sent? Not to the engine's queue while a call is to take the slot of a job that yielded:
        sent within a millisecond of it, the wrong one may be there first."""
        return self.free > 0 and not (self.settling and self.full)

    @property
    def load(self) -> float:
        return len(self.running) / self.info.slots if self.info.slots else float("inf")

    def told_to_end(self, running: Running) -> None:
        """The slice was told to end; its slot frees when its end is reported."""
        running.ending = True
        running.version = -1
        self.ending += 1
        if running.started:
            self.closing += 1

    def offer(self, running: Running, key: float) -> None:
        """``running`` may be made to yield, at ``key``; replaces what was offered before."""
        running.key = key
        running.version = version = running.version + 1
        victims = self._victims
        heappush(victims, (-running.job.spec.rank, -key, -running.id, version, running))
        if len(victims) > 64 and len(victims) > 4 * len(self.running):
            victims[:] = [v for v in victims if v[4].version == v[3]]
            victims.sort()

    def victim(self, now: float) -> Running | None:
        """The slice whose job has the worst key; overdue jobs are never made to yield."""
        heap = self._victims
        while heap:
            _, _, _, version, running = heap[0]
            if running.version == version:
                due = running.job.due
                if due is None or due > now:
                    return running
            heappop(heap)
        return None

    def queued_calls(self) -> list[Running]:
        """Calls waiting in the engine's own queue, the one it starts next first."""
        if len(self.running) <= self.info.slots:
            return []  # each has a slot
        started = len(self.running) - len(self.unstarted) - self.closing
        waiting = [r for r in self.unstarted.values() if not r.ending]
        if self.info.orders:
            waiting.sort(key=lambda r: (r.slice.priority, r.id))
        return waiting[max(self.info.slots - started, 0) :]


def _calls(info: UpstreamInfo) -> int:
    """Calls that may be in flight."""
    return info.slots + info.overcommit if info.slots else 0


class Pool:
    """The upstreams that serve one model: their shared queue, their pace, and what answers have been like."""

    __slots__ = (
        "_answers", "_arrived", "_gamma_at", "_last", "_pace", "_rate", "down_since", "gamma", "lengths", "model",
        "queue", "seconds_per_token", "shadow", "slots", "stall", "upstreams",
    )  # fmt: skip

    def __init__(self, model: str, seconds_per_token: float, now: float) -> None:
        self.model = model
        self.queue = ReadyQueue()
        """Jobs that never ran, or whose home is gone."""
        self.upstreams: list[Upstream] = []
        self.slots = 0
        self.seconds_per_token = seconds_per_token
        self._pace = seconds_per_token
        self.gamma = 0.0
        self.stall = Slope()
        """Seconds that a continuation holds up every other slice of its engine."""
        self.shadow = Shadow()
        self.lengths = Lengths()
        self.down_since: float | None = now
        self._last: float | None = None
        self._rate = 0.0
        self._arrived = 0
        self._answers = 0
        self._gamma_at = 64

    @property
    def long_answer(self) -> float | None:
        return self.lengths.p95

    def refresh(self, now: float) -> None:
        """Count slots again after an upstream came, went or changed."""
        slots = self.slots
        self.slots = sum(u.info.slots for u in self.upstreams)
        if self.slots not in (slots, 0):
            self.shadow.resize(self.slots, now)
        if self.slots == 0:
            self.down_since = now if self.down_since is None else self.down_since
        else:
            self.down_since = None

    def arrived(self, now: float) -> None:
        """Count an arrival."""
        if self._last is not None:
            self._arrived += 1
            share = 1.0 / self._arrived if self._arrived < 500 else 0.002
            self._rate += share * ((now - self._last) - self._rate)
        self._last = now

    def answered(self, tokens: int) -> None:
        """Count a complete answer; every so often solve for gamma again.

        Not from the first few: under a shortest-first order those are the short ones, and gamma would be far too large.
        """
        self.lengths.add(tokens)
        self._answers += 1
        if self._answers >= self._gamma_at and self.slots and self._rate > 0.0:
            self._gamma_at += min(self._answers, 512)
            self.gamma = solve_gamma(1.0 / self._rate, self.lengths.shares(), self.seconds_per_token / self.slots)

    def paced(self, seconds_per_token: float) -> None:
        """A slice ran at this pace. The pool's own moves slowly and in steps of a twentieth: were it to follow every
        measurement, two jobs of the same length would differ in their keys for no reason, and the unlucky starve."""
        said = self.seconds_per_token
        self._pace = pace = self._pace + 0.02 * (seconds_per_token - self._pace)
        if abs(pace - said) > 0.05 * said:
            self.seconds_per_token = pace
