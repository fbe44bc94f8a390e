#!/usr/bin/env python3
"""End to end over real sockets: what each predictor is worth, on an engine that speaks recorded answers.

    python -m benchmarks.predictor_live run --seeds 5 --jobs 400 --lessons 500      appends to benchmarks/results
    python -m benchmarks.predictor_live run --seeds 5 --jobs 400 --lessons 500 --mix
    python -m benchmarks.predictor_live report

Per seed: real answers (``../shared/data``; a served model's AlpacaEval answers, or with ``--mix`` six applications that
name themselves), Poisson arrivals at 0.95 of what the engine decodes with all slots busy, the same requests at the same
times for every arm, one arm after another, in an order drawn anew per seed. Each arm is a gateway process of its own
in front of an embedded engine of its own that replays the recording, over sockets. *Learned*: the gateway first served
``--lessons`` other prompts' answers, as fast as they come, and kept what it learned in its state file; all arms but
first-come go on learning while they are measured. Perfect knowledge is ``oracle`` on the recording's lengths. The
published method runs with its fixed windows; its encoder takes real time, so ``--speed`` above 1 is unfair to it and to
``bge`` cold. Every answer's length must agree between the arms; a row says how many did not, and how late the load
generator was. ``report``: completion time over first-come's and the share of perfect knowledge's gain, by seed and over
all with 90 % intervals over seeds.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import click
import uvloop

from benchmarks.capacity_live import _GATEWAY, Engine, gateway, seams
from benchmarks.predictor_gain import MIX, Answer, read
from benchmarks.rows import save
from elis_gateway.predictor.baselines import write_lengths
from elis_gateway.sim import replay
from elis_gateway.sim.engine import EngineModel
from loadtest import runner
from loadtest.client import Client
from loadtest.engines import Child, free_port, wait_ready
from loadtest.records import Row
from loadtest.targets import HttpTarget
from loadtest.workload import Request, Workload

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "predictor-live.jsonl"
LOAD, SLOTS, LONGEST = 0.95, 4, 1500
ELASTIC: dict[str, Any] = {"aging": {"kind": "none"}}
FIXED: dict[str, Any] = {**ELASTIC, "window": 50, "mode": "fixed", "rescore": "always"}
ISRTF: dict[str, Any] = {"policy": "isrtf"}

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "first-come": ({"policy": "fcfs"}, {"kind": "none"}, ""),
    "perfect, ISRTF": ({**ISRTF, **ELASTIC}, {"kind": "oracle"}, ""),
    "perfect, SJF": ({"policy": "sjf", **ELASTIC}, {"kind": "oracle"}, ""),
    "history, learned, ISRTF": ({**ISRTF, **ELASTIC}, {"kind": "history"}, "path"),
    "bge, cold, ISRTF": ({**ISRTF, **ELASTIC}, {"kind": "bge"}, ""),
    "bge, learned, ISRTF": ({**ISRTF, **ELASTIC}, {"kind": "bge"}, "state"),
    "bge, learned, SJF": ({"policy": "sjf", **ELASTIC}, {"kind": "bge"}, "state"),
    "published method": (
        {"policy": {"kind": "isrtf", "order": "mean"}, **FIXED},
        {"kind": "bge", "path": "elis-paper", "deadline": 0.5},
        "",
    ),
}
"""Scheduler, predictor, and the key under which the predictor is given what it learned before."""


def requests_of(answers: Sequence[tuple[str, Answer]], rate: float, rng: random.Random, mark: str) -> Workload:
    """At ``rate`` a second, a Poisson process."""
    now, made = 0.0, []
    for number, (app, answer) in enumerate(answers):
        now += rng.expovariate(rate) if rate else 0.0
        tokens = len(replay.split(answer.text))
        made.append(
            Request(f"{mark}-{number}", now, answer.prompt, 0, answer.text, tokens, app=app, max_tokens=LONGEST)
        )
    return Workload(tuple(made))


def drawn(
    answers: Sequence[Answer], mix: bool, seed: int, split: str, lessons: int, jobs: int
) -> tuple[list[tuple[str, Answer]], list[tuple[str, Answer]], str]:
    """(application, answer) to learn from and to be measured with, of prompts that are not each other's; and who
    answered."""
    rng = random.Random(f"who {mix} {seed}")
    usable = [a for a in answers if len(replay.split(a.text)) <= LONGEST]
    who, pools = [], {}
    for app, sources in (MIX if mix else {"": ("alpaca_eval",)}).items():
        here = [a for a in usable if a.source in sources]
        model = sorted({a.model for a in here})
        who.append(model[seed % len(model)] if not mix else rng.choice(model))
        pools[app] = [a for a in here if a.model == who[-1]]

    def take(part: str, count: int) -> list[tuple[str, Answer]]:
        found = []
        for app, pool in pools.items():
            # A prompt is one recorded answer: the first of its rows.
            of_prompt = {a.prompt: a for a in reversed([a for a in pool if a.split == part])}
            some = sorted(of_prompt.values(), key=lambda a: a.prompt_id)
            each = count // len(pools)
            chosen = rng.sample(some, each) if len(some) >= each else rng.choices(some, k=each)
            found += [(app, answer) for answer in chosen]
        rng.shuffle(found)
        return found

    return take("train", lessons), take(split, jobs), ", ".join(who)


@contextmanager
def engine(folder: Path, recording: Path, model: str, speed: float, *, delay: bool = True) -> Iterator[Engine]:
    file, port = folder / "engine.json", free_port()
    replace(EngineModel.load(model), slots=SLOTS).save(file)
    argv = [
        sys.executable, "-c", _GATEWAY, "sim-engine", "--port", str(port), "--model", "sim", "--engine", str(file),
        "--replay", str(recording), "--speed", str(speed), "--delay" if delay else "--no-delay",
    ]  # fmt: skip
    with Child(argv, log=folder / "engine.log") as child:
        wait_ready(child, f"http://127.0.0.1:{port}/health", timeout=60)
        yield Engine(f"http://127.0.0.1:{port}", "sim", SLOTS, model)


def ask(url: str, workload: Workload, users: int = 0) -> list[Row]:
    """Every request at its time; or, with ``users``, one after another. Raises ClickException where one failed."""

    async def run() -> list[Row]:
        async with Client(url) as client:
            start = time.perf_counter() + 0.2
            target = HttpTarget(client, "sim", start=start, body={"temperature": 0})
            done = await (
                runner.closed(workload, target, users, start=start, patience=3600)
                if users
                else runner.run(workload, target, start=start, patience=3600)
            )
        if errors := [row.error for row in done.rows if row.error]:
            raise click.ClickException(f"{len(errors)} requests failed: {errors[0]}")
        return done.rows

    return uvloop.run(run())


def learn(folder: Path, lessons: Workload, recording: Path, model: str) -> dict[str, Path]:
    """What history and the shipped predictor know after the lessons, in files."""
    kept = {"path": folder / "history.json", "state": folder / "bge.npz"}
    for key, kind in (("path", "history"), ("state", "bge")):
        scheduler = {**ISRTF, **ELASTIC}
        with (
            engine(folder, recording, model, 1.0, delay=False) as made,
            gateway(folder, f"learn {kind}", made, {}, scheduler, {"kind": kind, key: str(kept[key])}) as (url, _),
        ):
            ask(url, lessons, users=2 * SLOTS)
        if not kept[key].exists():
            raise click.ClickException(f"{kind} kept nothing: {(folder / f'learn {kind}.log').read_text()[-500:]}")
    return kept


def measure(
    folder: Path, arm: str, workload: Workload, recording: Path, kept: Mapping[str, Path], model: str, speed: float
) -> dict[str, Any]:
    scheduler, predictor, key = ARMS[arm]
    predictor = dict(predictor)
    if predictor["kind"] == "oracle":
        predictor["path"] = str(folder / "lengths.jsonl")
    if key:
        copy = folder / f"{arm}.state"
        copyfile(kept[key], copy)  # what one arm goes on learning is not the next one's
        predictor[key] = str(copy)
    with (
        engine(folder, recording, model, speed) as made,
        gateway(folder, arm, made, {}, scheduler, predictor) as (url, admin),
    ):
        rows = ask(url, workload)
        calls, preempted = seams(admin)
    expected = {request.id: request.tokens for request in workload.requests}
    jct = sorted(row.jct for row in rows)
    return {
        "mean": fmean(jct),
        "p50": jct[len(jct) // 2],
        "p90": jct[int(0.9 * len(jct))],
        "tokens": sum(row.tokens for row in rows),
        "lengths that differ": sum(abs(row.tokens - expected[row.id]) > 1 for row in rows),
        "worst lag": max(row.lag for row in rows),
        "calls": calls,
        "preempted": preempted,
    }


@click.group()
def cli() -> None:
    """Predictors, end to end."""


@cli.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--jobs", default=400, show_default=True, help="Measured requests per seed and arm.")
@click.option("--lessons", default=500, show_default=True, help="Answers learned from before, of other prompts.")
@click.option("--mix", is_flag=True, help="Six applications on one server.")
@click.option("--model", default="default", show_default=True, help="Engine model.")
@click.option("--speed", default=1.0, show_default=True, help="Modelled seconds per second.")
@click.option("--split", default="test", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default=ROOT / "../shared/data")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="Only these; repeatable.")
def run(
    seeds: int,
    first_seed: int,
    jobs: int,
    lessons: int,
    mix: bool,
    model: str,
    speed: float,
    split: str,
    data: Path,
    arms: tuple[str, ...],
) -> None:
    """Measure, and append one row per seed."""
    answers = read(data)
    capacity = replace(EngineModel.load(model), slots=SLOTS).rate(SLOTS) * SLOTS * speed
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    for seed in range(first_seed, first_seed + seeds):
        taught, asked, who = drawn(answers, mix, seed, split, lessons, jobs)
        rng = random.Random(f"arrivals {seed}")
        mean = fmean(len(replay.split(answer.text)) for _, answer in asked)
        workload = requests_of(asked, LOAD * capacity / mean, rng, "asked")
        with TemporaryDirectory() as made:
            folder = Path(made)
            recording = folder / "answers.jsonl"
            both = {answer.prompt: answer.text for _, answer in (*taught, *asked)}
            recording.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in both.items()))
            write_lengths(
                folder / "lengths.jsonl", [("sim", request.prompt, request.tokens) for request in workload.requests]
            )
            order = [arm for arm in ARMS if not arms or arm in arms]
            kept = {}
            if any(ARMS[arm][2] for arm in order):
                kept = learn(folder, requests_of(taught, 0.0, rng, "taught"), recording, model)
            rng.shuffle(order)
            figures = {arm: measure(folder, arm, workload, recording, kept, model, speed) for arm in order}
        row = {
            "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "seed": seed, "jobs": jobs,
            "lessons": lessons, "mix": mix, "split": split, "answered by": who, "workload": workload.hash,
            "load": LOAD, "engine": {"model": model, "slots": SLOTS, "speed": speed}, "arms": figures,
        }  # fmt: skip
        save(RESULTS, row)
        tell([row])


@cli.command()
def report() -> None:
    """What is stored, by kind of workload."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for key in sorted({(row["mix"], row["jobs"], row["lessons"], row["engine"]["speed"]) for row in rows}):
        some = [row for row in rows if (row["mix"], row["jobs"], row["lessons"], row["engine"]["speed"]) == key]
        click.echo(f"\nmix {key[0]}, {key[1]} requests after {key[2]} lessons, speed {key[3]:g}: {len(some)} seeds")
        tell(some)


def tell(rows: Sequence[Mapping[str, Any]]) -> None:
    click.echo(f"{'':26s} over first-come       share of perfect's gain   p90   preempted  lengths off  lag")
    for arm in ARMS:
        runs = [row["arms"] for row in rows if {arm, "first-come"} <= row["arms"].keys()]
        if not runs:
            continue
        ratios = [run[arm]["mean"] / run["first-come"]["mean"] for run in runs]
        gains = [
            1 - run["perfect, ISRTF"]["mean"] / run["first-come"]["mean"] for run in runs if "perfect, ISRTF" in run
        ]
        share = (1 - fmean(ratios)) / fmean(gains) if len(gains) == len(runs) and fmean(gains) else float("nan")
        click.echo(
            f"{arm:26s} {fmean(ratios):6.3f}{_half(ratios)}   {share:10.2f}"
            f"            {fmean(run[arm]['p90'] / run['first-come']['p90'] for run in runs):6.2f}"
            f"   {fmean(run[arm]['preempted'] for run in runs):6.0f}"
            f"   {sum(run[arm]['lengths that differ'] for run in runs):6d}"
            f"     {1000 * max(run[arm]['worst lag'] for run in runs):5.0f} ms"
        )


def _half(values: Sequence[float]) -> str:
    """Half of the 90 % interval over seeds."""
    return f" ± {1.8 * stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else "        "


if __name__ == "__main__":
    cli()
