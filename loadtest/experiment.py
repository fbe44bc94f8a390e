"""Several settings on the same work: which run comes when, on which target, and what is kept of it.

Knows: the order of runs (interleaved, every other seed backwards, an A/A pair at the ends), how a gateway is switched
between them, that a run which lagged is not valid. Never: statistics, files, what a person sees.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from elis_gateway.errors import ConfigError
from elis_gateway.sim.model import EngineModel
from loadtest import runner
from loadtest.compare import AGAIN, Arm
from loadtest.figures import Alone, Objectives, alone_in, alone_on, figures
from loadtest.knowledge import Knowledge
from loadtest.records import Row, Run
from loadtest.runner import Stop
from loadtest.settings import PERFECT, ordering, setting
from loadtest.stats import percentile
from loadtest.targets import HttpTarget, Steering, simulated
from loadtest.workload import Request, Workload

__all__ = ["MAX_LAG", "Experiment", "Live", "Planned", "Simulated", "conduct", "plan", "switchable"]

MAX_LAG = 0.05
"""Seconds: a run whose 99th percentile of lag is above measured the load generator as well."""
AS_IT_IS = "as it is"
"""The setting of a server that is not switched."""


class Planned(NamedTuple):
    setting: str
    seed: int
    arm: str


def plan(settings: Sequence[str], seeds: Sequence[int], again: str | None) -> list[Planned]:
    """The runs in order: all settings for one seed before the next, every other seed backwards. ``again``: the setting
    that is run a second time, at the other end."""
    order = [(name, "") for name in settings]
    if again is not None:
        order = [(again, ""), *((name, "") for name in settings if name != again), (again, AGAIN)]
    found = []
    for number, seed in enumerate(seeds):
        for name, arm in order if number % 2 == 0 else reversed(order):
            found.append(Planned(name, seed, arm))
    return found


@dataclass
class Experiment:
    """Everything that was run."""

    config: dict[str, Any]
    target: str
    """``live`` or ``sim``."""
    settings: list[str]
    """The first is what the others are compared with."""
    workloads: dict[int, Workload]
    again: str | None = None
    window: int = 50
    objectives: Objectives = field(default_factory=Objectives)
    engine: EngineModel | None = None
    max_lag: float = MAX_LAG
    runs: list[Run] = field(default_factory=list)
    begun: float = 0.0
    """Seconds since the epoch, as is ``ended``."""
    ended: float = 0.0
    complete: bool = True
    """Every planned run was made, and each to its end."""

    @property
    def base(self) -> str:
        return self.settings[0]

    def alone(self) -> Alone | None:
        """What a request takes by itself on this target."""
        return alone_on(self.engine) if self.engine is not None else alone_in(self.runs)

    def arms(self) -> dict[str, Arm]:
        """By name, the A/A arm among them, with figures."""
        alone = self.alone()
        names = [*self.settings, *(f"{name} {AGAIN}" for name in (self.again,) if name is not None)]
        found = {name: Arm(name) for name in names if any(run.name == name for run in self.runs)}
        for run in self.runs:
            arm = found[run.name]
            arm.runs[run.seed] = run
            arm.figures[run.seed] = figures(run, objectives=self.objectives, alone=alone, interval=self.window)
        return found

    def lag(self, run: Run) -> float:
        """99th percentile of the generator's own lag, in seconds; the worst where there are few requests."""
        lags = [row.lag for row in run.rows]
        return (percentile(lags, 99, beyond=0) if len(lags) >= 100 else max(lags, default=0.0)) or 0.0

    def faults(self) -> list[str]:
        """What makes the figures invalid or partial, in words; empty: nothing."""
        found = []
        for run in self.runs:
            where = f"{run.name}, seed {run.seed}"
            if self.lag(run) > self.max_lag:
                found.append(f"{where}: the load generator lagged by {self.lag(run) * 1e3:.0f} ms (p99): invalid")
            if not run.complete:
                unfinished = sum(row.error == runner.UNFINISHED for row in run.rows)
                found.append(f"{where}: stopped with {unfinished} requests unfinished and {run.unsent} unsent")
            if failed := Counter(row.error for row in run.rows if row.error and row.error != runner.UNFINISHED):
                kinds = ", ".join(error for error, _ in failed.most_common(3))
                found.append(f"{where}: {failed.total()} of {len(run.rows)} requests failed ({kinds})")
            if guessed := run.about.get("guessed"):
                found.append(
                    f"{where}: the server did not count the tokens of {guessed} answers; their deltas were counted"
                )
            if wrong := sum(self._wrong(row, run) for row in run.rows):
                found.append(f"{where}: {wrong} forced lengths came out different")
        if not self.complete and all(run.complete for run in self.runs):
            found.append("stopped before every planned run was made")
        return found

    def _wrong(self, row: Row, run: Run) -> bool:
        if row.error or row.tokens == row.expected:
            return False
        forced = {request.id for request in self.workloads[run.seed].requests if request.forced}
        return row.id in forced

    @property
    def valid(self) -> bool:
        return self.complete and all(self.lag(run) <= self.max_lag for run in self.runs)


class Target(Protocol):
    """Where a planned run is made."""

    async def make(self, planned: Planned, workload: Workload, stop: Stop) -> Run: ...


class Simulated:
    """The modelled engine in virtual time."""

    def __init__(
        self,
        engine: EngineModel,
        knowledge: Knowledge,
        *,
        window: int,
        workers: int = 1,
        delay: float = 0.0,
        watch: bool = True,
    ) -> None:
        self._engine = engine
        self._knowledge = knowledge
        self._perfect = Knowledge("perfect", lambda noise: Workload(()))
        self._window = window
        self._workers = workers
        self._delay = delay
        self._watch = watch

    async def make(self, planned: Planned, workload: Workload, stop: Stop) -> Run:
        knowledge = self._perfect if planned.setting == PERFECT else self._knowledge
        # The two arms of an A/A pair differ in what the predictor happens to know.
        noise = 2 * planned.seed + (planned.arm == AGAIN)
        section = setting(planned.setting, window=self._window)
        predictor = knowledge.make(workload, noise)
        return simulated(
            workload, section, self._engine, predictor, workers=self._workers, delay=self._delay, watch=self._watch
        )


def switchable(name: str) -> None:
    """Raises ConfigError for a setting that a running gateway cannot take over."""
    if name == PERFECT:
        raise ConfigError("a live gateway knows only what its predictor knows: use predictor.kind oracle for perfect")
    if name != AS_IT_IS and setting(name).tail is not None:
        raise ConfigError(
            f"{name}: the tail promise of a running gateway cannot be switched; set scheduler.tail in its "
            "configuration and compare stored runs"
        )


class Live:
    """A server, switched through its admin listener where it has one."""

    def __init__(
        self,
        make_target: Callable[[Workload], HttpTarget],
        steering: Steering | None,
        *,
        window: int,
        users: int | None = None,
        patience: float = 600.0,
        on_begin: Callable[[Planned, Workload, float], None] | None = None,
        on_sent: Callable[[Row], None] | None = None,
        on_end: Callable[[Request, Row], None] | None = None,
    ) -> None:
        self._make_target = make_target
        self._steering = steering
        self._window = window
        self._users = users
        self._patience = patience
        self._on_begin = on_begin
        self._on_sent = on_sent
        self._on_end = on_end

    async def make(self, planned: Planned, workload: Workload, stop: Stop) -> Run:
        about: dict[str, Any] = {}
        switchable(planned.setting)
        if planned.setting != AS_IT_IS:
            if self._steering is None:
                raise ConfigError("to switch the gateway between runs its admin listener is needed: --admin URL")
            about["policy"] = await self._steering.use(ordering(setting(planned.setting, window=self._window)))
        target = self._make_target(workload)
        target.prepare(workload.requests)
        # What is there by now stays: the garbage collector need not look at it while requests are due.
        gc.collect()
        gc.freeze()
        start = time.perf_counter() + runner.LEAD
        target.start = start
        if self._on_begin is not None:
            self._on_begin(planned, workload, start)
        if self._users is not None:
            run = await runner.closed(
                workload, target, self._users, start=start, patience=self._patience, on_sent=self._on_sent,
                on_end=self._on_end, stop=stop,
            )  # fmt: skip
        else:
            run = await runner.run(
                workload, target, start=start, patience=self._patience, on_sent=self._on_sent, on_end=self._on_end,
                stop=stop,
            )  # fmt: skip
        if target.guessed:
            about["guessed"] = target.guessed
        run.about = about
        return run


async def conduct(
    experiment: Experiment,
    target: Target,
    *,
    stop: Stop,
    on_run: Callable[[Planned, Run], None] | None = None,
) -> None:
    """Make every planned run, in order; ends early, marked incomplete, when told to stop."""
    experiment.begun = time.time()
    planned = plan(experiment.settings, sorted(experiment.workloads), experiment.again)
    try:
        for one in planned:
            if stop:
                break
            run = await target.make(one, experiment.workloads[one.seed], stop)
            run.setting, run.seed, run.arm = one
            experiment.runs.append(run)
            if on_run is not None:
                on_run(one, run)
    finally:
        experiment.ended = time.time()
        experiment.complete = len(experiment.runs) == len(planned) and all(run.complete for run in experiment.runs)
