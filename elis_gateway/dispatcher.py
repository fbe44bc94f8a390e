"""The live driver: asyncio and the loop's clock around the scheduler. Performs its actions; decides nothing.

Knows: when things happen. Never: HTTP, JSON, event streams, metric names.

``_perform`` is synchronous and does not await, so there are no locks and no re-entrancy: a task it starts comes back
later through one of the scheduler's inputs. What arrives from an upstream goes to the client's channel at once; the
scheduler hears of it once per window, not once per token.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from elis_gateway.core.actions import Abort, Action, AskEstimate, Finish, Preempt, Run
from elis_gateway.core.compiled import mypyc_attr
from elis_gateway.core.job import Estimate, Job, Outcome
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.policy import Policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult
from elis_gateway.errors import (
    GatewayError,
    Overloaded,
    ShuttingDown,
    UpstreamError,
    UpstreamRefused,
    UpstreamUnavailable,
)
from elis_gateway.estimator import Estimator
from elis_gateway.flight import Flight, Leg, Observer, overriding
from elis_gateway.logs import job_id
from elis_gateway.predictor.base import Predictor
from elis_gateway.tasks import spawn
from elis_gateway.upstream.base import Session, Upstream

__all__ = ["Dispatcher", "RetryBudget"]

_SPARE = 100.0
"""Calls that may be repeated beyond what the jobs have earned."""
_NO_SLOTS = 5.0
_LONGEST_WAIT = 600.0
"""Seconds: bounds of what a refused client is told to wait."""
_CLOSING_TIME = 2.0
"""Seconds that calls which were told to end may take for it at shutdown."""


How = Literal["finished", "aborted", "broken"]


class _Call:
    """A slice in flight."""

    __slots__ = (
        "asked",
        "base",
        "begun",
        "feeding",
        "first_token",
        "flight",
        "lost",
        "mark",
        "sent",
        "slice",
        "stop",
        "task",
        "window",
    )

    def __init__(self, slice_: Slice, flight: Flight, now: float) -> None:
        self.slice = slice_
        self.flight = flight
        self.sent = now
        self.base = flight.answer.attained
        self.window = slice_.window
        self.mark = self.base + slice_.window if slice_.window is not None else None
        self.first_token: float | None = None
        self.task: asyncio.Task[None] | None = None
        self.begun = False
        self.asked = False
        """An upstream call was made."""
        self.feeding = False
        self.stop = False
        """Told to end: Preempt or Abort, or given up."""
        self.lost: UpstreamError | None = None
        """Why it was given up from outside."""

    def end(self) -> None:
        """Close the call at the next chance: at once where it waits for the network."""
        if self.stop:
            return
        self.stop = True
        if self.begun and not self.feeding and self.task is not None:
            self.task.cancel()


@mypyc_attr(allow_interpreted_subclasses=True)
class Dispatcher:
    """Runs jobs. One per gateway; lives on one event loop."""

    def __init__(
        self,
        core: Scheduler,
        predictor: Predictor | None,
        upstreams: Mapping[str, Upstream],
        *,
        observers: Sequence[Observer],
        estimate_deadline: float = 0.5,
        retry_budget: float = 0.2,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``stopwatch``: see ``Estimator``."""
        self.core = core
        self.budget = RetryBudget(retry_budget)
        self._tell_missed = overriding(observers, "estimate_missed")
        self._estimator = Estimator(
            predictor, self._estimated, deadline=estimate_deadline, missed=self._missed, stopwatch=stopwatch
        )
        self.flights: dict[str, Flight] = {}
        """Every job that is not over, by id."""
        self._upstreams = upstreams
        self._tell_submitted = overriding(observers, "submitted")
        self._tell_slice_began = overriding(observers, "slice_began")
        self._tell_fed = overriding(observers, "fed")
        self._tell_window_passed = overriding(observers, "window_passed")
        self._tell_estimated = overriding(observers, "estimated")
        self._tell_slice_ended = overriding(observers, "slice_ended")
        self._tell_finished = overriding(observers, "finished")
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, _Call] = {}
        self._queue: deque[Action] = deque()
        self._performing = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._quiet: asyncio.Future[None] | None = None
        self._closing = False
        self._patience: dict[str, tuple[float, float]] = {}
        """By model: what ``retry_after`` said, and until when it is said again."""
        self._perform_one: dict[type[Action], Callable[..., None]] = {
            AskEstimate: self._ask,
            Run: self._run,
            Preempt: self._preempt,
            Abort: self._abort,
            Finish: self._finish,
        }

    # --- inputs from outside -------------------------------------------------------------------------------------

    def submit(self, flight: Flight) -> None:
        """Take a request. Its bytes, its end or its error come through ``flight.channel``.

        Raises:
            ShuttingDown: nothing is accepted any more.
        """
        if self._closing:
            raise ShuttingDown("the gateway is shutting down")
        self.flights[flight.spec.id] = flight
        self.budget.earn()
        for submitted in self._tell_submitted:
            submitted(flight)
        self._perform(self.core.submit(flight.spec, self._loop.time()))

    def cancel(self, flight: Flight) -> None:
        """Nobody wants the answer any more: the upstream's socket is closed, the slot comes free. Too late is fine."""
        if flight.spec.id in self.flights:
            self._perform(self.core.cancel(flight.spec.id, self._loop.time()))

    def upstream_changed(self, info: UpstreamInfo) -> None:
        """An upstream is new, came back, went down (no slots), or serves other models."""
        self._perform(self.core.upstream_changed(info, self._loop.time()))

    def upstream_removed(self, upstream_id: str) -> None:
        """An upstream without any slice in flight is gone for good."""
        self._perform(self.core.upstream_removed(upstream_id, self._loop.time()))

    async def idle(self, upstream_id: str) -> None:
        """Wait until no slice runs on this upstream. It should be draining, or this may take for ever."""
        while tasks := [c.task for c in self._calls.values() if c.slice.upstream == upstream_id and c.task is not None]:
            await asyncio.wait(tasks)

    def set_policy(self, policy: Policy, config: SchedulerConfig | None = None) -> None:
        """Order by ``policy``, and by other dials where given, from now on."""
        self._perform(self.core.set_policy(policy, self._loop.time(), config))

    @property
    def accepting(self) -> bool:
        """Not shutting down."""
        return not self._closing

    async def drain(self, grace: float) -> None:
        """Accept nothing more, let jobs finish for ``grace`` seconds, then end what is left with ``ShuttingDown``.

        ``hurry`` cuts the grace short.
        """
        self._closing = True
        if self.flights:
            self._quiet = self._loop.create_future()
            await asyncio.wait([self._quiet], timeout=grace)
        for flight in list(self.flights.values()):
            flight.error = ShuttingDown("the gateway is shutting down")
            now = self._loop.time()
            self._perform(self.core.cancel(flight.spec.id, now, outcome=Outcome.FAILED, cause="shutdown"))
        if tasks := [call.task for call in self._calls.values() if call.task is not None]:
            await asyncio.wait(tasks, timeout=_CLOSING_TIME)
        if self._timer is not None:
            self._timer.cancel()

    def hurry(self) -> None:
        """End the grace of ``drain`` now."""
        self._closing = True
        if self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    # --- performing ----------------------------------------------------------------------------------------------

    def _perform(self, actions: Iterable[Action]) -> None:
        """Do what the scheduler decided, in order. An action that leads to further decisions appends to the queue."""
        self._queue.extend(actions)
        if self._performing:
            return
        self._performing = True
        try:
            while self._queue:
                action = self._queue.popleft()
                self._perform_one[type(action)](action)
        finally:
            self._performing = False
            if self._queue:
                # One failed, which is a bug and is raised; the others must not wait for the next input.
                self._loop.call_soon(self._perform, ())
            else:
                self._arm()

    def _arm(self) -> None:
        """Have one timer, never later than the next deadline. One too early costs a tick that finds nothing."""
        at = self.core.next_deadline()
        if at is None or at >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = float("inf")
        self._perform(self.core.tick(self._loop.time()))

    def _ask(self, action: AskEstimate) -> None:
        job = action.job
        flight = self.flights.get(job.spec.id)
        if flight is not None:
            flight.job = job
            self._estimator.ask(flight, job, pressing=action.pressing)

    def _estimated(self, flight: Flight, job: Job, estimate: Estimate | None, seconds: float) -> None:
        if estimate is not None:
            for estimated in self._tell_estimated:
                estimated(flight, seconds)
        self._perform(self.core.estimated(job.spec.id, estimate, self._loop.time()))

    def _missed(self, flight: Flight, why: str) -> None:
        for estimate_missed in self._tell_missed:
            estimate_missed(flight, why)

    def _preempt(self, action: Preempt) -> None:
        call = self._calls[action.slice_id]
        # An answer that turned out to need one call, after the scheduler took it for sliceable, keeps it.
        if call.flight.answer.divisible:
            call.end()

    def _abort(self, action: Abort) -> None:
        self._calls[action.slice_id].end()

    def _finish(self, action: Finish) -> None:
        job = action.job
        flight = self.flights.pop(job.spec.id)
        flight.job = job
        try:
            if job.outcome is Outcome.COMPLETED:
                self._deliver(flight)
            else:
                flight.channel.close(self._error(flight, job))
        finally:
            # Whatever went wrong above is a bug and is raised; the client must not wait for ever because of it.
            flight.channel.close(GatewayError("internal error"))
        # The client's last bytes first: its handler was woken above and runs before the books are done.
        self._loop.call_soon(self._do_the_books, flight, job)
        if self._quiet is not None and not self.flights and not self._quiet.done():
            self._quiet.set_result(None)

    def _do_the_books(self, flight: Flight, job: Job) -> None:
        self._estimator.learn(flight, job)
        for finished in self._tell_finished:
            finished(flight)

    def _deliver(self, flight: Flight) -> None:
        answer = flight.answer
        if flight.request.stream:
            last = answer.close(flight.describe(flight) if flight.describe is not None else None)
        else:
            last = answer.body()
        flight.channel.close(last=last)

    def _error(self, flight: Flight, job: Job) -> GatewayError:
        """What the client is told of a job that did not complete."""
        if job.outcome is Outcome.REJECTED:
            return Overloaded("the queue is full", cause=job.cause, retry_after=self.retry_after(job.spec.model))
        if job.outcome is Outcome.EXPIRED:
            wait = self.retry_after(job.spec.model)
            return Overloaded(_EXPIRED.get(job.cause, job.cause), cause=job.cause, retry_after=wait)
        if flight.error is not None:
            return flight.error
        return UpstreamUnavailable("the answer could not be completed", cause=job.cause or "unknown")

    def retry_after(self, model: str) -> float:
        """Seconds after which today's work should be done: the tokens expected still, over the pool's throughput.

        Looked up at most once a second: in an overload it is asked for by every refusal.
        """
        now = self._loop.time()
        known = self._patience.get(model)
        if known is not None and now < known[1]:
            return known[0]
        slots = sum(u.info.slots for u in self.core.upstreams.values() if model in u.info.models)
        wait = _NO_SLOTS
        if slots:
            wait = self.core.backlog(model) * self.core.seconds_per_token(model) / slots
        wait = min(max(wait, 1.0), _LONGEST_WAIT)
        self._patience[model] = (wait, now + 1.0)
        return wait

    def give_up_silent(self, upstream_id: str, after: float) -> None:
        """This upstream is down: end its calls that have not been heard for ``after`` seconds, where their jobs can go
        on elsewhere. A frozen engine keeps its connections, and so its calls, for as long as it is let."""
        now = self._loop.time()
        for call in list(self._calls.values()):
            if call.slice.upstream != upstream_id or call.stop:
                continue
            if call.flight.answer.committed and not call.flight.answer.divisible:
                continue  # part of it is with its client and nobody else can make the rest: it may wake up
            if now - max(call.flight.heard, call.sent) < after or not self._others(upstream_id, call.flight.spec.model):
                continue
            call.lost = UpstreamUnavailable(f"{upstream_id}: silent, and down", cause="stall")
            call.lost.reported = True
            call.end()

    def _others(self, upstream_id: str, model: str) -> bool:
        pool = self.core.pools.get(model)
        return pool is not None and any(u.info.id != upstream_id and u.info.slots for u in pool.upstreams)

    # --- slices --------------------------------------------------------------------------------------------------

    def _run(self, action: Run) -> None:
        slice_ = action.slice
        flight = self.flights[slice_.job.spec.id]
        flight.job = slice_.job
        if flight.renew is not None:
            flight.answer, flight.renew = flight.renew(), None
        call = _Call(slice_, flight, self._loop.time())
        self._calls[slice_.id] = call
        call.task = spawn(self._serve(call), name=f"slice {slice_.id}")

    async def _serve(self, call: _Call) -> None:
        """Make the slice's upstream call and report its one end."""
        call.begun = True
        # The task was started by whoever freed the slot, in the context of another job.
        job_id.set(call.flight.spec.id)
        error: UpstreamError | None = None
        try:
            if not call.stop:
                await self._make(call)
        except asyncio.CancelledError:
            if not _was_told(call):
                raise
        except UpstreamError as failure:
            error = failure
        except Exception:
            # A bug of ours, raised and logged; but no slot is lost for it and no client waits for ever.
            self._over(call, "broken", UpstreamUnavailable("internal error", cause="bug"))
            raise
        error = error or call.lost
        self._over(call, "aborted" if error is None else "broken", error)

    async def _make(self, call: _Call) -> None:
        slice_, flight, answer = call.slice, call.flight, call.flight.answer
        upstream = self._upstreams[slice_.upstream]
        spec = slice_.job.spec
        priority = slice_.priority if upstream.capabilities.orders else None
        call.asked = True
        for slice_began in self._tell_slice_began:
            slice_began(flight, slice_.upstream)
        order = answer.call(slice_.limit, model=spec.model, priority=priority, window=slice_.window)
        # An answer that comes in one piece is silent until it is complete, however long that takes.
        patient = not answer.divisible and not order.stream
        request_id = f"{spec.id}-{slice_.id}"
        async with upstream.open(order, request_id=request_id, patient=patient, headers=_headers(flight)) as session:
            if order.stream:
                await self._stream(call, session)
            else:
                answer.feed_whole(await session.whole())
            if not call.stop:
                # The engine is done: its slot is free before the connection has said goodbye.
                self._over(call, "finished")

    async def _stream(self, call: _Call, session: Session) -> None:
        answer = call.flight.answer
        try:
            async for payloads in session:
                self._feed(call, payloads)
                if call.stop or answer.over:
                    return
        except asyncio.CancelledError:
            if not _was_told(call):
                raise
            # What has arrived is kept, read or not.
            self._feed(call, session.pending())

    def _feed(self, call: _Call, payloads: list[bytes]) -> None:
        """The hot path: once per read from the network."""
        flight = call.flight
        answer = flight.answer
        before = answer.attained
        call.feeding = True
        try:
            if (data := answer.feed(payloads)) and flight.request.stream:
                flight.channel.put(data)
            attained = answer.attained
            if attained > before or (call.first_token is None and answer.started):
                now = self._loop.time()
                if flight.heard:
                    for fed in self._tell_fed:
                        fed(flight, now - flight.heard)
                flight.heard = now
                if call.first_token is None and answer.started:
                    call.first_token = now
                    self._perform(self.core.slice_started(call.slice.id, now))
            if call.mark is not None and attained >= call.mark and call.window is not None and not answer.finished:
                call.mark += (attained - call.mark) // call.window * call.window + call.window
                for window_passed in self._tell_window_passed:
                    window_passed(flight)
                self._perform(self.core.window_passed(call.slice.id, attained, self._loop.time()))
        finally:
            call.feeding = False

    def _over(self, call: _Call, how: How, error: UpstreamError | None = None) -> None:
        """The call is over; told to the scheduler exactly once for every Run, later news is nothing."""
        slice_, flight, answer = call.slice, call.flight, call.flight.answer
        if self._calls.pop(slice_.id, None) is None:
            return
        now = self._loop.time()
        end, cause = SliceEnd.FAILED, "bug"
        try:
            end, cause = self._settle(call, how, error)
            leg = Leg(
                slice_.upstream,
                call.sent,
                call.first_token,
                now,
                max(answer.attained - call.base, 0),  # where it begins anew, what came before was another call's
                end,
                cause,
                bool(flight.legs),
                answer.cached,
            )
            flight.legs.append(leg)
            for slice_ended in self._tell_slice_ended:
                slice_ended(flight, leg)
        finally:
            # Whatever went wrong above is a bug and is raised; the slot must not be lost because of it.
            self._perform(self.core.slice_ended(slice_.id, SliceResult(end, answer.attained, cause, answer.limit), now))

    def _settle(self, call: _Call, how: How, error: UpstreamError | None) -> tuple[SliceEnd, str]:
        """What the end of the call means for the answer: how the slice ended, and why if it ended badly."""
        flight, answer = call.flight, call.flight.answer
        if not call.asked:
            return SliceEnd.PREEMPTED, ""
        if isinstance(error, UpstreamRefused) and answer.refused(error.status, error.body):
            # Refused for what we had added to the request: it goes on as the client wrote it.
            return SliceEnd.WINDOW, ""
        end = answer.end_slice(how)
        upstream = self._upstreams[call.slice.upstream]
        if end not in (SliceEnd.INTERRUPTED, SliceEnd.FAILED):
            if end is not SliceEnd.PREEMPTED:
                upstream.succeeded()
            return end, ""
        cut = UpstreamUnavailable(f"{call.slice.upstream}: the answer broke off", cause="cut")
        # Where the connection was fine and what came through it was not, only we can tell.
        flight.error = said = upstream.failed(error or answer.error or cut)
        if end is SliceEnd.INTERRUPTED and not said.retryable:
            end = SliceEnd.FAILED
        if end is SliceEnd.INTERRUPTED and answer.attained == call.base and not self.budget.take(self._loop.time()):
            # Everything fails: trying again would multiply the load that may be the reason.
            end = SliceEnd.FAILED
        return end, said.cause


def _headers(flight: Flight) -> Mapping[str, str] | None:
    """What is sent beside the upstream's own headers. It drops the client's credentials unless it is to have them."""
    if flight.credentials is None:
        return flight.headers
    return {**(flight.headers or {}), **flight.credentials}


class RetryBudget:
    """Calls that may be repeated without progress: a share of the jobs, and one a second, beyond some to begin with."""

    __slots__ = ("_at", "_left", "share")

    def __init__(self, share: float) -> None:
        self.share = share
        self._left = _SPARE
        self._at: float | None = None

    def earn(self) -> None:
        """Another job came."""
        self._left = min(self._left + self.share, _SPARE)

    def take(self, now: float) -> bool:
        """May one be repeated now?"""
        if self._at is not None:
            self._left = min(self._left + now - self._at, _SPARE)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


_EXPIRED = {
    "queue_ttl": "the request waited longer than the queue's time limit",
    "deadline": "the request's deadline has passed",
    "unavailable": "no upstream of this model is healthy",
}


def _was_told(call: _Call) -> bool:
    """The cancellation is ours (Preempt or Abort), not the loop's; take it back."""
    return call.stop and call.task is not None and call.task.uncancel() == 0
