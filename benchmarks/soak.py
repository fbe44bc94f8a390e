"""A soak: half an hour at 80 % of capacity in front of the embedded engine. Are memory and latency flat?

    python -m benchmarks.soak run --minutes 30       writes benchmarks/results/soak.json and soak.png
    python -m benchmarks.soak report                 reads the first, draws the second

Every ten seconds the gateway's own metrics are read: resident memory, open files, what waits, how late its event loop
runs. Clients measure completion times; per minute they are told as a ratio to the time the engine needs at the least
for so many tokens, since the lengths themselves vary. Beside it stand what the same requests take in virtual time (at
80 % of capacity some minutes bring more than others), and the engine's own pace, from its log: where the machine has
other work, the modelled engine is late as well.

What remembers a fixed number of applications and prompts is filled before the half hour begins, by short requests of
invented applications: what grows afterwards would grow for ever. (So that this takes minutes, a quarter of the prompts
that are remembered by default: ``--prompts``.) The trend is a straight line over everything after the first third. A
run whose generator was late (99th percentile) is told to be invalid as to latency.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import click
import numpy as np
import uvloop

from benchmarks.capacity_live import Forced, embedded, gateway
from elis_gateway.core.policy import ISRTF, Aging
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.predictor.baselines import MaxTokens
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import simulate
from elis_gateway.tasks import spawn
from loadtest import runner
from loadtest.experiment import MAX_LAG
from loadtest.stats import percentile
from loadtest.targets import sim_jobs
from loadtest.workload import Seeds, Workload, azure

RESULTS = Path(__file__).parent / "results"
MODEL, SLOTS, LOAD = "default", 8, 0.8
EVERY = 10.0
APPS = 1100
"""Applications invented before the half hour: more than the history and the learner remember."""
BATCH, USERS = 100, 16
"""Requests between two looks at how many prompts have been encoded, and how many are under way."""
READ = {
    "memory": "process_resident_memory_bytes",
    "files": "process_open_fds",
    "cpu": "process_cpu_seconds_total",
    "live": "elis_jobs_live",
    "waiting": "elis_jobs_waiting",
    "lag_sum": "elis_event_loop_lag_seconds_sum",
    "lag_count": "elis_event_loop_lag_seconds_count",
    "tokens": "elis_tokens_total",
    "jobs": "elis_jobs_total",
    "encoded": r'elis_prompts_total\{result="encoded"\}',
}


async def look(admin: str, session: aiohttp.ClientSession) -> dict[str, float]:
    """What the metrics say now."""
    async with session.get(f"{admin}/metrics") as reply:
        text = await reply.text()
    return {
        name: sum(map(float, re.findall(rf"^{series}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))
        for name, series in READ.items()
    }


async def watch(admin: str, session: aiohttp.ClientSession, start: float, samples: list[dict[str, float]]) -> None:
    """Read the metrics for as long as nobody cancels."""
    while True:
        at = time.perf_counter() - start
        samples.append({"at": at, **await look(admin, session)})
        await asyncio.sleep(EVERY)


async def fill(url: str, admin: str, session: aiohttp.ClientSession, prompts: int) -> dict[str, float]:
    """Short requests, each with a prompt of its own, until so many have been encoded; what the metrics say then."""
    asked = count()

    async def one(number: int) -> None:
        text = f"before {number}: " + " ".join(f"number {number + n}," for n in range(20))
        body = {
            "model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 40, "ignore_eos": True,
        }  # fmt: skip
        headers = {"X-Elis-App": f"before {number % APPS}"}
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as reply:
            if reply.status != 200:
                raise click.ClickException(f"filling: {reply.status}: {(await reply.text())[:200]}")
            await reply.read()

    async def user(numbers: Iterator[int]) -> None:
        for number in numbers:
            await one(number)

    while (seen := await look(admin, session))["encoded"] < prompts or seen["jobs"] < APPS:
        numbers = islice(asked, BATCH)
        await asyncio.gather(*(user(numbers) for _ in range(USERS)))
    return seen


@click.group()
def cli() -> None:
    """The soak."""


@cli.command()
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--speed", default=2.0, show_default=True, help="Of the engine: less where the machine has other work.")
@click.option("--predictor", default="bge", show_default=True, help="The default, where its extra is installed.")
@click.option("--prompts", default=1024, show_default=True, help="Remembered; as many are encoded before it begins.")
@click.option("--name", default="soak", show_default=True, help="Of the stored run.")
def run(minutes: float, seed: int, speed: float, predictor: str, prompts: int, name: str) -> None:
    """Measure."""
    rate = EngineModel.load(MODEL).rate(SLOTS) * speed
    workload = asked(minutes, seed, rate)
    samples: list[dict[str, float]] = []
    settings = {"kind": predictor, "cached_prompts": prompts} if predictor == "bge" else {"kind": predictor}

    with TemporaryDirectory() as made:
        folder = Path(made)
        with (
            embedded(folder, SLOTS, MODEL, speed) as engine,
            gateway(folder, "soak", engine, {}, {"policy": "isrtf"}, settings) as (url, admin),
        ):

            async def ask() -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, float]]]:
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                    before = await fill(url, admin, session, settings.get("cached_prompts", 0))
                    start = time.perf_counter() + 0.2
                    watching = spawn(watch(admin, session, start, samples), name="watch")
                    target = Forced(engine, url, session, start=start, mark="soak")
                    done = await runner.run(workload, target, start=start, patience=1200)
                    await asyncio.sleep(EVERY + 2)
                    watching.cancel()
                    async with session.get(f"{engine.url}/sim/requests") as reply:
                        calls = paces(await reply.json(), time.perf_counter() - start)
                rows = [
                    {
                        "at": r.sent,
                        "lag": r.lag,
                        "jct": None if r.end is None else r.end - r.sent,
                        "tokens": r.tokens,
                        "error": r.error,
                    }
                    for r in done.rows
                ]
                return before, rows, calls

            before, rows, calls = uvloop.run(ask())
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, shared with other work",
        "engine": {"model": MODEL, "slots": SLOTS, "speed": speed, "least_seconds_per_token": 1.0 / rate},
        "load": LOAD,
        "seed": seed,
        "workload": workload.hash,
        "before": before,
        "lag": {"p99": percentile([r["lag"] for r in rows], 99, beyond=0), "worst": max(r["lag"] for r in rows)},
        "samples": samples,
        "predictor": settings,
        "minutes": by_minute(rows, 1.0 / rate),
        "engine_minutes": engine_by_minute(calls, 1.0 / rate),
        "modelled_minutes": modelled(workload, speed),
        "requests": len(rows),
        "errors": sorted({r["error"] for r in rows if r["error"]}),
        "failed": sum(bool(r["error"]) for r in rows),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    tell(result, name)


@cli.command()
@click.option("--name", default="soak", show_default=True, help="Of the stored run.")
def report(name: str) -> None:
    """What is stored, in words and as a plot."""
    tell(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")), name)


def asked(minutes: float, seed: int, rate: float) -> Workload:
    """The requests of so many minutes, at ``LOAD`` of what the slots make at ``rate`` tokens a second each."""
    workload = azure(int(minutes * 60 * 10), load=LOAD, capacity=rate * SLOTS, seeds=Seeds.all(seed))
    return Workload(tuple(r for r in workload.requests if r.at < minutes * 60), workload.about)


def modelled(workload: Workload, speed: float) -> list[dict[str, float]]:
    """The same requests in virtual time, lengths known."""
    model = replace(EngineModel.load(MODEL), slots=SLOTS)
    jobs = [job._replace(limit=job.output_tokens, arrival=job.arrival * speed) for job in sim_jobs(workload)]
    scheduler = Scheduler(SchedulerConfig(), ISRTF(aging=Aging(kind="boost")))
    records = simulate(jobs, scheduler, {"u": Engine(model)}, MaxTokens()).records
    rows = [
        {"at": job.arrival / speed, "jct": record.jct / speed, "tokens": job.output_tokens, "error": ""}
        for job, record in zip(jobs, records, strict=True)
    ]
    return by_minute(rows, 1.0 / (model.rate(SLOTS) * speed))


def by_minute(rows: list[dict[str, Any]], least: float) -> list[dict[str, float]]:
    """Completion times of the requests sent in each minute."""
    minutes: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["jct"] is not None and not row["error"]:
            minutes.setdefault(int(row["at"] // 60), []).append(row)
    return [
        {
            "minute": minute,
            "requests": len(found),
            "mean": fmean(r["jct"] for r in found),
            "slowdown": median(r["jct"] / (least * r["tokens"]) for r in found),
        }
        for minute, found in sorted(minutes.items())
    ]


def paces(log: dict[str, Any], now: float) -> list[dict[str, float]]:
    """The engine's calls as it logged them: when, seconds a token after the first, and how late their end was sent."""
    begin = log["now"] - now
    return [
        {
            "at": call["begun"] - begin,
            "pace": (call["ended"] - call["started"]) / (call["tokens"] - 1),
            "late": call["ended"] - call["due"],
        }
        for call in log["requests"]
        if call["due"] is not None and call["started"] is not None and call["tokens"] >= 20
    ]


def engine_by_minute(calls: list[dict[str, float]], least: float) -> list[dict[str, float]]:
    """How much slower than at the least the engine's own calls of each minute were."""
    minutes: dict[int, list[dict[str, float]]] = {}
    for call in calls:
        minutes.setdefault(int(call["at"] // 60), []).append(call)
    return [
        {
            "minute": minute,
            "slowdown": median(call["pace"] for call in found) / least,
            "late": median(call["late"] for call in found),
        }
        for minute, found in sorted(minutes.items())
    ]


def trend(at: list[float], values: list[float]) -> tuple[float, float]:
    """Mean after the first third, and growth per hour by a straight line, times in seconds."""
    begin = max(at) / 3
    late = [(x, y) for x, y in zip(at, values, strict=True) if x >= begin]
    x, y = np.array(late).T
    return float(y.mean()), float(np.polyfit(x, y, 1)[0]) * 3600.0


def tell(result: dict[str, Any], name: str) -> None:
    samples, minutes = result["samples"], result["minutes"]
    # The last sample is of an idle gateway: what is left when everybody has gone.
    loaded, idle = samples[:-1], samples[-1]
    at = [s["at"] for s in loaded]
    memory = [s["memory"] / 1e6 for s in loaded]
    lag = [(b["lag_sum"] - a["lag_sum"]) / max(b["lag_count"] - a["lag_count"], 1) * 1e3 for a, b in pairwise(loaded)]
    cpu = [(b["cpu"] - a["cpu"]) / (b["at"] - a["at"]) for a, b in pairwise(loaded)]
    mean_memory, growth = trend(at, memory)
    whole = [m for m in minutes if m["requests"] >= 20]
    slow, slower = trend([60.0 * m["minute"] for m in whole], [m["slowdown"] for m in whole])
    if before := result.get("before"):
        print(f"before: {before['jobs']:.0f} requests, {before['encoded']:.0f} prompts encoded")
    print(f"requests {result['requests']}, failed {result['failed']} {result['errors']}")
    if lagged := result.get("lag"):
        print(
            f"the generator was late by {lagged['p99'] * 1e3:.0f} ms (p99), {lagged['worst'] * 1e3:.0f} at most", end=""
        )
        print("" if lagged["p99"] <= MAX_LAG else ": INVALID as to latency")
    print(f"memory {mean_memory:.1f} MB, first {memory[0]:.1f}, last {memory[-1]:.1f}; trend {growth:+.2f} MB per hour")
    print(f"slowdown (median by minute) {slow:.2f}; trend {slower:+.3f} per hour")
    expected = {m["minute"]: m["slowdown"] for m in result["modelled_minutes"]}
    above = [m["slowdown"] / expected[m["minute"]] for m in whole]
    more, growing = trend([60.0 * m["minute"] for m in whole], above)
    print(
        f"over what is modelled {more:.3f}, minutes {min(above):.2f} to {max(above):.2f}; trend {growing:+.3f} per hour"
    )
    own = result["engine_minutes"]
    engine_slow, engine_slower = trend([60.0 * m["minute"] for m in own], [m["slowdown"] for m in own])
    late = [m["late"] * 1e3 for m in own]
    print(f"the engine's own pace over the least {engine_slow:.2f}; trend {engine_slower:+.3f} per hour", end="; ")
    print(f"ends sent late by {median(late):.1f} ms, worst minute {max(late):.1f}")
    print(f"event-loop lag, mean of ten seconds: median {median(lag):.2f} ms, worst {max(lag):.1f} ms")
    print(f"processor {fmean(cpu):.1%} of one core; open files at most {max(s['files'] for s in samples):.0f}")
    print(f"afterwards: {idle['live']:.0f} jobs live, {idle['files']:.0f} open files")
    draw(result, at, memory, lag, RESULTS / f"{name}.png")


def draw(result: dict[str, Any], at: list[float], memory: list[float], lag: list[float], file: Path) -> None:
    """The plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 7.5), sharex=True)
    minutes = [x / 60 for x in at]
    top.plot(minutes, memory, color="#2f6fde")
    top.set_ylim(0, max(memory) * 1.25)
    top.set_ylabel("resident memory, MB")
    for name, color, label in (
        ("minutes", "#14804a", "completion time"),
        ("modelled_minutes", "#d1495b", "the same requests, modelled"),
        ("engine_minutes", "#888888", "the engine's own calls"),
    ):
        # Calls before the first minute are those that filled what remembers.
        shown = [m for m in result[name] if m["minute"] >= 0]
        middle.plot([m["minute"] + 0.5 for m in shown], [m["slowdown"] for m in shown], color=color, label=label)
    middle.legend(loc="upper right")
    middle.set_ylim(0)
    middle.set_ylabel("over the least possible,\nmedian of a minute")
    bottom.plot(minutes[1:], lag, color="#c77700")
    bottom.set_ylim(0)
    bottom.set_ylabel("event-loop lag, ms\n(mean of 10 s)")
    bottom.set_xlabel("minutes")
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    top.set_title(
        f"{result['requests']} requests at {result['load']:.0%} of capacity, embedded engine, {result['date']}"
    )
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    cli()
