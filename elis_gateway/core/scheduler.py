"""The scheduler. Events in with ``now``, actions out; it never calls out, reads a clock or performs I/O.

    submit            -> ESTIMATING  if the policy wants an estimate, else READY
                      -> RUNNING     a slot is free that nobody waits for; an estimate may follow
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

from elis_gateway.core.actions import Abort, Action, AskEstimate, Finish
from elis_gateway.core.admission import Alarms
from elis_gateway.core.compiled import mypyc_attr
from elis_gateway.core.dials import SchedulerConfig
from elis_gateway.core.job import Estimate, Job, JobSpec, JobState, Outcome
from elis_gateway.core.placement import Running, Upstream, UpstreamInfo
from elis_gateway.core.policy import Policy, remaining_tokens
from elis_gateway.core.slice import SliceEnd, SliceResult
from elis_gateway.core.slots import Slots
from elis_gateway.core.waiting import WaitingRoom

__all__ = ["Scheduler", "SchedulerConfig"]

# Looking a member up in its enum costs more than comparing it.
_READY, _RUNNING, _ESTIMATING, _DONE = JobState.READY, JobState.RUNNING, JobState.ESTIMATING, JobState.DONE
_FINISHED, _WINDOW, _PREEMPTED = SliceEnd.FINISHED, SliceEnd.WINDOW, SliceEnd.PREEMPTED
_COMPLETED = Outcome.COMPLETED
_SEAM_TOKENS = 2.0
"""Assumed until learned; an engine on a GPU needs one or two, a small one on a CPU four."""
_HALF_DONE = 0.5
"""Of the token that a cut call was making, on average: work that is lost."""


@mypyc_attr(allow_interpreted_subclasses=True)
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
        self._alarms = Alarms()
        self._slots = Slots(config, self.room, self._alarms, policy)
        self._slices = self._slots.slices

    # ---- inputs -----------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec, now: float) -> list[Action]:
        """A request arrived. Raises ValueError if its id is in use."""
        slots, alarms = self._slots, self._alarms
        if spec.id in self.jobs:
            raise ValueError(f"job id {spec.id!r} is in use")
        pool = self.room.pool(spec.model, now)
        job = Job(spec, now, pool)
        if spec.conversation is not None:
            job.home = self.room.warm_home(job)
        limit = self.config.queue_limit
        if limit is not None and len(self.jobs) >= limit and self.room.count() >= limit:
            self._finish(job, Outcome.REJECTED, "queue_full", now)
            return slots.take()
        self.jobs[spec.id] = job
        if alarms.set:
            alarms.forget_all_but(self.jobs)
        pool.arrived(now)
        pool.shadow.arrived(job)
        if self.config.queue_ttl is not None:
            alarms.wait_until(now + self.config.queue_ttl, spec.id)
        if spec.deadline is not None:
            alarms.done_until(spec.deadline, spec.id)
        if not slots.estimates:
            slots.enqueue(job, now)
        else:
            at_once = slots.start_at_once(job, now)
            slots.actions.append(AskEstimate(job, not at_once))
        return slots.take()

    def estimated(self, job_id: str, estimate: Estimate | None, now: float) -> list[Action]:
        """An answer to AskEstimate, at once or later. None: the old estimate is counted down."""
        slots = self._slots
        job = self.jobs.get(job_id)
        if job is None or job.state is _DONE:
            return []
        if estimate is not None:
            job.estimate = estimate
            job.estimate_at = job.attained
        state = job.state
        if state is _ESTIMATING:
            slots.enqueue(job, now)
        elif state is _READY:
            if estimate is not None:
                slots.rekey(job, now)
        else:
            slots.rescored(self._slices[job.slice], now)  # type: ignore[index]
        return slots.take()

    def slice_started(self, slice_id: int, now: float) -> list[Action]:
        """The slice's first token arrived. Optional for drivers whose slices always start at once."""
        running = self._slices[slice_id]
        if not running.started:
            self._slots.begun(running, now)
        return self._slots.take()

    def window_passed(self, slice_id: int, attained: int, now: float) -> list[Action]:
        """Another window's tokens arrived in this slice; ``attained``: the job's kept tokens in all."""
        slots = self._slots
        running = self._slices[slice_id]
        job = running.job
        if job.state is not _RUNNING:
            return []
        if not running.started:
            slots.begun(running, now)
        slots.measure(running, attained, now)
        job.attained = attained
        job.failures = 0
        job.avoid = None
        if running.upstream.info.leaving and slots.leaves(running):
            return slots.take()
        if slots.estimates:
            # Its answer, even if it is none, makes the new key.
            slots.actions.append(AskEstimate(job, self.room.is_wanted(running.upstream)))
        else:
            slots.rescored(running, now)
        return slots.take()

    def slice_ended(self, slice_id: int, result: SliceResult, now: float) -> list[Action]:
        """A slice is over; its slot is free. Exactly once for every Run."""
        slots = self._slots
        running = self._slices.pop(slice_id)
        job, upstream = running.job, running.upstream
        end, attained, cause, limit = result
        tokens = attained - running.base
        job.served += self._slot_time(running, tokens, now)
        job.disturbed += upstream.continued - running.calm
        if job.state is not _DONE:
            slots.measure(running, attained, now)
        upstream.ended(running)
        if upstream.info.overcommit and (running.started or tokens > 0):
            upstream.passes_on(now)
        upstream.settling = (
            end is _PREEMPTED
            and running.started
            and not upstream.info.orders
            and any(r.queued for r in upstream.unstarted.values())
        )
        if job.state is _DONE:
            self.jobs.pop(job.spec.id, None)
            slots.fill(upstream, now)
            return slots.take()
        if tokens > 0:
            job.failures = 0
            job.avoid = None
            if job.first_token is None:
                job.first_token = now
            elif not running.started and running.base:
                job.seams += 1
        job.attained = attained
        job.slice = None
        if limit is not None and limit != job.spec.limit:
            job.spec = job.spec._replace(limit=limit)
        if end is _WINDOW:
            self._continue(job, upstream, now)
        elif end is _FINISHED:
            job.pool.answered(attained)
            self._finish(job, _COMPLETED, cause, now)
        elif end is _PREEMPTED:
            if running.started or tokens > 0:
                job.preemptions += 1
                slots.enqueue(job, now, False)
            else:
                slots.called_back(running, now)
        elif end is SliceEnd.INTERRUPTED:
            self._interrupted(job, cause, now)
        else:
            self._finish(job, Outcome.FAILED, cause, now)
        slots.fill(upstream, now)
        return slots.take()

    def cancel(self, job_id: str, now: float, *, outcome: Outcome = Outcome.CANCELLED, cause: str = "") -> list[Action]:
        """The client is gone, or nobody wants the answer any more."""
        job = self.jobs.get(job_id)
        if job is None or job.state is _DONE:
            return []
        self._drop(job, outcome, cause, now)
        return self._slots.take()

    def upstream_changed(self, info: UpstreamInfo, now: float) -> list[Action]:
        """An upstream is new, came back, went down (``slots`` 0), or changed what it serves."""
        upstream = self.upstreams.get(info.id)
        if upstream is None:
            upstream = self.upstreams[info.id] = Upstream(info)
        stale = upstream.info.models - info.models
        upstream.become(info)
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
                self._slots.enqueue(job, now)
        if info.leaving:
            self._slots.empty(upstream)
        for each in self.upstreams.values():
            # The others too: what was left for a better place may have to be taken where it is now.
            self._slots.fill(each, now)
        return self._slots.take()

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
        self._slots.use(policy, self.config)
        queues = [p.queue for p in self.pools.values()] + [u.queue for u in self.upstreams.values()]
        for queue in queues:
            for job in queue.jobs():
                if job.state is not _READY:
                    continue  # a new key before its own has let it start
                self._slots.rekey(job, now)
                if self._slots.estimates and job.estimate is None:
                    self._slots.actions.append(AskEstimate(job))
        return self._slots.take()

    def tick(self, now: float) -> list[Action]:
        """Time has reached ``next_deadline``."""
        for job_id, reason in self._alarms.due(now):
            job = self.jobs.get(job_id)
            if job is None or job.state is _DONE:
                continue
            if reason == "queue_ttl" and (job.first_run is not None):
                continue
            if reason == "unavailable":
                at = self._stranded_at(job)
                if at is not None and at > now:
                    # It may wait longer by now than when the alarm was set.
                    self._alarms.capacity_until(at, job_id)
                if at is None or at > now:
                    continue
            self._drop(job, Outcome.EXPIRED, reason, now)
        return self._slots.take()

    def next_deadline(self) -> float | None:
        """When ``tick`` is wanted next; None: not before another input."""
        return self._alarms.next()

    # ---- views ------------------------------------------------------------------------------------------------

    def backlog(self, model: str) -> float:
        """Tokens that the waiting and running jobs of ``model`` are expected to need still. Looks at all of them."""
        pool = self.pools.get(model)
        if pool is None:
            return 0.0
        jobs = self.jobs.values()
        return sum(remaining_tokens(job, pool) for job in jobs if job.spec.model == model and job.state is not _DONE)

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

    # ---- what becomes of a job --------------------------------------------------------------------------------

    def _continue(self, job: Job, upstream: Upstream, now: float) -> None:
        """A fixed window is over and the answer goes on."""
        if not self._slots.estimates:
            self._slots.enqueue(job, now, False)
            return
        if self.config.rescore == "always" or self.room.is_wanted(upstream):
            # The slot is held: who gets it depends on what this job's fresh estimate says.
            job.state = _ESTIMATING
            self._slots.hold(job, upstream)
            self._slots.actions.append(AskEstimate(job))
        else:
            self._slots.enqueue(job, now, False)
            self._slots.fill(upstream, now)
            self._slots.actions.append(AskEstimate(job, False))

    @staticmethod
    def _slot_time(running: Running, tokens: int, now: float) -> float:
        """How long the slice held a slot, as opposed to waiting for one in the engine's own queue."""
        longest = now - running.began
        if running.started or not running.queued:
            return longest
        # It never began, or came in one piece at its end.
        job = running.job
        return min(longest, tokens * job.pool.seconds_per_token) if tokens > 0 else 0.0

    def _interrupted(self, job: Job, cause: str, now: float) -> None:
        job.failures += 1
        if job.failures > self.config.retries:
            self._finish(job, Outcome.FAILED, cause, now)
            return
        job.avoid, job.home = job.home, None
        self._slots.enqueue(job, now)

    def _drop(self, job: Job, outcome: Outcome, cause: str, now: float) -> None:
        held = self._slots.unhold(job)
        if job.state is _READY:
            self.room.queue_of(job).discard(job)
            job.waited += now - job.ready_since
        elif job.state is _RUNNING:
            running = self._slices[job.slice]  # type: ignore[index]
            if not running.ending:
                running.upstream.told_to_end(running)
                self._slots.actions.append(Abort(running.id))
        self._finish(job, outcome, cause, now)
        if held is not None:
            self._slots.fill(held, now)

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
        self._slots.actions.append(Finish(job))

    def _shadow(self, job: Job) -> None:
        """Tell first-come's shadow what the job turned out to need: its slot time without the seams our order cost,
        its own with the token that was being made when it was cut, and, where a prompt holds up everybody's decoding,
        those of others beside it."""
        pool = job.pool
        seams = (job.seams * self.room.seam_tokens + job.preemptions * _HALF_DONE) * pool.seconds_per_token
        stalls = job.disturbed * pool.stall.value if job.disturbed else 0.0
        pool.shadow.over(job, max(job.served - seams - stalls, 0.0))

    def _stranded_at(self, job: Job) -> float | None:
        """When a job has waited too long for an upstream; None: there is one, or it does not wait."""
        pool = job.pool
        if job.state is not _READY or pool.down_since is None:
            return None
        return max(pool.down_since, job.ready_since) + self.config.unavailable_timeout
