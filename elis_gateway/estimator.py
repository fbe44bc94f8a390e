"""Asks the predictor for the driver: at once where it answers at once, in a task with a deadline where it takes long.

Knows: views, deadlines, what an estimate is worth that comes late. Never: what becomes of it, which predictor it is.
Predictors may be anybody's code: one that raises, or answers nonsense, costs estimates and no request.

An estimate that nobody waits for comes after the upstream call it is about has been sent, and only while predicting
takes little of the event loop's time: of thousands of short answers a second that never queue, most need none. Which
ones get one is decided when they arrive, so that a predictor that learns, from those alone, sees a fair sample of
lengths.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from math import isfinite

from elis_gateway.core.job import Estimate, Job, JobState, Outcome
from elis_gateway.flight import Flight
from elis_gateway.predictor.base import Predictor, View, clamp, counted_down
from elis_gateway.tasks import spawn

__all__ = ["Estimator"]

_log = logging.getLogger("elis_gateway.jobs")

_SHARE = 0.03
"""Of the event loop's time, for estimates that nobody waits for and for learning: some 100 answers a second, more than
an engine of long answers gives; of thousands of short ones, a sample does."""
_SAVED = 0.02
"""Seconds of it that may be saved up and then spent at once."""

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
        self._allowance = _Allowance()
        self._cost = 0.0
        """Seconds that an estimate takes, about; set aside for those that are about to be made."""
        self._skipped: dict[str, tuple[Flight, Job]] = {}
        """Jobs whose last estimate was not made, because nobody waited for it."""

    def ask(self, flight: Flight, job: Job, *, pressing: bool = True) -> None:
        """How much is left of this job? ``pressing``: somebody waits to know."""
        predictor = self._predictor
        if predictor is None:
            self._answered(flight, job, None, 0.0)
            return
        free = self._allowance.left(now := self._stopwatch()) > 0.0
        if flight.sampled is None:
            flight.sampled = pressing or free
        if pressing:
            self._estimate(flight, job, _view(flight, job, predictor), predictor)
            if self._skipped:
                # What runs is compared with what waits from now on.
                self._loop.call_soon(self._catch_up)
        elif free:
            # Not before the upstream call that was just decided has been sent: that is a task which begins first.
            self._skipped.pop(job.spec.id, None)
            self._allowance.spend(self._cost, now)
            self._loop.call_soon(self._at_leisure, flight, job, _view(flight, job, predictor), predictor)
        else:
            self._skipped[job.spec.id] = (flight, job)

    def _at_leisure(self, flight: Flight, job: Job, view: View, predictor: Predictor) -> None:
        began = self._stopwatch()
        if job.state is not JobState.DONE:
            self._estimate(flight, job, view, predictor)
        now = self._stopwatch()
        took = now - began
        self._allowance.spend(took - self._cost, now)
        self._cost += 0.1 * (took - self._cost)

    def _catch_up(self) -> None:
        """One of the estimates that were skipped: as many as others ask for, the oldest first."""
        if self._skipped and self._predictor is not None:
            flight, job = self._skipped.pop(next(iter(self._skipped)))
            self._allowance.spend(self._cost, self._stopwatch())
            self._at_leisure(flight, job, _view(flight, job, self._predictor), self._predictor)

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
        self._skipped.pop(job.spec.id, None)
        # Of what was ever estimated the predictor keeps a trace until it hears of the end.
        heard = flight.sampled or flight.estimates
        if self._predictor is not None and heard:
            complete = job.outcome is Outcome.COMPLETED and flight.answer.finish_reason != "length"
            try:
                began = self._stopwatch()
                self._predictor.learn(_view(flight, job, self._predictor), complete=complete)
                now = self._stopwatch()
                self._allowance.spend(now - began, now)
            except Exception:  # noqa: BLE001
                _log.exception("request %s: the predictor could not learn from it", job.spec.id)

    async def _refine(self, flight: Flight, job: Job, view: View, predictor: Predictor) -> None:
        """A better estimate, or none by the deadline. Tokens that arrived meanwhile are counted down from it."""
        asked = self._loop.time()
        estimate: Estimate | None = None
        if job.state is JobState.DONE:
            # It was cancelled in the turn in which it was asked about, and the predictor has heard of that.
            flight.refining = False
            return
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


class _Allowance:
    """Seconds that may be spent: a share of the time that passes, saved up to a bound. Debts are bounded, too."""

    __slots__ = ("_at", "_left")

    def __init__(self) -> None:
        self._left = _SAVED
        self._at: float | None = None

    def left(self, now: float) -> float:
        """What may be spent at ``now``; not positive: nothing."""
        if self._at is not None:
            self._left = min(self._left + (now - self._at) * _SHARE, _SAVED)
        self._at = now
        return self._left

    def spend(self, seconds: float, now: float) -> None:
        """So much was spent."""
        self._left = max(self.left(now) - seconds, -_SAVED)


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
