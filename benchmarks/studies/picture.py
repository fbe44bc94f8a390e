"""Pictures: SVGs that are right on light and on dark ground. The README's, of `where` and of `real_gain`; `workers`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.studies.harness import Ratio
from benchmarks.tail import ROOT
from loadtest.report.style import BASE, CSS, FOREGROUND, MUTED, SERIES, SIZES, adapt

__all__ = ["draw", "measured", "scaling"]

PATH = ROOT / "docs" / "gain.svg"
SCALING = ROOT / "docs" / "scaling.svg"
MEASURED = ROOT / "docs" / "real-gain.svg"


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
        return _written(
            figure,
            PATH,
            "gain",
            "Mean completion time over first come's, by load: nothing gained at half load, a quarter at 0.95",
        )


def measured(panels: Mapping[str, Mapping[str, Ratio]], order: Sequence[str]) -> Path:
    """Mean completion time over first come's, with 95 % intervals: a panel a load, a line a setting, in that order."""
    settings = [name for name in order if any(name in found for found in panels.values())]
    with mpl.rc_context(SIZES):  # type: ignore[arg-type]
        figure = Figure(figsize=(8.6, 0.42 * len(settings) + 1.3), layout="constrained")
        for axes, (title, found) in zip(
            figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0], panels.items(), strict=True
        ):
            axes.axvline(1, color=FOREGROUND, lw=1)
            for name, ratio in found.items():
                colour = SERIES[0] if name.startswith("ISRTF elastic") else BASE
                axes.errorbar(
                    [ratio.mean], [settings.index(name)], xerr=[ratio.half], color=colour, marker="o", ms=5,
                    capsize=0, lw=0, elinewidth=1.8,
                )  # fmt: skip
                axes.text(ratio.mean, settings.index(name) - 0.22, f"{ratio.mean:.2f}", ha="center", fontsize=8.5,
                          color=FOREGROUND)  # fmt: skip
            axes.set_yticks(range(len(settings)), settings)
            axes.set_ylim(len(settings) - 0.5, -0.7)
            axes.set_xlim(0.4, 1.2)
            axes.set_title(title)
        figure.supxlabel("mean completion time over first come's", fontsize=10)
        alt = "Mean completion time over first come's on a real vLLM, by load and setting, with intervals"
        return _written(figure, MEASURED, "real-gain", alt)


def scaling(peaks: Mapping[str, Sequence[tuple[float, float]]], per_worker: float) -> Path:
    """The rate served with a mean wait of half a second, by number of workers; ``per_worker``: what one can do."""
    with mpl.rc_context(SIZES):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        last = max(count for found in peaks.values() for count, _ in found)
        axes.plot([0, last], [0, last * per_worker], color=MUTED, lw=1.2, ls="--", label="all slots busy")
        for (name, found), colour, size in zip(peaks.items(), (BASE, SERIES[0]), (8, 4.5), strict=True):
            axes.plot(*zip(*found, strict=True), color=colour, marker="o", ms=size, lw=2, label=name)
        axes.set_xlabel("workers of four slots behind one queue")
        axes.set_ylabel("requests/s, mean wait 0.5 s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
        return _written(figure, SCALING, "scaling", "Requests per second with a mean wait of half a second, by workers")


def _written(figure: Figure, path: Path, name: str, label: str) -> Path:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    drawing = adapt(out.getvalue(), name, label)
    path.write_text(drawing.replace("<defs>", f"<style>{CSS}</style><defs>", 1) + "\n", encoding="utf-8")
    return path.relative_to(ROOT)
