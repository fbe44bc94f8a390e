#!/usr/bin/env python3
"""The simulator against a real vLLM: mean completion time of first come, SJF and ISRTF, live over simulated.

    python -m benchmarks.validate_engine run --seeds 5 --load 0.65     resumes; rows: results/validate-engine.jsonl
    python -m benchmarks.validate_engine run --url http://127.0.0.1:8765 --seeds 5        a vLLM that runs already
    python -m benchmarks.validate_engine report

A fresh gateway for each run, in front of one vLLM (CPU build, float32). Lengths are forced and the predictor is
`max_tokens`, so both sides know the same. The engine's numbers (time of a step by batch, what a beginning call costs
the others, what it takes to its first token) are fitted to the token times of the very run that is then simulated, so a
machine that is slow today is slow on both sides; arrivals are the moments at which the requests really left. Load is a
share of the capacity measured at the beginning: backlog, all slots at work.

The aim: within 10 %, or the 95 % interval over five runs or more where that is wider; never beyond 20 %.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from benchmarks import capacity_live
from benchmarks.capacity import about, requests
from benchmarks.fitting import fit
from benchmarks.rows import by_question, run_missing
from benchmarks.validate_sockets import marked
from elis_gateway.errors import UpstreamUnavailable
from elis_gateway.predictor.baselines import MaxTokens
from loadtest import make, runner
from loadtest.client import Client
from loadtest.records import Row
from loadtest.settings import SETTINGS, setting
from loadtest.stats import interval, percentile
from loadtest.targets import HttpTarget, simulated
from loadtest.workload import Seeds, Workload

NAMES = ("fcfs", "sjf", "isrtf")
RESULTS = Path(__file__).parent / "results" / "validate-engine.jsonl"
SLOTS, BLOCK = 4, 32
"""As ``benchmarks.vllm_engine`` starts it."""
LAG = 0.05
"""Seconds (99th percentile) that the generator may send late; a step of this engine takes as long."""
AIM, NEVER = 0.10, 0.20


@dataclass(frozen=True)
class Question:
    load: float
    requests: int
    median: float
    longest: int

    def work(self, seed: int, capacity: float) -> Workload:
        plan = make.Plan(
            requests=self.requests,
            apps=(make.App(lengths=f"lognormal:median={self.median:g},sigma=0.7"),),
            arrivals="gamma:shape=0.8",
            load=self.load,
            capacity=capacity,
            longest=self.longest,
        )
        return make.make(plan, Seeds.all(seed))


def capacity(engine: capacity_live.Engine) -> float:
    """Tokens per second with every slot at work."""
    work = requests([60] * (4 * SLOTS))
    figures = capacity_live.backlog(engine, engine.url, work, 3 * SLOTS, f"capacity {time.time():.0f}")
    if figures["errors"]:
        raise click.ClickException(f"the engine failed: {figures['first_error']}")
    return figures["rate"]


async def live(url: str, model: str, work: Workload) -> list[Row]:
    async with Client(url) as client:
        target = HttpTarget(client, model, body={"temperature": 0}, debug=True, gaps=True)
        target.prepare(work.requests)
        target.start = time.perf_counter() + runner.LEAD
        run = await runner.run(work, target, start=target.start)
    if failed := [row.error for row in run.rows if row.error]:
        raise UpstreamUnavailable(f"{len(failed)} requests failed: {failed[0]}", cause="failed")
    return run.rows


def measure(folder: Path, engine: capacity_live.Engine, work: Workload, name: str, seed: int) -> dict[str, Any]:
    """One setting on one workload, live through a fresh gateway and as the simulator tells it."""
    sent = marked(work, f"{name} {seed} {time.time():.0f}")
    busy = os.getloadavg()[0]
    with capacity_live.gateway(folder, "gateway", engine, {}, SETTINGS[name], "max_tokens") as (url, _):
        rows = asyncio.run(live(url, engine.model, sent))
    found = fit(rows, slots=SLOTS, block=BLOCK)
    by_id = {row.id: row for row in rows}
    happened = [
        replace(request, at=by_id[request.id].sent, prompt_tokens=by_id[request.id].prompt_tokens)
        for request in sent.requests
    ]
    as_sent = Workload(tuple(sorted(happened, key=lambda request: request.at)))
    told = simulated(as_sent, setting(name), found.model, MaxTokens()).rows
    seconds, expected = (fmean(row.jct - row.lag for row in side) for side in (rows, told))
    lag = percentile([row.lag for row in rows], 99, beyond=0) or 0.0
    return {
        "live": seconds,
        "simulated": expected,
        "ratio": seconds / expected,
        "wait": [fmean(row.wait or 0.0 for row in side) for side in (rows, told)],
        "preemptions": [sum(row.preemptions for row in side) for side in (rows, told)],
        "decode": [[batch, round(rate, 2)] for batch, rate in found.model.decode],
        "gaps": found.gaps,
        "stall": found.stall,
        "seam_tokens": found.model.seam_tokens,
        "wrong_lengths": sum(row.tokens != row.expected for row in rows),
        "lag_p99": lag,
        "valid": lag <= LAG,
        "load_average": busy,
    }


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    pass


@main.command()
@click.option("--url", help="A vLLM that runs already (python -m benchmarks.vllm_engine serve --slots 4).")
@click.option("--seeds", default=5, show_default=True)
@click.option("--load", default=0.65, show_default=True)
@click.option("--requests", "count", default=60, show_default=True)
@click.option("--median", default=50.0, show_default=True, help="Of the answers' lengths, in tokens.")
@click.option("--longest", default=250, show_default=True)
@click.option("--tries", default=2, show_default=True, help="Of a run that came out invalid.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def run(
    url: str | None, seeds: int, load: float, count: int, median: float, longest: int, tries: int, output: Path
) -> None:
    """Make the runs that are missing, and store each."""
    question = Question(load, count, median, longest)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elis-validate-")))
        engine = stack.enter_context(capacity_live.real(folder, SLOTS, url))
        rate = capacity(engine)
        click.echo(f"capacity {rate:.1f} tokens/s")

        def one(name: str, seed: int) -> dict[str, Any]:
            return {"capacity": rate, **measure(folder, engine, question.work(seed, rate), name, seed)}

        run_missing(output, asdict(question), about(), NAMES, seeds, tries, one, tell)
    summary(output)


def tell(row: dict[str, Any]) -> None:
    click.echo(
        f"{row['setting']:6s} seed {row['seed']}: live {row['live']:.2f} s over {row['simulated']:.2f} s: "
        f"{row['ratio']:.3f}; rates {row['decode']}, a start holds up by {row['stall'] * 1e3:.0f} ms, "
        f"seam {row['seam_tokens']:.1f}, lag {row['lag_p99'] * 1e3:.0f} ms{'' if row['valid'] else ': INVALID'}"
    )


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def report(output: Path) -> None:
    """What is stored, by question and code, held against the aim."""
    summary(output)


def summary(path: Path) -> None:
    for (question, code), rows in by_question(path).items():
        click.echo(f"{question}, code {code}: {len(rows)} runs, {sum(not row['valid'] for row in rows)} invalid")
        for name in NAMES:
            ratios = [row["ratio"] for row in rows if row["setting"] == name and row["valid"]]
            if ratios:
                click.echo(f"  {name:6s} {verdict(ratios)}")


def verdict(ratios: list[float]) -> str:
    ratio, half = interval(ratios)
    off = abs(ratio - 1)
    if len(ratios) < 5:
        said = "too few runs to say"
    elif off <= AIM or (off <= half and off <= NEVER):
        said = "within the aim"
    else:
        said = "BEYOND the aim"
    return f"live over simulated {ratio:.3f} ± {half:.3f}, {len(ratios)} runs: {said}"


if __name__ == "__main__":
    main()
