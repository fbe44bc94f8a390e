"""The plots of an experiment. Each tells one thing; a plot that the data cannot fill is left out.

Knows: matplotlib, what is drawn. Never: files, HTML.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from loadtest.compare import AGAIN, Arm
from loadtest.experiment import Experiment
from loadtest.records import Row, Run
from loadtest.report.style import BASE, FIGURE, FOREGROUND, GROUND, MUTED, SEQUENCE, SERIES, SIZES, WIDE
from loadtest.settings import PERFECT
from loadtest.tables import differences

__all__ = ["Plot", "draw", "lanes", "svg", "waiting"]

_SAME = 1e-6
"""Seconds between an end and a start that are the same moment."""

_POINTS = 1500
"""Of a scatter, per setting."""


class Plot(NamedTuple):
    name: str
    title: str
    words: str
    """What to see in it."""
    figure: Figure
    wide: bool = False


class _Data(NamedTuple):
    """What the plots draw from."""

    experiment: Experiment
    arms: dict[str, Arm]
    """Without the second arm of an A/A pair."""
    colours: dict[str, str]
    again: Arm | None


def draw(experiment: Experiment, arms: Mapping[str, Arm]) -> list[Plot]:
    """Every plot that the data can fill, in the order of the page."""
    shown = {name: arm for name, arm in arms.items() if not name.endswith(f" {AGAIN}")}
    others = [name for name in shown if name != experiment.base]
    colours = {experiment.base: BASE if others else SERIES[0]}
    colours |= {name: SERIES[n % len(SERIES)] for n, name in enumerate(others)}
    again = next((arm for name, arm in arms.items() if name.endswith(f" {AGAIN}")), None)
    data = _Data(experiment, shown, colours, again)
    makers: Sequence[Callable[[_Data], Plot | None]] = (
        _comparison, _distribution, _by_decile, _length, _queue, _timeline, _errors,
    )  # fmt: skip
    with mpl.rc_context(SIZES):  # type: ignore[arg-type]
        return [plot for plot in (make(data) for make in makers) if plot is not None]


def svg(plot: Plot) -> str:
    """The drawing as SVG, with its text as text."""
    out = io.StringIO()
    with mpl.rc_context(SIZES):  # type: ignore[arg-type]
        plot.figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _axes(size: tuple[float, float] = FIGURE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _plain(axis: Any) -> None:
    """Logarithmic, with plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _pair(data: _Data) -> list[str]:
    """The base, and the last setting that does not know everything."""
    others = [name for name in data.arms if name != data.experiment.base]
    others = [name for name in others if name != PERFECT] or others
    return [data.experiment.base, *others[-1:]]


def _done(arm: Arm) -> list[Row]:
    return [row for run in arm.runs.values() for row in run.rows if not row.error and row.end is not None]


# ---- the comparison -------------------------------------------------------------------------------------------------

_FOREST = {
    "jct.mean": "JCT, mean",
    "jct.p50": "JCT, median",
    "jct.p90": "JCT, p90",
    "jct.p99": "JCT, p99",
    "ttft.mean": "TTFT, mean",
    "slowdown.longest_decile": "slowdown,\nlongest tenth",
}


def _comparison(data: _Data) -> Plot | None:
    found = [d for d in differences(data.experiment, data.arms) if d.metrics]
    if not found:
        return None
    names = [name for name in _FOREST if any(name in d.metrics for d in found)]
    figure, axes = _axes((FIGURE[0], max(FIGURE[1], 0.11 * len(names) * (len(found) + 1) + 0.8)))
    step = 0.8 / len(found)
    for number, difference in enumerate(found):
        colour = data.colours[difference.arm]
        for place, name in enumerate(names):
            if (entry := difference.metrics.get(name)) is None:
                continue
            at = place - 0.4 + step * (number + 0.5)
            half = entry.half_width if entry.half_width < float("inf") else 0.0
            axes.plot([entry.ratio - half, entry.ratio + half], [at, at], color=colour, lw=2.4, solid_capstyle="round")
            axes.plot([entry.ratio], [at], "o", color=colour, ms=5.5)
    axes.axvline(1, color=FOREGROUND, lw=1)
    axes.set_yticks(range(len(names)), [_FOREST[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"ratio to {data.experiment.base} (left of the line: less)")
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, 0), min(high, 5))
    _legend(axes, [(d.arm, data.colours[d.arm]) for d in found])
    seeds = len(data.experiment.workloads)
    words = f"Each dot is a mean over {seeds} workload seeds, its bar the 95 % interval, paired by seed."
    return Plot("comparison", f"What changes against {data.experiment.base}", words, figure)


def _legend(axes: Axes, entries: Sequence[tuple[str, str]], **options: Any) -> None:
    handles = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in entries]
    where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=handles, ncols=min(len(handles), 3), **{**where, **options})


def _by_decile(data: _Data) -> Plot | None:
    found = [d for d in differences(data.experiment, data.arms) if d.by_decile]
    if not found:
        return None
    figure, axes = _axes()
    for difference in found:
        colour = data.colours[difference.arm]
        ratios = [entry.ratio for entry in difference.by_decile]
        axes.plot(range(1, 11), ratios, "-o", color=colour, ms=4)
        halves = [entry.half_width for entry in difference.by_decile]
        if max(halves) < float("inf"):
            low = [max(r - h, 0.02) for r, h in zip(ratios, halves, strict=True)]
            high = [r + h for r, h in zip(ratios, halves, strict=True)]
            axes.fill_between(range(1, 11), low, high, color=colour, alpha=0.13, lw=0)
    axes.axhline(1, color=FOREGROUND, lw=1)
    axes.set_yscale("log")
    low_, high_ = axes.get_ylim()
    axes.set_ylim(max(low_, 0.02), min(high_, 20))
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks)
    _plain(axes.yaxis)
    axes.set_xticks(range(1, 11))
    axes.set_xlabel("tenth of the answers by length: 1 shortest, 10 longest")
    axes.set_ylabel(f"mean JCT over {data.experiment.base}'s")
    _legend(axes, [(d.arm, data.colours[d.arm]) for d in found])
    return Plot(
        "deciles", "Who gains and who pays", "Short answers jump ahead; what they gain, long ones wait.", figure
    )


# ---- distributions --------------------------------------------------------------------------------------------------


def _distribution(data: _Data) -> Plot | None:
    figure, axes = _axes()
    for name, arm in data.arms.items():
        offered = sum(len(run.rows) for run in arm.runs.values())
        jct = sorted(row.jct for row in _done(arm))
        if not jct:
            continue
        step = max(1, len(jct) // 800)
        places = [*range(0, len(jct), step), len(jct) - 1]
        values, shares = [jct[n] for n in places], [(n + 1) / offered for n in places]
        axes.plot(values, shares, color=data.colours[name], drawstyle="steps-post")
    if not axes.lines:
        return None
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("job completion time, seconds")
    axes.set_ylabel("requests that took no longer")
    _legend(axes, [(name, data.colours[name]) for name in data.arms])
    words = (
        "All requests offered, all seeds. Further left is sooner; where lines cross, somebody pays for somebody else."
    )
    return Plot("jct", "How long requests took", words, figure)


def _length(data: _Data) -> Plot | None:
    names = _pair(data)
    figure, axes = _axes()
    for name in names:
        rows = [row for row in _done(data.arms[name]) if row.tokens > 0 and row.jct > 0] if name in data.arms else []
        if not rows:
            continue
        chosen = random.Random(0).sample(rows, min(len(rows), _POINTS))
        axes.plot(
            [row.tokens for row in chosen], [row.jct for row in chosen], ".", ms=4.5, alpha=0.4,
            color=data.colours[name], mew=0,
        )  # fmt: skip
        middles = _medians(rows)
        axes.plot([at for at, _ in middles], [value for _, value in middles], color=data.colours[name], lw=2.6)
    if not axes.lines:
        return None
    alone = data.experiment.alone()
    if alone is not None:
        tokens = [row.tokens for arm in data.arms.values() for row in _done(arm) if row.tokens]
        sizes = [min(tokens), max(tokens)]
        prompt = median([row.prompt_tokens for arm in data.arms.values() for row in _done(arm)] or [0])
        line = [alone.seconds(int(size), int(prompt)) for size in sizes]
        axes.plot(sizes, line, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.set_xlabel("answer length, tokens")
    axes.set_ylabel("job completion time, seconds")
    entries = [(name, data.colours[name]) for name in names if name in data.arms]
    _legend(axes, [*entries, ("alone on the server", MUTED)] if alone is not None else entries)
    return Plot("length", "Completion time against length", "Dots are requests, lines their running median.", figure)


def _medians(rows: Sequence[Row], parts: int = 14) -> list[tuple[float, float]]:
    """Medians of equal groups by length."""
    ordered = sorted((row.tokens, row.jct) for row in rows)
    size = max(1, len(ordered) // parts)
    groups = [ordered[n : n + size] for n in range(0, len(ordered), size)]
    by_size: dict[float, list[float]] = {}
    for group in groups[:-1] if len(groups) > 1 and len(groups[-1]) < size else groups:
        by_size.setdefault(median(tokens for tokens, _ in group), []).extend(jct for _, jct in group)
    return [(tokens, median(jct)) for tokens, jct in by_size.items()]


# ---- over time ------------------------------------------------------------------------------------------------------


def _first(arm: Arm) -> Run:
    return arm.runs[min(arm.runs)]


def _queue(data: _Data) -> Plot | None:
    figure, axes = _axes()
    told = False
    for name, arm in data.arms.items():
        steps = waiting(_first(arm))
        if not steps:
            continue
        told = True
        axes.step(
            [at for at, _ in steps], [count for _, count in steps], where="post", color=data.colours[name], lw=1.3
        )
    if not told:
        return None
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("seconds")
    axes.set_ylabel("requests waiting")
    _legend(axes, [(name, data.colours[name]) for name in data.arms])
    seed = min(next(iter(data.arms.values())).runs)
    words = f"Seed {seed}. Waiting: in the gateway, before the first call or between two."
    return Plot("queue", "The queue over time", words, figure)


def waiting(run: Run) -> list[tuple[float, int]]:
    """(time, requests waiting), at every change. Where calls are not known, from the arrival to the first token."""
    changes: list[tuple[float, int]] = []
    for row in run.rows:
        since = row.intended
        for leg in row.legs:
            changes += [(since, 1), (max(leg.start, since), -1)]
            since = leg.end
        if not row.legs and row.first is not None:
            changes += [(since, 1), (row.first, -1)]
    changes.sort()
    totals = accumulate(change for _, change in changes)
    steps = list(zip((at for at, _ in changes), totals, strict=True))
    return steps if len(steps) <= 4000 else steps[:: len(steps) // 4000 + 1]


def lanes(run: Run) -> list[list[tuple[float, float, int, bool]]]:
    """Slots as they were used: (start, end, tokens of the whole answer, cut short by a preemption).

    A call that was sent while every slot was taken waits in the engine, and has a slot when one comes free before its
    first token. One without a token had none.
    """
    calls = sorted(
        (leg.upstream, leg.first, leg.start, leg.end, row.tokens, leg.why == "preempted")
        for row in run.rows
        for leg in row.legs
        if leg.first is not None and leg.end > leg.start
    )
    made: dict[str, list[list[tuple[float, float, int, bool]]]] = {}
    for upstream, first, start, end, tokens, cut in calls:
        slots = made.setdefault(upstream, [])
        lane = next((bars for bars in slots if bars[-1][1] <= start + _SAME), None)
        if lane is None:
            lane = min(
                (bars for bars in slots if bars[-1][1] <= first + _SAME), key=lambda bars: bars[-1][1], default=[]
            )
        if lane:
            start = max(start, lane[-1][1])
        else:
            slots.append(lane)
        lane.append((start, max(end, start), tokens, cut))
    return [bars for slots in made.values() for bars in slots]


def _timeline(data: _Data) -> Plot | None:
    names = _pair(data)
    rows = {name: lanes(_first(data.arms[name])) for name in names if name in data.arms}
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return None
    sizes = sorted(tokens for found in rows.values() for lane in found for _, _, tokens, _ in lane)
    edges = [sizes[len(sizes) * n // len(SEQUENCE)] for n in range(1, len(SEQUENCE))]
    begin, end = _window(next(iter(rows.values())), waiting(_first(data.arms[names[0]])))
    figure = Figure(
        figsize=(WIDE[0], min(1.1 + sum(0.32 * min(len(f), 16) + 0.5 for f in rows.values()), 11)), layout="constrained"
    )
    parts = figure.subplots(len(rows), 1, sharex=True, squeeze=False)
    for axes, (name, found) in zip(parts[:, 0], rows.items(), strict=True):
        _bars(axes, found[:16], edges, begin, end)
        axes.set_title(name, loc="left", color=FOREGROUND)
    axes.set_xlabel("seconds")
    bounds = [sizes[0], *edges, sizes[-1]]
    handles: list[Any] = [
        Patch(color=colour, label=f"{low}–{high}")
        for colour, low, high in zip(SEQUENCE, bounds, bounds[1:], strict=False)
    ]
    handles.append(Line2D([], [], color=SERIES[5], marker="|", ls="", ms=10, mew=2.2, label="preempted"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), title="tokens of the whole answer")
    words = (
        f"One row is a slot, one bar a call, stronger for longer answers. First seed, second {begin:.0f} to {end:.0f}."
    )
    return Plot("timeline", "Who ran when", words, figure, wide=True)


def _window(
    found: Sequence[Sequence[tuple[float, float, int, bool]]], queue: Sequence[tuple[float, int]]
) -> tuple[float, float]:
    """A stretch that can be read, some fourteen calls a slot, around the time when most requests waited."""
    ends = [bar[1] for lane in found for bar in lane]
    starts = [bar[0] for lane in found for bar in lane]
    calls = sum(len(lane) for lane in found)
    whole = max(ends) - min(starts)
    length = min(whole, whole * 14 * len(found) / max(calls, 1))
    busiest = max(queue, key=lambda step: step[1])[0] if queue else min(starts) + whole / 2
    begin = min(max(busiest - length / 2, min(starts)), max(ends) - length)
    return begin, begin + length


def _bars(
    axes: Axes,
    found: Sequence[Sequence[tuple[float, float, int, bool]]],
    edges: Sequence[int],
    begin: float,
    end: float,
) -> None:
    for number, lane in enumerate(found):
        for start, stop, tokens, cut in lane:
            if stop < begin or start > end:
                continue
            colour = SEQUENCE[sum(tokens >= edge for edge in edges)]
            axes.barh(number, stop - start, left=start, height=0.86, color=colour, edgecolor=GROUND, lw=0.9)
            if cut:
                axes.plot([stop, stop], [number - 0.46, number + 0.46], color=SERIES[5], lw=2.2)
    axes.set_xlim(begin, end)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.grid(visible=False)
    axes.set_ylabel(f"{len(found)} slots")
    axes.spines["left"].set_visible(False)


# ---- predictions ----------------------------------------------------------------------------------------------------


def _errors(data: _Data) -> Plot | None:
    figure, axes = _axes()
    window = data.experiment.window
    told = []
    for name, arm in data.arms.items():
        found: dict[int, list[tuple[float, int]]] = {}
        for figures in arm.figures.values():
            for entry in figures["predictions"]["by_window"]:
                found.setdefault(entry["window"], []).append((entry["mae"], entry["n"]))
        steps = [
            (number, _weighted(entries))
            for number, entries in sorted(found.items())
            if sum(n for _, n in entries) >= 20
        ]
        if not steps or max(value for _, value in steps) == 0:
            continue
        told.append(name)
        axes.plot([n * window for n, _ in steps], [value for _, value in steps], "-o", ms=4, color=data.colours[name])
    if not told:
        return None
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens so far when the estimate was made")
    axes.set_ylabel("mean absolute error, tokens")
    _legend(axes, [(name, data.colours[name]) for name in told])
    words = "Estimates of what remains, by window. Those still running late are the long ones, so errors need not fall."
    return Plot("errors", "How far off the predictions were", words, figure)


def _weighted(entries: Sequence[tuple[float, int]]) -> float:
    return sum(value * n for value, n in entries) / sum(n for _, n in entries)
