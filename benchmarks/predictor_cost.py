#!/usr/bin/env python3
"""What an estimate costs on one core: at once, with the head, by the encoder, by the published method; and what serving
feels of it while 200 jobs are re-scored and 10 prompts a second are encoded.

    python -m benchmarks.predictor_cost --output benchmarks/results/predictor-cost.json

Times are of wall clock around single calls (medians and 99th percentiles), and of this thread's CPU where the machine
is shared; rates are calls per CPU second. Event-loop lag: how much later than asked for a 1 ms sleep returns, for
``--seconds`` seconds, beside the same loop with nothing to do.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import platform
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from elis_gateway.predictor.base import View
from elis_gateway.predictor.bge import EncodeOnce, Paper, make
from elis_gateway.predictor.history import History
from elis_gateway.tasks import spawn

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Explain to a beginner, with five examples, how a hash table resolves collisions and when that gets slow. "
ANSWER = (
    "A hash table stores pairs of keys and values in an array, and a function of the key says where.\n\n"
    "1. **Chaining**: every place holds a list of what fell there.\n"
    "2. **Open addressing**: the next free place is used.\n"
)


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_us": round(1e6 * median(ordered), 1),
        "p99_us": round(1e6 * ordered[int(0.99 * (len(ordered) - 1))], 1),
    }


def timed(call: Callable[[int], Any], times: int) -> dict[str, float]:
    """One call at a time: wall time, and calls per CPU second of this thread."""
    for number in range(3):
        call(-1 - number)
    walls = []
    cpu = time.thread_time()
    for number in range(times):
        begun = time.perf_counter()
        call(number)
        walls.append(time.perf_counter() - begun)
    spent = time.thread_time() - cpu
    return {**quantiles(walls), "cpu_us": round(1e6 * spent / times, 1), "per_cpu_second": round(times / spent, 1)}


def view(job: int, windows: int, *, prompt: str = PROMPT) -> View:
    """A job after so many windows of 50 tokens, about 4.4 characters each."""
    text = (ANSWER * 40)[: 220 * windows]
    return View(f"job {job}", "m", f"app {job % 5}", prompt, text, 50 * windows, 4000 - 50 * windows)


def warmed(folder: Path | None) -> EncodeOnce:
    """A predictor that has served 300 jobs."""
    predictor = make(folder)
    assert isinstance(predictor, EncodeOnce)
    rng = random.Random(1)

    async def known() -> None:
        await predictor.refine([view(-1, 0)])

    asyncio.run(known())
    for number in range(300):
        tokens = rng.randint(20, 900)
        for windows in range(min(tokens // 50 + 1, 8)):
            predictor.instant(view(number, windows))
        predictor.learn(view(number, 0)._replace(attained=tokens), complete=True)
    return predictor


def instant(folder: Path | None) -> dict[str, Any]:
    history = History()
    predictor = warmed(folder)
    for number in range(300):
        history.learn(view(number, 0)._replace(attained=1 + number * 7 % 900), complete=True)
    rows: dict[str, Any] = {"history alone": timed(lambda n: history.instant(view(n, 4)), 3000)}
    for windows, name in ((0, "at arrival"), (4, "after 200 tokens"), (18, "after 900 tokens (4,000 characters)")):
        # Jobs of their own: a job's first estimate also finds out which prompt it has.
        rows[f"counters, head, learned: {name}"] = timed(lambda n, w=windows: predictor.instant(view(n, w)), 3000)

    def batch(n: int) -> None:
        predictor.instants([view(1000 + job, (n + job) % 12) for job in range(32)])

    rows["32 jobs re-scored at once"] = timed(batch, 300)

    def learn(n: int) -> None:
        predictor.learn(view(n, 0)._replace(attained=321), complete=True)

    def whole(n: int) -> None:
        for windows in range(8):
            predictor.instant(view(n, windows))

    for number in range(-3, 300):
        whole(number)
    rows["learning from a finished job of 8 windows"] = timed(learn, 300)
    predictor.close()
    return rows


def encoder(folder: Path | None) -> dict[str, Any]:
    predictor = make(folder)
    assert isinstance(predictor, EncodeOnce)
    model, rows = predictor.model, {}
    for tokens in (64, 128, 256):
        prompt = ("word " * 4000)[: 5 * (tokens - 2)]
        rows[f"encoder, {tokens} tokens"] = timed(lambda n, p=prompt: model.encode([(p, "")]), 40)
    predictor.close()
    return rows


def paper(folder: Path) -> dict[str, Any]:
    predictor = make(folder)
    assert isinstance(predictor, Paper)
    model, rows = predictor.model, {}
    for windows in (0, 4, 18):
        asked = view(0, windows)

        def score(n: int, asked: View = asked) -> None:
            vectors = model.encode([(asked.prompt, asked.answer)])
            model.head(vectors, np.zeros((1, 0), dtype=np.float32), ["m"])

        rows[f"published method, after {50 * windows} tokens"] = timed(score, 40)
    predictor.close()
    return rows


def lag(folder: Path | None, seconds: float) -> dict[str, Any]:
    """200 jobs at 30 tokens a second are re-scored every 50 tokens; 10 new prompts a second of 100 tokens."""
    predictor = warmed(folder)

    async def measure(busy: bool) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        late: list[float] = []
        end = loop.time() + seconds
        scored = 0

        async def job(number: int) -> None:
            nonlocal scored
            windows = number % 12
            await asyncio.sleep(random.Random(number).random() * 50 / 30)
            while loop.time() < end:
                predictor.instant(view(number, windows))
                scored += 1
                windows = (windows + 1) % 12
                await asyncio.sleep(50 / 30)

        async def prompts() -> None:
            number = 0
            while loop.time() < end:
                prompt = f"{number} " + PROMPT * 5
                spawn(predictor.refine([view(10_000 + number, 0, prompt=prompt)]), name="refine")  # type: ignore[arg-type]
                number += 1
                await asyncio.sleep(0.1)

        tasks = [spawn(job(n), name="job") for n in range(200)] + [spawn(prompts(), name="prompts")] if busy else []
        while loop.time() < end:
            asked = loop.time() + 0.001
            await asyncio.sleep(0.001)
            late.append(loop.time() - asked)
        for task in tasks:
            await task
        return {**quantiles(late), "rescored_per_second": round(scored / seconds, 1), **predictor.counts}

    rows = {"nothing to do": asyncio.run(measure(False)), "serving": asyncio.run(measure(True))}
    predictor.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder (default: the shipped encode-once)")
    parser.add_argument("--paper", type=Path, default=Path("elis-paper"), help="folder of the published method")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    np.random.default_rng(1)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result: dict[str, Any] = {
        "about": {
            "commit": commit.stdout.strip(),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}, 2 cores, shared",
        },
        "on the event loop": instant(asked.model),
        "encoder": encoder(asked.model),
    }
    try:
        result["published method"] = paper(asked.paper)
    except Exception as error:  # noqa: BLE001 (a folder that is not there is no reason to lose the rest)
        result["published method"] = f"not measured: {error}"
    result["event-loop lag"] = lag(asked.model, asked.seconds)
    text = json.dumps(result, indent=1)
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
