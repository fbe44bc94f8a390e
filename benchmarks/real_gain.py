#!/usr/bin/env python3
"""What ordering gains on a real engine: every order with every predictor, on real answers, over workload seeds.

    python -m benchmarks.real_gain run --seeds 5 --hours 8      resumes; rows: benchmarks/results/real-gain.jsonl
    python -m benchmarks.real_gain run --url http://127.0.0.1:8765 --hours 1          a vLLM that runs already
    python -m benchmarks.real_gain report [FILE ...]            the tables, and docs/real-gain.svg

vLLM 0.32 (CPU build, float32, 4 slots) and SmolLM2-135M-Instruct at temperature 0, whose answers end by themselves or
at 250 tokens. First they are recorded, once: half of the prompts are the *past*, which the predictors learn from (they
are asked through a gateway that learns), the other half is what is *asked* of the engine afterwards. So `oracle` knows
every length, `history` and `bge` begin each run with the same past, and no prompt of a run was seen before. Requests
name their kind in X-Elis-App.

Then, for every seed and load: first come, and SJF, ISRTF as published (fixed windows) and ISRTF elastic (the default)
with history, the BGE predictor and perfect knowledge, each by a gateway of its own, interleaved, every other seed
backwards. Load is offered tokens over what full slots make in so many steps, and arrivals are timed in the engine's own
steps (``Pace``): by the seconds of a shared machine 0.95 is 0.8 in one run and 1.1 in the next, and first come on the
same arrivals differed by a quarter. A burst is ten requests a second. Requests carry a cache salt of their run, so that
no run finds prompts of another in the prefix cache. A run whose generator lagged is stored and not counted; a request
whose answer has another length than recorded is counted as unequal work.

At 45 tokens/s with all slots busy (a loaded machine) a run takes two minutes and five seeds five hours; at 100, half.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import aiohttp
import click

from benchmarks import capacity_live
from benchmarks.capacity import Clock, about
from benchmarks.capacity_probe import Pace, Spent
from benchmarks.rows import save, stored
from benchmarks.studies.harness import Ratio, table
from benchmarks.validate_engine import SLOTS
from benchmarks.vllm_engine import MODEL, cache
from elis_gateway.predictor.base import View
from elis_gateway.predictor.baselines import write_lengths
from elis_gateway.predictor.history import History
from elis_gateway.tasks import spawn
from loadtest import arrivals, runner
from loadtest.client import Client
from loadtest.engines import EngineFailed
from loadtest.records import Row, Run
from loadtest.settings import SETTINGS
from loadtest.stats import interval, kendall, percentile
from loadtest.targets import HttpTarget
from loadtest.workload import Request, Workload, pool

RESULTS = Path(__file__).parent / "results"
ROWS, RECORDING = (RESULTS / f"real-gain{end}.jsonl" for end in ("", "-recording"))
LIMIT = 250
ORDERS = {"sjf": "SJF", "isrtf-published": "ISRTF as published", "isrtf": "ISRTF elastic"}
PREDICTORS = {"history": "history", "bge": "BGE", "oracle": "perfect knowledge"}
FIRST = ("fcfs", "none")
ARMS = [FIRST, *((order, known) for order in ORDERS for known in PREDICTORS)]
BURST = "burst"
AT_ONCE = 10.0
"""Requests per second of a burst."""
LAG = 0.01
"""What the generator's lag (its 99th percentile) may be of the mean completion time, both in what arrivals are timed in
(seconds; the engine's steps). Completion times count from the intended time all the same: what lags is a little of the
order of arrival."""
_LOOK, _GLANCE = 1.0, 0.05
"""Seconds between two readings of the engine's count of steps: to tell how many there were, to send by them."""
_PATIENCE = 1800.0
"""Seconds a request may take."""
GREEDY = {"temperature": 0}


# ---- what is asked --------------------------------------------------------------------------------------------------


def parts(count: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(kind, prompt) of the past and of what is asked: every kind in both, as far as there are enough."""
    chosen = random.Random("real gain").sample(pool(), count)
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for row in chosen:
        by_kind.setdefault(row.kind, []).append((row.kind, row.prompt))
    ordered = [row for rows in by_kind.values() for row in rows]
    return ordered[::2], ordered[1::2]


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    return {row["prompt"]: row for row in stored(path)}


def draw(asked: Sequence[Mapping[str, Any]], count: int, load: float | str, seed: int) -> Workload:
    """Arrivals in seconds of a burst, in the engine's steps of a load."""
    chosen = random.Random(f"real {seed}").sample(list(asked), count)
    if load == BURST:
        times = [number / AT_ONCE for number in range(count)]
    else:
        per_step = float(load) * SLOTS / fmean(row["tokens"] for row in chosen)
        gaps = arrivals.gamma(count, per_step, 0.8, random.Random(f"real arrivals {seed}"))
        times = arrivals.times(gaps)
    return Workload(
        tuple(
            Request(f"r{n}", round(at, 4), row["prompt"], row["prompt_tokens"], "", row["tokens"], row["kind"], LIMIT)
            for n, (at, row) in enumerate(zip(times, chosen, strict=True))
        )
    )


# ---- asking ---------------------------------------------------------------------------------------------------------


async def record(url: str, rows: Sequence[tuple[str, str]], path: Path) -> None:
    """Ask what is not recorded yet, as many at once as there are slots, and store each answer as it comes."""
    known = recorded(path)
    work = Workload(
        tuple(Request(f"p{n}", 0.0, prompt, 0, "", 0, kind, LIMIT) for n, (kind, prompt) in enumerate(rows))
    )
    texts: dict[str, list[str]] = {}

    def heard(request: Request, text: str) -> None:
        texts.setdefault(request.id, []).append(text)

    def ended(request: Request, row: Row) -> None:
        if row.error:
            raise click.ClickException(f"{request.prompt!r}: {row.error}")
        answer = {"prompt": request.prompt, "kind": request.app, "answer": "".join(texts.get(request.id, []))}
        if request.prompt not in known:
            save(path, {**answer, "tokens": row.tokens, "prompt_tokens": row.prompt_tokens})

    async with Client(url) as client:
        target = HttpTarget(client, MODEL, body=GREEDY, on_text=heard)
        target.start = time.perf_counter()
        await runner.closed(work, target, SLOTS, start=target.start, on_end=ended)


def learned(folder: Path, past: Sequence[Mapping[str, Any]]) -> None:
    """A history of the past, as the predictor of that name keeps it."""
    history = History(folder / "history.json")
    for row in past:
        view = View(row["prompt"], MODEL, row["kind"], "", "", row["tokens"], None)
        history.learn(view, complete=row["tokens"] < LIMIT)
    history.save()


def predictor(known: str, past: Path, folder: Path) -> dict[str, Any]:
    """A section of the configuration; what was learned is a copy, so that no run teaches another."""
    if known == "history":
        return {"kind": "history", "path": str(shutil.copy(past / "history.json", folder / "history.json"))}
    if known == "bge":
        return {"kind": "bge", "state": str(shutil.copy(past / "bge.state", folder / "bge.state"))}
    if known == "oracle":
        return {"kind": "oracle", "path": str(past / "lengths.jsonl")}
    return {"kind": known}


async def by_steps(
    engine: capacity_live.Engine, work: Workload, target: HttpTarget, start: float
) -> tuple[Run, list[float]]:
    """Each request when the engine's own clock has come to its arrival, and by how many steps it had passed that.

    A row's lag in seconds is that of the looks at the engine: long where the machine stands still, engine and all.
    """
    pace, rows, asked, late = Pace(), [], [], []

    async def ask(request: Request, row: Row) -> None:
        async with asyncio.timeout(_PATIENCE):
            await target.send(request, row)

    async with aiohttp.ClientSession() as session:
        for request in work.requests:
            before = 0.0
            while True:
                async with session.get(f"{engine.url}/metrics") as reply:
                    now = time.perf_counter() - start
                    pace.read(await reply.text(), now)
                if pace.now >= request.at:
                    break
                before = now
                await asyncio.sleep(_GLANCE)
            row = Row(request.id, before or now, now, app=request.app, prompt_tokens=request.prompt_tokens,
                      expected=request.tokens)  # fmt: skip
            rows.append(row)
            late.append(pace.now - request.at)
            asked.append(spawn(ask(request, row), name="request"))
        await asyncio.wait(asked)
    return Run("", work.hash, rows), late


async def send(
    engine: capacity_live.Engine, url: str, work: Workload, load: str, salt: str
) -> tuple[Run, Spent, list[float]]:
    async with Client(url) as client, aiohttp.ClientSession() as session:
        target = HttpTarget(client, MODEL, body={**GREEDY, "cache_salt": salt}, debug=True)
        target.prepare(work.requests)
        target.start = time.perf_counter() + runner.LEAD
        spent = Spent(engine.url, engine.session, start=target.start)
        watching = spawn(spent.watch(session, _LOOK), name="steps of the engine")
        late: list[float] = []
        try:
            if load == BURST:
                run = await runner.run(work, target, start=target.start, patience=_PATIENCE)
            else:
                run, late = await by_steps(engine, work, target, target.start)
            await asyncio.sleep(2 * _LOOK)  # one more reading, behind the last answer
        finally:
            watching.cancel()
        return run, spent, late


def measure(
    engine: capacity_live.Engine, work: Workload, load: str, order: str, known: str, past: Path
) -> dict[str, Any]:
    """One run by a gateway of its own."""
    busy = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gate = capacity_live.gateway(folder, "gateway", engine, {}, SETTINGS[order], predictor(known, past, folder))
        url, _ = stack.enter_context(gate)
        done, spent, late = asyncio.run(send(engine, url, work, load, f"{order} {known} {time.time():.0f}"))
    rows = done.rows
    steps = [spent.between(row.intended, row.end)["steps"] for row in rows if row.end is not None]
    jct = [row.jct for row in rows if not row.error]
    if not jct:
        raise click.ClickException(f"{order} {known}: every request failed: {rows[0].error}")
    first = [(row.predictions[0][1], row.expected) for row in rows if row.predictions]
    lag = percentile([row.lag for row in rows], 99, beyond=0) or 0.0
    return {
        "mean": fmean(jct),
        "p50": median(jct),
        "worst": max(jct),
        "steps": {"mean": fmean(steps), "p50": median(steps), "worst": max(steps)},
        "ttft": fmean(row.ttft or 0.0 for row in rows if not row.error),
        "wait": fmean(row.wait or 0.0 for row in rows if not row.error),
        "tokens": sum(row.tokens for row in rows),
        "unequal": sum(row.tokens != row.expected for row in rows),
        "failed": sum(bool(row.error) for row in rows),
        "preemptions": sum(row.preemptions for row in rows),
        "calls": sum(row.slices for row in rows),
        "tau": kendall([said for said, _ in first], [true for _, true in first]) if first else None,
        "lag_p99": lag,
        "late_p99": percentile(late, 99, beyond=0),
        "load_average": busy,
        "jct": [round(row.jct, 3) if not row.error else None for row in rows],
    }


# ---- many runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    prompts: int
    requests: int


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    pass


@main.command()
@click.option("--url", help="A vLLM that runs already (python -m benchmarks.vllm_engine serve --slots 4).")
@click.option("--seeds", default=5, show_default=True)
@click.option("--loads", default="0.7,0.95,burst", show_default=True)
@click.option("--arms", default="", help="Some of the settings alone: fcfs:none,isrtf:bge ... Default: all.")
@click.option("--prompts", "count", default=160, show_default=True, help="Recorded; half of them is asked.")
@click.option("--requests", default=40, show_default=True, help="A run.")
@click.option("--hours", default=6.0, show_default=True, help="Begin no run after so long.")
@click.option("--past", type=click.Path(path_type=Path), help="Folder of what was learned. Default: in the cache.")
@click.option("--recording", type=click.Path(path_type=Path), default=RECORDING)
@click.option("--output", type=click.Path(path_type=Path), default=ROWS)
def run(
    url: str | None,
    seeds: int,
    loads: str,
    arms: str,
    count: int,
    requests: int,
    hours: float,
    past: Path | None,
    recording: Path,
    output: Path,
) -> None:
    """Record what is not recorded, make the runs that are missing, store each."""
    clock, question, stamp = Clock(60 * hours), Question(count, requests), about()
    wanted = [arm for arm in ARMS if not arms or ":".join(arm) in arms.split(",")]
    if len(wanted) < arms.count(",") + bool(arms):
        raise click.BadParameter(f"known are {','.join(map(':'.join, ARMS))}", param_hint="--arms")
    past = past or cache() / f"real-gain-{count}"
    past.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(capacity_live.real(folder, SLOTS, url))
        asked = prepare(engine, folder, past, recording, count)
        for seed in range(seeds):
            for load in loads.split(","):
                block(engine, question, asked, wanted, load, seed, past, output, clock, stamp)
        if clock.left <= 0:
            click.echo("the time is spent; run again to go on")
    show([output])


def prepare(
    engine: capacity_live.Engine, folder: Path, past: Path, recording: Path, count: int
) -> list[dict[str, Any]]:
    """Record, and teach; returns what may be asked."""
    before, now = parts(count)
    known = recorded(recording)
    state = past / "bge.state"
    if not state.exists() or any(prompt not in known for _, prompt in before):
        click.echo(f"recording the past: {len(before)} prompts, through a gateway that learns")
        made = folder / "bge.state"
        learns = {"kind": "bge", "state": str(made)}
        with capacity_live.gateway(folder, "past", engine, {}, {}, learns) as (url, _):
            asyncio.run(record(url, before, recording))
        shutil.copy(made, state)
    if missing := [row for row in now if row[1] not in known]:
        click.echo(f"recording {len(missing)} prompts that will be asked")
        asyncio.run(record(engine.url, missing, recording))
    known = recorded(recording)
    learned(past, [known[prompt] for _, prompt in before])
    asked = [known[prompt] for _, prompt in now]
    write_lengths(past / "lengths.jsonl", [(MODEL, row["prompt"], row["tokens"]) for row in asked])
    return asked


def block(
    engine: capacity_live.Engine,
    question: Question,
    asked: Sequence[Mapping[str, Any]],
    arms: Sequence[tuple[str, str]],
    load: str,
    seed: int,
    past: Path,
    output: Path,
    clock: Clock,
    stamp: Mapping[str, Any],
) -> None:
    """The settings wanted, on one workload."""
    place = {"question": asdict(question), "load": load, "seed": seed}
    same = {**place, "code": stamp["code"]}
    done = [row for row in stored(output) if all(row[key] == same[key] for key in same)]
    left = [arm for arm in arms if not any((row["order"], row["known"]) == arm and valid(row) for row in done)]
    if not left or clock.left <= 0:
        return
    work = draw(asked, question.requests, load, seed)
    for order, known in left if seed % 2 == 0 else left[::-1]:
        if clock.left <= 0:
            return
        try:
            found = measure(engine, work, load, order, known, past)
        except EngineFailed as error:
            # A port may be taken between choosing and using it; the next call makes this run.
            click.echo(f"load {load}, seed {seed}, {order} {known}: the gateway did not start: {error}")
            continue
        save(output, {**place, "order": order, "known": known, "work": work.hash, **found, **stamp})
        click.echo(
            f"load {load}, seed {seed}, {order} {known}: mean {found['mean']:.2f} s, "
            f"{found['preemptions']} preemptions, {found['unequal']} of other length, "
            f"lag {found['lag_p99'] * 1e3:.0f} ms, {found['late_p99'] or 0.0:.1f} steps"
            f"{'' if valid(found) else ': INVALID'}"
        )


# ---- what came out --------------------------------------------------------------------------------------------------

Rows = dict[tuple[str, str, str], dict[int, dict[str, Any]]]


@main.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True))
def report(files: tuple[Path, ...]) -> None:
    """Tables and the picture of what is stored, of each file the newest code."""
    show(files or (ROWS,))


def valid(row: Mapping[str, Any]) -> bool:
    """Everything was answered, and asked in time."""
    if (late := row.get("late_p99")) is not None:
        return not row["failed"] and bool(late <= LAG * row["steps"]["mean"])
    return not row["failed"] and bool(row["lag_p99"] <= LAG * row["mean"])


def newest(path: Path) -> tuple[Rows, list[dict[str, Any]]]:
    """Valid rows by load, order and knowledge, then seed; and all rows, of the code and question measured last."""
    found = stored(path)
    ours = [row for row in found if (row["code"], row["question"]) == (found[-1]["code"], found[-1]["question"])]
    by: Rows = {}
    for row in ours:
        if valid(row):
            by.setdefault((row["load"], row["order"], row["known"]), {})[row["seed"]] = row
    return by, ours


def against(rows: Rows, load: str, order: str, known: str, figure: str = "mean") -> list[float]:
    """Ratios to first come on the same workload, by seed, of times counted in the engine's steps."""
    base, ours = rows.get((load, *FIRST), {}), rows.get((load, order, known), {})
    shared = sorted(base.keys() & ours.keys())
    return [ours[seed]["steps"][figure] / base[seed]["steps"][figure] for seed in shared]


def show(paths: Sequence[Path]) -> None:
    rows: Rows = {}
    every: list[dict[str, Any]] = []
    for path in paths:
        of_path, made = newest(path)
        rows.update(of_path)
        every += made
    loads = sorted({row["load"] for row in every})
    for load in loads:
        base = rows.get((load, *FIRST), {})
        if not base:
            continue
        seconds, steps = (
            fmean(row["mean"] for row in base.values()),
            fmean(row["steps"]["mean"] for row in base.values()),
        )
        click.echo(f"\nload {load}, {len(base)} seeds; first come: {seconds:.1f} s in the mean, {steps:.0f} steps\n")
        body = [
            [ORDERS[order], *(cell(against(rows, load, order, known)) for known in PREDICTORS),
             *(cell(against(rows, load, order, known, "p50")) for known in PREDICTORS)]
            for order in ORDERS
        ]  # fmt: skip
        heads = [*(f"mean, {name}" for name in PREDICTORS.values()), *(f"p50, {name}" for name in PREDICTORS.values())]
        click.echo(table(["over first come", *heads], body))
    unequal, total = sum(row["unequal"] for row in every), sum(len(row["jct"]) for row in every)
    taus = {known: [row["tau"] for row in every if row["known"] == known and row["tau"] is not None]
            for known in PREDICTORS}  # fmt: skip
    said = ", ".join(f"{name} {fmean(taus[known]):.2f}" for known, name in PREDICTORS.items() if taus[known])
    click.echo(f"\n{len(every)} runs, {sum(not valid(row) for row in every)} invalid; {unequal} of {total} answers "
               f"of another length than recorded; Kendall's tau of the first estimates: {said}")  # fmt: skip
    click.echo(f"drawn: {picture(rows, loads)}")


def cell(ratios: Sequence[float]) -> str | None:
    if not ratios:
        return None
    mean, half = interval(ratios)
    return f"{mean:.2f} ± {half:.2f}" if len(ratios) > 1 else f"{mean:.2f}"


def picture(rows: Rows, loads: Sequence[str]) -> Path:
    """Mean completion time over first come's, in steps. One draw has no interval, and is not drawn."""
    from benchmarks.studies import picture as pictures

    names = {(order, known): f"{ORDERS[order]}, {PREDICTORS[known]}" for order, known in ARMS[1:]}
    panels = {}
    for load in loads:
        panels["burst" if load == BURST else f"load {load}"] = {
            name: Ratio(*interval(ratios), len(ratios))
            for arm, name in names.items()
            if len(ratios := against(rows, load, *arm)) > 1
        }
    return pictures.measured(panels, list(names.values()))


if __name__ == "__main__":
    main()
