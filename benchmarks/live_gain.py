"""Is the live gain true? The shadow's first-come figures against a real first-come run of the same traffic.

    python -m benchmarks.live_gain run --seeds 3 --jobs 1200       appends to benchmarks/results/live-gain.jsonl
    python -m benchmarks.live_gain jumping --seeds 3               the same over sockets, on a clock that jumps
    python -m benchmarks.live_gain virtual --seeds 5                the same in virtual time, on three engine models
    python -m benchmarks.live_gain report

Per seed, two gateways run side by side, each in front of an embedded engine of its own and under the same requests
(Azure's conversation lengths and arrivals): one serves first come, first served, the other by ISRTF. The second one's
shadow must tell, once every job has ended, what the clients of the first one have measured: mean within 3 %, 99th
percentile within 10 %. The first one's shadow, which has nothing to undo, is the noise floor: on a machine whose other
work starves the engine, it shows how much of the difference is the machine's. ``jumping`` has no such noise: gateway,
engine and clients speak over sockets as ever, in one process whose clock jumps to the next timer when nobody has
anything to do. ``virtual`` has no sockets either: core, engine models and traffic.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import click
import uvloop

from benchmarks.capacity_live import Engine as LiveEngine
from benchmarks.capacity_live import Forced, embedded, gateway
from benchmarks.rows import save
from elis_gateway.app import Gateway
from elis_gateway.config import from_mapping
from elis_gateway.core.policy import FCFS, ISRTF, Aging
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.predictor.baselines import MaxTokens
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.server import ServerConfig, SimServer
from elis_gateway.sim.simulator import simulate
from elis_gateway.tasks import spawn
from loadtest import runner
from loadtest.records import Row
from loadtest.targets import MODEL, sim_jobs
from loadtest.workload import Request, Seeds, Workload, azure
from tests.upstream.autojump import local_loop

RESULTS = Path(__file__).parent / "results" / "live-gain.jsonl"
VIRTUAL = RESULTS.with_name("live-gain-virtual.jsonl")
SLOTS = 4
POLICIES = {"fcfs": {"policy": "fcfs"}, "isrtf": {"policy": "isrtf"}}
MEAN, P99 = 0.03, 0.10
"""What the shadow may be off."""


def percentile(values: list[float], q: float) -> float:
    """The ``q`` quantile, exact: the smallest value that so many are at most."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def shadow(text: str) -> dict[str, float]:
    """What a gateway's metrics say: ``first_come mean`` and the like, and ``jobs``."""
    rows = re.findall(r'^elis_order_jct_seconds\{.*order="(\w+)",stat="(\w+)"\} (\S+)$', text, re.MULTILINE)
    (jobs,) = re.findall(r"^elis_order_jobs\{.*\} (\S+)$", text, re.MULTILINE)
    return {f"{order} {stat}": float(value) for order, stat, value in rows} | {"jobs": float(jobs)}


def serve(name: str, workload: Workload, model: str, speed: float) -> dict[str, Any]:
    """One gateway under the whole workload: what its clients measured, and what its shadow says at the end."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        with (
            embedded(folder, SLOTS, model, speed) as engine,
            gateway(folder, name, engine, {}, POLICIES[name], "max_tokens") as (url, admin),
        ):

            async def ask() -> list[float]:
                start = time.perf_counter() + 0.2
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                    target = Forced(engine, url, session, start=start, mark=name)
                    done = await runner.run(workload, target, start=start, patience=3600)
                if errors := [row.error for row in done.rows if row.error]:
                    raise click.ClickException(f"{name}: {len(errors)} requests failed: {errors[0]}")
                # From its sending, not from its intended time: what the gateway could know of.
                return [row.jct - row.lag for row in done.rows]

            jct = uvloop.run(ask())
            time.sleep(0.5)
            return found(jct, urllib.request.urlopen(f"{admin}/metrics").read().decode())


def found(jct: list[float], metrics: str) -> dict[str, Any]:
    """What clients measured beside what the shadow says."""
    return {"mean": fmean(jct), "p99": percentile(jct, 0.99), "shadow": shadow(metrics)}


async def jumped(name: str, workload: Workload, model: EngineModel) -> dict[str, Any]:
    """One gateway under the whole workload, engine and clients in this process, by the loop's clock."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(SimServer(ServerConfig(port=0, engine=model)))
        settings = {
            "server": {"host": "127.0.0.1", "port": 0},
            "admin": {"port": 0},
            "upstreams": [{"url": served.url, "slots": SLOTS, "health": {"interval": 10}}],
            "scheduler": POLICIES[name],
            "predictor": {"kind": "max_tokens"},
            "logging": {"level": "warning"},
        }
        gateway = Gateway(from_mapping(settings))
        await gateway.start()
        stack.push_async_callback(gateway.stop, 0.0)
        engine = LiveEngine(served.url, "sim", SLOTS, "embedded")
        connections = aiohttp.TCPConnector(limit=0)
        patient = aiohttp.ClientTimeout(total=None)  # seconds that jump: the default is over in no time
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connections, timeout=patient))
        target = Forced(engine, f"http://127.0.0.1:{gateway.port}", session, start=0.0, mark=name)

        async def one(request: Request) -> float:
            row = Row(request.id, request.at, request.at, expected=request.tokens)
            sent = loop.time()
            await target.send(request, row)
            if row.error:
                raise click.ClickException(f"{name}: a request failed: {row.error}")
            return loop.time() - sent

        start, asked = loop.time(), []
        for request in workload.requests:
            await asyncio.sleep(start + request.at - loop.time())
            asked.append(spawn(one(request), name="client"))
        jct = await asyncio.gather(*asked)
        async with session.get(f"http://127.0.0.1:{gateway.admin_port}/metrics") as reply:
            return found(jct, await reply.text())


@click.group()
def cli() -> None:
    """The live gain against the truth."""


@cli.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--jobs", default=1200, show_default=True)
@click.option("--load", default=0.9, show_default=True)
@click.option("--model", default="vllm-cpu", show_default=True, help="Engine model.")
@click.option("--speed", default=5.0, show_default=True)
def run(seeds: int, first_seed: int, jobs: int, load: float, model: str, speed: float) -> None:
    """Measure, and append one line per seed."""
    capacity = EngineModel.load(model).rate(SLOTS) * SLOTS * speed
    for seed in range(first_seed, first_seed + seeds):
        workload = azure(jobs, load=load, capacity=capacity, seeds=Seeds.all(seed))
        with ThreadPoolExecutor(len(POLICIES)) as threads:
            served = {n: threads.submit(serve, n, workload, model, speed) for n in POLICIES}
            figures = {name: future.result() for name, future in served.items()}
        about = {"date": time.strftime("%Y-%m-%d"), "seed": seed, "jobs": jobs, "load": load, "workload": workload.hash}
        engine = {"model": model, "speed": speed, "slots": SLOTS}
        row = {**about, "engine": engine, **figures}
        save(RESULTS, row)
        tell([row])


@cli.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--jobs", default=1200, show_default=True)
@click.option("--load", default=0.9, show_default=True)
@click.option("--model", default="vllm-cpu", show_default=True, help="Engine model.")
def jumping(seeds: int, first_seed: int, jobs: int, load: float, model: str) -> None:
    """Measure over sockets in one process, on a clock that jumps, and append one line per seed."""
    numbers = replace(EngineModel.load(model), slots=SLOTS)
    for seed in range(first_seed, first_seed + seeds):
        workload = azure(jobs, load=load, capacity=numbers.rate(SLOTS) * SLOTS, seeds=Seeds.all(seed))
        row: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "seed": seed, "jobs": jobs, "load": load}
        row |= {"workload": workload.hash, "engine": {"model": model, "slots": SLOTS}, "clock": "jumping"}
        for name in POLICIES:
            with asyncio.Runner(loop_factory=local_loop) as runs:
                row[name] = runs.run(jumped(name, workload, numbers))
        save(RESULTS, row)
        tell([row])


@cli.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--jobs", default=1200, show_default=True)
def virtual(seeds: int, jobs: int) -> None:
    """Measure in virtual time, with perfect estimates, and store it."""
    rows = []
    for model, slots in (("default", 8), ("vllm-cpu", 4), ("llama-cpp", 4)):
        for load in (0.8, 0.9):
            rows += [modelled(model, slots, load, seed, jobs) for seed in range(seeds)]
    VIRTUAL.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tell(rows)


def modelled(name: str, slots: int, load: float, seed: int, jobs: int) -> dict[str, Any]:
    """One workload under both orders, without a clock."""
    model = replace(EngineModel.load(name), slots=slots)
    workload = azure(jobs, load=load, capacity=model.rate(slots) * slots, seeds=Seeds.all(seed))
    asked = [job._replace(limit=job.output_tokens) for job in sim_jobs(workload)]
    row: dict[str, Any] = {"seed": seed, "jobs": jobs, "load": load, "workload": workload.hash}
    row["engine"] = {"model": name, "slots": slots}
    for kind, policy in (("fcfs", FCFS()), ("isrtf", ISRTF(aging=Aging(kind="boost")))):
        scheduler = Scheduler(SchedulerConfig(), policy)
        jct = [r.jct for r in simulate(asked, scheduler, {"u": Engine(model)}, MaxTokens()).records]
        paper = scheduler.pools[MODEL].shadow
        told = {"first_come mean": paper.shadow_mean, "first_come p99": paper.p99.value, "jobs": paper.settled}
        row[kind] = {"mean": fmean(jct), "p99": percentile(jct, 0.99), "shadow": told}
    return row


@cli.command()
def report() -> None:
    """What is stored, and whether it is good enough."""
    for file in (RESULTS, VIRTUAL):
        print(file.name)
        tell([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])


def tell(rows: list[dict[str, Any]]) -> None:
    print("engine     load seed  jobs | first-come, as run | ISRTF's shadow of it | FCFS's own shadow | ISRTF as run")
    print("                           |   mean      p99    |   mean       p99     |  mean      p99    |  mean   p99")
    for row in rows:
        real, other = row["fcfs"], row["isrtf"]
        off = [other["shadow"][f"first_come {stat}"] / real[stat] - 1.0 for stat in ("mean", "p99")]
        floor = [real["shadow"][f"first_come {stat}"] / real[stat] - 1.0 for stat in ("mean", "p99")]
        gain = [other[stat] / real[stat] for stat in ("mean", "p99")]
        verdict = "good" if abs(off[0]) <= MEAN and abs(off[1]) <= P99 else "NOT GOOD ENOUGH"
        print(
            f"{row['engine']['model']:9s} {row['load']:5.2f} {row['seed']:4d} {row['jobs']:5d}"
            f" | {real['mean']:6.2f} s {real['p99']:7.2f} s"
            f" | {off[0]:+8.1%} {off[1]:+8.1%}  | {floor[0]:+7.1%} {floor[1]:+7.1%}  | {gain[0]:5.2f} {gain[1]:5.2f}"
            f"  {verdict}"
        )


if __name__ == "__main__":
    cli()
