"""The demo's second part: the same work under several orders, on the modelled engine, in virtual time.

Twelve workload seeds, 0 to 11, none chosen; every setting sees the same ones, and gains are compared seed by seed.
Knows: which settings and what knowledge are compared. Never: wall time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from elis_gateway.predictor.base import Predictor, View
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.predictor.history import History
from elis_gateway.sim.engine import EngineModel
from loadtest.live import Screen, figure
from loadtest.settings import setting
from loadtest.stats import Comparison, Summary, compare, mean_of, summarise
from loadtest.targets import MODEL, capacity, simulated
from loadtest.workload import Seeds, Workload, azure

__all__ = ["LOAD", "REQUESTS", "SEEDS", "SLOTS", "Knowledge", "Study", "show"]

SEEDS = 12
REQUESTS = 150
SLOTS = 4
LOAD = 0.95
SEAMS = (0.0, 1.5, 4.0)
TAUGHT = 1000
"""Answers the history predictor has seen before each run, drawn with other seeds."""

SHOWN = {
    "fcfs": ("FCFS", "first come, first served"),
    "sjf": ("SJF", "shortest predicted first, never interrupted"),
    "isrtf-published": ("ISRTF published", "shortest remaining first, as published: fixed windows of 50 tokens"),
    "isrtf": ("ISRTF elastic", "the gateway's default: interrupted only where somebody else deserves it"),
}


@dataclass(frozen=True)
class Knowledge:
    """What the predictor knows, and whether clients say which application they are."""

    name: str
    make: Callable[[Workload, int], Predictor]
    apps: bool = True


def _perfect(workload: Workload, seed: int) -> Predictor:
    return NoisyOracle({request.id: request.tokens for request in workload.requests}, 0.0)


def _history(apps: bool) -> Callable[[Workload, int], Predictor]:
    def make(workload: Workload, seed: int) -> Predictor:
        history = History()
        past = azure(TAUGHT, load=LOAD, capacity=1.0, seeds=Seeds.all(1000 + seed))
        for request in past.requests:
            view = View(request.id, MODEL, request.app if apps else "", "", "", request.tokens, None)
            history.learn(view, complete=request.tokens < request.max_tokens)
        return history

    return make


PERFECT = Knowledge("perfect knowledge", _perfect)
BY_APP = Knowledge("history by app", _history(True))
ONE_APP = Knowledge("history alone", _history(False), apps=False)


@dataclass
class Study:
    """Every seed under every setting, for one engine model and one knowledge."""

    engine: EngineModel
    knowledge: Knowledge
    runs: dict[str, list[Summary]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        backlog = azure(1000, load=1.0, capacity=1.0, seeds=Seeds.all(2000))
        self.capacity = capacity(self.engine, backlog)

    def run(self, name: str, seed: int) -> None:
        workload = azure(REQUESTS, load=LOAD, capacity=self.capacity, seeds=Seeds.all(seed))
        predictor = self.knowledge.make(workload, seed)
        done = simulated(workload, setting(name), self.engine, predictor, name=name, apps=self.knowledge.apps)
        self.runs.setdefault(name, []).append(summarise(done))

    def gain(self, name: str) -> Comparison:
        """Mean completion time over first-come's, seed by seed."""
        return compare([run.mean for run in self.runs[name]], [run.mean for run in self.runs["fcfs"]])


def engine_model() -> EngineModel:
    """A shipped model with the demo's slots: a real vLLM on two CPU cores, measured."""
    model = EngineModel.load("vllm-cpu")
    return model if model.slots == SLOTS else replace(model, slots=SLOTS)


def show(screen: Screen) -> list[Study]:
    """Run everything and print the tables."""
    engine = engine_model()
    main = Study(engine, PERFECT)
    others = [Study(engine, knowledge) for knowledge in (BY_APP, ONE_APP)]
    seams = [Study(replace(engine, seam_tokens=seam), PERFECT) for seam in SEAMS]
    studies = [main, *others, *seams]
    screen.say(
        f"{REQUESTS} requests with the arrivals and lengths of Azure's conversation trace (CC BY 4.0), {SLOTS} slots,\n"
        f"load {LOAD:g} of {main.capacity:.0f} tokens/s, {SEEDS} workload seeds (0 to {SEEDS - 1}). The engine's rates "
        f"were measured on:\n{engine.about.split('. Measured')[0]}."
    )
    for label, meaning in SHOWN.values():
        screen.say(f"  {label:15s}  {meaning}")
    with screen.progress("simulating", len(studies) * len(SHOWN) * SEEDS) as step:
        for study in studies:
            for name in SHOWN:
                for seed in range(SEEDS):
                    study.run(name, seed)
                    step()
    screen.say("\nSeconds, means over the seeds, with perfect knowledge of every length (the upper bound):")
    _figures(screen, main)
    screen.say(
        "\nMean completion time over first-come's: ratio ± 95 % interval, paired by seed, and how many seeds were\n"
        "better. By what the predictor knows:"
    )
    _gains(screen, [main, *others], [study.knowledge.name for study in (main, *others)])
    screen.say(
        "\nBy what a seam (ending a call and going on with another) costs, in decoded tokens; perfect knowledge:"
    )
    _gains(screen, seams, [f"seam {seam:g}" for seam in SEAMS])
    screen.say(
        f"\nHistory: taught with {TAUGHT} earlier answers; by app: clients name their application. Tok/s are over the\n"
        "whole run, whose end drains half-empty; every order does the same work. Where lengths are hardly known,\n"
        "order gains little and interrupting can lose."
    )
    return studies


def _figures(screen: Screen, study: Study) -> None:
    rows = []
    for name, (label, _) in SHOWN.items():
        runs = study.runs[name]
        columns = [
            mean_of([run.mean for run in runs]),
            mean_of([run.p50 for run in runs]),
            mean_of([run.p90 for run in runs]),
            mean_of([run.ttft_mean for run in runs]),
            mean_of([run.ttft_p50 for run in runs]),
            mean_of([run.ttft_p90 for run in runs]),
        ]
        counts = [
            mean_of([run.throughput for run in runs]),
            mean_of([run.calls for run in runs]),
            mean_of([run.preemptions for run in runs]),
        ]
        rows.append([label, *map(figure, columns), *(figure(count, 0) for count in counts)])
    heads = ["", "JCT", "p50", "p90", "TTFT", "p50", "p90", "tok/s", "calls", "preempt"]
    screen.table(heads, rows)


def _gains(screen: Screen, studies: list[Study], labels: list[str]) -> None:
    names = [name for name in SHOWN if name != "fcfs"]
    rows = []
    for study, label in zip(studies, labels, strict=True):
        gains = [study.gain(name) for name in names]
        rows.append([label, *(f"{g.ratio:.2f} ± {g.half_width:.2f}  {g.better}/{g.seeds}" for g in gains)])
    screen.table(["", *(SHOWN[name][0] for name in names)], rows)
