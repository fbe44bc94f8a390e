"""Invariants of the scheduler under any history: nothing lost, nothing doubled, no slot leaked, no slot idle."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from elis_gateway.core.actions import Abort, Action, AskEstimate, Finish, Preempt, Run
from elis_gateway.core.job import Estimate, Job, JobSpec, JobState
from elis_gateway.core.placement import Pool, UpstreamInfo
from elis_gateway.core.policy import FCFS, ISRTF, LAS, SJF, Aging, Policy, RoundRobin
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult

MODELS = ("m", "n")
SERVES = {"u": frozenset({"m"}), "v": frozenset({"m", "n"})}
POLICIES: list[Policy] = [
    FCFS(), RoundRobin(), LAS(), SJF(), ISRTF(), ISRTF("mean", Aging("linear")), ISRTF("gittins", Aging("boost")),
]  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 300)), min_size=2, max_size=40),
    st.sampled_from([Aging("linear", a=0.5), Aging("boost", factor=1.0)]),
    st.integers(1, 3),
)
def test_the_wait_is_bounded(arrivals, aging, slots):
    """At a fixed pace and gamma no job starts before a waiting one that came earlier than it by more than
    boost(shortest) - boost(longest): that is when the key of even the shortest newcomer is behind the longest's."""
    longest, now = 300, 0.0
    scheduler = Scheduler(SchedulerConfig(mode="fixed", seconds_per_token=1.0), SJF("mean", aging))
    scheduler.upstream_changed(UpstreamInfo("u", frozenset({"m"}), slots), 0.0)
    pool = scheduler.pools["m"]
    spread = _boost(aging, 1.0, pool) - _boost(aging, float(longest), pool)
    flying: list[Slice] = []
    waiting: dict[str, float] = {}

    def perform(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, AskEstimate):
                if action.pressing:
                    waiting[action.job.id] = now
                perform(scheduler.estimated(action.job.id, Estimate(float(lengths[action.job.id])), now))
            elif isinstance(action, Run):
                job = action.slice.job
                waiting.pop(job.id, None)  # not there: a slot was free when it came
                assert all(job.arrival <= since + spread + 1e-6 for since in waiting.values())
                flying.append(action.slice)

    lengths: dict[str, int] = {}
    for i, (gap, length) in enumerate(arrivals):
        now += gap
        lengths[f"j{i}"] = length
        perform(scheduler.submit(JobSpec(f"j{i}", "m", limit=length), now))
        if i % 3 == 2:
            slice_ = flying.pop(0)
            perform(scheduler.slice_ended(slice_.id, SliceResult(SliceEnd.FINISHED, 1), now))
    while flying:
        now += 1.0
        slice_ = flying.pop(0)
        perform(scheduler.slice_ended(slice_.id, SliceResult(SliceEnd.FINISHED, 1), now))
    assert not waiting


def _boost(aging: Aging, seconds: float, pool: Pool) -> float:
    job = Job(JobSpec("x", "m"), 0.0, pool)
    return -aging.key(job, seconds, pool)


class Machine(RuleBasedStateMachine):
    """Plays a driver that answers late, out of order, or with bad news, against two schedulers fed alike."""

    jobs = Bundle("jobs")

    @initialize(
        policy=st.sampled_from(POLICIES),
        mode=st.sampled_from(["fixed", "elastic"]),
        rescore=st.sampled_from(["always", "contended"]),
        slots=st.integers(1, 2),
        overcommit=st.integers(0, 2),
        orders=st.booleans(),
        limit=st.none() | st.integers(1, 6),
        tail=st.none() | st.just(1.25),
    )
    def begin(self, policy, mode, rescore, slots, overcommit, orders, limit, tail):
        config = SchedulerConfig(
            mode=mode, rescore=rescore, queue_limit=limit, queue_ttl=500.0, unavailable_timeout=40.0, retries=2
        )
        if any(f.name == "tail" for f in dataclasses.fields(config)):
            config = dataclasses.replace(config, tail=tail)
        self.twins = [Scheduler(config, policy) for _ in range(2)]
        self.scheduler = self.twins[0]
        self.now = 0.0
        self.count = 0
        self.capacity = {}
        self.flying: dict[int, Slice] = {}
        self.told: set[int] = set()
        self.asked: dict[str, int] = {}
        self.submitted: set[str] = set()
        self.finished: set[str] = set()
        self.infos = {name: UpstreamInfo(name, serves, slots, overcommit, orders) for name, serves in SERVES.items()}
        for info in self.infos.values():
            self.feed("upstream_changed", info)

    def feed(self, method: str, *args: object, **more: object) -> None:
        """The same input to both schedulers: equal inputs give equal actions."""
        said = [getattr(s, method)(*args, self.now, **more) for s in self.twins]
        assert repr(said[0]) == repr(said[1])
        for action in said[0]:
            self.perform(action)

    def perform(self, action: Action) -> None:
        match action:
            case AskEstimate(job):
                assert job.id in self.submitted or job.id == self.newest
                self.asked[job.id] = self.asked.get(job.id, 0) + 1
            case Run(slice_):
                assert slice_.job.id not in self.finished
                assert all(s.job.id != slice_.job.id for s in self.flying.values()), "in two places"
                assert slice_.limit is None or slice_.limit >= 1
                self.flying[slice_.id] = slice_
            case Preempt(slice_id) | Abort(slice_id):
                assert slice_id in self.flying
                assert slice_id not in self.told, "told twice"
                self.told.add(slice_id)
            case Finish(job):
                assert job.id not in self.finished, "finished twice"
                self.finished.add(job.id)

    @rule(
        target=jobs, model=st.sampled_from(MODELS), rank=st.integers(0, 1), sliceable=st.booleans(),
        limit=st.none() | st.integers(1, 300), wait=st.none() | st.floats(1, 100),
    )  # fmt: skip
    def submit(self, model, rank, sliceable, limit, wait):
        self.count += 1
        self.newest = f"j{self.count}"
        deadline = None if wait is None else self.now + wait
        self.feed("submit", JobSpec(self.newest, model, rank=rank, sliceable=sliceable, limit=limit, deadline=deadline))
        self.submitted.add(self.newest)
        return self.newest

    @rule(dt=st.floats(0.0, 20.0))
    def wait(self, dt):
        self.now += dt
        due = self.scheduler.next_deadline()
        if due is not None and due <= self.now:
            self.feed("tick")

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), tokens=st.none() | st.floats(1, 500), gittins=st.none() | st.floats(1, 500))
    def answer(self, data, tokens, gittins):
        job_id = data.draw(st.sampled_from(sorted(self.asked)))
        del self.asked[job_id]
        self.feed("estimated", job_id, None if tokens is None else Estimate(tokens, gittins))

    @rule(job_id=jobs, tokens=st.floats(1, 500))
    def refine(self, job_id, tokens):
        """A better estimate, late, for whatever has become of the job."""
        job = self.scheduler.jobs.get(job_id)
        if job is None or job.state is not JobState.ESTIMATING:
            self.feed("estimated", job_id, Estimate(tokens))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def started(self, data):
        self.feed("slice_started", data.draw(st.sampled_from(sorted(self.flying))))

    @precondition(lambda self: any(s.window for s in self.flying.values()))
    @rule(data=st.data())
    def window(self, data):
        slice_id = data.draw(st.sampled_from(sorted(i for i, s in self.flying.items() if s.window)))
        job = self.flying[slice_id].job
        if job.spec.limit is None or job.attained + 50 <= job.spec.limit:
            self.feed("window_passed", slice_id, job.attained + 50)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), end=st.sampled_from(SliceEnd), tokens=st.integers(0, 50))
    def end(self, data, end, tokens):
        slice_id = data.draw(st.sampled_from(sorted(self.flying)))
        slice_ = self.flying.pop(slice_id)
        if slice_id in self.told:
            end = SliceEnd.PREEMPTED
        elif end in (SliceEnd.PREEMPTED, SliceEnd.WINDOW) and not slice_.job.spec.sliceable:
            end = SliceEnd.FINISHED
        elif end is SliceEnd.PREEMPTED:
            end = SliceEnd.INTERRUPTED
        self.told.discard(slice_id)
        job = slice_.job
        attained = job.attained + tokens
        if job.spec.limit is not None and attained >= job.spec.limit:
            attained = job.spec.limit
            end = SliceEnd.FINISHED if end is SliceEnd.WINDOW else end
            attained -= end in (SliceEnd.INTERRUPTED, SliceEnd.PREEMPTED)
        self.feed("slice_ended", slice_id, SliceResult(end, attained))

    @rule(job_id=consumes(jobs))
    def cancel(self, job_id):
        self.feed("cancel", job_id)

    @rule(name=st.sampled_from(sorted(SERVES)), slots=st.integers(0, 2))
    def resize(self, name, slots):
        self.infos[name] = self.infos[name]._replace(slots=slots)
        self.feed("upstream_changed", self.infos[name])

    @rule(name=st.sampled_from(sorted(SERVES)), models=st.sampled_from([{"m"}, {"n"}, {"m", "n"}]))
    def serve_others(self, name, models):
        """An upstream serves other models from now on."""
        self.infos[name] = self.infos[name]._replace(models=frozenset(models))
        self.feed("upstream_changed", self.infos[name])

    @rule(policy=st.sampled_from(POLICIES))
    def switch(self, policy):
        self.feed("set_policy", policy)

    @invariant()
    def nothing_is_lost_or_doubled(self):
        if not hasattr(self, "scheduler"):
            return
        live = {j.id: j for j in self.scheduler.jobs.values() if j.state is not JobState.DONE}
        assert set(live) == self.submitted - self.finished
        waiting = [j.id for p in self.scheduler.pools.values() for j in p.queue.jobs()]
        waiting += [j.id for u in self.scheduler.upstreams.values() for j in u.queue.jobs()]
        assert sorted(waiting) == sorted(i for i, j in live.items() if j.state is JobState.READY)
        assert len(waiting) == self.scheduler.waiting()
        running = {s.job.id for s in self.flying.values()}
        assert {i for i, j in live.items() if j.state is JobState.RUNNING} <= running
        for job_id, job in live.items():
            if job.state is JobState.ESTIMATING:
                assert job_id in self.asked, "waits for an estimate nobody was asked for"

    @invariant()
    def slots_are_neither_leaked_nor_overused(self):
        if not hasattr(self, "scheduler"):
            return
        for name, upstream in self.scheduler.upstreams.items():
            flying = [i for i, s in self.flying.items() if s.upstream == name]
            assert sorted(flying) == sorted(upstream.running)
            assert upstream.ending == sum(1 for i in flying if i in self.told)
            assert 0 <= upstream.closing <= upstream.ending

    @invariant()
    def work_conserving(self):
        """A free slot and a job that could use it never meet; slots held for an estimate are not free, jobs that an
        upstream just failed are left for the others, and an engine's queue is left alone while a slot changes hands."""
        if not hasattr(self, "scheduler"):
            return
        s = self.scheduler
        for upstream in s.upstreams.values():
            if not upstream.takes:
                assert upstream.free <= 0 or upstream.full
                continue
            waiting = [job for queue in (upstream.queue, *(p.queue for p in upstream.pools)) for job in queue.jobs()]
            assert all(s.room.shuns(job, upstream) for job in waiting)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=80, deadline=None, derandomize=True)
TestScheduler = Machine.TestCase
