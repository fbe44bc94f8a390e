"""Asks the predictor for the driver: at once where it answers at once, in a task with a deadline where it takes long.

Knows: views, deadlines, what an estimate is worth that comes late. Never: what becomes of it, which predictor it is.
Predictors may be anybody's code: one that raises, or answers nonsense, costs estimates and no request.

An estimate that nobody waits for comes after the upstream call it is about has been sent, and only while such estimates
and learning take little of the event loop's time: at thousands of short answers a second that never queue, most need
none, and a predictor that learns sees a sample.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

from elis_gateway.core.job import Estimate, Job, JobState, Outcome
from elis_gateway.flight import Flight
from elis_gateway.predictor.base import Predictor, View, clamp, counted_down
from elis_gateway.tasks import spawn

__all__ = ["Estimator"]

_log = logging.getLogger("elis_gateway.jobs")

_SHARE = 0.1
"""Of the event loop's time, for estimates that nobody waits for and for learning."""
_LATER = 4096
"""Estimates that nobody waits for and that are still to be made, at most."""
_LONGEST_REST = 1.0
"""Seconds."""

Answered = Callable[[Flight, Job, Estimate | None, float], None]
"""Told every estimate (None: there is none, count the old one down) and the seconds it took."""
Missed = Callable[[Flight, str], None]
"""Told why an estimate that was asked for is not there: ``late``, ``failed``, ``absurd``."""


class Estimator:
    """One per driver. ``answered`` hears an answer to every ``ask``, and perhaps a better one after it."""

    def __init__(
        self,
        predictor: Predictor | None,
        answered: Answered,
        *,
        deadline: float,
        missed: Missed | None = None,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``stopwatch``: reads what predicting costs, in seconds; the loop's own clock stands still meanwhile."""
        self._stopwatch = stopwatch
        self._predictor = predictor
        self._answered = answered
        self._missed = missed or (lambda flight, why: None)
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._wants: Callable[[View], bool] | None = getattr(predictor, "wants_refining", None)
        self._leisure = _Leisure(self._loop, self._at_leisure, stopwatch)

    def ask(self, flight: Flight, job: Job, *, pressing: bool = True) -> None:
        """How much is left of this job? ``pressing``: somebody waits to know."""
        predictor = self._predictor
        if predictor is None:
            self._answered(flight, job, None, 0.0)
            return
        view = _view(flight, job, predictor)
        if pressing:
            self._estimate(flight, job, view, predictor)
            # What runs is compared with what waits from now on.
            self._leisure.hurry()
        else:
            self._leisure.add(_Asked(flight, job, view))

    def _at_leisure(self, asked: _Asked) -> None:
        assert self._predictor is not None
        self._estimate(*asked, self._predictor)

    def _estimate(self, flight: Flight, job: Job, view: View, predictor: Predictor) -> None:
        asked = self._loop.time()
        estimate: Estimate | None = None
        try:
            estimate = predictor.instant(view)
            wanted = predictor.refines and (self._wants is None or self._wants(view))
        except Exception:  # noqa: BLE001 (anybody's code: logged and counted)
            self._failed(flight, job)
            wanted = False
        if wanted:
            if not flight.refining:
                flight.refining = True
                spawn(self._refine(flight, job, view, predictor), name=f"refine {job.spec.id}")
            if estimate is None:
                return
        self._answer(flight, job, counted_down(estimate, job.attained - view.attained), asked)

    def learn(self, flight: Flight, job: Job) -> None:
        """The job is over. An answer that was cut off, by whatever, is a lower bound."""
        if self._predictor is not None and job.first_run is not None:
            complete = job.outcome is Outcome.COMPLETED and flight.answer.finish_reason != "length"
            try:
                began = self._stopwatch()
                self._predictor.learn(_view(flight, job, self._predictor), complete=complete)
                self._leisure.spent(self._stopwatch() - began)
            except Exception:  # noqa: BLE001
                _log.exception("request %s: the predictor could not learn from it", job.spec.id)

    async def _refine(self, flight: Flight, job: Job, view: View, predictor: Predictor) -> None:
        """A better estimate, or none by the deadline. Tokens that arrived meanwhile are counted down from it."""
        asked = self._loop.time()
        estimate: Estimate | None = None
        try:
            async with asyncio.timeout(self._deadline):
                estimate = (await predictor.refine([view]))[0]
        except TimeoutError:
            _log.debug("request %s: no estimate within %g s", job.spec.id, self._deadline)
            self._missed(flight, "late")
        except Exception:  # noqa: BLE001
            self._failed(flight, job)
        finally:
            flight.refining = False
        self._answer(flight, job, counted_down(estimate, job.attained - view.attained), asked)

    def _failed(self, flight: Flight, job: Job) -> None:
        _log.exception("request %s: the predictor failed", job.spec.id)
        self._missed(flight, "failed")

    def _answer(self, flight: Flight, job: Job, estimate: Estimate | None, asked: float) -> None:
        if estimate is not None:
            estimate = self._sane(flight, job, estimate)
        if estimate is not None and job.state is not JobState.DONE:
            if _log.isEnabledFor(logging.DEBUG):
                _log_estimate(flight, job, estimate)
            flight.estimates.append((job.attained, estimate.remaining))
            if flight.first_estimate is None:
                flight.first_estimate = estimate
        self._answered(flight, job, estimate, self._loop.time() - asked)

    def _sane(self, flight: Flight, job: Job, estimate: Estimate) -> Estimate | None:
        """Within 1 .. what is allowed. What is no number at all is no estimate."""
        remaining, gittins = estimate.remaining, estimate.gittins
        allowed = job.allowed
        most = float("inf") if allowed is None else max(allowed, 1)
        if 1.0 <= remaining <= most and remaining < float("inf") and (gittins is None or 1.0 <= gittins <= most):
            return estimate
        if not isfinite(remaining) or (gittins is not None and not isfinite(gittins)):
            _log.warning("request %s: absurd estimate %r", job.spec.id, estimate)
            self._missed(flight, "absurd")
            return None
        return estimate._replace(
            remaining=float(clamp(remaining, allowed)),
            gittins=None if gittins is None else float(clamp(gittins, allowed)),
        )


class _Asked(NamedTuple):
    """An estimate that is wanted, but not waited for, and the job as it was then."""

    flight: Flight
    job: Job
    view: View


class _Leisure:
    """Has estimates made one at a time, oldest first, in a share of the event loop's time."""

    __slots__ = ("_asked", "_do", "_loop", "_owed", "_rests", "_stopwatch", "_turn")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, do: Callable[[_Asked], None], stopwatch: Callable[[], float]
    ) -> None:
        self._stopwatch = stopwatch
        self._loop = loop
        self._do = do
        self._asked: deque[_Asked] = deque(maxlen=_LATER)
        self._turn: asyncio.Handle | None = None
        self._rests = False
        self._owed = 0.0
        """Seconds spent that are to be rested for."""

    def add(self, asked: _Asked) -> None:
        """Not before the upstream call that was just decided has been sent: that is a task which begins first."""
        self._asked.append(asked)
        if self._turn is None:
            self._turn = self._loop.call_soon(self._next)

    def spent(self, seconds: float) -> None:
        """So much was spent on what pays in the long run."""
        self._owed += seconds

    def hurry(self) -> None:
        """No rest now."""
        if self._rests and self._asked and self._turn is not None:
            self._rests = False
            self._turn.cancel()
            self._turn = self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._turn = None
        self._rests = False
        while self._asked:
            asked = self._asked.popleft()
            if asked.job.state is not JobState.DONE:
                began = self._stopwatch()
                self._do(asked)
                owed, self._owed = self._owed + self._stopwatch() - began, 0.0
                self._rests = True
                self._turn = self._loop.call_later(min(owed / _SHARE, _LONGEST_REST), self._next)
                return


def _view(flight: Flight, job: Job, predictor: Predictor) -> View:
    spec = job.spec
    reads = predictor.reads_text
    text = flight.answer.text if reads else ""
    return View(spec.id, spec.model, spec.app, spec.prompt if reads else "", text, job.attained, job.allowed)


def _log_estimate(flight: Flight, job: Job, estimate: Estimate) -> None:
    """In the words researchers grep for."""
    if flight.estimates:
        before = flight.estimates[-1][1]
        _log.debug(
            "request %s: prediction updated: %.1f -> %.1f (at %d tokens)",
            job.spec.id, before, estimate.remaining, job.attained,
        )  # fmt: skip
    else:
        _log.debug("request %s: initial prediction: %.1f tokens", job.spec.id, estimate.remaining)
