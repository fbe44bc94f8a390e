#!/usr/bin/env python3
"""The simulator against the same gateway over real sockets: mean completion time per setting, live over simulated.

    python -m benchmarks.validate_sockets --seeds 2 --requests 80 --json FILE

The embedded engine and the gateway run as processes of their own, in real time; lengths are forced and the predictor is
`max_tokens`, so both sides know the same. The simulator gets the engine's model and half a round trip each way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from elis_gateway.sim.model import EngineModel
from loadtest import make
from loadtest.client import Client
from loadtest.engines import Child, free_port, wait_ready
from loadtest.experiment import Experiment, Live, Simulated, conduct
from loadtest.knowledge import Knowledge
from loadtest.runner import Stop
from loadtest.stats import interval
from loadtest.targets import HttpTarget, Steering
from loadtest.workload import Seeds, Workload

SETTINGS = ["fcfs", "sjf", "isrtf"]
SLOTS = 8
DELAY = 0.001
"""Seconds from gateway to engine, each way: sockets and two event loops."""


@contextmanager
def servers(folder: Path, engine: EngineModel) -> Iterator[tuple[str, str]]:
    """URLs of a gateway and its admin listener, in front of the embedded engine."""
    ports = [free_port() for _ in range(3)]
    engine.save(folder / "engine.json")
    config = {
        "server": {"host": "127.0.0.1", "port": ports[1]},
        "admin": {"port": ports[2]},
        "upstreams": [{"url": f"http://127.0.0.1:{ports[0]}", "slots": engine.slots}],
        "predictor": {"kind": "max_tokens"},
        "logging": {"level": "warning"},
    }
    (folder / "gateway.json").write_text(json.dumps(config))
    elis = [sys.executable, "-m", "elis_gateway"]
    serve = [*elis, "sim-engine", "--port", str(ports[0]), "--engine", str(folder / "engine.json")]
    with Child(serve, log=folder / "engine.log") as child:
        wait_ready(child, f"http://127.0.0.1:{ports[0]}/health", timeout=60)
        with Child([*elis, "serve", str(folder / "gateway.json")], log=folder / "gateway.log") as gateway:
            wait_ready(gateway, f"http://127.0.0.1:{ports[1]}/ready", timeout=60)
            yield f"http://127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}"


def works(engine: EngineModel, requests: int, seeds: int, load: float) -> dict[int, Workload]:
    plan = make.Plan(
        requests=requests,
        apps=(make.App(lengths="lognormal:median=90,sigma=0.8"),),
        arrivals="gamma:shape=0.8",
        load=load,
        capacity=engine.capacity,
        longest=500,
    )
    return {seed: make.make(plan, Seeds.all(seed)) for seed in range(seeds)}


async def live(url: str, admin: str, experiment: Experiment) -> None:
    async with Client(url) as client, Client(admin) as desk:
        body = {"temperature": 0}
        target = Live(lambda work: HttpTarget(client, "sim", body=body, debug=True), Steering(desk), window=50)
        await conduct(experiment, target, stop=Stop())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    engine = replace(EngineModel.load("default"), slots=SLOTS)
    work = works(engine, given.requests, given.seeds, given.load)
    real = Experiment({}, "live", list(SETTINGS), work)
    model = Experiment({}, "sim", list(SETTINGS), work, engine=engine)
    # A forced request's limit is its length: perfect knowledge, on both sides.
    known = Simulated(engine, Knowledge("perfect", lambda noise: Workload(())), window=50, delay=DELAY)
    asyncio.run(conduct(model, known, stop=Stop()))
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="elis-validate-") as folder, servers(Path(folder), engine) as (url, admin):
        asyncio.run(live(url, admin, real))
    rows = []
    for name in SETTINGS:
        means = [
            [fmean(row.jct for row in run.rows) for run in side.runs if run.setting == name] for side in (real, model)
        ]
        seconds, expected = means
        ratio, half = interval([a / b for a, b in zip(seconds, expected, strict=True)])
        rows.append(
            {"setting": name, "live": fmean(seconds), "simulated": fmean(expected), "ratio": ratio, "half": half}
        )
        print(
            f"{name:8s} live {fmean(seconds):.3f} s, simulated {fmean(expected):.3f} s, ratio {ratio:.3f} ± {half:.3f}"
        )
    failed = sum(bool(row.error) for run in real.runs for row in run.rows)
    lag = max(real.lag(run) for run in real.runs)
    print(f"failed {failed}, lag p99 {lag * 1e3:.1f} ms, load average {before:.1f} to {os.getloadavg()[0]:.1f}")
    if given.json is not None:
        about = {"load_average": [before, os.getloadavg()[0]], "lag_p99": lag, "failed": failed, "seeds": given.seeds}
        given.json.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
