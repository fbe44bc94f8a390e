"""From a plan (which applications, how they arrive, what they ask, how long the answers are) to a frozen workload.

Knows: how the parts are put together, and that every application draws from generators of its own, so that adding one
leaves the others as they were. Never: a clock, a target.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import yaml

from elis_gateway.errors import ConfigError
from elis_gateway.predictor.baselines import write_lengths
from loadtest import arrivals, lengths, prompts, traces
from loadtest.prompts import Prompt
from loadtest.spec import Spec, parse
from loadtest.workload import CAP, Request, Seeds, Workload, around, pool, trace

__all__ = [
    "EXAMPLE_MIX",
    "App",
    "Plan",
    "about",
    "check_pieces",
    "describe",
    "make",
    "read_mix",
    "write_oracle",
    "write_replay",
]

_NEAREST = 5
"""A drawn length takes one of so many recorded answers around it."""


@dataclass(frozen=True)
class App:
    """One application of a mix."""

    name: str = ""
    share: float = 1.0
    """Of the requests, relative to the other applications'."""
    system: str = ""
    """Its system prompt, sent with every request."""
    prompts: str = "pool"
    """``pool`` (shipped), or a file in any format of ``loadtest.prompts``."""
    lengths: str = ""
    """A distribution (``loadtest.lengths``), ``azure``, ``trace:FILE``, or ``own``: the recorded answers'.
    Default: ``azure`` for the pool, ``own`` for a file, the trace's rows where arrivals replay one."""
    arrivals: str = ""
    """A process (``loadtest.arrivals``), ``azure``, or ``trace:FILE``. Default: the plan's."""
    max_tokens: int | None = None
    """Limit that its clients send. Default: the plan's ``longest``."""


@dataclass(frozen=True)
class Plan:
    """What to draw. The rate follows from ``rate`` (requests/s), else from ``load`` and ``capacity`` (tokens/s)."""

    requests: int = 100
    apps: tuple[App, ...] = (App(),)
    arrivals: str = "gamma"
    rate: float | None = None
    load: float | None = None
    capacity: float | None = None
    longest: int = CAP
    """Drawn lengths are cut off there, longer recorded answers left out."""
    forced: bool | None = None
    """Forced lengths. Default: wherever the length was not recorded with the text."""
    turns: str = "first"
    """Of recorded conversations: the ``first`` user turn, or ``all``."""


@dataclass(slots=True)
class _Asked:
    """A request that has no time yet."""

    app: App
    prompt: Prompt
    tokens: int
    prompt_tokens: int
    forced: bool


def read_mix(path: str | Path) -> tuple[App, ...]:
    """Applications from a YAML or JSON file: a list of objects with ``App``'s fields. Raises ConfigError."""
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"mix {path}: {error}") from None
    if isinstance(rows, dict) and "apps" in rows:
        rows = rows["apps"]
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"mix {path}: expected a list of applications")
    known = {field.name: field.type for field in fields(App)}
    apps = []
    for number, row in enumerate(rows, 1):
        where = f"mix {path}: application {number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected an object")
        for key in row:
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
        app = App(**{"name": f"app{number}", **row})
        if not isinstance(app.share, int | float) or not app.share > 0:
            raise ConfigError(f"{where}: share: expected a number above 0, got {app.share!r}")
        if app.max_tokens is not None and not (isinstance(app.max_tokens, int) and app.max_tokens > 0):
            raise ConfigError(f"{where}: max_tokens: expected a whole number above 0, got {app.max_tokens!r}")
        apps.append(app)
    if len({app.name for app in apps}) < len(apps):
        raise ConfigError(f"mix {path}: two applications have the same name")
    return tuple(apps)


def make(plan: Plan, seeds: Seeds) -> Workload:
    """Draw a workload. Equal plans and seeds give equal hashes. Raises ConfigError."""
    if plan.requests < 1:
        raise ConfigError(f"expected at least one request, got {plan.requests}")
    counts = _shares(plan)
    asked = {app: _asked(plan, app, count, seeds) for app, count in counts.items()}
    whole = [one for ones in asked.values() for one in ones]
    rate = _rate(plan, fmean(one.tokens for one in whole))
    timed: list[tuple[float, int, _Asked]] = []
    for app, ones in asked.items():
        at = _times(plan, app, len(ones), None if rate is None else rate * len(ones) / len(whole), seeds)
        timed += zip(at, range(len(timed), len(timed) + len(ones)), ones, strict=True)
    timed.sort(key=lambda entry: entry[:2])
    requests = tuple(_request(number, at, one, plan) for number, (at, _, one) in enumerate(timed))
    about = {key: value for key, value in asdict(plan).items() if value is not None}
    about["apps"] = list(about["apps"])
    return Workload(
        requests, {**about, "seeds": asdict(seeds), "mean_tokens": round(fmean(o.tokens for o in whole), 2)}
    )


def _shares(plan: Plan) -> dict[App, int]:
    """Requests of each application: as the shares say, the largest remainders rounded up."""
    total = sum(app.share for app in plan.apps)
    exact = {app: plan.requests * app.share / total for app in plan.apps}
    counts = {app: int(count) for app, count in exact.items()}
    for app in sorted(exact, key=lambda app: counts[app] - exact[app])[: plan.requests - sum(counts.values())]:
        counts[app] += 1
    return {app: count for app, count in counts.items() if count}


def _rate(plan: Plan, mean_tokens: float) -> float | None:
    """Requests per second of all applications together; None: a trace's own."""
    if plan.rate is not None:
        return plan.rate
    if plan.load is not None:
        if plan.capacity is None:
            raise ConfigError("a load needs the capacity it is a share of (tokens per second)")
        if mean_tokens <= 0:
            raise ConfigError("a load needs answer lengths, and these prompts have none: give lengths, or a rate")
        return plan.load * plan.capacity / mean_tokens
    if all(_is_trace(app.arrivals or plan.arrivals) for app in plan.apps):
        return None
    raise ConfigError("expected a rate (requests per second), or a load and a capacity")


# ---- what is asked --------------------------------------------------------------------------------------------------


def _asked(plan: Plan, app: App, count: int, seeds: Seeds) -> list[_Asked]:
    of_lengths = random.Random(f"lengths {seeds.lengths} {app.name}")
    of_prompts = random.Random(f"prompts {seeds.prompts} {app.name}")
    texts = _texts(plan, app)
    wanted, contexts = _wanted(plan, app, count, of_lengths, seeds)
    limit = _limit(plan, app)
    if wanted is None:
        own = [text for text in texts if text.tokens <= plan.longest]
        if not own:
            raise ConfigError(f"{app.prompts}: every answer is longer than {plan.longest} tokens")
        forced = bool(plan.forced)
        chosen = of_prompts.choices(own, k=count)
        return [_Asked(app, text, min(text.tokens, limit), text.prompt_tokens, forced) for text in chosen]
    matched = app.prompts == "pool"
    forced = plan.forced if plan.forced is not None else not (matched and _source(app, plan) == "azure")
    made = []
    sizes = [text.tokens for text in texts]
    for number, tokens in enumerate(wanted):
        text = texts[of_prompts.choice(around(sizes, tokens, _NEAREST))] if matched else of_prompts.choice(texts)
        size = contexts[number] if contexts is not None else text.prompt_tokens
        made.append(_Asked(app, text, min(tokens if forced else text.tokens or tokens, limit), size, forced))
    return made


def _limit(plan: Plan, app: App) -> int:
    """What its clients send as the most to generate."""
    return app.max_tokens or plan.longest


def _texts(plan: Plan, app: App) -> Sequence[Prompt]:
    """By length, where it is the pool."""
    if app.prompts == "pool":
        return [Prompt(a.prompt, (), a.answer, a.tokens, a.prompt_tokens, a.kind) for a in pool()]
    return prompts.read(app.prompts, turns=plan.turns)


def _source(app: App, plan: Plan) -> str:
    if app.lengths:
        return app.lengths
    if _is_trace(app.arrivals or plan.arrivals):
        return app.arrivals or plan.arrivals
    return "azure" if app.prompts == "pool" else "own"


def _wanted(
    plan: Plan, app: App, count: int, rng: random.Random, seeds: Seeds
) -> tuple[list[int] | None, list[int] | None]:
    """Lengths of the answers and, from a trace, of the prompts; None: those recorded with the texts."""
    source = _source(app, plan)
    spec = parse(source, (*lengths.KINDS, "azure", "trace", "own"), "lengths")
    if spec.name == "own":
        spec.only()
        return None, None
    if spec.name == "azure":
        spec.only()
        known = [tokens for tokens in trace()[1] if tokens <= plan.longest]
        return rng.choices(known, k=count), None
    if spec.name == "trace":
        rows = traces.read(_file(spec))
        if source == (app.arrivals or plan.arrivals):
            # Row by row, as they came.
            chosen = [rows[number % len(rows)] for number in _piece(spec, count, seeds)]
        else:
            chosen = rng.choices([row for row in rows if row.tokens <= plan.longest], k=count)
        return [min(row.tokens, plan.longest) for row in chosen], [row.prompt_tokens for row in chosen]
    return lengths.draw(source, count, rng, longest=plan.longest), None


# ---- when -----------------------------------------------------------------------------------------------------------


def _is_trace(arrivals_: str) -> bool:
    return arrivals_.partition(":")[0] == "trace"


def _file(spec: Spec) -> str:
    spec.only("speed", "start", rest=1)
    if not spec.rest:
        raise ConfigError(f"{spec.text!r}: expected trace:FILE")
    return spec.rest[0]


def _piece(spec: Spec, count: int, seeds: Seeds) -> range:
    """Rows of a trace, wrapping around: each seed has a piece of its own, since the same arrivals again would be no
    independent sample."""
    start = int(spec.number("start", 0.0, above=-1.0)) + seeds.arrivals * count
    return range(start, start + count)


def check_pieces(arrivals_: str, count: int, seeds: int) -> None:
    """Raises ConfigError where a trace is too short for ``count`` requests of every seed to be rows of their own."""
    if seeds < 2 or not _is_trace(arrivals_):
        return
    rows = len(traces.read(_file(parse(arrivals_, ("trace",), "arrivals"))))
    if count * seeds > rows:
        raise ConfigError(
            f"{arrivals_!r}: {rows} rows are no {seeds} independent workloads of {count} requests: fewer seeds, or "
            "fewer requests"
        )


def _times(plan: Plan, app: App, count: int, rate: float | None, seeds: Seeds) -> list[float]:
    rng = random.Random(f"arrivals {seeds.arrivals} {app.name}")
    text = app.arrivals or plan.arrivals
    spec = parse(text, (*arrivals.KINDS, "azure", "trace"), "arrivals")
    if spec.name == "trace":
        return _replay(spec, count, rate, seeds)
    assert rate is not None
    if spec.name == "azure":
        spec.only()
        return arrivals.times(arrivals.replayed(count, rate, trace()[0], rng))
    return arrivals.draw(text, count, rate, rng)


def _replay(spec: Spec, count: int, rate: float | None, seeds: Seeds) -> list[float]:
    """Consecutive rows of a trace, ``speed`` times as fast, or so fast that the mean rate is ``rate``; one that is too
    short starts over."""
    rows = traces.read(_file(spec))
    turn = rows[-1].at + rows[-1].at / max(len(rows) - 1, 1)
    at = [turn * (number // len(rows)) + rows[number % len(rows)].at for number in _piece(spec, count, seeds)]
    at = [moment - at[0] for moment in at]
    if rate is None:
        speed = spec.number("speed", 1.0)
    elif "speed" in spec.options:
        raise ConfigError(f"{spec.text!r}: speed: leave it out where a rate or a load says how fast")
    else:
        speed = at[-1] * rate / max(count - 1, 1) if at[-1] > 0 else 1.0
    return [moment / speed for moment in at]


def _request(number: int, at: float, one: _Asked, plan: Plan) -> Request:
    app, text = one.app, one.prompt
    turns = text.turns
    size = one.prompt_tokens
    if app.system:
        turns = (("system", app.system), *(turn for turn in turns if turn[0] != "system"))
        size += prompts.guess_tokens(app.system)
    return Request(
        id=f"r{number:05d}",
        at=round(at, 6),
        prompt=text.prompt,
        prompt_tokens=size,
        answer=text.answer,
        tokens=one.tokens,
        app=app.name or text.app,
        max_tokens=_limit(plan, app),
        turns=turns,
        forced=one.forced,
    )


# ---- beside the workload --------------------------------------------------------------------------------------------


def write_replay(workload: Workload, path: Path) -> int:
    """Prompt and recorded answer of every request that has one, once each, as ``sim-engine --replay`` reads them."""
    rows = {request.prompt: request.answer for request in workload.requests if request.answer}
    with path.open("w", encoding="utf-8") as file:
        for prompt, answer in rows.items():
            file.write(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
    return len(rows)


def write_oracle(workload: Workload, model: str, path: Path) -> int:
    """The lengths as the ``oracle`` predictor reads them. Raises ConfigError where one prompt has two lengths."""
    rows: dict[str, int] = {}
    for request in workload.requests:
        if rows.setdefault(request.prompt, request.tokens) != request.tokens:
            raise ConfigError(
                f"the prompt {request.prompt[:40]!r} has answers of different length: no oracle knows which"
            )
    write_lengths(path, [(model, prompt, tokens) for prompt, tokens in rows.items()])
    return len(rows)


# ---- what was made --------------------------------------------------------------------------------------------------


def describe(workload: Workload) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table: one row per application, and one for all."""
    by_app: dict[str, list[Request]] = {}
    for request in workload.requests:
        by_app.setdefault(request.app or "-", []).append(request)
    heads = ["", "requests", "per s", "CV of gaps", "prompt", "answer: mean", "p50", "p90", "p99", "max", "forced"]
    rows = [_line(name, ours) for name, ours in sorted(by_app.items())] if 1 < len(by_app) <= 20 else []
    return heads, [*rows, _line("all", list(workload.requests))]


def _line(name: str, ours: list[Request]) -> list[str]:
    gaps = [b.at - a.at for a, b in pairwise(ours)]
    rate = 1 / fmean(gaps) if gaps and fmean(gaps) > 0 else None
    variation = pstdev(gaps) / fmean(gaps) if rate is not None else None
    tokens = sorted(request.tokens for request in ours)
    lengths_ = [f"{fmean(tokens):.0f}", *(_at(tokens, q) for q in (0.5, 0.9, 0.99)), tokens[-1]]

    numbers: list[Any] = [
        len(ours),
        "–" if rate is None else f"{rate:.3g}",
        "–" if variation is None else f"{variation:.2f}",
        f"{fmean(request.prompt_tokens for request in ours):.0f}",
        *(lengths_ if tokens[-1] else ["–"] * len(lengths_)),
        f"{sum(request.forced for request in ours) / len(ours):.0%}",
    ]
    return [name, *map(str, numbers)]


def _at(ordered: Sequence[int], q: float) -> int:
    """A percentile of a file, not an estimate of anything: the sample is the whole."""
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def about(workload: Workload) -> dict[str, Any]:
    """The same in a few numbers, for a summary."""
    span = workload.requests[-1].at - workload.requests[0].at
    lengths_ = sorted(request.tokens for request in workload.requests)
    return {
        "requests": len(workload.requests),
        "tokens": workload.tokens,
        "answer_tokens": {
            "mean": round(fmean(lengths_), 1),
            "p50": _at(lengths_, 0.5),
            "p90": _at(lengths_, 0.9),
            "max": lengths_[-1],
        },
        "forced": round(sum(request.forced for request in workload.requests) / len(lengths_), 3),
        "seconds": round(span, 3),
        "tokens_per_second": round(workload.tokens / span, 2) if span > 0 else None,
    }


EXAMPLE_MIX: list[dict[str, Any]] = [
    {"name": "classify", "share": 3, "system": "Answer with one word.", "lengths": "lognormal:median=6,sigma=0.4"},
    {"name": "chat", "share": 4, "lengths": "lognormal:median=180,sigma=0.8"},
    {"name": "code", "share": 2, "lengths": "lognormal:median=350,sigma=0.6", "arrivals": "onoff:on=10,off=20"},
    {"name": "reason", "share": 1, "system": "Think step by step.", "lengths": "pareto:min=300,alpha=1.6"},
]
"""What ``--mix example`` takes: four applications with habits of their own."""
