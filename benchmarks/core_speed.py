#!/usr/bin/env python3
"""The core's speed: decisions per second, with few and with 100,000 jobs waiting, and memory per waiting job.

    python benchmarks/core_speed.py

The driver is trivial: it performs actions at once and tells the scheduler what a perfect engine would. A job has five
windows: in fixed windows five calls, in elastic ones one call that reports four windows and its end. CPU time of this
process is counted, so that other work on the machine does not enter; still, compare figures of one run only.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import cast

from elis_gateway.core.actions import Action, AskEstimate, Preempt, Run
from elis_gateway.core.job import Estimate, JobSpec
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.policy import Aging, Policy, make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate

WINDOW, WINDOWS = 50, 5
TOKENS = WINDOW * WINDOWS
SLOTS = 8


class Driver:
    """Performs actions at once; time advances by a window per slot in turn."""

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.core = Scheduler(config, policy)
        self.now = 0.0
        self.running: deque[tuple[Slice, int]] = deque()
        """Slices in flight and their jobs' tokens when they began, next to report first."""
        self.stopped: set[int] = set()
        self.started = 0
        self.calls = 0
        self.rng = random.Random(1)
        self.perform(self.core.upstream_changed(UpstreamInfo("engine", frozenset({"m"}), SLOTS), 0.0))

    def perform(self, todo: list[Action]) -> None:
        core, now = self.core, self.now
        for action in todo:
            kind = type(action)
            if kind is Run:
                self.calls += 1
                self.running.append((action.slice, action.slice.job.attained))  # type: ignore[union-attr]
            elif kind is AskEstimate:
                job = action.job  # type: ignore[union-attr]
                guess = cast(float, job.spec.payload) - job.attained
                todo += core.estimated(job.spec.id, Estimate(guess if guess > 1.0 else 1.0), now)
            elif kind is Preempt:
                self.stopped.add(action.slice_id)  # type: ignore[union-attr]

    def submit(self) -> None:
        self.started += 1
        guess = TOKENS * self.rng.uniform(0.5, 1.5)
        self.perform(self.core.submit(JobSpec(f"job-{self.started}", "m", limit=1000, payload=guess), self.now))

    def step(self) -> bool:
        """One slice's next report; True when its job is done."""
        self.now += 0.01
        core, now = self.core, self.now
        slice_, attained = self.running.popleft()
        if slice_.id in self.stopped:
            self.stopped.discard(slice_.id)
            self.perform(core.slice_ended(slice_.id, SliceResult(SliceEnd.PREEMPTED, attained), now))
            return False
        if attained == slice_.job.attained and slice_.job.state.value == "running":
            core.slice_started(slice_.id, now)
        attained += WINDOW
        if attained >= TOKENS:
            self.perform(core.slice_ended(slice_.id, SliceResult(SliceEnd.FINISHED, TOKENS), now))
            return True
        if slice_.limit == WINDOW:
            self.perform(core.slice_ended(slice_.id, SliceResult(SliceEnd.WINDOW, attained), now))
            return False
        self.running.append((slice_, attained))
        if slice_.window:
            self.perform(core.window_passed(slice_.id, attained, now))
        return False


def serve(driver: Driver, jobs: int) -> float:
    """Jobs per CPU second: one arrives whenever one is done, so the number waiting stays as it is."""
    done = 0
    begun = time.process_time()
    while done < jobs:
        if driver.step():
            done += 1
            driver.submit()
    return jobs / (time.process_time() - begun)


def case(
    mode: str, kind: str, waiting: int, jobs: int, *, aging: str = "none", tail: float | None = None
) -> tuple[float, float]:
    """(jobs per CPU second, calls per job: above one, or five in fixed windows, by preemption)."""
    options: dict[str, object] = {"aging": Aging(aging)} if kind in ("isrtf", "sjf") else {}  # type: ignore[arg-type]
    config = SchedulerConfig(mode=mode, rescore="always", tail=tail)  # type: ignore[arg-type]
    driver = Driver(config, make_policy(kind, **options))
    for _ in range(waiting + SLOTS):
        driver.submit()
    gc.collect()
    gc.freeze()
    serve(driver, 200)
    driver.calls = 0
    figures = [serve(driver, jobs // 3) for _ in range(3)]
    gc.unfreeze()
    return median(figures), driver.calls / (jobs // 3 * 3)


def memory(count: int, *, tail: float | None) -> float:
    """Bytes of the scheduler per waiting job, its spec included (a short id, no prompt)."""
    driver = Driver(SchedulerConfig(tail=tail), make_policy("isrtf"))
    for _ in range(100):
        driver.submit()
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(count):
        driver.submit()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / count


def simulated(mode: str, jobs: int) -> float:
    """Jobs per CPU second through core, engine, simulator and predictor together, at load 0.9."""
    rng = random.Random(1)
    now, work = 0.0, []
    model = EngineModel(SLOTS, ((1, 30.0),), seam_tokens=1.5)
    for number in range(jobs):
        now += rng.expovariate(0.9 * model.capacity / (TOKENS + 1.5))
        work.append(SimJob(str(number), now, 100, TOKENS))
    core = Scheduler(SchedulerConfig(mode=mode, rescore="always"), make_policy("isrtf"))  # type: ignore[arg-type]
    predictor = NoisyOracle({job.id: job.output_tokens for job in work}, 0.6)
    begun = time.process_time()
    simulate(work, core, {"engine": Engine(model)}, predictor)
    return jobs / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=12_000)
    parser.add_argument("--waiting", type=int, default=100_000)
    args = parser.parse_args()

    print(f"jobs/s of five windows each through the core, {SLOTS} slots, one core")
    print(f"{'':44}{'100 waiting':>12}{f'{args.waiting:,} waiting':>18}{'ratio':>8}{'calls/job':>11}")
    cases: list[tuple[str, Callable[[int], tuple[float, float]]]] = [
        ("first-come, one call", lambda n: case("elastic", "fcfs", n, args.jobs)),
        ("ISRTF, fixed windows, always re-scored", lambda n: case("fixed", "isrtf", n, args.jobs)),
        ("ISRTF, elastic windows", lambda n: case("elastic", "isrtf", n, args.jobs)),
        ("ISRTF, elastic, Boost aging", lambda n: case("elastic", "isrtf", n, args.jobs, aging="boost")),
        ("the same with tail 1.25", lambda n: case("elastic", "isrtf", n, args.jobs, aging="boost", tail=1.25)),
    ]
    for name, measure in cases:
        (few, _), (many, calls) = measure(100), measure(args.waiting)
        print(f"{name:44}{few:12,.0f}{many:18,.0f}{few / many:8.2f}{calls:11.2f}")
    print("(O(log n) decisions: log 100,000 / log 100 is 2.5, and cache misses add to it)")

    print("\nscaling, ISRTF elastic: microseconds per job of five windows")
    for waiting in (100, 1_000, 10_000, 100_000):
        if waiting <= args.waiting:
            print(f"{waiting:>10,} waiting {1e6 / case('elastic', 'isrtf', waiting, args.jobs)[0]:8.1f}")

    print("\nscheduler memory per waiting job")
    for name, tail in (("without tail", None), ("with tail", 1.25)):
        print(f"{name:>20} {memory(args.waiting, tail=tail):8,.0f} bytes")

    print("\nsimulated jobs/s (core, engine, simulator, predictor), load 0.9")
    for mode in ("fixed", "elastic"):
        print(f"{mode:>20} {simulated(mode, args.jobs):8,.0f}")


if __name__ == "__main__":
    main()
