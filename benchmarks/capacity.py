"""What ordering costs in tokens per second, and what it gives in completion time, beside the engine alone.

    python -m benchmarks.capacity live --engine vllm --repeats 6 --seeds 5 --budget 15
    python -m benchmarks.capacity live --engine embedded --repeats 6 --seeds 0 --budget 8
    python -m benchmarks.capacity virtual --seeds 12 --budget 15
    python -m benchmarks.capacity report

``live``, over real sockets: load generator, engine and one gateway per setting are processes of their own. Every
*repeat* runs all settings once on the same work, straight to the engine at the beginning and again at the end (one A/A
pair), and every other repeat runs them in the opposite order. Lengths are forced and known (``ignore_eos`` with
``max_tokens``, predictor ``max_tokens``).

* Capacity, ``all``: every request is there from the beginning, shortest first in every setting, so that each setting
  serves the same work in the same order and only refilling and seams differ. ``closed``: three requests per slot are
  always unanswered, in an order of length that nobody knows beforehand, so that the gateway also preempts; the order
  then decides what is left for the drain, which the column of requests begun makes visible.
  Tokens per second count from the moment every slot streams to the moment nothing waits; never the drain.
* Completion times at ``--load`` times the capacity that the same invocation has measured straight to the engine, gamma
  arrivals of shape 0.8, the same work for every setting of a seed.

``virtual``: the same settings in virtual time, many seeds, with perfect knowledge, ``history`` learned while serving,
and perfect knowledge dealt to the wrong requests (the gain must vanish).

Every run is appended to a file of rows as soon as it is done; what is there already is not measured again, unless the
code has changed since. Each part has a budget; nothing is begun after it.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from benchmarks import capacity_live as live
from benchmarks import capacity_report as reports
from benchmarks import capacity_virtual as virtual
from benchmarks.rows import save
from loadtest.workload import Request

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Gateway = tuple[dict[str, Any], dict[str, Any]]
"""Keys of the upstream, keys of the scheduler."""

STRAIGHT, AGAIN = "straight", "straight, again"


def gateways(slots: int) -> dict[str, Gateway]:
    """The settings beside straight, as an operator would write them. ``elastic`` is the default configuration."""
    off = {"engine_priority": "off"}
    extra = max(1, slots // 2)
    return {
        "elastic": (off, {}),
        "none in hand": (off, {"overcommit": 0}),
        "fixed": (off, {"mode": "fixed", "window": 50}),
        "ordered": ({"engine_priority": "on", "overcommit": extra}, {}),
    }


# ---- work -----------------------------------------------------------------------------------------------------------


def lengths(shortest: int, longest: int, n: int, rng: random.Random) -> list[int]:
    """Log-uniform, stratified, in random order: every draw has nearly the same sum."""
    spread = log(longest / shortest)
    drawn = [round(shortest * exp(spread * (i + rng.random()) / n)) for i in range(n)]
    rng.shuffle(drawn)
    return drawn


def requests(tokens: Sequence[int], at: Sequence[float] | None = None) -> list[Request]:
    prompt = "Tell me something that I do not know yet, in as many words as you like."
    return [
        Request(f"r{n:04d}", at[n] if at is not None else 0.0, prompt, 0, "", length, "", length)
        for n, length in enumerate(tokens)
    ]


def arrivals(tokens: Sequence[int], rate: float, rng: random.Random) -> list[float]:
    """Gamma gaps of shape 0.8, scaled so that the offered tokens per second are ``rate`` in this very draw."""
    gaps = [rng.gammavariate(0.8, 1.0) for _ in tokens]
    scale = sum(tokens) / rate / sum(gaps)
    now, times = 0.0, []
    for gap in gaps:
        now += gap * scale
        times.append(round(now, 6))
    return times


# ---- rows -----------------------------------------------------------------------------------------------------------


def code() -> str:
    """A digest of everything a result depends on, so that rows of other code are never mixed in."""
    digest = hashlib.sha256()
    for folder in ("elis_gateway", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if folder != "benchmarks" or (file.name.startswith("capacity") and file.name != "capacity_report.py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def about() -> dict[str, Any]:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "code": code(),
        "commit": described.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {processor()}, Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "busy": os.getloadavg()[0],
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


class Clock:
    """The budget of an invocation."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


# ---- live -----------------------------------------------------------------------------------------------------------


class Session:
    """One engine with its gateways, and the rows measured on them."""

    def __init__(self, engine: live.Engine, urls: Mapping[str, tuple[str, str | None]], path: Path) -> None:
        self.engine = engine
        self.urls = urls
        self.path = path
        self.code = code()
        self.capacity: list[float] = []
        """Tokens per second straight to the engine, of this invocation."""
        self._count = 0

    def run(self, question: Mapping[str, Any], setting: str, repeat: int, load: Any) -> live.Figures:
        """Measure one setting. ``load`` is called with URL and mark."""
        url, admin = self.urls[setting]
        before = live.seams(admin) if admin else (0.0, 0.0)
        self._count += 1
        mark = f"{datetime.datetime.now(datetime.UTC):%H%M%S}{self._count:03d}"
        figures: live.Figures = load(url, mark)
        if admin:
            calls, preemptions = live.seams(admin)
            figures |= {"calls": calls - before[0], "preemptions": preemptions - before[1]}
        row = {"question": dict(question), "setting": setting, "repeat": repeat, "figures": figures, **about()}
        row["code"] = self.code
        save(self.path, row)
        shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}
        print(f"  {setting:16} {shown}", flush=True)
        return figures


def measured(path: Path, digest: str, question: Mapping[str, Any]) -> dict[int, set[str]]:
    """Settings measured already, by repeat."""
    found: dict[int, set[str]] = {}
    for row in reports.rows(path):
        if row["code"] == digest and row["question"] == dict(question):
            found.setdefault(row["repeat"], set()).add(row["setting"])
    return found


def order(names: Sequence[str], repeat: int) -> Sequence[str]:
    """A B C D A' and, in every other repeat, backwards."""
    return names if repeat % 2 == 0 else names[::-1]


def todo(
    session: Session, names: Sequence[str], question: Mapping[str, Any], repeats: int, clock: Clock
) -> Iterator[int]:
    """Repeats to measure, while there is time for another one as long as the longest so far."""
    done = measured(session.path, session.code, question)
    longest = 0.0
    for repeat in range(repeats):
        if done.get(repeat, set()) >= set(names):
            continue
        if clock.left < longest or clock.left <= 0:
            print(f"budget spent before repeat {repeat + 1} of {repeats}")
            return
        start = time.monotonic()
        print(f"{question}, repeat {repeat + 1} of {repeats}; load average {os.getloadavg()[0]:.1f}", flush=True)
        yield repeat
        longest = max(longest, time.monotonic() - start)


def capacity(session: Session, feed: str, n: int, span: tuple[int, int], repeats: int, clock: Clock) -> None:
    engine = session.engine
    question = {"part": "capacity", "engine": engine.name, "feed": feed, "requests": n, "lengths": list(span)}
    names = list(session.urls)
    for repeat in todo(session, names, question, repeats, clock):
        tokens = lengths(*span, n, random.Random(f"capacity {repeat}"))
        if feed == "all":
            tokens.sort()
        outstanding = n if feed == "all" else 3 * engine.slots
        for setting in order(names, repeat):
            load = partial(_backlog, engine, requests(tokens), outstanding)
            figures = session.run(question, setting, repeat, load)
            if setting in (STRAIGHT, AGAIN):
                session.capacity.append(figures["rate"])


def _backlog(engine: live.Engine, work: list[Request], outstanding: int, url: str, mark: str) -> live.Figures:
    return live.backlog(engine, url, work, outstanding, mark)


def completion(session: Session, load: float, n: int, span: tuple[int, int], seeds: int, clock: Clock) -> None:
    engine = session.engine
    rate = load * fmean(session.capacity)
    question = {"part": "jct", "engine": engine.name, "load": load, "requests": n, "lengths": list(span)}
    print(f"capacity {rate / load:.1f} tokens/s ({len(session.capacity)} runs), offered {rate:.1f}")
    names = [name for name in session.urls if name != AGAIN]
    for seed in todo(session, names, question, seeds, clock):
        rng = random.Random(f"arrivals {seed}")
        tokens = lengths(*span, n, random.Random(f"jct {seed}"))
        work = requests(tokens, arrivals(tokens, rate, rng))
        for setting in order(names, seed):
            session.run(question, setting, seed, partial(_open_loop, engine, work))


def _open_loop(engine: live.Engine, work: list[Request], url: str, mark: str) -> live.Figures:
    return live.open_loop(engine, url, work, mark)


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    pass


@main.command("live")
@click.option("--engine", "kind", type=click.Choice(["vllm", "embedded"]), default="embedded", show_default=True)
@click.option("--url", help="A vLLM that runs already (python -m benchmarks.vllm_engine serve --priority).")
@click.option("--slots", type=int, help="Default: 4 for vLLM, 16 for the embedded engine.")
@click.option("--model", default="default", show_default=True, help="Engine model of the embedded engine.")
@click.option("--speed", default=1.0, show_default=True, help="Modelled seconds per real one (embedded engine).")
@click.option("--feeds", default="all,closed", show_default=True, help="How the backlog is kept.")
@click.option("--requests", "n", type=int, help="Per run. Default: what takes half a minute.")
@click.option("--lengths", "span", type=(int, int), help="Shortest and longest answer in tokens.")
@click.option("--repeats", default=6, show_default=True, help="Of the capacity runs.")
@click.option("--seeds", default=5, show_default=True, help="Of the completion times; 0: none.")
@click.option("--load", default=0.95, show_default=True)
@click.option("--budget", default=10.0, show_default=True, help="Minutes for each part: every feed, completion times.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: benchmarks/results/capacity-ENGINE.jsonl")
@click.option("--logs", type=click.Path(path_type=Path), help="Folder that keeps the processes' logs.")
def live_command(
    kind: str,
    url: str | None,
    slots: int | None,
    model: str,
    speed: float,
    feeds: str,
    n: int | None,
    span: tuple[int, int] | None,
    repeats: int,
    seeds: int,
    load: float,
    budget: float,
    output: Path | None,
    logs: Path | None,
) -> None:
    """Capacity and completion times over real sockets."""
    slots = slots or (4 if kind == "vllm" else 16)
    n = n or (36 if kind == "vllm" else 200)
    span = span or ((30, 250) if kind == "vllm" else (30, 600))
    path = output or RESULTS / f"capacity-{kind}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "vllm":
            engine = stack.enter_context(live.real(folder, slots, url))
        else:
            engine = stack.enter_context(live.embedded(folder, slots, model, speed))
        urls: dict[str, tuple[str, str | None]] = {STRAIGHT: (engine.url, None)}
        for name, (upstream, scheduler) in gateways(slots).items():
            urls[name] = stack.enter_context(live.gateway(folder, name, engine, upstream, scheduler, "max_tokens"))
        urls[AGAIN] = (engine.url, None)
        session = Session(engine, urls, path)
        warm_up(session)
        for feed in feeds.split(","):
            capacity(session, feed, n, span, repeats, Clock(budget))
        if seeds:
            if not session.capacity:  # all of it was measured before
                work = requests(sorted(lengths(*span, n, random.Random("capacity now"))))
                figures = live.backlog(engine, engine.url, work, n, "capacity now")
                session.capacity.append(figures["rate"])
            completion(session, load, n * 2, span, seeds, Clock(budget))
    reports.show([path])


def warm_up(session: Session) -> None:
    """The first requests of a process are slower than all others; and each setting must work at all."""
    for name, (url, _) in session.urls.items():
        work = requests([20] * 2 * session.engine.slots)
        figures = live.backlog(session.engine, url, work, len(work), f"warm-up {name}")
        if figures["errors"]:
            raise click.ClickException(f"{name}: {figures['first_error']}")


# ---- virtual --------------------------------------------------------------------------------------------------------


def cells(load: float, jobs: int, dropped: int) -> Iterator[tuple[virtual.Question, str, str]]:
    """(question, setting, knowledge): everything at the middle seam, the cost of seams for perfect knowledge."""
    names = list(virtual.SETTINGS)
    for work in ("azure", "six", "equal"):
        question = virtual.Question(work, load, 4, 1.5, 0.001, jobs, dropped)
        for setting in names:
            yield question, setting, "perfect"
            if setting not in ("straight", "fcfs"):
                yield question, setting, "history"
                if work == "six":
                    yield question, setting, "shuffled"
    for work, (slots, seam) in product(("azure", "six"), ((4, 0.0), (4, 4.0), (16, 1.5))):
        question = virtual.Question(work, load, slots, seam, 0.001, jobs, dropped)
        for setting in names:
            if setting not in ("published", "elastic, no aging"):
                yield question, setting, "perfect"


@main.command("virtual")
@click.option("--seeds", default=12, show_default=True, help="Workload seeds, 0 and up.")
@click.option("--load", default=0.95, show_default=True)
@click.option("--jobs", default=3000, show_default=True)
@click.option("--dropped", default=500, show_default=True, help="First jobs that do not count.")
@click.option("--budget", default=15.0, show_default=True, help="Minutes.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "capacity-virtual.jsonl")
def virtual_command(seeds: int, load: float, jobs: int, dropped: int, budget: float, output: Path) -> None:
    """Completion times in virtual time."""
    clock = Clock(budget)
    stamp = about()
    output.parent.mkdir(parents=True, exist_ok=True)
    done = {
        (virtual.Question(**row["question"]), row["setting"], row["knowledge"], row["repeat"])
        for row in reports.rows(output)
        if row["code"] == stamp["code"]
    }
    work = [(seed, *cell) for seed in range(seeds) for cell in cells(load, jobs, dropped)]
    for number, (seed, question, setting, knowledge) in enumerate(work, 1):
        if (question, setting, knowledge, seed) in done:
            continue
        if clock.left <= 0:
            print(f"\nbudget spent at {number} of {len(work)} runs")
            break
        figures = virtual.measure(question, setting, knowledge, seed)
        row = {"question": question._asdict(), "setting": setting, "knowledge": knowledge, "repeat": seed}
        save(output, {**row, "figures": figures, **stamp})
        print(f"\r{number}/{len(work)} runs", end="", flush=True)
    print()
    reports.show([output])


@main.command("report")
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path))
def report_command(paths: tuple[Path, ...]) -> None:
    """Tables of what has been measured; of every question the newest code alone."""
    reports.show(paths or sorted(RESULTS.glob("capacity-*.jsonl")))


if __name__ == "__main__":
    main()
