"""The README's picture, from the rows of study `where`: one SVG that is right on light and on dark ground."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.studies.harness import Ratio
from benchmarks.tail import ROOT
from loadtest.report.style import BASE, CSS, FOREGROUND, MUTED, SERIES, SIZES, adapt

__all__ = ["draw"]

PATH = ROOT / "docs" / "gain.svg"


def draw(points: Mapping[str, Sequence[tuple[float, Ratio | None]]]) -> Path:
    """Mean completion time over first come's, by load, with 95 % intervals."""
    with mpl.rc_context(SIZES):  # type: ignore[arg-type]
        figure = Figure(figsize=(8.6, 3.9), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(1, color=FOREGROUND, lw=1)
        axes.text(0.5, 1.015, "first come, first served", color=MUTED, fontsize=9.5, va="bottom")
        for (name, found), colour in zip(points.items(), (BASE, SERIES[0]), strict=True):
            loads = [load for load, ratio in found if ratio is not None]
            ratios = [ratio for _, ratio in found if ratio is not None]
            axes.errorbar(
                loads, [r.mean for r in ratios], yerr=[r.half for r in ratios], color=colour, marker="o", ms=5,
                capsize=0, lw=2.2, elinewidth=1.4, label=name,
            )  # fmt: skip
        axes.set_ylim(0, 1.2)
        axes.set_xlabel("load: offered tokens over what the engine can make")
        axes.set_ylabel("mean completion time, ratio")
        axes.set_xticks([load for load, _ in next(iter(points.values()))])
        axes.legend(loc="lower left")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    drawing = adapt(
        out.getvalue(),
        "gain",
        "Mean completion time over first come's, by load: nothing gained at half load, a quarter at 0.95",
    )
    PATH.write_text(drawing.replace("<defs>", f"<style>{CSS}</style><defs>", 1) + "\n", encoding="utf-8")
    return PATH.relative_to(ROOT)
