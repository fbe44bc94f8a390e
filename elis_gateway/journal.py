"""The jobs of the last while: one log line each as they end, and their story for the admin listener.

Knows: which facts of a job tell a person what happened to it. Never: metrics, files, who asks.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from elis_gateway.core.compiled import mypyc_attr
from elis_gateway.core.job import Job, JobState
from elis_gateway.flight import Flight, Observer

__all__ = ["Journal", "story"]

_log = logging.getLogger("elis_gateway.jobs")
_KEPT = 512
"""Finished jobs remembered."""


def story(flight: Flight, now: float) -> dict[str, Any]:
    """One job, live or over, as the admin listener shows it. Times are seconds from its arrival."""
    job, answer = flight.job, flight.answer
    if job is None:
        return {"job_id": flight.spec.id, "model": flight.spec.model, "state": "new"}
    start = job.arrival
    waited = job.waited if job.state is not JobState.READY else job.waited + now - job.ready_since
    return {
        "job_id": job.id,
        "model": job.spec.model,
        "app": job.spec.app,
        "class": flight.class_name,
        "state": job.state,
        "outcome": job.outcome,
        "cause": job.cause,
        "sliced": f"no; {answer.reason}" if answer.reason else answer.mode,
        "tokens": job.attained,
        "limit": job.spec.limit,
        "age": (job.finished if job.finished is not None else now) - start,
        "queue_wait": waited,
        "first_token": None if job.first_token is None else job.first_token - start,
        "preemptions": job.preemptions,
        "slices": [
            {
                "upstream": leg.upstream,
                "start": leg.sent - start,
                "tokens": leg.tokens,
                "end": leg.end,
                "cause": leg.cause,
            }
            for leg in flight.legs
        ],
        "prediction_history": list(flight.estimates),
    }


def _facts(flight: Flight, job: Job, finished: float) -> dict[str, Any]:
    """The line's figures by name, for logs that machines read."""
    return {
        "event": "job_end",
        "model": job.spec.model,
        "class": flight.class_name,
        "outcome": job.outcome,
        "cause": job.cause,
        "tokens": job.attained,
        "jct": round(finished - job.arrival, 6),
        "ttft": None if job.first_token is None else round(job.first_token - job.arrival, 6),
        "queue_wait": round(job.waited, 6),
        "slices": job.slices,
        "preemptions": job.preemptions,
        "upstreams": [leg.upstream for leg in flight.legs],
    }


@mypyc_attr(native_class=False)
class _Line(logging.LogRecord):
    """A record of one line per job: without the search for its caller, of which nobody is told."""

    def __init__(self, line: str, job: str, facts: Callable[[], dict[str, Any]]) -> None:
        now = time.time()
        self.__dict__.update(_PLAIN)
        self.msg = line
        self.created = now
        self.msecs = now % 1.0 * 1000.0
        self.job = job
        self.facts = facts


_PLAIN = vars(logging.LogRecord(_log.name, logging.INFO, "", 0, "", None, None))


class Journal(Observer):
    """An observer that remembers the last finished jobs and logs each."""

    def __init__(self) -> None:
        self._finished: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def finished(self, flight: Flight) -> None:
        """A job is over."""
        job = flight.job
        if job is None or job.outcome is None or job.finished is None:
            return
        finished = self._finished
        finished[job.id] = story(flight, job.finished)
        if len(finished) > _KEPT:
            finished.popitem(last=False)
        if _log.isEnabledFor(logging.INFO):
            line = (
                f"request {job.id}: {job.outcome}{f' ({job.cause})' if job.cause else ''}, {job.attained} tokens "
                f"in {job.finished - job.arrival:.3f} s, waited {job.waited:.3f} s, {job.slices} slices, "
                f"{job.preemptions} preemptions"
            )
            _log.handle(_Line(line, job.id, partial(_facts, flight, job, job.finished)))

    def get(self, job_id: str) -> dict[str, Any] | None:
        """The story of a finished job, as long as it is remembered."""
        return self._finished.get(job_id)

    def recent(self, count: int) -> list[dict[str, Any]]:
        """The last finished jobs, newest first."""
        return [self._finished[k] for k, _ in zip(reversed(self._finished), range(count), strict=False)]
