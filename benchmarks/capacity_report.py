"""Tables of what ``benchmarks.capacity`` measured: ratios paired by repeat or seed, with 95 % t intervals over them.

Knows: the rows. Never: how they came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loadtest.stats import t95

__all__ = ["interval", "rows", "show"]

Row = dict[str, Any]
Table = dict[str, dict[int, Mapping[str, float]]]
"""Figures by setting and repeat."""

STRAIGHT, AGAIN = "straight", "straight, again"


def rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    half = t95(len(values)) * stdev(values) / sqrt(len(values)) if len(values) > 1 else float("inf")
    return fmean(values), half


def show(paths: Iterable[Path]) -> None:
    for path in paths:
        for question, found in _newest(rows(path)).items():
            _heading(json.loads(question), found)
            table = _table(found)
            if STRAIGHT not in table:
                continue
            if "rate" in next(iter(table[STRAIGHT].values())):
                _capacity(table)
            else:
                _completion(table)


def _newest(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by question, those of the code that was measured last."""
    by_question: dict[str, list[Row]] = {}
    for row in found:
        by_question.setdefault(json.dumps(row["question"], sort_keys=True), []).append(row)
    return {
        question: [row for row in group if row["code"] == group[-1]["code"]] for question, group in by_question.items()
    }


def _heading(question: Mapping[str, Any], found: Sequence[Row]) -> None:
    last = found[-1]
    print("\n" + ", ".join(f"{name} {value}" for name, value in question.items()))
    busy = [row["busy"] for row in found]
    print(
        f"commit {last['commit']}, {last['machine']}, {found[0]['date']} to {last['date'][-5:]} UTC, "
        f"load average {min(busy):.1f} to {max(busy):.1f}"
    )


def _table(found: Sequence[Row]) -> Table:
    table: Table = {}
    for row in found:
        knowledge = row.get("knowledge")
        name = row["setting"] if knowledge in (None, "perfect") else f"{row['setting']} / {knowledge}"
        if not row["figures"].get("errors"):
            table.setdefault(name, {})[row["repeat"]] = row["figures"]
    return table


_PER = {"second": "seconds", "engine CPU second": "cpu", "step": "steps"}
"""What tokens are divided by, and the figure that says how much of it there was."""


def _capacity(table: Table) -> None:
    """Ratios to the mean of the two straight runs of the same repeat."""
    both = [n for n in sorted(table[STRAIGHT]) if n in table.get(AGAIN, {})]
    for per, figure in _PER.items():
        if not all(run.get(figure) for runs in table.values() for run in runs.values()):
            continue
        rates = {name: {n: run["tokens"] / run[figure] for n, run in runs.items()} for name, runs in table.items()}
        title = f"tokens per {per}"
        print(f"{title:35}  {'over straight (95 %)':26}{'begun/1000 tok':>15}{'calls':>7}{'preempt':>9}")
        for name, runs in table.items():
            if name == AGAIN:
                ratios = [rates[AGAIN][n] / rates[STRAIGHT][n] for n in both]
            else:
                ratios = [rates[name][n] / fmean((rates[STRAIGHT][n], rates[AGAIN][n])) for n in both if n in runs]
            mean, half = interval(ratios) if ratios else (float("nan"), float("nan"))
            cell = "" if name == STRAIGHT else f"{mean:.4f} ± {half:.4f} (n={len(ratios)})"
            begun = fmean(1000 * run["begun"] / run["tokens"] for run in runs.values())
            label = "A/A" if name == AGAIN else name
            print(
                f"  {label:24}{fmean(rates[name].values()):9.2f}  {cell:26}{begun:15.2f}"
                f"{_mean(runs, 'calls'):7.0f}{_mean(runs, 'preemptions'):9.1f}"
            )


def _completion(table: Table) -> None:
    first = table[STRAIGHT]
    figures = [name for name in ("mean", "p50", "p99") if name in next(iter(first.values()))]
    heads = "".join(f"{name + ' over straight':22}" for name in figures)
    print(f"{'':30}{'mean, s':>8}{'p50':>7}   {heads}{'n':>3}  preempt.  lag, s")
    for name, runs in table.items():
        shared = [n for n in sorted(runs) if n in first]
        cells = []
        for figure in figures:
            mean, half = interval([runs[n][figure] / first[n][figure] for n in shared])
            cells.append(f"{mean:.3f} ± {half:.3f}" if name != STRAIGHT else "")
        unequal = [n for n in shared if runs[n]["tokens"] != first[n]["tokens"]]
        lag = max(run.get("lag", 0.0) for run in runs.values())
        print(
            f"{name:30}{_mean(runs, 'mean'):8.2f}{_mean(runs, 'p50'):7.2f}   "
            + "".join(f"{cell:22}" for cell in cells)
            + f"{len(shared):3}  {_mean(runs, 'preemptions'):8.2f}{lag:8.2f}"
            + ("  UNEQUAL WORK" if unequal else "")
        )


def _mean(runs: Mapping[int, Mapping[str, float]], name: str) -> float:
    return fmean(run.get(name, 0.0) for run in runs.values())
