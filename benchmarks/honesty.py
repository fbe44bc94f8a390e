"""Does the load test say nothing where there is nothing, and lose the gain where the knowledge is broken?

    python -m benchmarks.honesty --tries 100 --output benchmarks/results/honesty.jsonl

In virtual time (the shipped `vllm-cpu` engine, load 0.95, Azure's lengths and arrivals):

- *A/A*: two arms of one setting that differ in what the predictor happens to know, over six workload seeds. An interval
  of 95 % should find no difference in 90 to 99 of 100 tries. Every try has seeds of its own.
- *broken on purpose*: perfect lengths, lengths off by e^±0.6, and perfect lengths dealt to the wrong requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.rows import show
from benchmarks.tail import about
from elis_gateway.sim.model import EngineModel
from loadtest.compare import Arm, contrast
from loadtest.experiment import Experiment, Simulated, conduct
from loadtest.knowledge import Knowledge
from loadtest.runner import Stop
from loadtest.workload import Seeds, Workload, azure

EQUAL = (("sjf", "noisy:0.6"), ("isrtf", "noisy:0.6"), ("isrtf", "noisy:1.5"), ("isrtf-published", "noisy:0.6"))
BROKEN = ("perfect", "noisy:0.6", "shuffled")
LOAD, SEEDS = 0.95, 6


def arms(settings: Sequence[str], again: str | None, predictor: str, seeds: range, requests: int) -> dict[str, Arm]:
    engine = EngineModel.load("vllm-cpu")
    works = {s: azure(requests, load=LOAD, capacity=engine.capacity, seeds=Seeds.all(s)) for s in seeds}
    experiment = Experiment({}, "sim", list(settings), works, again, engine=engine)
    known = Knowledge(predictor, lambda noise: Workload(()))
    asyncio.run(conduct(experiment, Simulated(engine, known, window=50, watch=False), stop=Stop()))
    return experiment.arms()


def equal(setting: str, predictor: str, tries: int, requests: int) -> dict[str, Any]:
    """How often two arms of one setting were found not to differ, by figure."""
    found: dict[str, int] = {}
    for number in range(tries):
        made = arms([setting], setting, predictor, range(SEEDS * number, SEEDS * (number + 1)), requests)
        metrics = contrast(made[f"{setting} again"], made[setting]).metrics
        for name in ("jct.mean", "jct.p50"):
            found[name] = found.get(name, 0) + (not metrics[name].differs)
    return {"setting": setting, "predictor": predictor, "tries": tries, "no_difference": found}


def broken(predictor: str, requests: int, seeds: int) -> dict[str, Any]:
    made = arms(["fcfs", "sjf", "isrtf"], None, predictor, range(seeds), requests)
    ratios = {name: contrast(made[name], made["fcfs"]).metrics["jct.mean"] for name in ("sjf", "isrtf")}
    return {"predictor": predictor, "seeds": seeds, **{name: [r.ratio, r.half_width] for name, r in ratios.items()}}


@click.command(help=__doc__.split("\n")[0])
@click.option("--tries", default=100, show_default=True)
@click.option("--requests", default=60, show_default=True, help="A run.")
@click.option("--seeds", default=10, show_default=True, help="Where knowledge is broken.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path))
def main(tries: int, requests: int, seeds: int, output: Path | None) -> None:
    stamp = {**about(), "load": LOAD}
    for predictor in BROKEN:
        show({**stamp, "broken": broken(predictor, 150, seeds)}, output)
    for setting, predictor in EQUAL:
        row = equal(setting, predictor, tries, requests)
        show({**stamp, "workload_seeds": SEEDS, "requests": requests, "equal": row}, output)


if __name__ == "__main__":
    main()
