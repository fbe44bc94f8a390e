#!/usr/bin/env python3
"""The core's speed: decisions per second, with few and with 100,000 jobs waiting, and memory per waiting job.

    python benchmarks/core_speed.py
    python benchmarks/core_speed.py --beside ../another-tree --output benchmarks/results/core-speed.jsonl
    python -m deploy.compiled --keep /tmp/c && python benchmarks/core_speed.py --beside . --tree /tmp/c/site

The driver is trivial: it performs actions at once and tells the scheduler what a perfect engine would. A job has five
windows: in fixed windows five calls, in elastic ones one call that reports four windows and its end. *Core alone*: the
inputs that such a run gave to the scheduler, given once more to a fresh one, which decides the same again; what making
them costs (a driver's own work) does not count. *With the driver*: the run itself. CPU time of this process is counted,
so that other work on the machine enters only by what it does to caches and clock rate; compare figures of one run only.

``--beside``: this script on two trees, each in a process of its own, in turns; the ratio is that of turns next to each
other, so that a machine whose speed swings takes no side. Given are its median and quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

from elis_gateway.core.actions import Action, AskEstimate, Preempt, Run
from elis_gateway.core.job import Estimate, JobSpec
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.policy import Aging, Policy, make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import Slice, SliceEnd, SliceResult
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate

ROOT = Path(__file__).resolve().parent.parent
WINDOW, WINDOWS = 50, 5
TOKENS = WINDOW * WINDOWS
SLOTS = 8
CASES: list[tuple[str, tuple[str, str], dict[str, Any]]] = [
    ("first-come, one call", ("elastic", "fcfs"), {}),
    ("ISRTF, fixed windows, always re-scored", ("fixed", "isrtf"), {}),
    ("ISRTF, elastic windows", ("elastic", "isrtf"), {}),
    ("ISRTF, elastic, Boost aging", ("elastic", "isrtf"), {"aging": "boost"}),
    ("the same with tail 1.25", ("elastic", "isrtf"), {"aging": "boost", "tail": 1.25}),
]


class Driver:
    """Performs actions at once; time advances by a window per slot in turn."""

    def __init__(self, core: Scheduler | Recorder) -> None:
        self.core = core
        self.now = 0.0
        self.running: deque[tuple[Slice, int, bool]] = deque()
        """Slices in flight, their jobs' tokens, and whether their first was told of; next to report first."""
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
                self.running.append((action.slice, action.slice.job.attained, False))  # type: ignore[union-attr]
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
        slice_, attained, told = self.running.popleft()
        if slice_.id in self.stopped:
            self.stopped.discard(slice_.id)
            self.perform(core.slice_ended(slice_.id, SliceResult(SliceEnd.PREEMPTED, attained), now))
            return False
        if not told:
            self.perform(core.slice_started(slice_.id, now))
        attained += WINDOW
        if attained >= TOKENS:
            self.perform(core.slice_ended(slice_.id, SliceResult(SliceEnd.FINISHED, TOKENS), now))
            return True
        if slice_.limit == WINDOW:
            self.perform(core.slice_ended(slice_.id, SliceResult(SliceEnd.WINDOW, attained), now))
            return False
        self.running.append((slice_, attained, True))
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


def settings(mode: str, kind: str, aging: str, tail: float | None) -> tuple[SchedulerConfig, Policy]:
    options: dict[str, object] = {"aging": Aging(aging)} if kind in ("isrtf", "sjf") else {}  # type: ignore[arg-type]
    config = SchedulerConfig(mode=mode, rescore="always", tail=tail)  # type: ignore[arg-type]
    return config, make_policy(kind, **options)


class Recorder:
    """A scheduler that notes what it is given."""

    def __init__(self, core: Scheduler) -> None:
        self.core = core
        self.log: list[tuple[str, tuple[object, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., list[Action]]:
        def noted(*args: object) -> list[Action]:
            self.log.append((name, args))
            return getattr(self.core, name)(*args)  # type: ignore[no-any-return]

        return noted


class Recording:
    """A run's inputs, to be given to fresh schedulers."""

    def __init__(
        self, mode: str, kind: str, waiting: int, jobs: int, *, aging: str = "none", tail: float | None = None
    ) -> None:
        self.settings = settings(mode, kind, aging, tail)
        self.jobs = jobs
        prelude = Recorder(Scheduler(*self.settings))
        driver = Driver(prelude)
        for _ in range(waiting + SLOTS):
            driver.submit()
        serve(driver, 200)
        driver.core = serving = Recorder(prelude.core)
        serve(driver, jobs)
        self.prelude, self.serving = prelude.log, serving.log

    def play(self) -> float:
        """Jobs per CPU second of the core alone."""
        core = Scheduler(*self.settings)
        for name, args in self.prelude:
            getattr(core, name)(*args)
        inputs = {name: getattr(core, name) for name, _ in self.serving}
        calls = [(inputs[name], args) for name, args in self.serving]
        gc.collect()
        gc.freeze()
        begun = time.process_time()
        for call, args in calls:
            call(*args)
        took = time.process_time() - begun
        gc.unfreeze()
        return self.jobs / took


def alone(mode: str, kind: str, waiting: int, jobs: int, *, aging: str = "none", tail: float | None = None) -> float:
    """Jobs per CPU second of the core alone; the best of five, for only other work makes it slower."""
    recording = Recording(mode, kind, waiting, jobs, aging=aging, tail=tail)
    return max(recording.play() for _ in range(5))


def case(
    mode: str, kind: str, waiting: int, jobs: int, *, aging: str = "none", tail: float | None = None
) -> tuple[float, float]:
    """(jobs per CPU second with the driver, calls per job: above one, or five in fixed windows, by preemption)."""
    config, policy = settings(mode, kind, aging, tail)
    driver = Driver(Scheduler(config, policy))
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
    driver = Driver(Scheduler(SchedulerConfig(tail=tail), make_policy("isrtf")))
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


# ---- two trees in turns ----------------------------------------------------------------------------------------------

SIMULATED = "simulated, "


def work() -> None:
    """Reads the name of a case and a number of jobs per line, answers with jobs per CPU second."""
    cases = {name: (setting, dials) for name, setting, dials in CASES}
    recordings: dict[str, Recording] = {}
    for line in sys.stdin:
        name, jobs = json.loads(line)
        if name.startswith(SIMULATED):
            figure = simulated(name.removeprefix(SIMULATED), jobs)
        else:
            if name not in recordings:
                setting, dials = cases[name]
                recordings[name] = Recording(*setting, 100, jobs, **dials)
            figure = recordings[name].play()
        print(figure, flush=True)


class Tree:
    """This script at work on one tree, in a process of its own."""

    def __init__(self, root: Path) -> None:
        compiled = any((root / "elis_gateway" / "core").glob("scheduler.*.so"))
        self.commit = _commit(root) if not compiled else f"{_commit(ROOT)} compiled"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env={**os.environ, "PYTHONPATH": str(root.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self, name: str, jobs: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, jobs]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def _commit(root: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def beside(other: Path, tree: Path, turns: int, jobs: int, only: str, output: Path | None) -> None:
    new, old = Tree(tree), Tree(other)
    print(f"jobs per CPU second, {old.commit} and {new.commit} in turns; medians, quartiles of {turns} ratios")
    names = [name for name, _, _ in CASES] + [SIMULATED + mode for mode in ("fixed", "elastic")]
    for name in [name for name in names if only in name]:
        pairs = []
        for number in range(turns + 1):
            order = (old, new) if number % 2 else (new, old)
            found = {tree: tree.turn(name, jobs) for tree in order}
            pairs.append((found[old], found[new]))
        pairs = pairs[1:]  # the first turn has warmed both up
        before, after = (median(column) for column in zip(*pairs, strict=True))
        low, middle, high = quantiles([b / a for a, b in pairs], n=4)
        best = max(b for _, b in pairs)
        print(
            f"{name:44}{before:9,.0f}{after:9,.0f}   best {best:7,.0f}   ratio {middle:.2f} ({low:.2f} to {high:.2f})"
        )
        if output is not None:
            row = {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
                "machine": f"{platform.machine()}, Python {platform.python_version()}",
                "load_average": round(os.getloadavg()[0], 1),
                "case": name, "old": old.commit, "new": new.commit, "jobs": jobs, "turns": turns,
                "jobs_per_s": {"old": round(before), "new": round(after), "best": round(best)},
                "ratio": {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]},
            }  # fmt: skip
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    new.close()
    old.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=12_000)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--beside", type=Path, metavar="TREE", help="a checkout of another version to compare with")
    parser.add_argument("--tree", type=Path, default=ROOT, help="what is compared, where that is not this checkout")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--only", default="", metavar="TEXT", help="of a comparison, the cases with this in their name")
    parser.add_argument("--output", type=Path, help="file of results of a comparison, appended to")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    if args.beside is not None:
        beside(args.beside, args.tree, args.turns, min(args.jobs, 2000), args.only, args.output)
        return

    print(f"jobs/s of five windows each, {SLOTS} slots, one core; 100 waiting, then {args.waiting:,}")
    print(f"{'':44}{'core alone':>18}{'with the driver':>18}{'ratio':>8}{'calls/job':>11}")
    for name, setting, dials in CASES:
        core = [alone(*setting, waiting, args.jobs, **dials) for waiting in (100, args.waiting)]
        driven = [case(*setting, waiting, args.jobs, **dials) for waiting in (100, args.waiting)]
        print(f"{name:44}{core[0]:9,.0f}{core[1]:9,.0f}{driven[0][0]:9,.0f}{driven[1][0]:9,.0f}"
              f"{core[0] / core[1]:8.2f}{driven[1][1]:11.2f}")  # fmt: skip
    print("(O(log n) decisions: log 100,000 / log 100 is 2.5, and cache misses add to it)")

    print("\nscaling, ISRTF elastic: microseconds per job of five windows")
    for waiting in (100, 1_000, 10_000, 100_000):
        if waiting <= args.waiting:
            print(f"{waiting:>10,} waiting {1e6 / alone('elastic', 'isrtf', waiting, args.jobs):8.1f}")

    print("\nscheduler memory per waiting job")
    for name, tail in (("without tail", None), ("with tail", 1.25)):
        print(f"{name:>20} {memory(args.waiting, tail=tail):8,.0f} bytes")

    print("\nsimulated jobs/s (core, engine, simulator, predictor), load 0.9")
    for mode in ("fixed", "elastic"):
        print(f"{mode:>20} {simulated(mode, args.jobs):8,.0f}")


if __name__ == "__main__":
    main()
