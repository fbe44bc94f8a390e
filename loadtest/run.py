"""``loadtest run``: from options to a finished folder, against a server or in virtual time.

Knows: how the parts are put together for one call of the command, what a person sees meanwhile, what Ctrl-C does.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvloop

from elis_gateway.errors import ConfigError, GatewayError, UpstreamUnavailable
from elis_gateway.sim.model import EngineModel
from loadtest import calibrate, runner, store, targets
from loadtest.client import Client
from loadtest.experiment import AS_IT_IS, MAX_LAG, Experiment, Live, Planned, Simulated, conduct, plan, switchable
from loadtest.figures import Objectives
from loadtest.knowledge import Knowledge
from loadtest.live import Screen, Watch, figure
from loadtest.make import check_pieces
from loadtest.options import Work
from loadtest.records import Row, Run
from loadtest.settings import LABELS, PERFECT, setting
from loadtest.tables import tables, verdict
from loadtest.targets import HttpTarget, Steering
from loadtest.workload import Request, Workload

__all__ = ["Options", "calibrate_to", "execute"]

GAPS_UP_TO = 2_000_000
"""Tokens of a workload up to which every time between two deltas is kept."""
_SIMULATED = {"predictor", "workers", "delay"}
"""Options that say nothing about a live run."""
_PAST = 100_000
"""What a simulated history has seen was drawn with seeds from here on: never those of a run."""


@dataclass(frozen=True)
class Options:
    """What the command line said, beside the work itself."""

    target: str
    settings: tuple[str, ...]
    """Empty: the server as it is; in virtual time the default setting."""
    workload: Path | None = None
    seeds: int = 1
    again: bool | None = None
    """An A/A arm; None: wherever settings are compared."""
    window: int = 50
    batch_size: int | None = None
    output: Path | None = None
    objectives: Objectives = field(default_factory=Objectives)
    # live
    model: str | None = None
    admin: str | None = None
    admin_key: str | None = None
    users: int | None = None
    patience: float = 600.0
    max_lag: float = MAX_LAG
    headers: Mapping[str, str] | None = None
    body: Mapping[str, Any] | None = None
    apps: bool = True
    # in virtual time
    predictor: str = "history"
    workers: int = 1
    delay: float = 0.0

    @property
    def simulated(self) -> bool:
        return self.target == "sim" or self.target.startswith("sim:")


def execute(options: Options, work: Work, screen: Screen) -> tuple[Path, Experiment]:
    """Run everything, store it, print it. Raises GatewayError where it cannot even begin."""
    for name in options.settings:
        setting(name)  # before anything is started
        if not options.simulated:
            switchable(name)
    if len(set(options.settings)) < len(options.settings):
        raise ConfigError("the same setting twice: the second run of an A/A pair comes by itself (--aa)")
    if options.workload is None:
        check_pieces(work.arrivals, work.num_requests, options.seeds)
    folder = store.new_folder(options.output)
    if options.simulated:
        experiment = _simulate(options, work, screen)
    else:
        # The faster loop: the generator's own lag is what a live run must keep small.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            experiment = loop.run(_live(options, work, screen))
    if not experiment.runs:
        raise GatewayError("stopped before the first run was done: nothing to store")
    arms = store.write(folder, experiment)
    drawn = _plots(folder, experiment, screen)
    for table in tables(experiment, arms)[:4]:
        screen.heading(table.title)
        screen.table(table.heads, table.rows)
        if table.note:
            screen.say(table.note)
    if said := verdict(experiment, arms):
        screen.heading("In short")
        screen.lines(f"- {line}" for line in said)
    screen.say(f"\n{folder}: {drawn}report.md, summary.json, summary.csv, comparison.csv, rows.jsonl")
    return folder, experiment


def _plots(folder: Path, experiment: Experiment, screen: Screen) -> str:
    """What was drawn, in words."""
    try:
        from loadtest.report import html
    except ModuleNotFoundError:
        screen.say("no plots: pip install 'elis-gateway[loadtest]', then: elis-gateway loadtest report FOLDER")
        return ""
    html.write(folder, experiment)
    return "report.html, plots/, "


def _experiment(options: Options, workloads: dict[int, Workload], config: dict[str, Any]) -> Experiment:
    names = list(options.settings)
    again = None
    if options.again or (options.again is None and len(names) > 1):
        again = _again(names) if options.simulated else names[0]
    hidden = {"headers", "admin_key", "settings"} | (set() if options.simulated else _SIMULATED)
    given = {key: value for key, value in asdict(options).items() if key not in hidden}
    return Experiment(
        {**given, "settings": names, **config},
        "sim" if options.simulated else "live",
        names,
        workloads,
        again,
        options.window,
        options.objectives,
        max_lag=options.max_lag,
    )


def _again(names: Sequence[str]) -> str:
    """In virtual time two runs of first-come are one and the same: the pair must differ in what is predicted."""
    guessing = [name for name in names if name != PERFECT and setting(name).policy.kind in ("sjf", "isrtf")]
    return guessing[-1] if guessing else names[0]


def _workloads(options: Options, work: Work, capacity: float | None) -> dict[int, Workload]:
    if options.workload is not None:
        if options.seeds > 1:
            raise ConfigError("a workload file is one workload: more seeds need the options it was made with")
        return {work.seed: Workload.load(options.workload)}
    return {work.seed + number: work.make(number, capacity=capacity) for number in range(options.seeds)}


def _needs_capacity(options: Options, work: Work) -> bool:
    return options.workload is None and work.load is not None and work.capacity is None


# ---- virtual time ---------------------------------------------------------------------------------------------------


def _simulate(options: Options, work: Work, screen: Screen) -> Experiment:
    engine = EngineModel.load(options.target.partition(":")[2] or "vllm-cpu")
    if options.batch_size is not None:
        engine = replace(engine, slots=options.batch_size)
    if not options.settings:
        options = replace(options, settings=("isrtf",))
    capacity = None
    if _needs_capacity(options, work):
        backlog = replace(work, num_requests=1000, load=None, rate=1.0, arrivals="once", seed=work.seed + _PAST)
        if work.mix is not None or not work.arrivals.startswith("trace:"):
            capacity = targets.capacity(engine, backlog.make()) * options.workers
        else:
            capacity = engine.capacity * options.workers
    workloads = _workloads(options, work, capacity)

    def past(noise: int) -> Workload:
        """Earlier work of the same kind."""
        if options.workload is not None:
            return next(iter(workloads.values()))
        other = replace(work, seed=_PAST + noise, num_requests=1000, load=None, rate=1.0)
        return other.make()

    experiment = _experiment(options, workloads, {"work": _plain(work), "capacity": capacity, "engine": asdict(engine)})
    experiment.engine = engine
    target = Simulated(
        engine,
        Knowledge(options.predictor, past, apps=options.apps),
        window=options.window,
        workers=options.workers,
        delay=options.delay,
    )
    _announce(screen, experiment)
    with _until_told(None) as stop:
        planned = plan(experiment.settings, sorted(workloads), experiment.again)
        with screen.progress("simulating", len(planned)) as step, asyncio.Runner() as loop:

            def done(one: Planned, run: Run) -> None:
                step()

            loop.run(conduct(experiment, target, stop=stop, on_run=done))
    return experiment


# ---- live -----------------------------------------------------------------------------------------------------------


async def _live(options: Options, work: Work, screen: Screen) -> Experiment:
    if not options.settings:
        options = replace(options, settings=(AS_IT_IS,))
    switching = options.settings != (AS_IT_IS,)
    async with Client(options.target, options.headers) as client, Client(_admin(options), _key(options)) as admin:
        model = options.model or await _first_model(client)
        steering = Steering(admin) if switching or options.admin else None
        before = await steering.policy() if steering is not None else None
        capacity = None
        if _needs_capacity(options, work):
            slots = options.batch_size or await _slots(admin if steering is not None else None)
            screen.say(f"measuring the capacity: {slots} sequences at once ...")
            capacity = await measure_capacity(client, model, slots, options)
            screen.say(f"  {capacity:.0f} tokens/s")
        workloads = _workloads(options, work, capacity)
        experiment = _experiment(
            options, workloads, {"work": _plain(work), "capacity": capacity, "model": model, "policy_before": before}
        )
        _announce(screen, experiment)
        watch = Watch(screen)

        def make_target(workload: Workload) -> HttpTarget:
            small = workload.tokens <= GAPS_UP_TO
            body = {"temperature": 0, **(options.body or {})}
            return HttpTarget(client, model, apps=options.apps, body=body, debug=True, gaps=small, on_refusal=refused)

        refusals: set[int] = set()

        def refused(status: int, words: str) -> None:
            if status not in refusals:
                refusals.add(status)
                screen.say(f"  a request was answered {status}: {words}")

        def begin(planned: Planned, workload: Workload, start: float) -> None:
            name, label = f"{planned.setting} {planned.arm}".strip(), LABELS.get(planned.setting, planned.setting)
            watch.begin(f"{name} seed {planned.seed}: {label}", workload, start)

        target = Live(
            make_target,
            steering if switching else None,
            window=options.window,
            users=options.users,
            patience=options.patience,
            on_begin=begin,
            on_sent=watch.sent,
            on_end=watch.ended,
        )
        with _until_told(asyncio.get_running_loop()) as stop:
            try:
                await conduct(experiment, target, stop=stop, on_run=lambda one, run: _line(screen, watch, one, run))
            except GatewayError as error:
                if not experiment.runs:
                    raise
                # Hours of runs may be done: they are worth more than the reason why there are no more.
                watch.end()
                screen.say(f"stopped: {error}; what is done is kept, marked incomplete")
            finally:
                watch.end()
                if switching and steering is not None and before is not None:
                    await _switch_back(steering, before, screen)
        return experiment


async def _switch_back(steering: Steering, before: Mapping[str, Any], screen: Screen) -> None:
    try:
        await steering.use(before)
    except GatewayError as error:
        screen.say(f"the gateway's policy could not be put back to what it was: {error}")


def _line(screen: Screen, watch: Watch, planned: Planned, run: Run) -> None:
    watch.end()
    done = [row for row in run.rows if not row.error]
    mean = sum(row.jct for row in done) / len(done) if done else None
    screen.say(
        f"  {run.name} seed {planned.seed}: {len(done)} of {len(run.rows)} completed, "
        f"mean JCT {figure(mean)} s, worst lag {run.lag * 1e3:.1f} ms"
    )


def _admin(options: Options) -> str:
    """As told, or where the gateway's admin listener is by default."""
    if options.admin:
        return options.admin
    parts = urlsplit(options.target)
    return f"{parts.scheme}://{parts.hostname}:8081"


def _key(options: Options) -> dict[str, str]:
    return {"Authorization": f"Bearer {options.admin_key}"} if options.admin_key else {}


async def _first_model(client: Client) -> str:
    try:
        reply = await client.get("/v1/models")
        found: list[Any] = orjson.loads(reply.body)["data"] if reply.status == 200 else []
        return str(found[0]["id"])
    except UpstreamUnavailable as error:
        raise GatewayError(f"{client.url} does not answer: {error}") from error
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise GatewayError(f"{client.url}/v1/models names no model: give --model") from error


async def _slots(admin: Client | None) -> int:
    """As the gateway knows them. Raises ConfigError where it cannot be asked."""
    if admin is not None:
        try:
            found = orjson.loads((await admin.get("/admin/upstreams")).body)["upstreams"]
            return sum(int(upstream["slots"]) for upstream in found)
        except (UpstreamUnavailable, orjson.JSONDecodeError, KeyError, TypeError):
            pass
    raise ConfigError("a load needs the capacity: give --capacity, or --batch-size to have it measured")


async def measure_capacity(client: Client, model: str, slots: int, options: Options, tokens: int = 120) -> float:
    """Tokens per second with ``slots`` sequences always at work: a closed loop, counted while all of them are busy."""
    prompt = "Count as far as you can, in words: one, two, three"
    requests = tuple(
        Request(f"capacity-{n}", 0.0, prompt, 12, "", tokens, max_tokens=tokens, forced=True) for n in range(4 * slots)
    )
    start = time.perf_counter()
    body = {"temperature": 0, **(options.body or {})}
    target = HttpTarget(client, model, start=start, body=body)
    rows = (await runner.closed(Workload(requests), target, slots, start=start, patience=options.patience)).rows
    if failed := [row.error for row in rows if row.error]:
        raise GatewayError(f"the capacity could not be measured: {failed[0]}; give --capacity")
    return full_rate(rows, slots)


def full_rate(rows: Sequence[Row], slots: int) -> float:
    """Tokens per second from the first time that ``slots`` requests were under way to the last."""
    firsts = sorted(row.sent for row in rows)
    begin = firsts[slots - 1]
    end = min(sorted(row.end for row in rows if row.end is not None)[-slots:])
    made = 0.0
    for row in rows:
        assert row.end is not None
        overlap = min(row.end, end) - max(row.sent, begin)
        if overlap > 0 and row.end > row.sent:
            made += row.tokens * overlap / (row.end - row.sent)
    return made / (end - begin)


def calibrate_to(
    url: str,
    output: Path,
    *,
    model: str | None,
    slots: int | None,
    block: int,
    kv_tokens: int | None,
    rounds: int,
    about: str,
    headers: Mapping[str, str],
    said: Callable[[str], None],
) -> None:
    """Measure an engine, write its model, and say what was found. Raises GatewayError."""

    async def measured() -> tuple[calibrate.Calibration, str]:
        async with Client(url, headers) as client:
            name = model or await _first_model(client)
            server = calibrate.Server(client, name)
            try:
                return await calibrate.measure(server, slots=slots, rounds=rounds, said=said), name
            except UpstreamUnavailable as error:
                raise GatewayError(f"{url} does not answer: {error}") from error

    found, name = asyncio.run(measured())
    seam = found.seam
    words = (
        f"{about or name}. Measured {time.strftime('%Y-%m-%d')} on {platform.machine()} with {os.cpu_count()} cores by "
        f"loadtest calibrate, median of {rounds} rounds; capacity {found.capacity:.1f} tokens/s. A seam cost "
        f"{seam['alone']:.1f} decoded tokens alone, {seam['backlog']:.1f} of each sequence under backlog, and computed "
        f"{seam['computed']:.0f} prompt tokens again."
    )
    fitted = calibrate.fitted(found, block=block, kv_tokens=kv_tokens, about=words)
    fitted.save(output)
    said(f"decoding: {', '.join(f'{rate:.1f} tokens/s each of {batch}' for batch, rate in found.decode)}")
    said(f"capacity: {found.capacity:.1f} tokens/s with {found.slots} slots at work, whole answers")
    prefill = (
        "free, as far as can be measured"
        if fitted.prefill_tokens_per_second is None
        else f"{found.prefill:.0f} tokens/s"
    )
    said(f"prompts: {prefill}; others {'wait' if found.stalls else 'go on'} meanwhile")
    said(f"a seam: {seam['alone']:.1f} tokens alone, {seam['backlog']:.1f} under backlog"
         + ("" if found.by_ids else "; continued by text, as no token ids came back"))  # fmt: skip
    said(f"{output}: use it as --target sim:{output}")


# ---- both -----------------------------------------------------------------------------------------------------------


def _plain(work: Work) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(work).items()
        if value is not None
    }


def _announce(screen: Screen, experiment: Experiment) -> None:
    screen.heading("Load test")
    first = next(iter(experiment.workloads.values()))
    span = first.requests[-1].at
    offered = f", {first.tokens / span:.0f} tokens/s offered" if span > 0 else ", all at once"
    screen.say(
        f"{experiment.config['target']}: {len(first.requests)} requests a run, {first.tokens} tokens{offered}; "
        f"{len(experiment.workloads)} workload seed{'s' * (len(experiment.workloads) > 1)}"
    )
    if (users := experiment.config.get("users")) is not None:
        screen.say(f"  closed loop of {users} users: arrivals wait for answers")
    for name in experiment.settings:
        screen.say(f"  {name:16s} {LABELS.get(name, 'the server as it is')}")
    if experiment.again:
        screen.say(f"  {experiment.again} a second time: the noise floor")


@contextmanager
def _until_told(loop: asyncio.AbstractEventLoop | None) -> Iterator[runner.Stop]:
    """Ctrl-C asks the run to stop and keep what it has; a second one ends it at once."""
    stop = runner.Stop()

    def told(*_: object) -> None:
        if stop:
            raise KeyboardInterrupt
        print("\nstopping; what is done is kept, marked incomplete", file=sys.stderr)  # noqa: T201
        stop.set()

    if loop is not None:
        loop.add_signal_handler(signal.SIGINT, told)
        try:
            yield stop
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        return
    before: Callable[..., object] | int | None = signal.signal(signal.SIGINT, told)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
