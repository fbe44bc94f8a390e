"""Virtual time: the scheduler, modelled engines and a predictor, driven from one event to the next.

Knows: the order of events, how to perform the scheduler's actions, what each job's life looked like. Never: wall time,
sockets. The same core as the live gateway's, so that a run of 20,000 jobs takes a second and means something.

One job's life is told by one ``Record``, measured from its arrival. What happens at the same instant happens in this
order: the engines' events, late estimates and deliveries, the scheduler's deadlines, arrivals.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from elis_gateway.core.actions import Action, AskEstimate, Finish, Run
from elis_gateway.core.job import Job, JobSpec, JobState, Outcome
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.scheduler import Scheduler
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult
from elis_gateway.predictor.base import Predictor, View, counted_down
from elis_gateway.sim.engine import MARK, STARTED, Engine, Event, PrefixCache, Totals

__all__ = ["Outage", "Record", "Result", "SimJob", "simulate"]


_FINISHED, _WINDOW = SliceEnd.FINISHED, SliceEnd.WINDOW
_new = tuple.__new__
"""A named tuple without the detour through Python that its constructor takes."""


class SimJob(NamedTuple):
    """A request of the workload, with what only a simulation knows: the length of its answer."""

    id: str
    arrival: float
    """Seconds; a workload is sorted by it."""
    prompt_tokens: int
    output_tokens: int
    """Tokens at which the model would stop by itself; ``limit`` may cut it off earlier."""
    model: str = "model"
    app: str = ""
    prompt: str = ""
    limit: int | None = None
    rank: int = 0
    deadline: float | None = None
    """Seconds after the arrival."""
    sliceable: bool = True
    conversation: str | None = None
    patience: float | None = None
    """Seconds after which the client leaves."""


class Outage(NamedTuple):
    """An upstream dies, and comes back ``until`` later times (seconds of virtual time)."""

    upstream: str
    at: float
    until: float


class Record:
    """One job's life. Times in seconds of virtual time, ``None`` where it never came to that."""

    __slots__ = (
        "app", "arrival", "cause", "end", "first_token", "id", "outcome", "output_tokens", "predictions",
        "preemptions", "prompt_tokens", "slices", "tokens", "upstream", "wait",
    )  # fmt: skip

    def __init__(self, job: Job, asked: SimJob, tokens: int, predictions: list[tuple[int, float]] | None) -> None:
        self.id = asked.id
        self.app = asked.app
        self.arrival = asked.arrival
        self.first_token = job.first_token
        self.end = job.finished if job.finished is not None else inf
        self.wait = job.waited
        """Seconds spent ready but not running, all waits together."""
        self.slices = job.slices
        self.preemptions = job.preemptions
        self.prompt_tokens = asked.prompt_tokens
        self.output_tokens = asked.output_tokens
        self.tokens = tokens
        """Answer tokens made, those of an answer that nobody waited for included."""
        self.outcome = job.outcome
        self.cause = job.cause
        self.upstream = job.home
        self.predictions = predictions
        """(tokens so far, predicted remaining) of every estimate, where asked for."""

    @property
    def jct(self) -> float:
        """Job completion time."""
        return self.end - self.arrival

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def completed(self) -> bool:
        return self.outcome is Outcome.COMPLETED


class Result(NamedTuple):
    records: list[Record]
    """In the order of the workload."""
    totals: dict[str, Totals]
    """What each engine did."""
    end: float
    """Virtual time of the last event."""


def simulate(
    workload: Sequence[SimJob],
    scheduler: Scheduler,
    engines: Mapping[str, Engine],
    predictor: Predictor | None = None,
    *,
    latency: float = 0.0,
    delay: float = 0.0,
    overcommit: int = 0,
    outages: Sequence[Outage] = (),
    text: Callable[[SimJob, int], str] | None = None,
    predictions: bool = False,
    observe: Callable[[float, Action], None] | None = None,
) -> Result:
    """Run a workload to its end and return one record per job.

    ``latency``: seconds until a predictor that refines has answered (others answer at once). ``delay``: seconds from
    gateway to engine and back again, each way: what a slot loses while it waits to be refilled. ``overcommit``: calls
    to hand each engine beyond its slots. ``text(job, tokens)``: the answer so far, for predictors that read text.
    ``predictions``: keep every estimate in the records. ``observe`` sees every action before it is performed.

    The scheduler must be fresh. Raises ValueError for an unsorted workload, RuntimeError where everything stands still
    although jobs are left (a bug of the scheduler, or no engine for a job).
    """
    run = _Simulation(workload, scheduler, engines, predictor, latency, delay, overcommit, text, predictions, observe)
    return run.run(outages)


class _Upstream(NamedTuple):
    info: UpstreamInfo
    engine: Engine
    cache: PrefixCache | None
    """None where prompts cost nothing."""


class _Life:
    """What the driver keeps of one job; travels with it as its payload."""

    __slots__ = ("asked", "base", "last", "limit", "predictions", "sent", "slice", "upstream", "whole")

    def __init__(self, asked: SimJob, predictions: list[tuple[int, float]] | None) -> None:
        self.asked = asked
        limit = asked.limit
        self.whole = asked.output_tokens if limit is None or limit > asked.output_tokens else limit
        """Tokens at which the answer is complete."""
        self.predictions = predictions
        self.slice: Slice | None = None
        """In flight. Given up at its end: with it the job would hold itself in memory."""
        self.upstream: _Upstream | None = None
        """Where that is."""
        self.base = 0
        """Tokens before it."""
        self.sent = False
        """The engine knows of it."""
        self.last: int | None = None
        """Tokens when a call was closed because the job is over."""


class _Simulation:
    def __init__(
        self,
        workload: Sequence[SimJob],
        scheduler: Scheduler,
        engines: Mapping[str, Engine],
        predictor: Predictor | None,
        latency: float,
        delay: float,
        overcommit: int,
        text: Callable[[SimJob, int], str] | None,
        predictions: bool,
        observe: Callable[[float, Action], None] | None,
    ) -> None:
        self._workload = workload
        self._scheduler = scheduler
        self._predictor = predictor
        self._latency = latency
        self._delay = delay
        self._text = text if predictor is not None and predictor.reads_text else None
        self._predictions = predictions
        self._observe = observe
        self._flights: dict[Hashable, _Life] = {}
        """Jobs by slice in flight."""
        self._records: dict[str, Record] = {}
        self._timers: list[tuple[float, int, Callable[..., list[Action]], tuple[object, ...]]] = []
        self._timer_seq = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        models = frozenset(job.model for job in workload)
        self._upstreams = {
            name: _Upstream(
                UpstreamInfo(name, models, engine.model.slots, overcommit, engine.model.orders),
                engine,
                None if engine.model.prefill_tokens_per_second is None else PrefixCache(engine.model),
            )
            for name, engine in engines.items()
        }

    # ---- the event loop ---------------------------------------------------------------------------------------

    def run(self, outages: Sequence[Outage]) -> Result:
        for outage in outages:
            self._at(outage.at, self._down, outage.upstream)
            self._at(outage.until, self._up, outage.upstream)
        for upstream in self._upstreams.values():
            self._perform(self._scheduler.upstream_changed(upstream.info, 0.0), 0.0)
        # A run makes millions of short-lived objects and no cycles: looking for them costs a fifth of the time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            end = self._run()
        finally:
            if collecting:
                gc.enable()
            if self._loop is not None:
                self._loop.close()
        records = [self._records[job.id] for job in self._workload]
        return Result(records, {name: upstream.engine.totals for name, upstream in self._upstreams.items()}, end)

    def _run(self) -> float:
        workload, scheduler, timers, records = self._workload, self._scheduler, self._timers, self._records
        engines = [(upstream.engine.next_event, upstream.engine) for upstream in self._upstreams.values()]
        next_deadline, deliver, perform, delay = scheduler.next_deadline, self._deliver, self._perform, self._delay
        total, index = len(workload), 0
        arrival = workload[0].arrival if total else inf
        now = 0.0
        idle = 0
        while len(records) < total:
            at = arrival
            source: object = None
            deadline = next_deadline()
            if deadline is not None and deadline <= at:
                at, source = deadline, scheduler
            if timers and timers[0][0] <= at:
                at, source = timers[0][0], timers
            for next_event, engine in engines:
                due = next_event()
                if due is not None and due <= at:
                    at, source = due, engine
            if at == inf:
                raise RuntimeError(f"{total - len(records)} jobs are left at {now:.3f} s and nothing will happen")
            if at > now:
                now, idle = at, 0
            if isinstance(source, Engine):
                if delay:
                    for event in source.advance(now):
                        self._at(event.at + delay, deliver, event)
                else:
                    for event in source.advance(now):
                        if actions := deliver(event, now):
                            perform(actions, now)
            elif source is None:
                job = workload[index]
                index += 1
                arrival = workload[index].arrival if index < total else inf
                if arrival < job.arrival:
                    raise ValueError(f"the workload is not sorted by arrival: {arrival} after {job.arrival}")
                self._arrive(job, now)
            elif source is timers:
                _, _, act, args = heappop(timers)
                perform(act(*args, now), now)
            else:
                idle += 1
                if idle > 10_000:
                    raise RuntimeError(f"the scheduler's next deadline stays at {deadline} s")
                perform(scheduler.tick(now), now)
        return now

    def _at(self, at: float, act: Callable[..., list[Action]], *args: object) -> None:
        self._timer_seq += 1
        heappush(self._timers, (at, self._timer_seq, act, args))

    # ---- inputs of the scheduler ------------------------------------------------------------------------------

    def _arrive(self, asked: SimJob, now: float) -> None:
        deadline = None if asked.deadline is None else now + asked.deadline
        life = _Life(asked, [] if self._predictions else None)
        spec = _new(
            JobSpec,
            (asked.id, asked.model, asked.app, asked.prompt, asked.prompt_tokens, asked.limit, asked.rank, deadline,
             asked.sliceable, asked.conversation, life, None),
        )  # fmt: skip
        if asked.patience is not None:
            self._at(now + asked.patience, self._leave, asked.id)
        self._perform(self._scheduler.submit(spec, now), now)

    def _leave(self, job_id: str, now: float) -> list[Action]:
        return self._scheduler.cancel(job_id, now)

    def _deliver(self, event: Event, now: float) -> list[Action]:
        """An engine's event reaches the gateway."""
        kind, slice_id, tokens, _ = event
        life = self._flights.get(slice_id)
        if life is None:
            return []
        if kind is STARTED:
            return self._scheduler.slice_started(slice_id, now)  # type: ignore[arg-type]
        attained = life.base + tokens
        if kind is MARK:
            return self._scheduler.window_passed(slice_id, attained, now)  # type: ignore[arg-type]
        return self._end(life, _FINISHED if attained >= life.whole else _WINDOW, attained, now)

    def _end(self, life: _Life, end: SliceEnd, attained: int, now: float) -> list[Action]:
        slice_id = life.slice.id  # type: ignore[union-attr]
        life.slice = None
        del self._flights[slice_id]
        cache = life.upstream.cache  # type: ignore[union-attr]
        if cache is not None and attained > life.base:
            asked = life.asked
            cache.store(asked.conversation or asked.id, asked.prompt_tokens + attained)
        return self._scheduler.slice_ended(slice_id, _new(SliceResult, (end, attained, "", None)), now)

    def _down(self, name: str, now: float) -> list[Action]:
        upstream = self._upstreams[name]
        actions = self._scheduler.upstream_changed(upstream.info._replace(slots=0), now)
        made = upstream.engine.abort_all(now)
        for slice_id, life in list(self._flights.items()):
            if life.upstream is upstream:
                actions += self._end(life, SliceEnd.INTERRUPTED, life.base + made.get(slice_id, 0), now)
        if upstream.cache is not None:
            upstream.cache.clear()
        return actions

    def _up(self, name: str, now: float) -> list[Action]:
        return self._scheduler.upstream_changed(self._upstreams[name].info, now)

    # ---- actions ----------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action], now: float) -> None:
        """Perform actions in order; those that follow from them come after."""
        observe = self._observe
        for action in actions:
            if observe is not None:
                observe(now, action)
            kind = type(action)
            if kind is AskEstimate:
                actions += self._estimate(action.job, now)  # type: ignore[union-attr]
            elif kind is Run:
                self._start(action.slice, now)  # type: ignore[union-attr]
            elif kind is Finish:
                self._finish(action.job, now)  # type: ignore[union-attr]
            elif self._delay:
                self._at(now + self._delay, self._close, action.slice_id)  # type: ignore[union-attr]
            else:
                actions += self._close(action.slice_id, now)  # type: ignore[union-attr]

    def _start(self, slice_: Slice, now: float) -> None:
        job = slice_.job
        life: _Life = job.spec.payload  # type: ignore[assignment]
        self._flights[slice_.id] = life
        life.slice = slice_
        life.base = job.attained
        life.upstream = self._upstreams[slice_.upstream]
        if self._delay:
            life.sent = False
            self._at(now + self._delay, self._arrived, slice_.id)
        else:
            self._send(life, slice_, now)

    def _arrived(self, slice_id: int, now: float) -> list[Action]:
        """A call reaches its engine, unless it was closed on the way."""
        if (life := self._flights.get(slice_id)) is not None:
            self._send(life, life.slice, now)  # type: ignore[arg-type]
        return []

    def _send(self, life: _Life, slice_: Slice, now: float) -> None:
        life.sent = True
        asked = life.asked
        _, engine, cache = life.upstream  # type: ignore[misc]
        prompt = asked.prompt_tokens + life.base
        left = life.whole - life.base
        slice_id, _, _, limit, window, priority = slice_
        engine.start(
            slice_id,
            prompt,
            prompt if cache is None else cache.lookup(asked.conversation or asked.id, prompt),
            left if limit is None or limit > left else limit,
            now,
            window,
            priority,
        )

    def _close(self, slice_id: int, now: float) -> list[Action]:
        """The engine hears that a call is closed. What it made until then is kept."""
        life = self._flights.get(slice_id)
        if life is None:
            return []
        engine = life.upstream.engine  # type: ignore[union-attr]
        if life.sent and not engine.holds(slice_id):
            return []  # it has ended; the news is told already, or on its way
        attained = life.base + (engine.abort(slice_id, now) if life.sent else 0)
        if life.slice.job.state is JobState.DONE:  # type: ignore[union-attr]
            life.last = attained
        # Closed in the very instant of its last token: nothing is left to continue.
        return self._end(life, SliceEnd.FINISHED if attained >= life.whole else SliceEnd.PREEMPTED, attained, now)

    def _finish(self, job: Job, now: float) -> None:
        life: _Life = job.spec.payload  # type: ignore[assignment]
        asked = life.asked
        tokens = job.attained if life.last is None else life.last
        if job.slice in self._flights and life.sent:
            tokens = life.base + life.upstream.engine.tokens(job.slice, now)  # type: ignore[union-attr]
        self._records[asked.id] = Record(job, asked, tokens, life.predictions)
        if self._predictor is not None:
            complete = job.outcome is Outcome.COMPLETED and (asked.limit is None or asked.output_tokens < asked.limit)
            self._predictor.learn(self._view(job, asked, tokens), complete=complete)

    # ---- estimates --------------------------------------------------------------------------------------------

    def _view(self, job: Job, asked: SimJob, attained: int) -> View:
        answer = "" if self._text is None else self._text(asked, attained)
        limit = job.spec.limit
        left = None if limit is None else limit - attained
        return _new(View, (asked.id, asked.model, asked.app, asked.prompt, answer, attained, left))

    def _estimate(self, job: Job, now: float) -> list[Action]:
        predictor = self._predictor
        if predictor is None:
            return self._scheduler.estimated(job.spec.id, None, now)
        spec, attained = job.spec, job.attained
        life: _Life = spec.payload  # type: ignore[assignment]
        view = self._view(job, life.asked, attained)
        estimate = predictor.instant(view)
        if predictor.refines:
            # A better answer is on its way; without an instant one the scheduler hears nothing until then.
            self._at(now + self._latency, self._refined, life, view)
            if estimate is None:
                return []
        if life.predictions is not None and estimate is not None:
            life.predictions.append((attained, estimate.remaining))
        return self._scheduler.estimated(spec.id, estimate, now)

    def _refined(self, life: _Life, view: View, now: float) -> list[Action]:
        assert self._predictor is not None
        if view.job_id in self._records:
            return []
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        [estimate] = self._loop.run_until_complete(self._predictor.refine([view]))
        attained = self._scheduler.jobs[view.job_id].attained
        estimate = counted_down(estimate, attained - view.attained)
        if life.predictions is not None and estimate is not None:
            life.predictions.append((attained, estimate.remaining))
        return self._scheduler.estimated(view.job_id, estimate, now)
