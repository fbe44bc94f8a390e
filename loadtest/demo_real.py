"""The demo's first part: a small real model on llama.cpp behind the real gateway, both as child processes.

One answer, watched as it streams: how long it queued, its windows, and how the estimate changed. Then short bursts of
real chat requests under first come first served, SJF and ISRTF, switched while serving by ``PUT /admin/policy``.
Bursts are interleaved (A B C C B A), each is followed to its end, and token counts should agree between the orders.

The predictor is ``history``, taught with the recorded answers of other prompts of the shipped pool.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import aiohttp
import orjson
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from elis_gateway.errors import GatewayError
from elis_gateway.predictor.base import View
from elis_gateway.predictor.history import History
from elis_gateway.tasks import spawn
from elis_gateway.wire.sse import EventDecoder
from loadtest import runner
from loadtest.client import Client
from loadtest.engines import Child, free_port, llama, wait_ready
from loadtest.live import Screen, figure
from loadtest.records import Row, Run
from loadtest.stats import percentile
from loadtest.targets import HttpTarget
from loadtest.workload import Answered, Request, Workload, pool

__all__ = ["Gateway", "burst", "bursts", "measure_speed", "print_table", "show", "taught", "watch"]

SLOTS = 2
BUDGET = 120.0
"""Seconds of engine time that all bursts together may take."""
LONGEST = 250
"""``max_tokens`` of the bursts: the model runs on one core."""
QUICK = ("word", "yesno", "sentence", "translate", "two")
LONG = ("explain", "essay", "story", "plan", "tips", "travel")
"""Kinds of the pool: a mix of applications with habits of their own."""
ORDER = (("fcfs", 0), ("sjf", 0), ("isrtf", 0), ("isrtf", 1), ("sjf", 1), ("fcfs", 1))
"""Policy and workload seed of each burst: interleaved, so that a machine that gets slower favours nobody."""
LABELS = {"fcfs": "FCFS", "sjf": "SJF", "isrtf": "ISRTF elastic"}
WATCHED = "Explain how a bicycle stays upright, for a curious child."
GREEDY = {"temperature": 0, "seed": 0}
CONFIG = Path(__file__).parent / "data" / "demo.yaml"
"""In the package: the demo is for those who have installed it, too."""


@dataclass(frozen=True)
class Gateway:
    """Where the parts listen."""

    url: str
    admin: str
    engine: str
    model: str


@contextmanager
def running(folder: Path, screen: Screen) -> Iterator[Gateway]:
    """llama.cpp and the gateway in front of it, as children that end with us."""
    screen.say(f"starting llama.cpp with SmolLM2-135M-Instruct, {SLOTS} slots, one thread ...")
    with llama(slots=SLOTS, log=folder / "engine.log") as engine:
        port, admin = free_port(), free_port()
        env = {
            "ELIS__UPSTREAMS__0__URL": engine,
            "ELIS__UPSTREAMS__0__SLOTS": str(SLOTS),
            "ELIS__SERVER__PORT": str(port),
            "ELIS__ADMIN__PORT": str(admin),
            "ELIS__PREDICTOR__PATH": str(folder / "history.json"),
        }
        screen.say(f"starting the gateway: elis-gateway serve {os.path.relpath(CONFIG)}")
        argv = [sys.executable, "-m", "elis_gateway", "serve", str(CONFIG)]
        with Child(argv, log=folder / "gateway.log", env={**os.environ, **env}) as child:
            url = f"http://127.0.0.1:{port}"
            wait_ready(child, f"{url}/ready", timeout=60.0)
            yield Gateway(url, f"http://127.0.0.1:{admin}", engine, "smollm2")


def taught(path: Path, leave_out: set[str], model: str = "smollm2") -> int:
    """Write a history of the pool's recorded answers, but for the prompts in ``leave_out``. Returns how many."""
    history = History(path)
    answers = [answered for answered in pool() if answered.prompt not in leave_out]
    for answered in answers:
        view = View(answered.prompt, model, answered.kind, "", "", answered.tokens, None)
        history.learn(view, complete=True)
    history.save()
    return len(answers)


# --- one answer, watched -----------------------------------------------------------------------------------------


@dataclass
class Watched:
    """What is known so far of the answer on screen."""

    text: str = ""
    job: dict[str, Any] = field(default_factory=dict)
    told: int = 0

    def facts(self) -> list[str]:
        job = self.job
        if not job:
            return ["waiting to be accepted"]
        slices = job.get("slices", [])
        lines = [
            f"state        {job['outcome'] or job['state']}",
            f"queue wait   {job['queue_wait']:.2f} s",
            f"continues by {job['sliced']}",
            f"tokens       {job['tokens']}   calls {len(slices) + (job['state'] == 'running')}   "
            f"preempted {job['preemptions']}",
            "window       estimate of what remains",
        ]
        estimates = job.get("prediction_history", [])
        return lines + [f"  at {int(at):4d}    {left:6.1f} tokens" for at, left in estimates[-10:]]

    def news(self) -> Iterator[str]:
        """Estimates that came since the last time, for a screen that cannot be redrawn."""
        estimates = self.job.get("prediction_history", [])
        for at, left in estimates[self.told :]:
            waited = self.job["queue_wait"]
            yield f"    at {int(at):4d} tokens: {left:6.1f} remain by estimate (queue wait {waited:.2f} s)"
        self.told = len(estimates)


async def watch(gateway: Gateway, session: aiohttp.ClientSession, screen: Screen) -> None:
    """Stream one answer while others wait and run beside it."""
    # More requests than slots, so that there is a queue to see.
    others = [spawn(_chat(gateway, session, answered.prompt, 60), name="company") for answered in pool()[40:43]]
    await asyncio.sleep(0.05)
    seen = Watched()
    answer = spawn(_stream(gateway, session, WATCHED, seen), name="watched")
    screen.say(f"\n> {WATCHED}")
    with _view(screen, seen) as redraw:
        while not answer.done():
            redraw()
            await asyncio.wait([answer], timeout=0.1)
        await answer
        redraw()
    await asyncio.gather(*others)


@contextmanager
def _view(screen: Screen, seen: Watched) -> Iterator[Any]:
    if not screen.terminal:
        yield lambda: screen.lines(seen.news())
        screen.say("")
        screen.say(seen.text)
        screen.say("\n" + "\n".join(seen.facts()[:4]))
        return

    def picture() -> Group:
        side = Panel(Text("\n".join(seen.facts())), title="the job", title_align="left")
        return Group(Text(seen.text[-1600:]), side)

    with Live(picture(), console=screen.console, refresh_per_second=8) as live:
        yield lambda: live.update(picture())


async def _stream(gateway: Gateway, session: aiohttp.ClientSession, prompt: str, seen: Watched) -> None:
    body = {
        "model": gateway.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 300,
        "stream": True,
        **GREEDY,
    }
    headers = {"X-Elis-Debug": "1", "X-Elis-App": "explain"}
    decoder = EventDecoder()
    async with session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as reply:
        _check(reply, await reply.text() if reply.status != 200 else "")
        job_id = reply.headers["X-Elis-Job"]
        asked = 0.0
        async for data in reply.content.iter_any():
            for payload in decoder.feed(data):
                if payload != b"[DONE]":
                    for choice in orjson.loads(payload).get("choices", ()):
                        seen.text += choice.get("delta", {}).get("content") or ""
            if time.monotonic() - asked > 0.2:
                asked = time.monotonic()
                seen.job = await _job(gateway, session, job_id)
    seen.job = await _job(gateway, session, job_id)


async def _job(gateway: Gateway, session: aiohttp.ClientSession, job_id: str) -> dict[str, Any]:
    async with session.get(f"{gateway.admin}/admin/jobs/{job_id}") as reply:
        found: dict[str, Any] = orjson.loads(await reply.read()) if reply.status == 200 else {}
        return found


async def _chat(gateway: Gateway, session: aiohttp.ClientSession, prompt: str, max_tokens: int) -> None:
    body = {
        "model": gateway.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        **GREEDY,
    }
    async with session.post(f"{gateway.url}/v1/chat/completions", json=body) as reply:
        _check(reply, await reply.text())


def _check(reply: aiohttp.ClientResponse, text: str) -> None:
    if reply.status != 200:
        raise GatewayError(f"the gateway answered {reply.status}: {text[:300]}")


# --- bursts of real requests -------------------------------------------------------------------------------------


def bursts(n: int, seeds: int = 2) -> list[Workload]:
    """``n`` requests each, ten a second and so more than the engine can take: quick questions and longer pieces by
    turns. Kinds and prompts of the shipped pool, drawn by seed."""
    by_kind: dict[str, list[Answered]] = {}
    for answered in pool():
        by_kind.setdefault(answered.kind, []).append(answered)
    made = []
    for seed in range(seeds):
        draw = random.Random(f"burst {seed}")
        kinds: list[tuple[str, ...]] = []
        while len(kinds) < n:
            kinds += draw.sample((QUICK, QUICK, LONG, LONG), 4)
        chosen = [draw.choice(by_kind[draw.choice(kind)]) for kind in kinds[:n]]
        made.append(Workload(tuple(_request(i, 0.1 * i, asked) for i, asked in enumerate(chosen))))
    return made


def _first(work: Workload, n: int) -> Workload:
    return Workload(work.requests[:n])


def _request(i: int, at: float, asked: Answered) -> Request:
    tokens = min(asked.tokens, LONGEST)
    return Request(f"r{i:03d}", round(at, 3), asked.prompt, asked.prompt_tokens, "", tokens, asked.kind, LONGEST)


async def measure_speed(gateway: Gateway, session: aiohttp.ClientSession) -> float:
    """Tokens per second with every slot at work, straight at the engine."""

    async def one(i: int) -> int:
        body = {
            "model": gateway.model,
            "messages": [{"role": "user", "content": f"Count from {i} to one hundred, in words."}],
            "max_tokens": 100,
            **GREEDY,
        }
        async with session.post(f"{gateway.engine}/v1/chat/completions", json=body) as reply:
            tokens: int = orjson.loads(await reply.read())["usage"]["completion_tokens"]
            return tokens

    start = time.perf_counter()
    tokens = await asyncio.gather(*(one(i) for i in range(SLOTS)))
    return sum(tokens) / (time.perf_counter() - start)


async def burst(gateway: Gateway, session: aiohttp.ClientSession, policy: str, work: Workload, screen: Screen) -> Run:
    """One workload under one policy."""
    async with session.put(f"{gateway.admin}/admin/policy", json={"kind": policy}) as reply:
        _check(reply, await reply.text())
    start = time.perf_counter()
    async with Client(gateway.url) as client:
        return await _burst(
            HttpTarget(client, gateway.model, start=start, body=GREEDY, debug=True), policy, work, screen
        )


async def _burst(target: HttpTarget, policy: str, work: Workload, screen: Screen) -> Run:
    with screen.progress(f"{policy:6s}", len(work.requests)) as step:

        def ended(request: Request, row: Row) -> None:
            step()

        return await runner.run(work, target, start=target.start, name=policy, on_end=ended)


async def show(screen: Screen, folder: Path) -> list[Run]:
    """Run the whole part and print its table."""
    # Before the speed is known: the prompts of the largest burst there could be are kept from the predictor.
    largest = bursts(20)
    prompts = {request.prompt for work in largest for request in work.requests}
    learned = taught(folder / "history.json", prompts)
    with running(folder, screen) as gateway:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            screen.say(f"the predictor is `history`, taught with {learned} recorded answers to other prompts")
            await watch(gateway, session, screen)
            speed = await measure_speed(gateway, session)
            mean = fmean(request.tokens for work in largest for request in work.requests)
            works = [_first(work, max(6, min(20, round(BUDGET * speed / len(ORDER) / mean)))) for work in largest]
            screen.say(
                f"\nThe engine makes {speed:.0f} tokens/s here. Now {len(ORDER)} bursts of {len(works[0].requests)} "
                f"real chat requests, half of them\nquick questions, half longer pieces; two workloads, seeds 0 and 1, "
                f"interleaved:\n{', '.join(f'{policy} {seed}' for policy, seed in ORDER)}."
            )
            runs = [await burst(gateway, session, policy, works[seed], screen) for policy, seed in ORDER]
    print_table(screen, runs)
    return runs


def print_table(screen: Screen, runs: list[Run]) -> None:
    rows = []
    for policy, label in LABELS.items():
        ours = [run for run in runs if run.setting == policy]
        done = [row for run in ours for row in run.rows if not row.error]
        jct = [row.jct for row in done]
        ttft = [row.ttft for row in done if row.ttft is not None]
        figures = [f(values) for values in (jct, ttft) for f in (_mean, _p50, _p90)]
        counts = [len(done), sum(row.tokens for row in done), sum(row.preemptions for row in done)]
        rows.append([label, *map(figure, figures), *map(str, counts)])
    screen.table(["seconds", "JCT", "p50", "p90", "TTFT", "p50", "p90", "requests", "tokens", "preempt"], rows)
    if differ := _unequal(runs):
        screen.say(
            f"{differ} requests got answers of different length under the two orders: read the figures with care."
        )
    if failed := [row.error for run in runs for row in run.rows if row.error]:
        screen.say(f"{len(failed)} requests failed: {', '.join(sorted(set(failed)))}", style="bold red")
    screen.say(
        "A burst of short and long requests is where order pays most; two workloads are an example, no measurement.\n"
        "A dash: too few requests for that percentile."
    )


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _p50(values: list[float]) -> float | None:
    return percentile(values, 50)


def _p90(values: list[float]) -> float | None:
    return percentile(values, 90)


def _unequal(runs: list[Run]) -> int:
    """Requests whose answers differ in length between the settings: not the same work."""
    lengths: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        for row in run.rows:
            lengths.setdefault((run.workload, row.id), set()).add(row.tokens)
    return sum(len(found) > 1 for found in lengths.values())
