"""What every policy must satisfy; importable, so that a policy of yours can be held to it:

    from elis_gateway.core.conformance import check_policy

    def test_my_policy():
        check_policy(MyPolicy)

Knows: the Policy protocol. Never: a particular policy.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Literal

from elis_gateway.core.actions import Action, AskEstimate, Finish, Run
from elis_gateway.core.job import Estimate, Job, JobSpec, Outcome
from elis_gateway.core.placement import Pool, UpstreamInfo
from elis_gateway.core.policy import Policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult

__all__ = ["check_policy"]

_FIELDS = [name for name in dir(Job) if not name.startswith("_")]


def check_policy(make: Callable[[], Policy]) -> None:
    """Raises AssertionError saying what ``make()`` gets wrong: flags, pure and finite keys, and every job served."""
    policy = make()
    for flag in ("needs_estimates", "preempts"):
        assert isinstance(getattr(policy, flag, None), bool), f"{flag} must be a bool"
    _check_keys(make)
    for mode in ("fixed", "elastic"):
        _check_service(make(), mode)


def _check_keys(make: Callable[[], Policy]) -> None:
    policy, twin = make(), make()
    pool = Pool("m", 0.02, 0.0)
    for gamma in (0.0, 0.05):
        pool.gamma = gamma
        for job in _jobs(pool):
            before = [getattr(job, name) for name in _FIELDS]
            key = policy.key(job, pool, 100.0)
            assert isinstance(key, int | float), f"the key of {job} is not a number: {key!r}"
            assert isfinite(key), f"the key of {job} is not finite: {key!r}"
            assert key == policy.key(job, pool, 100.0) == twin.key(job, pool, 100.0), f"the key of {job} is not pure"
            assert before == [getattr(job, name) for name in _FIELDS], f"the policy changed {job}"


def _jobs(pool: Pool) -> list[Job]:
    found: list[Job] = []
    for estimate in (None, Estimate(1.0), Estimate(400.0, 30.0), Estimate(1e6)):
        for limit in (None, 1, 2000):
            for attained in (0, 1, 700):
                if limit is not None and attained > limit:
                    continue
                job = Job(JobSpec(f"j{len(found)}", "m", limit=limit), 10.0 * len(found), pool)
                job.estimate, job.attained = estimate, attained
                found.append(job)
    return found


def _check_service(policy: Policy, mode: Literal["fixed", "elastic"]) -> None:
    """Forty jobs through two slots: each is completed once, and the slots are never over-used."""
    lengths = {f"j{i}": 1 + 37 * i % 260 for i in range(40)}
    scheduler = Scheduler(SchedulerConfig(mode=mode, seconds_per_token=0.02), policy)
    flying: dict[int, Slice] = {}
    outcomes: dict[str, Outcome | None] = {}
    now = 0.0

    def perform(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, AskEstimate):
                left = max(lengths[action.job.id] - action.job.attained, 1)
                perform(scheduler.estimated(action.job.id, Estimate(float(left)), now))
            elif isinstance(action, Run):
                flying[action.slice.id] = action.slice
                assert len(flying) <= 2, "more slices in flight than slots"
            elif isinstance(action, Finish):
                assert action.job.id not in outcomes, f"{action.job} finished twice"
                outcomes[action.job.id] = action.job.outcome

    perform(scheduler.upstream_changed(UpstreamInfo("u", frozenset({"m"}), 2), now))
    waiting = list(lengths)
    while waiting or flying:
        now += 0.3
        if waiting:
            perform(scheduler.submit(JobSpec(waiting.pop(0), "m"), now))
        if not flying:
            continue
        slice_ = flying.pop(min(flying))
        attained = min(slice_.job.attained + (slice_.limit or 300), lengths[slice_.job.id])
        end = SliceEnd.FINISHED if attained == lengths[slice_.job.id] else SliceEnd.WINDOW
        perform(scheduler.slice_ended(slice_.id, SliceResult(end, attained), now))
    assert set(outcomes) == set(lengths), f"never finished: {sorted(set(lengths) - set(outcomes))}"
    assert set(outcomes.values()) == {Outcome.COMPLETED}
