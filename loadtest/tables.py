"""An experiment in tables: what a person reads on the console, in Markdown and in HTML. Text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loadtest.compare import AGAIN, MORE_IS_BETTER, Arm, Difference, contrast, unequal_work
from loadtest.experiment import Experiment
from loadtest.figures import flat
from loadtest.stats import Comparison, mean_of

__all__ = ["Table", "differences", "markdown", "ratio", "tables", "verdict"]

_SHOWN: tuple[tuple[str, str, int], ...] = (
    ("jct.mean", "JCT s", 2),
    ("jct.p50", "p50", 2),
    ("jct.p90", "p90", 2),
    ("jct.p99", "p99", 2),
    ("wait.mean", "wait", 2),
    ("ttft.mean", "TTFT", 2),
    ("tpot.mean", "TPOT ms", 0),
    ("slowdown.mean", "slowdown", 1),
    ("slowdown.longest_decile", "longest tenth", 1),
    ("goodput.share", "goodput", 2),
    ("throughput.tokens_per_second", "tok/s", 0),
    ("preemptions", "preempt", 0),
    ("calls", "calls", 0),
    ("requests.completed", "n", 0),
    ("requests.failed", "failed", 0),
)
_COMPARED = {
    "jct.mean": "JCT mean",
    "jct.p50": "p50",
    "jct.p90": "p90",
    "jct.p99": "p99",
    "ttft.mean": "TTFT mean",
    "slowdown.mean": "slowdown",
    "slowdown.longest_decile": "longest tenth",
    "goodput.share": "goodput",
}


_SEEDS = {"sim": 10, "live": 5}
"""Workload seeds that a result should rest on, at least."""


class Table(NamedTuple):
    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""


def ratio(found: Comparison | None) -> str:
    """``0.81 ± 0.04`` (95 % over seeds); without an interval from a single seed."""
    if found is None:
        return "–"
    if found.half_width == float("inf"):
        return f"{found.ratio:.2f}"
    return f"{found.ratio:.2f} ± {found.half_width:.2f}"


def differences(experiment: Experiment, arms: Mapping[str, Arm]) -> list[Difference]:
    """Every other arm against the base, the A/A pair against its own setting; on runs that came to their end."""
    found = []
    for name, arm in arms.items():
        base = name.removesuffix(f" {AGAIN}") if name.endswith(f" {AGAIN}") else experiment.base
        if name != base and base in arms and arm.whole & arms[base].whole:
            found.append(contrast(arm, arms[base]))
    return found


def tables(experiment: Experiment, arms: Mapping[str, Arm]) -> list[Table]:
    """Everything there is to say, most important first."""
    found = differences(experiment, arms)
    made = []
    if found:
        made.append(_comparison(experiment, found))
    made.append(_figures(experiment, arms))
    if found and any(difference.by_decile for difference in found):
        made.append(_deciles(found))
    if any(figures["predictions"]["made"] for arm in arms.values() for figures in arm.figures.values()):
        made.append(_predictions(arms))
    if found:
        made.append(_worst(found))
    return made


def _comparison(experiment: Experiment, found: Sequence[Difference]) -> Table:
    names = [name for name in _COMPARED if any(name in difference.metrics for difference in found)]
    rows = [
        [
            difference.arm,
            *(ratio(difference.metrics.get(name)) for name in names),
            f"{difference.wins:.0%}",
        ]
        for difference in found
    ]
    seeds = max((metric.seeds for difference in found for metric in difference.metrics.values()), default=1)
    enough = _SEEDS[experiment.target]
    few = f", fewer than the {enough} that a result should rest on" if seeds < enough else ""
    note = (
        f"Under 1 is less. ± is a 95 % interval over {seeds} workload seeds, paired by seed{few}. "
        if seeds > 1
        else "One workload seed: no interval, an example rather than a measurement. "
    )
    if any(name in MORE_IS_BETTER for name in names):
        note += "Of goodput, over 1 is better. "
    if any(difference.arm.endswith(AGAIN) for difference in found):
        note += f"The row “{AGAIN}” is a setting against itself: the noise floor. "
    if "sjf" not in experiment.settings and any(name.startswith("isrtf") for name in experiment.settings):
        note += "No sjf beside it: what interrupting adds to the mere order is not told. "
    note += "Slowdown: JCT over what the request takes alone, and that of the longest tenth of answers. "
    note += "Sooner: share of requests that ended earlier."
    return Table(f"Ratio to {experiment.base}", ["", *(_COMPARED[name] for name in names), "sooner"], rows, note)


def _figures(experiment: Experiment, arms: Mapping[str, Arm]) -> Table:
    shown = [
        entry
        for entry in _SHOWN
        if any(entry[0] in flat(figures) for arm in arms.values() for figures in arm.figures.values())
    ]
    # Where the runs were stopped there are more seeds of some arms than of others, and runs without their long answers:
    # means over different work compare nothing.
    made = [arm.whole for arm in arms.values()]
    common = set.intersection(*made) if made else set()
    rows = []
    for name, arm in arms.items():
        each = [flat(figures) for seed, figures in arm.figures.items() if not common or seed in common]
        rows.append([name, *(_cell(each, path, digits) for path, _, digits in shown)])
    note = "Means over seeds of each run's figure, n: requests of a run that completed. A dash: fewer than ten samples "
    note += "beyond that percentile. Wait: in the gateway; a call in hand, in the engine's queue, counts as begun."
    if common and any(seeds != common for seeds in made):
        note += f" Only the {len(common)} of {len(set.union(*made))} seeds that every setting ran to the end."
    if not common and len(arms) > 1:
        note += " No seed was run to its end under every setting: these are of different work, and compare nothing."
    if experiment.target == "live" and not any(
        run.legs for arm in arms.values() for r in arm.runs.values() for run in r.rows
    ):
        note += " Waits and calls are not told by this server."
    return Table("Figures", ["", *(label for _, label, _ in shown)], rows, note)


def _cell(each: Sequence[Mapping[str, float]], path: str, digits: int) -> str:
    value = mean_of([figures.get(path) for figures in each])
    if value is None:
        return "–"
    return f"{value * 1000 if path == 'tpot.mean' else value:,.{digits}f}"


def _deciles(found: Sequence[Difference]) -> Table:
    rows = [
        [difference.arm, *(_starred(part) for part in difference.by_decile)]
        for difference in found
        if difference.by_decile
    ]
    heads = ["", "shortest", *(f"{n}." for n in range(2, 10)), "longest"]
    note = "Who pays for the others' gain. A star: the 95 % interval over seeds leaves 1 out."
    return Table("Mean JCT by tenth of the answer's length, ratio", heads, rows, note)


def _starred(found: Comparison) -> str:
    return f"{found.ratio:.2f}{'*' if found.differs else ''}"


def _predictions(arms: Mapping[str, Arm]) -> Table:
    rows = []
    for name, arm in arms.items():
        each: list[Any] = [figures["predictions"] for figures in arm.figures.values()]
        if not any(one["made"] for one in each):
            continue
        values = [mean_of([one[key] for one in each]) for key in ("made", "mae", "bias", "kendall_tau")]
        made, mae, bias, tau = values
        rows.append(
            [
                name,
                "–" if made is None else f"{made:.0f}",
                "–" if mae is None else f"{mae:.0f}",
                "–" if bias is None else f"{bias:+.0f}",
                "–" if tau is None else f"{tau:.2f}",
            ]
        )
    heads = ["", "estimates a run", "MAE tokens", "bias tokens", "Kendall's tau"]
    return Table("Predictions", heads, rows, "Tau: of the first estimates against the lengths; 1 is the right order.")


def _worst(found: Sequence[Difference]) -> Table:
    rows = [
        [
            difference.arm,
            f"{row['id']} of seed {row['seed']}",
            f"{row['tokens']}",
            f"{row['base_jct']:.2f}",
            f"{row['jct']:.2f}",
            f"{row['factor']:.1f}",
        ]
        for difference in found
        for row in difference.worst[:2]
    ]
    return Table("Worst regressions", ["", "request", "tokens", "base s", "s", "factor"], rows)


def verdict(experiment: Experiment, arms: Mapping[str, Arm]) -> list[str]:
    """What to know before believing the tables, and what they come to, in sentences."""
    said = list(experiment.faults())
    if (users := next((run.users for run in experiment.runs if run.users is not None), None)) is not None:
        said.append(
            f"closed loop of {users} users: arrivals waited for answers, latencies are not those of open traffic"
        )
    if unequal := unequal_work(list(arms.values())):
        said.append(
            f"{unequal} requests got answers of different length, or none, under different settings: not equal work"
        )
    for difference in differences(experiment, arms):
        found = difference.metrics.get("jct.mean")
        if found is None:
            continue
        if difference.arm.endswith(f" {AGAIN}"):
            if found.half_width == float("inf"):
                said.append(f"A/A: one seed tells no noise from a difference (mean JCT {ratio(found)} of itself)")
                continue
            told = "differ more than chance allows: do not trust this comparison" if found.differs else "do not differ"
            said.append(f"A/A: two runs of {difference.base} {told} (mean JCT {ratio(found)})")
        elif found.half_width == float("inf"):
            continue
        elif found.differs:
            word = "less" if found.ratio < 1 else "more"
            said.append(
                f"{difference.arm}: mean JCT {abs(1 - found.ratio):.0%} {word} than {difference.base} ({ratio(found)})"
            )
        else:
            said.append(f"{difference.arm}: no difference shown in mean JCT from {difference.base} ({ratio(found)})")
    return said


def markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", "| " + " | ".join(table.heads) + " |"]
    lines.append("|---|" + "---:|" * (len(table.heads) - 1))
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join([*lines, "", table.note, ""] if table.note else [*lines, ""])
