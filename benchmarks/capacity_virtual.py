"""Virtual-time runs for ``benchmarks.capacity``: completion times of many seeds, with the scheduler that serves live.

Knows: the workloads (one application, a mix of six, all equally long), the settings as configuration sections, what is
known of the lengths. Never: sockets, wall time, what the figures mean.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import exp, log
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks.tail import SAMPLE, azure
from elis_gateway import build
from elis_gateway.config import Scheduler as Section
from elis_gateway.core.scheduler import Scheduler
from elis_gateway.predictor.base import Predictor
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.predictor.history import History
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate

__all__ = ["APPS", "CAP", "KNOWLEDGE", "SETTINGS", "Question", "lengths", "measure"]

CAP = 2000
"""Longest answer, and every request's limit: it says nothing about the length."""
PROMPT = 100

APPS: dict[str, tuple[float, float]] = {
    "label": (8, 0.4),
    "extract": (60, 0.5),
    "summary": (130, 0.4),
    "chat": (200, 0.8),
    "code": (350, 0.7),
    "reason": (800, 0.6),
}
"""Six applications, equally often: median length in tokens and sigma of its logarithm."""

_FOREVER = 10**9
"""Calls handed to an engine at once: straight to it, its own first-come queue holds them all."""

SETTINGS: dict[str, dict[str, Any]] = {
    "straight": {"policy": "fcfs", "overcommit": _FOREVER},
    "fcfs": {"policy": "fcfs"},
    "sjf": {"policy": "sjf"},
    "fixed": {"mode": "fixed"},
    "published": {
        "mode": "fixed",
        "rescore": "always",
        "policy": {"kind": "isrtf", "order": "mean"},
        "aging": {"kind": "none"},
    },
    "elastic": {},
    "none in hand": {"overcommit": 0},
    "elastic, no aging": {"aging": {"kind": "none"}},
    "ordered": {"overcommit": -1},
}
"""Scheduler sections beside the defaults. ``overcommit`` -1: half the slots, on an engine that orders its queue."""

KNOWLEDGE = ("perfect", "shuffled", "history")


class Question(NamedTuple):
    """One cell of the study, apart from setting, knowledge and seed."""

    work: str
    load: float
    slots: int
    seam: float
    delay: float
    """Seconds from gateway to engine and back, each way: what refilling a slot takes."""
    jobs: int
    dropped: int
    """First ones, while everything is learned, that do not count."""

    def __str__(self) -> str:
        return (
            f"{self.work}, load {self.load:g}, {self.slots} slots, seam {self.seam:g}, "
            f"{self.delay * 1e3:g} ms to the engine"
        )


def lengths(work: str, n: int, rng: random.Random) -> list[tuple[str, int]]:
    """(application, tokens) of ``n`` requests. ``work``: azure, six or equal."""
    if work == "azure":
        pool = azure(str(SAMPLE))
        return [("one", rng.choice(pool)) for _ in range(n)]
    if work == "equal":
        return [("one", 200)] * n
    names = list(APPS)
    drawn = []
    for _ in range(n):
        name = rng.choice(names)
        middle, sigma = APPS[name]
        drawn.append((name, min(max(round(exp(rng.gauss(log(middle), sigma))), 1), CAP)))
    return drawn


def _jobs(question: Question, capacity: float, seed: int) -> list[SimJob]:
    """Gamma arrivals of shape 0.8; the load is that of the lengths drawn, so no seed offers more than asked."""
    drawn = lengths(question.work, question.jobs, random.Random(f"lengths {seed}"))
    arrivals = random.Random(f"arrivals {seed}")
    gap = fmean(tokens for _, tokens in drawn) / (question.load * capacity)
    now, jobs = 0.0, []
    for number, (app, tokens) in enumerate(drawn):
        now += arrivals.gammavariate(0.8, gap / 0.8)
        jobs.append(SimJob(f"{number}", now, PROMPT, tokens, app=app, limit=CAP))
    return jobs


def _engine(question: Question, *, orders: bool) -> Engine:
    model = EngineModel.load("default")
    return Engine(replace(model, slots=question.slots, seam_tokens=question.seam, orders=orders))


def _scheduler(setting: str, question: Question, *, estimates: bool) -> tuple[Scheduler, int]:
    section = Section.model_validate({k: v for k, v in SETTINGS[setting].items() if k != "overcommit"})
    extra = SETTINGS[setting].get("overcommit", section.in_hand)
    core = Scheduler(build.scheduler_config(section, estimates=estimates), build.policy(section.policy, section.aging))
    return core, question.slots // 2 if extra < 0 else extra


@lru_cache
def _capacity(question: Question, seed: int) -> float:
    """Tokens per second straight to the engine with everything there from the beginning, drain left out."""
    drawn = lengths(question.work, 2000, random.Random(f"capacity {seed}"))
    jobs = [SimJob(f"{n}", 0.0, PROMPT, tokens, app=app, limit=CAP) for n, (app, tokens) in enumerate(drawn)]
    core, overcommit = _scheduler("straight", question, estimates=False)
    done = simulate(jobs, core, {"engine": _engine(question, orders=False)}, None, overcommit=overcommit)
    totals = done.totals["engine"]
    return totals.full_tokens / totals.full


def _predictor(knowledge: str, jobs: Sequence[SimJob], seed: int) -> Predictor:
    if knowledge == "history":
        return History()
    tokens = [job.output_tokens for job in jobs]
    if knowledge == "shuffled":
        random.Random(f"shuffled {seed}").shuffle(tokens)
    return NoisyOracle({job.id: n for job, n in zip(jobs, tokens, strict=True)}, 0.0)


def measure(question: Question, setting: str, knowledge: str, seed: int) -> dict[str, float]:
    """Mean, median and p99 of completion time (seconds) of the jobs after the warm-up, and what it took."""
    capacity = _capacity(question, seed)
    jobs = _jobs(question, capacity, seed)
    core, overcommit = _scheduler(setting, question, estimates=True)
    done = simulate(
        jobs,
        core,
        {"engine": _engine(question, orders=setting == "ordered")},
        _predictor(knowledge, jobs, seed),
        delay=question.delay,
        overcommit=overcommit,
    )
    kept = done.records[question.dropped :]
    jct = sorted(record.jct for record in kept)
    return {
        "capacity": capacity,
        "mean": fmean(jct),
        "p50": median(jct),
        "p99": jct[int(0.99 * len(jct))],
        "tokens": sum(record.tokens for record in kept),
        "preemptions": sum(record.preemptions for record in kept) / len(kept),
        "calls": sum(record.slices for record in kept) / len(kept),
    }
