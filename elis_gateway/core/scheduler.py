"""The scheduler. Events in with ``now``, actions out; it never calls out, reads a clock or performs I/O.

    submit            -> ESTIMATING  if the policy wants an estimate, else READY
    estimated         -> READY       or, for a READY job, a new key; for a RUNNING one, perhaps Preempt
    (slot available)  -> RUNNING     emits Run
    window_passed     -> RUNNING     asks for a fresh estimate; perhaps Preempt
    slice_ended       -> DONE        answer complete, refused, or the retries are spent
                      -> ESTIMATING  more to do and the policy wants a fresh estimate: the slot is held until it comes
                      -> READY       more to do
    cancel, expiry    -> DONE        emits Abort if a slice is in flight; its slot frees when that slice ends

News of a job that is DONE is dropped. News of an unknown slice is a bug and raises.

After every input free slots are filled (work conserving), with three named exceptions: a slot held for the estimate of
the job that just left it; an upstream that just failed the job next in line while another is up; and a job that waits
for its warm home because prefilling it elsewhere would cost more than the wait. Where the engine keeps a queue of its
own (``overcommit``), calls in flight never exceed ``slots + overcommit``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elis_gateway.core.actions import Abort, Action, AskEstimate, Finish, Preempt, Run
from elis_gateway.core.admission import Alarms
from elis_gateway.core.job import Estimate, Job, JobSpec, JobState, Outcome
from elis_gateway.core.placement import Pool, Running, Upstream, UpstreamInfo
from elis_gateway.core.policy import FCFS, Policy, remaining_tokens
from elis_gateway.core.ready import ReadyQueue
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult
from elis_gateway.core.waiting import WaitingRoom

__all__ = ["Scheduler", "SchedulerConfig"]

# Looking a member up in its enum costs more than comparing it.
_READY, _RUNNING, _ESTIMATING, _DONE = JobState.READY, JobState.RUNNING, JobState.ESTIMATING, JobState.DONE
_FINISHED, _WINDOW = SliceEnd.FINISHED, SliceEnd.WINDOW
_SEAM_TOKENS = 2.0
"""Assumed until learned; an engine on a GPU needs one or two, a small one on a CPU four."""
_CLASS_STRIDE = 10**13
"""Milliseconds; far above any key, so that classes never mix in one integer priority."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The scheduler's dials. Times in seconds, lengths in tokens."""

    window: int = 50
    mode: Literal["fixed", "elastic"] = "elastic"
    """``fixed``: every call asks for at most one window. ``elastic``: for all that remains, and yields when asked."""
    estimates: bool = True
    """There is a predictor. Without one, a policy that needs estimates is first-come."""
    rescore: Literal["always", "contended"] = "contended"
    """Fixed windows: hold the slot for a fresh estimate after every window, or only while somebody waits for it."""
    seam_cost: float | None = None
    """Tokens of work that ending one call and starting another costs; None: learned from continuations."""
    tail: float | None = None
    """Keep the 99th percentile of completion time within this ratio of what first-come would have given."""
    queue_limit: int | None = None
    """Jobs that may wait; further ones are rejected."""
    queue_ttl: float | None = None
    """Longest wait for the first slot."""
    unavailable_timeout: float = 30.0
    """Longest wait while no upstream of the model is up."""
    retries: int = 3
    """Interruptions in a row, without a token of progress, that a job survives."""
    seconds_per_token: float = 0.02
    """Assumed pace of one running job until it is measured."""
    prefill_tokens_per_second: float = 5000.0
    """Prices moving a job to a replica that has not cached its prompt."""


class Scheduler:
    """Decides which slice runs next. Every method that takes ``now`` returns the actions to perform, in order."""

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.config = config
        self.jobs: dict[str, Job] = {}
        """Live jobs, and finished ones whose slice has not ended yet."""
        self.room = WaitingRoom(
            config.seconds_per_token,
            config.prefill_tokens_per_second,
            _SEAM_TOKENS if config.seam_cost is None else config.seam_cost,
        )
        self.upstreams = self.room.upstreams
        self.pools = self.room.pools
        self._slices: dict[int, Running] = {}
        self._held: dict[str, Upstream] = {}
        self._alarms = Alarms()
        self._last_id = 0
        self._actions: list[Action] = []
        self._use(policy)

    # ---- inputs -----------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec, now: float) -> list[Action]:
        """A request arrived. Raises ValueError if its id is in use."""
        if spec.id in self.jobs:
            raise ValueError(f"job id {spec.id!r} is in use")
        job = Job(spec, now)
        pool = self.room.pool(spec.model, now)
        if spec.conversation is not None:
            job.home = self.room.warm_home(job)
        limit = self.config.queue_limit
        if limit is not None and self.room.count() >= limit:
            self._finish(job, Outcome.REJECTED, "queue_full", now)
            return self._take()
        self.jobs[spec.id] = job
        self._alarms.forget_all_but(self.jobs)
        pool.arrived(now)
        pool.shadow.arrived(job)
        if self.config.queue_ttl is not None:
            self._alarms.wait_until(now + self.config.queue_ttl, spec.id)
        if spec.deadline is not None:
            self._alarms.done_until(spec.deadline, spec.id)
        if self._estimates:
            self._actions.append(AskEstimate(job))
        else:
            self._enqueue(job, now)
        return self._take()

    def estimated(self, job_id: str, estimate: Estimate | None, now: float) -> list[Action]:
        """An answer to AskEstimate, at once or later. None: the old estimate is counted down."""
        job = self.jobs.get(job_id)
        if job is None or job.state is _DONE:
            return []
        if estimate is not None:
            job.estimate = estimate
            job.estimate_at = job.attained
        state = job.state
        if state is _ESTIMATING:
            self._enqueue(job, now)
        elif state is _READY:
            if estimate is not None:
                self._rekey(job, now)
        else:
            self._rescored(self._slices[job.slice], now)  # type: ignore[index]
        return self._take()

    def slice_started(self, slice_id: int, now: float) -> list[Action]:
        """The slice's first token arrived. Optional for drivers whose slices always start at once."""
        running = self._slices[slice_id]
        if not running.started:
            self._begun(running, now)
        return self._take()

    def window_passed(self, slice_id: int, attained: int, now: float) -> list[Action]:
        """Another window's tokens arrived in this slice; ``attained``: the job's kept tokens in all."""
        running = self._slices[slice_id]
        job = running.job
        if job.state is not _RUNNING:
            return []
        if not running.started:
            self._begun(running, now)
        self._measure(running, attained, now)
        job.attained = attained
        job.failures = 0
        job.avoid = None
        if self._estimates:
            # Its answer, even if it is none, makes the new key.
            self._actions.append(AskEstimate(job))
        else:
            self._rescored(running, now)
        return self._take()

    def slice_ended(self, slice_id: int, result: SliceResult, now: float) -> list[Action]:
        """A slice is over; its slot is free. Exactly once for every Run."""
        running = self._slices.pop(slice_id)
        job, upstream = running.job, running.upstream
        job.served += now - running.began
        job.disturbed += upstream.continued - running.calm
        self._release(running)
        if job.state is _DONE:
            self.jobs.pop(job.spec.id, None)
            self._fill(upstream, now)
            return self._take()
        self._measure(running, result.attained, now)
        if result.attained > running.base:
            job.failures = 0
            job.avoid = None
            if job.first_token is None:
                job.first_token = now
        job.attained = result.attained
        job.slice = None
        if result.limit is not None and result.limit != job.spec.limit:
            job.spec = job.spec._replace(limit=result.limit)
        end = result.end
        if end is _WINDOW:
            self._continue(job, upstream, now)
        elif end is _FINISHED:
            self.pools[job.spec.model].answered(job.attained)
            self._finish(job, Outcome.COMPLETED, result.cause, now)
        elif end is SliceEnd.PREEMPTED:
            if running.started or result.attained > running.base:
                job.preemptions += 1
            self._enqueue(job, now, place=False)
        elif end is SliceEnd.INTERRUPTED:
            self._interrupted(job, result.cause, now)
        else:
            self._finish(job, Outcome.FAILED, result.cause, now)
        self._fill(upstream, now)
        return self._take()

    def cancel(self, job_id: str, now: float, *, outcome: Outcome = Outcome.CANCELLED, cause: str = "") -> list[Action]:
        """The client is gone, or nobody wants the answer any more."""
        job = self.jobs.get(job_id)
        if job is None or job.state is _DONE:
            return []
        self._drop(job, outcome, cause, now)
        return self._take()

    def upstream_changed(self, info: UpstreamInfo, now: float) -> list[Action]:
        """An upstream is new, came back, went down (``slots`` 0), or changed what it serves."""
        upstream = self.upstreams.get(info.id)
        if upstream is None:
            upstream = self.upstreams[info.id] = Upstream(info)
        stale = upstream.info.models - info.models
        upstream.info = info
        for model in stale:
            self.pools[model].upstreams.remove(upstream)
        for model in info.models:
            pool = self.room.pool(model, now)
            if upstream not in pool.upstreams:
                pool.upstreams.append(upstream)
        upstream.pools = [self.pools[m] for m in sorted(info.models)]
        for pool in self.pools.values():
            was_down = pool.down_since is not None
            pool.refresh(now)
            if pool.down_since is not None and not was_down:
                for job in pool.queue.jobs():
                    self._alarms.capacity_until(now + self.config.unavailable_timeout, job.spec.id)
        if info.slots == 0 or stale:
            for job in upstream.queue.drain():
                self._enqueue(job, now)
        for each in self.upstreams.values():
            # The others too: what was left for a better place may have to be taken where it is now.
            self._fill(each, now)
        return self._take()

    def upstream_removed(self, upstream_id: str, now: float) -> list[Action]:
        """The upstream will not come back. Its slices must have ended: first set its slots to 0."""
        if self.upstreams[upstream_id].running:
            raise ValueError(f"upstream {upstream_id!r} still runs slices")
        actions = self.upstream_changed(UpstreamInfo(upstream_id, frozenset(), 0), now)
        del self.upstreams[upstream_id]
        return actions

    def set_policy(self, policy: Policy, now: float, config: SchedulerConfig | None = None) -> list[Action]:
        """Order by another policy from now on; everything waiting gets a new key. Calls in flight keep their limits.

        ``config``: other dials, too. Limits that alarms were set for hold for jobs that come from now on.
        """
        if config is not None:
            self.config = config
        self._use(policy)
        queues = [p.queue for p in self.pools.values()] + [u.queue for u in self.upstreams.values()]
        for queue in queues:
            for job in queue.jobs():
                self._rekey(job, now)
                if self._estimates and job.estimate is None:
                    self._actions.append(AskEstimate(job))
        return self._take()

    def tick(self, now: float) -> list[Action]:
        """Time has reached ``next_deadline``."""
        for job_id, reason in self._alarms.due(now):
            job = self.jobs.get(job_id)
            if job is None or job.state is _DONE:
                continue
            if reason == "queue_ttl" and (job.first_run is not None):
                continue
            if reason == "unavailable" and not self._is_stranded(job, now):
                continue
            self._drop(job, Outcome.EXPIRED, reason, now)
        return self._take()

    def next_deadline(self) -> float | None:
        """When ``tick`` is wanted next; None: not before another input."""
        return self._alarms.next()

    # ---- views ------------------------------------------------------------------------------------------------

    def waiting(self, model: str | None = None) -> int:
        """Jobs in the ready queues: all, or those that wait for an upstream of ``model``."""
        if model is None:
            return self.room.count()
        pool = self.pools.get(model)
        return 0 if pool is None else pool.queue.live + sum(u.queue.live for u in pool.upstreams)

    def running(self, upstream_id: str) -> int:
        """Slices in flight on one upstream."""
        return len(self.upstreams[upstream_id].running)

    def seconds_per_token(self, model: str) -> float:
        """Measured pace of one running job of this model."""
        pool = self.pools.get(model)
        return pool.seconds_per_token if pool else self.config.seconds_per_token

    @property
    def seam_tokens(self) -> float:
        """What a seam costs in decoded tokens: set, or learned so far."""
        return self.room.seam_tokens

    # ---- queue and slots --------------------------------------------------------------------------------------

    def _use(self, policy: Policy) -> None:
        self.policy: Policy = policy if self.config.estimates or not policy.needs_estimates else FCFS()
        self.room.policy = self.policy
        self._estimates = self.policy.needs_estimates
        self._elastic = self.policy.preempts and self.config.mode == "elastic"
        fixed = self.policy.preempts and self.config.mode == "fixed"
        self._fixed_window = self.config.window if fixed else None

    def _take(self) -> list[Action]:
        actions = self._actions
        self._actions = []
        return actions

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _enqueue(self, job: Job, now: float, *, place: bool = True) -> None:
        """READY: straight into a free slot where there is one, else the queue. ``place`` False: the caller fills."""
        held = self._unhold(job) if self._held else None
        job.state = _READY
        job.ready_since = now
        pool = self.pools[job.spec.model]
        if job.home is not None and not self.room.is_warm(job.home, job.spec.model):
            job.home = None
        if job.home is None:
            place = True
        elif held is not None:
            place = False
        self._place(job, pool, now, place=place)
        if held is not None:
            self._fill(held, now)

    def _place(self, job: Job, pool: Pool, now: float, *, place: bool) -> None:
        if place:
            upstream = self.room.free_upstream(job, pool, self._fixed_window)
            if upstream is not None:
                self._start(job, upstream, now)
                return
        self._push(job, self.room.queue_of(job), pool, now)
        if pool.down_since is not None:
            self._alarms.capacity_until(now + self.config.unavailable_timeout, job.spec.id)
        if place and self._elastic:
            self._make_yield(self.room.yields_to(job, pool, now))

    def _push(self, job: Job, queue: ReadyQueue, pool: Pool, now: float) -> None:
        tail = self.config.tail
        if tail is not None:
            job.due = pool.shadow.due(job, remaining_tokens(job, pool) * pool.seconds_per_token, tail)
        queue.push(job, self.policy.key(job, pool, now), self._next_id())

    def _rekey(self, job: Job, now: float) -> None:
        """A waiting job's key changed: a new entry; the old one goes stale."""
        pool = self.pools[job.spec.model]
        queue = self.room.queue_of(job)
        queue.discard(job)
        self._push(job, queue, pool, now)
        if self._elastic:
            self._make_yield(self.room.yields_to(job, pool, now))

    def _unhold(self, job: Job) -> Upstream | None:
        """The slot kept for ``job``'s estimate, given back."""
        upstream = self._held.pop(job.spec.id, None)
        if upstream is not None:
            upstream.held -= 1
        return upstream

    def _fill(self, upstream: Upstream, now: float) -> None:
        """Give every free slot of ``upstream`` to the best job that may run there."""
        room = self.room
        for _ in range(upstream.free):
            head = room.best_for(upstream, now)
            if head is None:
                head = room.stray_for(upstream, self._fixed_window, now)
                if head is None:
                    return
            job = head.job
            if job.avoid is not None and room.shuns(job, upstream):
                return
            room.queue_of(job).discard(job)
            self._start(job, upstream, now, head.key if head.late else None)

    def _start(self, job: Job, upstream: Upstream, now: float, key: float | None = None) -> None:
        pool = self.pools[job.spec.model]
        if key is None:
            key = self.policy.key(job, pool, now)
        spec = job.spec
        limit = job.allowed
        window = None
        if spec.sliceable:
            if self._fixed_window is not None:
                limit = self._fixed_window if limit is None else min(limit, self._fixed_window)
            elif self._elastic:
                window = self.config.window
        priority = spec.rank * _CLASS_STRIDE + round(key * 1000.0) if upstream.info.orders else 0
        slice_ = Slice(self._next_id(), job, upstream.info.id, limit, window, priority)
        running = Running(slice_, upstream, key, now)
        self._slices[slice_.id] = upstream.running[slice_.id] = upstream.unstarted[slice_.id] = running
        job.waited += now - job.ready_since
        job.state = _RUNNING
        job.slice = slice_.id
        job.slices += 1
        job.home = upstream.info.id
        if job.first_run is None:
            job.first_run = now
        self._actions.append(Run(slice_))
        if spec.conversation is not None:
            self.room.remember(job)
        if upstream.info.overcommit and self._elastic:
            self._make_yield(self.room.yields_on(upstream, now))

    def _release(self, running: Running) -> None:
        upstream = running.upstream
        del upstream.running[running.slice.id]
        unstarted = upstream.unstarted.pop(running.slice.id, None) is not None
        if running.ending:
            upstream.ending -= 1
            upstream.closing -= not unstarted

    # ---- during and after a slice ------------------------------------------------------------------------------

    def _begun(self, running: Running, now: float) -> None:
        running.started = True
        upstream, job = running.upstream, running.job
        upstream.unstarted.pop(running.slice.id, None)
        if running.ending:
            upstream.closing += 1
        if job.first_token is None:
            job.first_token = now
        elif self.config.seam_cost is None and len(upstream.running) <= upstream.info.slots:
            # The first token of a continuation is late by the seam: what preempting this job has cost.
            pace = self.room.pace(job)
            seam = min(max((now - running.sent) / pace - 1.0, 0.0), 200.0)
            self.room.seam_tokens += 0.05 * (seam - self.room.seam_tokens)
        if job.slices > 1:
            # Its own beginning disturbs the others, not itself.
            upstream.continued += 1
            running.calm += 1
        running.mark_at = now
        running.mark_tokens = job.attained + 1
        running.mark_calm = upstream.continued
        running.mark_full = upstream.full
        if upstream.info.overcommit:
            # It may have waited in the engine's queue: what came before the first token was a seam, not slot time.
            running.began = now - self.room.margin(job)
            running.calm = upstream.continued
        if job.state is _RUNNING and self._elastic and job.spec.sliceable and job.preemptions == 0:
            upstream.offer(running, running.key)
            self._make_yield(self.room.yields_on(upstream, now))

    def _continue(self, job: Job, upstream: Upstream, now: float) -> None:
        """A fixed window is over and the answer goes on."""
        if not self._estimates:
            self._enqueue(job, now, place=False)
            return
        if self.config.rescore == "always" or self.room.is_wanted(upstream):
            # The slot is held: who gets it depends on what this job's fresh estimate says.
            job.state = _ESTIMATING
            self._held[job.spec.id] = upstream
            upstream.held += 1
            self._actions.append(AskEstimate(job))
        else:
            self._enqueue(job, now, place=False)
            self._fill(upstream, now)
            self._actions.append(AskEstimate(job))

    def _interrupted(self, job: Job, cause: str, now: float) -> None:
        job.failures += 1
        if job.failures > self.config.retries:
            self._finish(job, Outcome.FAILED, cause, now)
            return
        job.avoid, job.home = job.home, None
        self._enqueue(job, now)

    def _drop(self, job: Job, outcome: Outcome, cause: str, now: float) -> None:
        held = self._unhold(job)
        if job.state is _READY:
            self.room.queue_of(job).discard(job)
            job.waited += now - job.ready_since
        elif job.state is _RUNNING:
            running = self._slices[job.slice]  # type: ignore[index]
            if not running.ending:
                self._end(running)
                self._actions.append(Abort(running.slice.id))
        self._finish(job, outcome, cause, now)
        if held is not None:
            self._fill(held, now)
        if job.avoid is not None:
            # A slot may have been left free because the job next in line had just failed there.
            for upstream in self.pools[job.spec.model].upstreams:
                self._fill(upstream, now)

    def _end(self, running: Running) -> None:
        running.ending = True
        running.upstream.ending += 1
        if running.started:
            running.upstream.closing += 1

    def _finish(self, job: Job, outcome: Outcome, cause: str, now: float) -> None:
        in_flight = job.state is _RUNNING and job.slice is not None
        job.state = _DONE
        job.outcome = outcome
        job.cause = cause
        job.finished = now
        if outcome is not Outcome.REJECTED:
            self._shadow(job)
        if not in_flight:
            self.jobs.pop(job.spec.id, None)
        self._actions.append(Finish(job))

    def _shadow(self, job: Job) -> None:
        """Tell first-come's shadow what the job turned out to need: its slot time without the seams our order cost,
        its own and, where a prompt holds up everybody's decoding, those of others beside it."""
        pool = self.pools[job.spec.model]
        seams = max(job.slices - 1, 0) * self.room.seam_tokens * pool.seconds_per_token
        stalls = job.disturbed * pool.stall.value
        pool.shadow.over(job, max(job.served - seams - stalls, 0.0))

    def _is_stranded(self, job: Job, now: float) -> bool:
        pool = self.pools[job.spec.model]
        if job.state is not _READY or pool.down_since is None:
            return False
        return now >= max(pool.down_since, job.ready_since) + self.config.unavailable_timeout

    def _measure(self, running: Running, attained: int, now: float) -> None:
        tokens = attained - running.mark_tokens
        if tokens >= 16 and now > running.mark_at:
            pool = self.pools[running.job.spec.model]
            pace = (now - running.mark_at) / tokens
            pool.paced(pace)
            continued, full = running.upstream.continued, running.upstream.full
            if full and running.mark_full:
                # A slot that was empty meanwhile would have made the pace faster, and continuations are begun when
                # none is.
                pool.stall.add((continued - running.mark_calm) / tokens, pace, tokens)
            running.mark_full = full
            running.mark_at = now
            running.mark_tokens = attained
            running.mark_calm = continued

    # ---- who yields -------------------------------------------------------------------------------------------

    def _rescored(self, running: Running, now: float) -> None:
        """A running job's remaining work was looked at again: its key, and whether it should yield."""
        if running.ending or not self._elastic or not running.job.spec.sliceable:
            return
        job, upstream = running.job, running.upstream
        key = self.policy.key(job, self.pools[job.spec.model], now)
        if not running.started:
            # Still in the engine's queue: what it was sent with no longer holds.
            if abs(key - running.key) > self.room.margin(job):
                running.key = key
                if upstream.info.orders and len(upstream.queued_calls()) > 0:
                    self._make_yield([running])
            return
        # Never twice within one window of the same job.
        if job.preemptions == 0 or job.attained - running.base >= self.config.window:
            upstream.offer(running, key)
            self._make_yield(self.room.yields_on(upstream, now))

    def _make_yield(self, slices: list[Running]) -> None:
        for running in slices:
            self._end(running)
            self._actions.append(Preempt(running.slice.id))
