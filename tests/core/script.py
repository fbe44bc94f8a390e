"""A scheduler on a stage: events go in by short verbs, what it answers is kept as words a test can read.

``Stage`` performs nothing; the test plays driver. It tracks which slices are in flight so that a story can say
``stage.finish("a")`` in place of slice ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from elis_gateway.core.actions import Abort, Action, AskEstimate, Finish, Preempt, Run
from elis_gateway.core.job import Estimate, JobSpec
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.policy import FCFS, ISRTF, Policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult

MODEL = "m"


class Stage:
    """One scheduler, a clock the test sets, and a transcript."""

    def __init__(
        self, policy: Policy | None = None, *, slots: int = 1, upstreams: Sequence[str] = ("u",), **dials: Any
    ):
        info = {k: dials.pop(k) for k in ("overcommit", "orders") if k in dials}
        dials.setdefault("seam_cost", 0.0)
        dials.setdefault("seconds_per_token", 1.0)
        self.now = 0.0
        self.scheduler = Scheduler(SchedulerConfig(**dials), policy or ISRTF())
        self.slices: dict[str, Slice] = {}
        self.names: dict[int, str] = {}
        for name in upstreams:
            self.said(self.scheduler.upstream_changed(UpstreamInfo(name, frozenset({MODEL}), slots, **info), self.now))

    def said(self, actions: list[Action]) -> list[str]:
        """Actions as words: ``ask a``, ``run a on u``, ``preempt a``, ``abort a``, ``completed a``."""
        words = []
        for action in actions:
            match action:
                case AskEstimate(job):
                    words.append(f"ask {job.id}")
                case Run(slice_):
                    self.slices[slice_.job.id] = slice_
                    self.names[slice_.id] = slice_.job.id
                    words.append(f"run {slice_.job.id} on {slice_.upstream}")
                case Preempt(slice_id):
                    words.append(f"preempt {self.names[slice_id]}")
                case Abort(slice_id):
                    words.append(f"abort {self.names[slice_id]}")
                case Finish(job):
                    assert job.outcome is not None
                    words.append(f"{job.outcome.value} {job.id}")
        return words

    def at(self, now: float) -> Stage:
        self.now = now
        return self

    def submit(self, job_id: str, tokens: float | None = None, **spec: Any) -> list[str]:
        """A request; ``tokens``: the estimate given at once."""
        words = self.said(self.scheduler.submit(JobSpec(job_id, spec.pop("model", MODEL), **spec), self.now))
        return words + self.estimate(job_id, tokens) if tokens is not None else words

    def estimate(self, job_id: str, tokens: float | None, gittins: float | None = None) -> list[str]:
        estimate = None if tokens is None else Estimate(tokens, gittins)
        return self.said(self.scheduler.estimated(job_id, estimate, self.now))

    def started(self, job_id: str) -> list[str]:
        return self.said(self.scheduler.slice_started(self.slices[job_id].id, self.now))

    def window(self, job_id: str, attained: int, left: float | None = None) -> list[str]:
        """A window passed; ``left``: the fresh estimate given at once."""
        words = self.said(self.scheduler.window_passed(self.slices[job_id].id, attained, self.now))
        return words + self.estimate(job_id, left) if left is not None else words

    def end(self, job_id: str, end: SliceEnd, attained: int, cause: str = "") -> list[str]:
        result = SliceResult(end, attained, cause)
        return self.said(self.scheduler.slice_ended(self.slices[job_id].id, result, self.now))

    def finish(self, job_id: str, attained: int = 1) -> list[str]:
        return self.end(job_id, SliceEnd.FINISHED, attained)

    def cancel(self, job_id: str) -> list[str]:
        return self.said(self.scheduler.cancel(job_id, self.now))

    def upstream(self, name: str, slots: int, **info: Any) -> list[str]:
        info.setdefault("models", frozenset({MODEL}))
        return self.said(self.scheduler.upstream_changed(UpstreamInfo(name, slots=slots, **info), self.now))

    def dials(self, **changed: Any) -> list[str]:
        """Other dials from now on, as a reload brings them, and first come, first served."""
        scheduler = self.scheduler
        return self.said(scheduler.set_policy(FCFS(), self.now, dataclasses.replace(scheduler.config, **changed)))

    def tick(self) -> list[str]:
        return self.said(self.scheduler.tick(self.now))
