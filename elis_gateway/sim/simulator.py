"""Virtual time: the scheduler, modelled engines and a predictor, driven from one event to the next.

Knows: the order of events, how to perform the scheduler's actions, what each job's life looked like. Never: wall time,
sockets. The same core as the live gateway's, so that a run of 20,000 jobs takes a second and means something.

One job's life is told by one ``Record``, measured from its arrival. What happens at the same instant happens in this
order: the engines' events, late estimates and deliveries, the scheduler's deadlines, arrivals.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from elis_gateway.core.actions import Abort, Action, AskEstimate, Finish, Preempt, Run
from elis_gateway.core.job import Job, JobSpec, JobState, Outcome
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.scheduler import Scheduler
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult
from elis_gateway.predictor.base import Estimate, Predictor, View
from elis_gateway.sim.engine import ENDED, MARK, Engine, Event, PrefixCache, Totals

__all__ = ["Outage", "Record", "Result", "SimJob", "simulate"]


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
    run = _Simulation(workload, scheduler, engines, predictor, latency, delay, text, predictions, observe)
    return run.run(overcommit, outages)


class _Flight:
    """A slice in flight."""

    __slots__ = ("asked", "base", "engine", "sent", "slice")

    def __init__(self, slice_: Slice, asked: SimJob, engine: Engine) -> None:
        self.slice = slice_
        self.asked = asked
        self.engine = engine
        self.base = slice_.job.attained
        self.sent = False


class _Simulation:
    def __init__(
        self,
        workload: Sequence[SimJob],
        scheduler: Scheduler,
        engines: Mapping[str, Engine],
        predictor: Predictor | None,
        latency: float,
        delay: float,
        text: Callable[[SimJob, int], str] | None,
        predictions: bool,
        observe: Callable[[float, Action], None] | None,
    ) -> None:
        self._workload = workload
        self._scheduler = scheduler
        self._engines = list(engines.values())
        self._names = list(engines)
        self._by_name = dict(engines)
        self._caches = {
            name: PrefixCache(engine.model) if engine.model.prefill_tokens_per_second is not None else None
            for name, engine in engines.items()
        }
        self._predictor = predictor
        self._latency = latency
        self._delay = delay
        self._text = text
        self._observe = observe
        self._asked: dict[str, SimJob] = {}
        self._flights: dict[int, _Flight] = {}
        self._records: dict[str, Record] = {}
        self._last_seen: dict[str, int] = {}
        """Tokens of jobs whose call was closed because they are over, until their Finish comes."""
        self._history: dict[str, list[tuple[int, float]]] | None = {} if predictions else None
        self._timers: list[tuple[float, int, Callable[..., list[Action]], tuple[object, ...]]] = []
        self._timer_seq = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- the event loop ---------------------------------------------------------------------------------------

    def run(self, overcommit: int, outages: Sequence[Outage]) -> Result:
        self._infos = self._register(overcommit)
        for outage in outages:
            self._at(outage.at, self._down, outage.upstream)
            self._at(outage.until, self._up, outage.upstream)
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
        return Result(records, {name: engine.totals for name, engine in self._by_name.items()}, end)

    def _register(self, overcommit: int) -> dict[str, UpstreamInfo]:
        models = frozenset(job.model for job in self._workload)
        infos = {}
        for name, engine in self._by_name.items():
            model = engine.model
            infos[name] = UpstreamInfo(name, models, model.slots, overcommit, model.orders)
            self._perform(self._scheduler.upstream_changed(infos[name], 0.0), 0.0)
        return infos

    def _run(self) -> float:
        workload, scheduler, engines, timers = self._workload, self._scheduler, self._engines, self._timers
        records = self._records
        total, index = len(workload), 0
        arrival = workload[0].arrival if total else inf
        now = 0.0
        idle = 0
        while len(records) < total:
            at = arrival
            source: object = None
            deadline = scheduler.next_deadline()
            if deadline is not None and deadline <= at:
                at, source = deadline, scheduler
            if timers and timers[0][0] <= at:
                at, source = timers[0][0], timers
            for engine in engines:
                due = engine.next_event()
                if due is not None and due <= at:
                    at, source = due, engine
            if at == inf:
                raise RuntimeError(f"{total - len(records)} jobs are left at {now:.3f} s and nothing will happen")
            if at > now:
                now, idle = at, 0
            if source is None:
                job = workload[index]
                index += 1
                arrival = workload[index].arrival if index < total else inf
                if arrival < job.arrival:
                    raise ValueError(f"the workload is not sorted by arrival: {arrival} after {job.arrival}")
                self._arrive(job, now)
            elif source is timers:
                _, _, act, args = heappop(timers)
                self._perform(act(*args, now), now)
            elif source is scheduler:
                idle += 1
                if idle > 10_000:
                    raise RuntimeError(f"the scheduler's next deadline stays at {deadline} s")
                self._perform(scheduler.tick(now), now)
            else:
                assert isinstance(source, Engine)
                for event in source.advance(now):
                    if self._delay:
                        self._at(event.at + self._delay, self._deliver, event)
                    else:
                        actions = self._deliver(event, now)
                        if actions:
                            self._perform(actions, now)
        return now

    def _at(self, at: float, act: Callable[..., list[Action]], *args: object) -> None:
        self._timer_seq += 1
        heappush(self._timers, (at, self._timer_seq, act, args))

    # ---- inputs of the scheduler ------------------------------------------------------------------------------

    def _arrive(self, asked: SimJob, now: float) -> None:
        self._asked[asked.id] = asked
        spec = JobSpec(
            asked.id,
            asked.model,
            asked.app,
            asked.prompt,
            asked.prompt_tokens,
            asked.limit,
            asked.rank,
            None if asked.deadline is None else now + asked.deadline,
            asked.sliceable,
            asked.conversation,
        )
        if asked.patience is not None:
            self._at(now + asked.patience, self._leave, asked.id)
        self._perform(self._scheduler.submit(spec, now), now)

    def _leave(self, job_id: str, now: float) -> list[Action]:
        return self._scheduler.cancel(job_id, now)

    def _deliver(self, event: Event, now: float) -> list[Action]:
        """An engine's event reaches the gateway."""
        kind, slice_id, tokens, _ = event
        flight = self._flights.get(slice_id)  # type: ignore[call-overload]
        if flight is None:
            return []
        attained = flight.base + tokens
        if kind is ENDED:
            whole = flight.asked.output_tokens
            limit = flight.slice.job.spec.limit
            done = attained >= whole or (limit is not None and attained >= limit)
            return self._end(flight, SliceEnd.FINISHED if done else SliceEnd.WINDOW, attained, now)
        if kind is MARK:
            return self._scheduler.window_passed(flight.slice.id, attained, now)
        return self._scheduler.slice_started(flight.slice.id, now)

    def _end(self, flight: _Flight, end: SliceEnd, attained: int, now: float) -> list[Action]:
        slice_id = flight.slice.id
        del self._flights[slice_id]
        cache = self._caches[flight.slice.upstream]
        if cache is not None and attained > flight.base:
            asked = flight.asked
            cache.store(asked.conversation or asked.id, asked.prompt_tokens + attained)
        return self._scheduler.slice_ended(slice_id, SliceResult(end, attained), now)

    def _down(self, name: str, now: float) -> list[Action]:
        actions = self._scheduler.upstream_changed(self._infos[name]._replace(slots=0), now)
        made = self._by_name[name].abort_all(now)
        cache = self._caches[name]
        for flight in [flight for flight in self._flights.values() if flight.slice.upstream == name]:
            tokens = made.get(flight.slice.id, 0)
            actions += self._end(flight, SliceEnd.INTERRUPTED, flight.base + tokens, now)
        if cache is not None:
            cache.clear()
        return actions

    def _up(self, name: str, now: float) -> list[Action]:
        return self._scheduler.upstream_changed(self._infos[name], now)

    # ---- actions ----------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action], now: float) -> None:
        """Perform actions in order; those that follow from them come after."""
        todo = list(actions)
        for action in todo:
            if self._observe is not None:
                self._observe(now, action)
            if type(action) is Run:
                self._start(action.slice, now)
            elif type(action) is AskEstimate:
                todo += self._estimate(action.job, now)
            elif type(action) is Finish:
                self._finish(action.job, now)
            elif isinstance(action, Preempt | Abort):
                flight = self._flights[action.slice_id]
                if self._delay:
                    self._at(now + self._delay, self._close, flight)
                else:
                    todo += self._close(flight, now)

    def _start(self, slice_: Slice, now: float) -> None:
        asked = self._asked[slice_.job.spec.id]
        engine = self._by_name[slice_.upstream]
        flight = self._flights[slice_.id] = _Flight(slice_, asked, engine)
        if self._delay:
            self._at(now + self._delay, self._send, flight)
        else:
            self._send(flight, now)

    def _send(self, flight: _Flight, now: float) -> list[Action]:
        slice_, asked = flight.slice, flight.asked
        if slice_.id not in self._flights:
            return []
        flight.sent = True
        attained = flight.base
        left = asked.output_tokens if asked.limit is None else min(asked.output_tokens, asked.limit)
        left -= attained
        if slice_.limit is not None and slice_.limit < left:
            left = slice_.limit
        cache = self._caches[slice_.upstream]
        prompt = asked.prompt_tokens + attained
        cached = prompt if cache is None else cache.lookup(asked.conversation or asked.id, prompt)
        flight.engine.start(slice_.id, prompt, cached, left, now, mark_every=slice_.window, priority=slice_.priority)
        return []

    def _close(self, flight: _Flight, now: float) -> list[Action]:
        """The engine hears that a call is closed. What it made until then is kept."""
        slice_id = flight.slice.id
        if slice_id not in self._flights or (flight.sent and not flight.engine.holds(slice_id)):
            return []  # it has ended; the news is told already, or on its way
        made = flight.engine.abort(slice_id, now) if flight.sent else 0
        if flight.slice.job.state is JobState.DONE and flight.asked.id in self._asked:
            self._last_seen[flight.asked.id] = flight.base + made
        return self._end(flight, SliceEnd.PREEMPTED, flight.base + made, now)

    def _finish(self, job: Job, now: float) -> None:
        job_id = job.spec.id
        asked = self._asked.pop(job_id)
        tokens = self._last_seen.pop(job_id, job.attained)
        flight = None if job.slice is None else self._flights.get(job.slice)
        if flight is not None and flight.sent:
            tokens = flight.base + flight.engine.tokens(flight.slice.id, now)
        history = None if self._history is None else self._history.pop(job_id, [])
        self._records[job_id] = Record(job, asked, tokens, history)
        if self._predictor is not None:
            complete = job.outcome is Outcome.COMPLETED and (asked.limit is None or asked.output_tokens < asked.limit)
            self._predictor.learn(self._view(job, asked)._replace(attained=tokens), complete=complete)

    # ---- estimates --------------------------------------------------------------------------------------------

    def _view(self, job: Job, asked: SimJob) -> View:
        answer = ""
        if self._text is not None and self._predictor is not None and self._predictor.reads_text:
            answer = self._text(asked, job.attained)
        limit = job.spec.limit
        attained = job.attained
        return View(
            asked.id,
            asked.model,
            asked.app,
            asked.prompt,
            answer,
            attained,
            None if limit is None else limit - attained,
        )

    def _estimate(self, job: Job, now: float) -> list[Action]:
        predictor = self._predictor
        job_id = job.spec.id
        asked = self._asked.get(job_id)
        if asked is None:
            return []
        if predictor is None:
            return self._scheduler.estimated(job_id, None, now)
        view = self._view(job, asked)
        estimate = predictor.instant(view)
        if predictor.refines:
            # A refined answer is on its way; an instant one is good until then, and nothing is worth waiting for it.
            self._at(now + self._latency, self._refined, job_id, view)
            if estimate is None:
                return []
        return self._tell(job_id, view.attained, estimate, now)

    def _refined(self, job_id: str, view: View, now: float) -> list[Action]:
        assert self._predictor is not None
        if job_id not in self._asked:
            return []
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        [estimate] = self._loop.run_until_complete(self._predictor.refine([view]))
        return self._tell(job_id, view.attained, estimate, now)

    def _tell(self, job_id: str, attained: int, estimate: Estimate | None, now: float) -> list[Action]:
        if self._history is not None and estimate is not None:
            self._history.setdefault(job_id, []).append((attained, estimate.remaining))
        return self._scheduler.estimated(job_id, estimate, now)
