#!/usr/bin/env python3
"""The simulator against the same gateway over real sockets: mean completion time per setting, live over simulated.

    python -m benchmarks.validate_sockets run --seeds 5       resumes; rows: benchmarks/results/validate-sockets.jsonl
    python -m benchmarks.validate_sockets report

Embedded engine and gateway are processes of their own, in real time, a fresh gateway for each run; lengths are forced
and the predictor is `max_tokens`, so both sides know the same. Both get the same requests at the same moments: the
simulator is given the times at which the generator really sent them. It is also given what the run itself shows of the
way between the parts, and nothing else:

- *refill*: from the modelled last token of a call to the beginning of the next one in its slot, by the engine's own
  log. Half of it is the simulator's `delay`, each way.
- *edge*: what a request that meets nobody takes beyond the model: client to gateway to engine and back.

A run counts only where the generator sent on time and the engine's process kept up with its own model.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
import orjson

from benchmarks.capacity import about
from benchmarks.rows import by_question, run_missing
from elis_gateway.predictor.baselines import MaxTokens
from elis_gateway.sim.model import EngineModel
from loadtest import make, runner
from loadtest.client import Client
from loadtest.engines import Child, free_port, wait_ready
from loadtest.records import Row
from loadtest.settings import SETTINGS, setting
from loadtest.stats import interval, percentile
from loadtest.targets import HttpTarget, simulated
from loadtest.workload import Request, Seeds, Workload

NAMES = ("fcfs", "sjf", "isrtf")
RESULTS = Path(__file__).parent / "results" / "validate-sockets.jsonl"
LATE = 0.6
"""Decoding steps (99th percentile) that the generator may send late, and the engine's process be behind its model."""
AIM = 0.05
PROBES, PROBED = 6, 12
"""Lone requests after a run, and their tokens."""
SOON, FEW = 0.03, 5
"""A call that begins later than this after a slot came free was not waiting for it; fewer refills say nothing."""


@dataclass(frozen=True)
class Question:
    slots: int = 8
    pace: float = 0.4
    """The default model's decode and prefill rates times this: what two busy cores can carry."""
    load: float = 0.7
    requests: int = 80

    def engine(self) -> EngineModel:
        model = replace(EngineModel.load("default"), slots=self.slots)
        prefill = model.prefill_tokens_per_second
        return replace(
            model,
            decode=tuple((batch, rate * self.pace) for batch, rate in model.decode),
            prefill_tokens_per_second=None if prefill is None else prefill * self.pace,
        )

    def work(self, seed: int) -> Workload:
        plan = make.Plan(
            requests=self.requests,
            apps=(make.App(lengths="lognormal:median=90,sigma=0.8"),),
            arrivals="gamma:shape=0.8",
            load=self.load,
            capacity=self.engine().capacity,
            longest=500,
        )
        return make.make(plan, Seeds.all(seed))


# ---- live -----------------------------------------------------------------------------------------------------------


@contextmanager
def embedded(folder: Path, engine: EngineModel) -> Iterator[str]:
    """The embedded engine's URL."""
    port = free_port()
    engine.save(folder / "engine.json")
    serve = [sys.executable, "-m", "elis_gateway", "sim-engine", "--port", str(port)]
    with Child([*serve, "--engine", str(folder / "engine.json")], log=folder / "engine.log") as child:
        wait_ready(child, f"http://127.0.0.1:{port}/health", timeout=60)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def gateway(folder: Path, engine: str, slots: int, name: str) -> Iterator[str]:
    """A fresh gateway's URL. What one learns (its pace, how bursty the traffic is) moves the keys of later jobs, and a
    simulation begins knowing nothing: one that had served other runs took up to 1.6 % longer, and the simulator told
    the same when it was given both runs."""
    port = free_port()
    config = {
        "server": {"host": "127.0.0.1", "port": port},
        "admin": {"port": free_port()},
        "upstreams": [{"url": engine, "slots": slots}],
        "scheduler": SETTINGS[name],
        "predictor": {"kind": "max_tokens"},
        "logging": {"level": "warning"},
    }
    (folder / "gateway.json").write_text(json.dumps(config))
    serve = [sys.executable, "-m", "elis_gateway", "serve", str(folder / "gateway.json")]
    with Child(serve, log=folder / "gateway.log") as child:
        wait_ready(child, f"http://127.0.0.1:{port}/ready", timeout=60)
        yield f"http://127.0.0.1:{port}"


def marked(work: Workload, mark: str) -> Workload:
    """The same work with prompts that no prefix cache has seen, each limited to its length."""
    return Workload(
        tuple(replace(r, prompt=f"{mark} {r.id} {r.prompt}", max_tokens=r.tokens) for r in work.requests), work.about
    )


async def live(gateway: str, at: str, work: Workload) -> tuple[list[Row], list[float], list[dict[str, Any]]]:
    """Rows of a run, the engine's log of it, and completion times of the lone requests after it."""
    async with Client(gateway) as client, Client(at) as engine:
        target = HttpTarget(client, "sim", body={"temperature": 0}, debug=True)
        await engine.send_json("DELETE", "/sim/requests", b"")
        target.prepare(work.requests)
        target.start = time.perf_counter() + runner.LEAD
        run = await runner.run(work, target, start=target.start)
        log = orjson.loads((await engine.get("/sim/requests")).body)["requests"]
        alone = [await lone(target, number, work.requests[number]) for number in range(PROBES)]
    if failed := [row.error for row in run.rows if row.error]:
        raise click.ClickException(f"{len(failed)} requests failed: {failed[0]}")
    return run.rows, alone, log


async def lone(target: HttpTarget, number: int, like: Request) -> float:
    request = replace(like, id=f"probe{number}", tokens=PROBED, max_tokens=PROBED, prompt=f"probe {like.prompt}")
    target.start = time.perf_counter()
    row = Row(request.id, 0.0, 0.0)
    await target.send(request, row)
    return row.jct


# ---- what the run says of the way -----------------------------------------------------------------------------------


def refills(log: Sequence[dict[str, Any]], slots: int) -> list[float]:
    """Seconds between the last token of a call and the beginning of the next, where all slots had been taken."""
    ends = [call["due"] if call["due"] is not None else call["closed"] or call["ended"] for call in log]
    moments = sorted([(call["begun"], 1) for call in log] + [(end, -1) for end in ends])
    taken, free, found = 0, None, []
    for at, change in moments:
        if change < 0:
            free = at if taken == slots else None
        elif free is not None:
            if at - free < SOON:
                found.append(at - free)
            free = None
        taken += change
    return found


def behind(log: Sequence[dict[str, Any]]) -> float:
    """Seconds that the engine's process was behind its model at the ends of calls, 99th percentile or worst."""
    late = [call["ended"] - call["due"] for call in log if call["due"] is not None]
    return percentile(late, 99, beyond=1) or max(late)


def modelled(name: str, engine: EngineModel, work: Workload, delay: float) -> list[Row]:
    return simulated(work, setting(name), engine, MaxTokens(), delay=delay).rows


def measure(folder: Path, at: str, question: Question, name: str, seed: int) -> dict[str, Any]:
    """One setting on one workload, live and simulated. ``at``: the engine's URL."""
    engine = question.engine()
    work = marked(question.work(seed), f"{name} {seed} {time.time():.0f}")
    with gateway(folder, at, engine.slots, name) as url:
        rows, alone, log = asyncio.run(live(url, at, work))
    by_id = {row.id: row for row in rows}
    happened = [
        replace(request, at=by_id[request.id].sent, prompt_tokens=by_id[request.id].prompt_tokens)
        for request in work.requests
    ]
    as_sent = Workload(tuple(sorted(happened, key=lambda request: request.at)))
    probe = replace(as_sent.requests[0], at=0.0, tokens=PROBED, max_tokens=PROBED)
    edge = median(alone) - modelled(name, engine, Workload((probe,)), 0.0)[0].jct
    gaps = refills(log, engine.slots)
    delay = median(gaps) / 2 if len(gaps) >= FEW else max(edge, 0.0) / 2
    seconds = fmean(row.jct - row.lag for row in rows)
    bare = modelled(name, engine, as_sent, 0.0)
    told = modelled(name, engine, as_sent, delay)
    lag, late = percentile([row.lag for row in rows], 99, beyond=0) or 0.0, behind(log)
    expected = fmean(row.jct for row in told) + max(edge - 2 * delay, 0.0)
    return {
        "live": seconds,
        "bare": fmean(row.jct for row in bare),
        "simulated": expected,
        "ratio": seconds / expected,
        "ratio_bare": seconds / fmean(row.jct for row in bare),
        "refill_ms": 2e3 * delay,
        "refills": len(gaps),
        "edge_ms": 1e3 * edge,
        "preemptions": [sum(row.preemptions for row in side) for side in (rows, told)],
        "calls": [sum(row.slices for row in side) for side in (rows, told)],
        "lag_p99": lag,
        "behind_p99": late,
        "valid": max(lag, late) * engine.rate(engine.slots) <= LATE,
    }


# ---- many runs ------------------------------------------------------------------------------------------------------


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    pass


@main.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--requests", default=80, show_default=True)
@click.option("--load", default=0.7, show_default=True)
@click.option("--slots", default=8, show_default=True)
@click.option("--pace", default=0.4, show_default=True, help="Of the default model's rates.")
@click.option("--tries", default=2, show_default=True, help="Of a run that came out invalid.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def run(seeds: int, requests: int, load: float, slots: int, pace: float, tries: int, output: Path) -> None:
    """Make the runs that are missing, and store each."""
    question = Question(slots, pace, load, requests)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elis-validate-")))
        at = stack.enter_context(embedded(folder, question.engine()))
        one = partial(measure, folder, at, question)
        run_missing(output, asdict(question), about(), NAMES, seeds, tries, one, tell)
    summary(output)


def tell(row: dict[str, Any]) -> None:
    click.echo(
        f"{row['setting']:6s} seed {row['seed']}: live {row['live']:.3f} s over {row['simulated']:.3f} s: "
        f"{row['ratio']:.3f} (without the way {row['ratio_bare']:.3f}); refill {row['refill_ms']:.1f} ms, "
        f"edge {row['edge_ms']:.1f} ms, lag {1e3 * row['lag_p99']:.1f} ms, behind {1e3 * row['behind_p99']:.1f} ms"
        f"{'' if row['valid'] else ': INVALID'}"
    )


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def report(output: Path) -> None:
    """What is stored, by question and code."""
    summary(output)


def summary(path: Path) -> None:
    for (question, code), rows in by_question(path).items():
        invalid = sum(not row["valid"] for row in rows)
        click.echo(f"{question}, code {code}: {len(rows)} runs, {invalid} invalid")
        for name in NAMES:
            ours = [row for row in rows if row["setting"] == name and row["valid"]]
            if not ours:
                continue
            ratio, half = interval([row["ratio"] for row in ours])
            bare, _ = interval([row["ratio_bare"] for row in ours])
            verdict = "within" if abs(ratio - 1) <= AIM else "beyond"
            click.echo(
                f"  {name:6s} live over simulated {ratio:.3f} ± {half:.3f}, {len(ours)} seeds, {verdict} {AIM:.0%}; "
                f"without the way {bare:.3f}; refill {fmean(row['refill_ms'] for row in ours):.1f} ms"
            )


if __name__ == "__main__":
    main()
