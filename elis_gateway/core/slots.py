"""Who runs in which slot: fills free ones, starts slices, makes a running job yield to one that deserves its slot.

Knows: the waiting room, the policy, slices in flight. Never: where jobs come from, what becomes of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from elis_gateway.core.actions import Action, Preempt, Run
from elis_gateway.core.admission import Alarms
from elis_gateway.core.dials import SchedulerConfig
from elis_gateway.core.job import Job, JobState
from elis_gateway.core.placement import Running, Upstream
from elis_gateway.core.policy import FCFS, Policy, remaining_tokens
from elis_gateway.core.ready import ReadyQueue
from elis_gateway.core.slice import Slice
from elis_gateway.core.waiting import WaitingRoom

__all__ = ["Slots"]

# Looking a member up in its enum costs more than comparing it.
_READY, _RUNNING = JobState.READY, JobState.RUNNING
_CLASS_STRIDE = 10**13
"""Milliseconds; far above any key, so that classes never mix in one integer priority."""

_new_slice = tuple.__new__
"""``Slice(...)`` without the detour through Python that a named tuple's constructor takes."""


class Slots:
    """The slots of all upstreams. What is to be done collects in ``actions`` until ``take``."""

    def __init__(self, config: SchedulerConfig, room: WaitingRoom, alarms: Alarms, policy: Policy) -> None:
        self.actions: list[Action] = []
        self.slices: dict[int, Running] = {}
        """In flight, by id."""
        self._room = room
        self._alarms = alarms
        self._last_id = 0
        self.use(policy, config)

    def use(self, policy: Policy, config: SchedulerConfig) -> None:
        """Order by ``policy`` from now on. Keys that were made stay as they are."""
        self._config = config
        self.policy: Policy = policy if config.estimates or not policy.needs_estimates else FCFS()
        self._room.policy = self.policy
        self.estimates = self.policy.needs_estimates
        """Does anybody want to know how much is left?"""
        self.elastic = self.policy.preempts and config.mode == "elastic"
        fixed = self.policy.preempts and config.mode == "fixed"
        self.fixed_window = config.window if fixed else None

    def take(self) -> list[Action]:
        """What is to be done, in order."""
        actions = self.actions
        self.actions = []
        return actions

    # ---- jobs that wait ---------------------------------------------------------------------------------------

    def enqueue(self, job: Job, now: float, place: bool = True) -> None:
        """READY: straight into a free slot where there is one, else the queue. ``place`` False: the caller fills."""
        job.state = _READY
        job.ready_since = now
        home = None
        if job.home is not None:
            home = self._room.home(job)
            if home is None:
                job.home = None
        held = job.held
        if held is None:
            self._place(job, now, place or home is None)
            return
        job.held = None
        held.free += 1
        if held is not home:
            self._place(job, now, True)
        elif self._goes_on(job, held, now):
            return
        else:
            self._place(job, now, False)
        self.fill(held, now)

    def start_at_once(self, job: Job, now: float) -> bool:
        """Start a new job where a slot is free that nobody waits for: whose turn it is needs no estimate, and its
        tokens need not wait for one. False: it needs an estimate first."""
        upstream = self._room.free_upstream(job, job.pool, self.fixed_window)
        if upstream is None or upstream.full or self._room.is_wanted(upstream):
            return False
        job.ready_since = now
        self._start(job, upstream, now, self.policy.key(job, job.pool, now))
        return True

    def _goes_on(self, job: Job, upstream: Upstream, now: float) -> bool:
        """Start ``job`` in the slot that was held for it where nobody else deserves it, without a detour through the
        queue: in fixed windows that is how most slices begin."""
        if upstream.free != 1 or job.avoid is not None or self._config.tail is not None or job.spec.tail is not None:
            return False
        key = self.policy.key(job, job.pool, now)
        head = self._room.best_for(upstream, now)
        if head is not None:
            rank, late, best, _, _ = head
            if late == 0 or (job.spec.rank, key) >= (rank, best):
                return False
        self._start(job, upstream, now, key)
        return True

    def _place(self, job: Job, now: float, place: bool) -> None:
        pool = job.pool
        if place:
            upstream = self._room.free_upstream(job, pool, self.fixed_window)
            if upstream is not None:
                self._start(job, upstream, now, self.policy.key(job, pool, now))
                return
        self._wait(job, now)
        if place and self.elastic and (found := self._room.yields_to(job, pool, now)):
            self._make_yield(found)

    def _wait(self, job: Job, now: float) -> None:
        self._push(job, self._room.queue_of(job), now)
        if job.pool.down_since is not None:
            self._alarms.capacity_until(now + self._config.unavailable_timeout, job.spec.id)

    def _push(self, job: Job, queue: ReadyQueue, now: float) -> None:
        pool = job.pool
        tail = job.spec.tail or self._config.tail
        if tail is not None:
            job.due = pool.shadow.due(job, remaining_tokens(job, pool) * pool.seconds_per_token, tail)
        self._last_id = seq = self._last_id + 1
        queue.push(job, self.policy.key(job, pool, now), seq)

    def rekey(self, job: Job, now: float) -> None:
        """A waiting job's key changed: a new entry; the old one goes stale."""
        queue = self._room.queue_of(job)
        queue.discard(job)
        self._push(job, queue, now)
        if job.state is not _READY:
            return
        if self.elastic and (found := self._room.yields_to(job, job.pool, now)):
            self._make_yield(found)

    # ---- slots ------------------------------------------------------------------------------------------------

    def hold(self, job: Job, upstream: Upstream) -> None:
        """Keep the slot ``job`` has just left free until its fresh estimate has come."""
        job.held = upstream
        upstream.free -= 1

    def unhold(self, job: Job) -> Upstream | None:
        """The slot kept for ``job``'s estimate, given back."""
        upstream = job.held
        if upstream is not None:
            job.held = None
            upstream.free += 1
        return upstream

    def fill(self, upstream: Upstream, now: float) -> None:
        """Give every free slot of ``upstream`` to the best job that may run there."""
        room = self._room
        while upstream.takes:
            head = room.next_for(upstream, now) or room.stray_for(upstream, self.fixed_window, now)
            if head is None:
                if not upstream.full and (sent := room.queued_elsewhere(upstream)) is not None:
                    self._make_yield([sent])
                return
            _, late, best, _, job = head
            if job.avoid is not None and room.shuns(job, upstream):
                return
            room.queue_of(job).discard(job)
            self._start(job, upstream, now, best if late else self.policy.key(job, job.pool, now))

    def called_back(self, running: Running, now: float) -> None:
        """A call came back from an engine's queue without having begun: its job is back in line, and idle slots
        elsewhere come before that queue."""
        job = running.job
        job.state = _READY
        job.ready_since = now
        if running.cold or (job.home is not None and self._room.home(job) is None):
            job.home = None
        self._wait(job, now)
        for upstream in job.pool.upstreams:
            if not upstream.full:
                self.fill(upstream, now)

    def _start(self, job: Job, upstream: Upstream, now: float, key: float) -> None:
        spec = job.spec
        limit = spec.limit
        if limit is not None:
            limit -= job.attained
        window = None
        if spec.sliceable:
            fixed = self.fixed_window
            if fixed is not None:
                if limit is None or limit > fixed:
                    limit = fixed
            elif self.elastic:
                window = self._config.window
        info = upstream.info
        priority = spec.rank * _CLASS_STRIDE + round(key * 1000.0) if info.orders else 0
        self._last_id = slice_id = self._last_id + 1
        slice_ = _new_slice(Slice, (slice_id, job, info.id, limit, window, priority))
        self.slices[slice_id] = running = Running(slice_, upstream, key, now)
        upstream.started(running)
        job.waited += now - job.ready_since
        job.state = _RUNNING
        job.slice = slice_id
        job.slices += 1
        job.home = info.id
        if job.first_run is None:
            job.first_run = now
        self.actions.append(Run(slice_))
        if spec.conversation is not None:
            self._room.remember(job)
        if info.overcommit and self.elastic and (found := self._room.yields_on(upstream, now)):
            self._make_yield(found)

    # ---- slices in flight -------------------------------------------------------------------------------------

    def begun(self, running: Running, now: float) -> None:
        """The slice's first token has come."""
        running.started = True
        upstream, job = running.upstream, running.job
        upstream.unstarted.pop(running.id, None)
        upstream.lined_up.pop(running.id, None)
        settled, upstream.settling = upstream.settling, False
        if running.ending:
            upstream.closing += 1
        if running.queued and running.slot_at is None:
            upstream.seated(running)
        if job.first_token is None:
            job.first_token = now
        else:
            job.seams += 1
            slot_at = running.slot_at if running.queued else running.sent
            if self._config.seam_cost is None and slot_at is not None:
                self._room.seam_took(now - slot_at, job.pool)
        running.mark_at = now
        running.mark_tokens = job.attained + 1
        running.mark_calm = upstream.continued
        running.mark_begun = upstream.begun
        running.mark_full = upstream.full
        if running.queued:
            # What came before the first token was a wait, and a seam.
            running.began = running.slot_at if running.slot_at is not None else now - self._room.margin(job)
            running.calm = upstream.continued
        if self.elastic and job.preemptions == 0 and job.state is _RUNNING and job.spec.sliceable:
            if not running.ending:
                upstream.offer(running, running.key)
            if found := self._room.yields_on(upstream, now):
                self._make_yield(found)
        if settled:
            self.fill(upstream, now)

    def measure(self, running: Running, attained: int, now: float) -> None:
        """The slice has brought its job to so many tokens: how fast was it?"""
        tokens = attained - running.mark_tokens
        at = running.mark_at
        if tokens >= 16 and now > at:
            pool, upstream = running.job.pool, running.upstream
            pace = (now - at) / tokens
            pool.paced(pace)
            continued, full = upstream.continued, upstream.full
            if full and running.mark_full:
                # A slot that was empty meanwhile would have made the pace faster, and continuations are begun when
                # none is.
                others = (continued - running.mark_calm) / tokens
                pool.stall.add(others, (upstream.begun - running.mark_begun) / tokens, pace, tokens)
            running.mark_full = full
            running.mark_at = now
            running.mark_tokens = attained
            running.mark_calm = continued
            running.mark_begun = upstream.begun

    def rescored(self, running: Running, now: float) -> None:
        """A running job's remaining work was looked at again: its key, and whether it should yield."""
        job, upstream = running.job, running.upstream
        if not self.elastic or running.ending or not job.spec.sliceable:
            return
        key = self.policy.key(job, job.pool, now)
        if not running.started:
            # Still in the engine's queue: what it was sent with no longer holds.
            if not upstream.info.orders:
                running.key = key
            elif abs(key - running.key) > self._room.margin(job):
                running.key = key
                if upstream.queued_calls():
                    self._make_yield([running])
        elif job.preemptions == 0 or job.attained - running.base >= self._config.window:
            # Never twice within one window of the same job.
            upstream.offer(running, key)
            if found := self._room.yields_on(upstream, now):
                self._make_yield(found)

    def empty(self, upstream: Upstream) -> None:
        """The upstream is to be left. Slices that tell of windows end at their next one, the others now."""
        for running in list(upstream.running.values()):
            if running.slice.window is None:
                self.leaves(running)

    def leaves(self, running: Running) -> bool:
        """End this slice so that its job goes on elsewhere, if it can: where nobody else is up it stays."""
        job, here = running.job, running.upstream
        if running.ending or job.state is not _RUNNING or not job.spec.sliceable:
            return False
        if not any(other.info.slots for other in job.pool.upstreams if other is not here):
            return False
        self._make_yield([running])
        return True

    def _make_yield(self, slices: Iterable[Running]) -> None:
        for running in slices:
            running.upstream.told_to_end(running)
            self.actions.append(Preempt(running.id))
