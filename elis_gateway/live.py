"""What goes on right now, as one JSON document: who runs where, who waits in which order, what has just happened.

Knows: which facts the page at ``/ui`` shows. Never: HTTP, how they are drawn.

One look costs the same with ten jobs as with ten thousand: it reads the slots, the front of the queue, and a few
thousand remembered figures. Nothing is computed while nobody looks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from heapq import merge
from itertools import islice
from math import isfinite
from typing import Any, NamedTuple

from elis_gateway import __version__
from elis_gateway.core.job import Job, JobState, Outcome
from elis_gateway.core.placement import Upstream
from elis_gateway.core.scheduler import Scheduler
from elis_gateway.core.slice import SliceEnd
from elis_gateway.flight import Flight, Leg, Observer

__all__ = ["POLICIES", "Live"]

POLICIES = ("fcfs", "round_robin", "las", "sjf", "isrtf")
"""Those that can be chosen while serving."""
_QUEUE_SHOWN = 40
_SLOTS_SHOWN = 64
"""Per upstream."""
_EVENTS_KEPT = 120
_ENDED_KEPT = 4000
_MEMORY = 600.0
"""Seconds that percentiles look back."""
_BEYOND = 10
"""Samples that must lie beyond a percentile for it to mean anything."""
_NOTABLE: dict[str, str] = {SliceEnd.PREEMPTED: "preempted", SliceEnd.INTERRUPTED: "broken"}


class _Ended(NamedTuple):
    """A completed job's figures, in seconds."""

    at: float
    jct: float
    ttft: float
    wait: float


class Live(Observer):
    """Remembers the last while, and tells it together with the present. ``epoch``: what to add to the loop's time."""

    def __init__(self, core: Scheduler, flights: Callable[[], Mapping[str, Flight]], epoch: float) -> None:
        self._core = core
        self._flights = flights
        self._epoch = epoch
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._ended: deque[_Ended] = deque(maxlen=_ENDED_KEPT)
        self._count = 0
        self._outcomes: dict[str, int] = {}
        self._tokens = self._preemptions = self._failures = 0
        self._began = time.time()

    # --- told ----------------------------------------------------------------------------------------------------

    def slice_ended(self, flight: Flight, leg: Leg) -> None:
        """An upstream call is over."""
        self._tokens += leg.tokens
        what = _NOTABLE.get(leg.end)
        job = flight.job
        if what is None or job is None or job.outcome is not None:
            return
        if what == "preempted" and leg.first_token is None and not leg.tokens:
            return  # called back from the engine's own queue: nobody was interrupted
        if what == "preempted":
            self._preemptions += 1
        else:
            self._failures += 1
        self._event(what, job, leg.ended, upstream=leg.upstream, tokens=flight.answer.attained, cause=leg.cause)

    def finished(self, flight: Flight) -> None:
        """A job is over."""
        job = flight.job
        if job is None or job.outcome is None or job.finished is None:
            return
        outcome = str(job.outcome)
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        jct = job.finished - job.arrival
        predicted = None if flight.first_estimate is None else round(flight.first_estimate.remaining)
        self._event(outcome, job, job.finished, tokens=job.attained, predicted=predicted, jct=jct, cause=job.cause)
        if job.outcome is Outcome.COMPLETED and job.first_token is not None:
            self._ended.append(_Ended(job.finished, jct, job.first_token - job.arrival, job.waited))

    def _event(self, what: str, job: Job, at: float, **facts: object) -> None:
        self._count += 1
        self._events.append({"n": self._count, "at": at + self._epoch, "what": what, "job": job.id, **facts})

    # --- asked ---------------------------------------------------------------------------------------------------

    def look(self, now: float, upstreams: Sequence[Mapping[str, Any]], policy: Mapping[str, Any]) -> dict[str, Any]:
        """The present. ``now``: the loop's time. Lists are cut where they would grow without end, and say so."""
        core = self._core
        return {
            "now": now + self._epoch,
            "since": self._began,
            "version": __version__,
            "policy": dict(policy),
            "policies": POLICIES,
            "waiting": core.waiting(),
            "longest_wait": self.longest_wait(now),
            "running": sum(core.running(name) for name in core.upstreams),
            "slots": sum(u.info.slots for u in core.upstreams.values()),
            "queue": self._queue(now),
            "upstreams": [self._upstream(facts, now) for facts in upstreams],
            "models": self._models(),
            "latency": self._latency(now),
            "totals": {
                "tokens": self._tokens,
                "preemptions": self._preemptions,
                "broken": self._failures,
                "outcomes": self._outcomes,
            },
            "events": list(reversed(self._events)),
        }

    def longest_wait(self, now: float) -> float:
        """Seconds the job has waited that has waited longest, since its arrival or its last call."""
        jobs = self._core.jobs.values()
        since = min((job.ready_since for job in jobs if job.state is JobState.READY), default=now)
        return now - since

    def _queue(self, now: float) -> list[dict[str, Any]]:
        """The front of all queues, in the order in which they would be served."""
        core = self._core
        queues = [p.queue for p in core.pools.values()] + [u.queue for u in core.upstreams.values()]
        heads = islice(merge(*(queue.best(_QUEUE_SHOWN, now) for queue in queues)), _QUEUE_SHOWN)
        return [
            {
                **self._job(job),
                "waited": max(now - job.ready_since, 0.0),
                "age": now - job.arrival,
                "overdue": late == 0,
                "home": job.home,
            }
            for _, late, _, _, job in heads
        ]

    def _upstream(self, facts: Mapping[str, Any], now: float) -> dict[str, Any]:
        upstream = self._core.upstreams.get(facts["id"])
        return {**facts, "runs": [] if upstream is None else self._slots(upstream, now)}

    def _slots(self, upstream: Upstream, now: float) -> list[dict[str, Any]]:
        return [
            {
                **self._job(running.job),
                "slice": running.slice.id,
                "seconds": now - running.sent,
                "age": now - running.job.arrival,
                "started": running.started,
                "ending": running.ending,
            }
            for running in islice(upstream.running.values(), _SLOTS_SHOWN)
        ]

    def _job(self, job: Job) -> dict[str, Any]:
        """``predicted``: the whole answer's length by the latest estimate; null without one."""
        flight = self._flights().get(job.id)
        attained = job.attained if flight is None else flight.answer.attained
        predicted = None if job.estimate is None else job.estimate_at + job.estimate.remaining
        return {
            "id": job.id,
            "model": job.spec.model,
            "class": "" if flight is None else flight.class_name,
            "tokens": attained,
            "predicted": predicted if predicted is not None and isfinite(predicted) else None,
            "limit": job.spec.limit,
            "preemptions": job.preemptions,
        }

    def _models(self) -> list[dict[str, Any]]:
        shown = []
        for model, pool in self._core.pools.items():
            shadow = pool.shadow
            if not pool.upstreams and not shadow.settled:
                continue
            shown.append(
                {
                    "model": model,
                    "slots": pool.slots,
                    "seconds_per_token": pool.seconds_per_token,
                    "jobs": shadow.settled,
                    "first_come": {"mean": shadow.shadow_mean, "p99": _if_enough(shadow.p99.value, shadow.settled)},
                    "actual": {"mean": shadow.real_mean, "p99": _if_enough(shadow.real_p99.value, shadow.settled)},
                }
            )
        return shown

    def _latency(self, now: float) -> dict[str, Any]:
        ended = [e for e in self._ended if now - e.at <= _MEMORY]
        columns = {"jct": [e.jct for e in ended], "ttft": [e.ttft for e in ended], "wait": [e.wait for e in ended]}
        since = now - self._ended[0].at if self._ended else 0.0
        return {
            "jobs": len(ended),
            "seconds": min(since, _MEMORY),
            **{name: _percentiles(values) for name, values in columns.items()},
        }


def _percentiles(values: list[float]) -> dict[str, float | None]:
    """Mean and percentiles; null where too few samples lie beyond one."""
    values.sort()
    count = len(values)
    found: dict[str, float | None] = {"mean": sum(values) / count if count else None}
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        found[name] = values[min(int(q * count), count - 1)] if count and count * (1.0 - q) >= _BEYOND - 1e-9 else None
    return found


def _if_enough(p99: float, count: int) -> float | None:
    return p99 if count * 0.01 >= _BEYOND else None
