"""Run studies and print their tables.

    python -m benchmarks.studies where windows tail errors calibrated margin rescore workers overhead --budget 300
    python -m benchmarks.studies tail --show          # tables of what is stored, nothing is run

    where       where ordering helps: load, slots, kinds of lengths
    windows     fixed against elastic, length of a window, seam cost, who holds the last queue
    tail        p99, worst slowdown and starvation against aging shapes and the tail promise
    errors      prediction error against gain
    calibrated  the same numbers, taken for what such numbers meant before
    margin      how often to preempt
    rescore     the first estimate counted down, against estimates renewed every window
    workers     1 to 50 workers: the rate they serve with a mean queue wait under 0.5 s
    overhead    time per estimate against model speed: where the gain is gone

Budgets are CPU seconds per study; what does not fit is left for the next call. A run has 1,500 jobs; with ten seeds a
whole study takes one to five CPU minutes. Rows go to benchmarks/results/study-*.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.studies import harness
from benchmarks.studies.harness import RESULTS, Cell, Rows, plain, ratios, run, table

SJF, PURE = "sjf:order=mean", "isrtf:order=mean"
DEFAULT = "isrtf:aging=boost,factor=0.35"
PUBLISHED = "isrtf:order=mean,mode=fixed,rescore=always"
PERFECT, GUESS = "noisy0", "noisy0.6"


def where() -> tuple[list[Cell], Callable[[Rows], None]]:
    asked = [
        ("SJF, perfect", SJF, PERFECT),
        ("ISRTF, perfect", PURE, PERFECT),
        ("SJF, e^±0.6", SJF, GUESS),
        ("default, e^±0.6", DEFAULT, GUESS),
    ]
    lengths = ["azure", "chat", "heavy", "six", "equal", "code"]
    places = [(f"{work}, load 0.95, 4 slots", Cell(work=work)) for work in lengths]
    places += [(f"{work}, load {load}, 4 slots", Cell(work=work, load=load))
               for work, loads in (("azure", (0.5, 0.7, 0.85, 1.05, 1.2)), ("heavy", (0.7, 1.05)))
               for load in loads]  # fmt: skip
    places += [(f"{work}, load 0.95, {slots} slots", Cell(work=work, slots=slots))
               for work in ("azure", "heavy") for slots in (16, 64)]  # fmt: skip
    # Its lengths are in a file that is not shipped; what is stored of them is shown all the same.
    cells = [
        replace(cell, setting=setting, knows=knows)
        for _, cell in places for _, setting, knows in asked
        if cell.work != "code" or harness.CODE_TRACE is not None
    ]  # fmt: skip

    def show(rows: Rows) -> None:
        body = [
            [name, wait(rows, cell.base), *(ratios(rows, replace(cell, setting=s, knows=k)) for _, s, k in asked)]
            for name, cell in places
            if cell.work != "code" or wait(rows, cell.base) is not None
        ]
        print(table(["mean JCT over first come's", "first come waits, s", *(name for name, _, _ in asked)], body))
        _picture(rows)

    return cells, show


def _picture(rows: Rows) -> None:
    """The README's, where its rows are there."""
    loads = (0.5, 0.7, 0.85, 0.95, 1.05)
    lines = {
        "every length known, ISRTF without aging": Cell(setting=PURE, knows=PERFECT),
        "lengths guessed, off by e^±0.6: the default": Cell(setting=DEFAULT, knows=GUESS),
    }
    points = {name: [(x, ratios(rows, replace(cell, load=x))) for x in loads] for name, cell in lines.items()}
    if all(ratio is not None for found in points.values() for _, ratio in found):
        from benchmarks.studies.picture import draw

        print(f"\ndrawn: {draw(points)}")


def wait(rows: Rows, cell: Cell) -> str | None:
    found = plain(rows, cell, "wait")
    return None if found is None else f"{found.mean:.1f}"


def windows() -> tuple[list[Cell], Callable[[Rows], None]]:
    base = Cell(load=0.85, slots=8)
    sizes, seams = (10, 50, 200), (0.0, 1.5, 4.0)
    modes = [("fixed", PUBLISHED), ("elastic", PURE)]
    grid = {(name, size, seam): replace(base, setting=f"{setting},window={size}", seam=seam)
            for name, setting in modes for size in sizes for seam in seams}  # fmt: skip
    sjf = {seam: replace(base, setting=SJF, seam=seam) for seam in seams}
    delays = (0.0, 0.005, 0.02)
    queues = [("gateway holds the queue", 0), ("engine-ordered, 4 more than slots", 4)]
    held = {(name, delay): replace(base, delay=delay, overcommit=extra) for name, extra in queues for delay in delays}
    cells = [*grid.values(), *sjf.values(), *held.values()]

    def show(rows: Rows) -> None:
        body = [[f"{name}, window {size}", *(ratios(rows, grid[name, size, seam]) for seam in seams)]
                for name, _ in modes for size in sizes]  # fmt: skip
        body.append(["SJF, never interrupted", *(ratios(rows, sjf[seam]) for seam in seams)])
        print(table(["mean JCT over first come's", *(f"seam {seam:g}" for seam in seams)], body))
        print()
        body = [[name, *(ratios(rows, held[name, delay], base=replace(base, delay=0.0).base) for delay in delays)]
                for name, _ in queues]  # fmt: skip
        print(table(["over first come without delay", *(f"{d * 1e3:g} ms to the engine" for d in delays)], body))

    return cells, show


def tail() -> tuple[list[Cell], Callable[[Rows], None]]:
    shapes = [
        ("none", PURE),
        *((f"linear, a {a:g}", f"{PURE},aging=linear,a={a}") for a in (0.05, 0.2, 1)),
        ("Boost 0.2 γ", f"{PURE},aging=boost,factor=0.2"),
        ("Boost 0.35 γ (default)", f"{PURE},aging=boost,factor=0.35"),
        ("Boost 0.7 γ", f"{PURE},aging=boost,factor=0.7"),
        ("Boost γ", f"{PURE},aging=boost,factor=1"),
        ("default and tail 1.25", f"{PURE},aging=boost,factor=0.35,tail=1.25"),
    ]  # fmt: skip
    works = [
        ("azure", Cell()),
        ("azure in bursts, load 0.8", Cell(arrivals="burst", load=0.8)),
        ("heavy", Cell(work="heavy")),
    ]
    cells = [replace(cell, setting=setting) for _, cell in works for _, setting in shapes]

    def show(rows: Rows) -> None:
        for name, cell in works:
            first = plain(rows, cell.base, "slow_above_10")
            print(f"\n{name}; first come: slowdown above 10 for {0 if first is None else first.mean:.1%} of the jobs\n")
            body = []
            for shape, setting in shapes:
                one = replace(cell, setting=setting)
                told = [
                    plain(rows, one, figure)
                    for figure in ("slow_above_10", "starved", "starved_seconds", "starved_worst")
                ]
                cellsof: list[Any] = [shape, *(ratios(rows, one, figure) for figure in ("mean", "p99", "worst"))]
                if all(told):
                    over, share, seconds, worst = (t.mean for t in told if t is not None)
                    cellsof += [f"{over:.1%}", f"{share:.2%}", f"{seconds:.0f}", f"{worst:.0f}"]
                body.append(cellsof)
            print(
                table(
                    ["aging", "mean", "p99", "worst", "slowdown > 10", "> 3 x first come", "by s, mean", "by s, worst"],
                    body,
                )
            )

    return cells, show


def errors() -> tuple[list[Cell], Callable[[Rows], None]]:
    sigmas = ("0", "0.3", "0.6", "1.0", "1.5")
    known = [(f"e^±{sigma}", f"noisy{sigma}") for sigma in sigmas]
    known += [("e^±1.0, outlived: half of what was made", "noisy1.0+floor"), ("shuffled", "shuffled"),
              ("history, one for all", "history"), ("history by application", "history-app")]  # fmt: skip
    orders = [
        ("SJF", "sjf", "mean"),
        ("ISRTF", "isrtf", "mean"),
        ("SJF, Gittins", "sjf", "gittins"),
        ("ISRTF, Gittins", "isrtf", "gittins"),
    ]
    works = ("azure", "six")
    cells = {
        (work, what, order): Cell(work=work, knows=knows, setting=f"{kind}:order={by}")
        for work in works for what, knows in known for order, kind, by in orders
        if by == "mean" or knows.startswith("history")
    }  # fmt: skip

    def show(rows: Rows) -> None:
        for work in works:
            print()
            body = [[what, *(ratios(rows, cells[work, what, order]) if (work, what, order) in cells else ""
                             for order, _, _ in orders)] for what, _ in known]  # fmt: skip
            print(table([f"{work}: mean JCT over first come's", *(order for order, _, _ in orders)], body))

    return list(cells.values()), show


def calibrated() -> tuple[list[Cell], Callable[[Rows], None]]:
    asked = [
        ("SJF", "", SJF),
        ("ISRTF", "", PURE),
        ("SJF, calibrated", "+calibrated", SJF),
        ("ISRTF, calibrated", "+calibrated", PURE),
        ("ISRTF, calibrated, Gittins", "+calibrated", "isrtf:order=gittins"),
    ]
    places = [(work, sigma) for work in ("azure", "six") for sigma in ("0.6", "1.0", "1.5")]
    cells = {
        (place, name): Cell(work=place[0], knows=f"noisy{place[1]}{how}", setting=setting)
        for place in places for name, how, setting in asked
    }  # fmt: skip

    def show(rows: Rows) -> None:
        heads = ["mean JCT over first come's", *(name for name, *_ in asked), "last over ISRTF"]
        body = []
        for place in places:
            ours = [cells[place, name] for name, *_ in asked]
            line = [f"{place[0]}, e^±{place[1]}", *(ratios(rows, cell) for cell in ours)]
            body.append([*line, ratios(rows, ours[-1], base=ours[1])])
        print(table(heads, body))

    return list(cells.values()), show


def margin() -> tuple[list[Cell], Callable[[Rows], None]]:
    margins, seams = (0, 2, 8, 32, 128), (0.0, 1.5, 4.0)
    grid = {(m, seam): Cell(setting=f"{PURE},seam_cost={m}", seam=seam) for m in margins for seam in seams}
    sjf = {seam: Cell(setting=SJF, seam=seam) for seam in seams}
    learned = {seam: Cell(seam=seam) for seam in seams}

    def show(rows: Rows) -> None:
        def line(name: str, by: dict[float, Cell]) -> list[Any]:
            found: list[Any] = [name]
            for seam in seams:
                count = plain(rows, by[seam], "preemptions")
                ratio = ratios(rows, by[seam])
                found.append(None if ratio is None or count is None else f"{ratio} ({count.mean:.2f})")
            return found

        body = [line(f"{m} tokens", {seam: grid[m, seam] for seam in seams}) for m in margins]
        body += [line("learned (default)", learned), line("never (SJF)", sjf)]
        print(table(["margin: mean over first come's (preemptions a job)", *(f"seam {s:g}" for s in seams)], body))

    return [*grid.values(), *sjf.values(), *learned.values()], show


def rescore() -> tuple[list[Cell], Callable[[Rows], None]]:
    pairs = [("off by e^±0.6, better by a quarter each window", "first0.6", "refining0.6"),
             ("off by e^±1.0, better by a quarter each window", "first1.0", "refining1.0"),
             ("history, one for all", "history-first", "history"),
             ("history by application", "history-app-first", "history-app")]  # fmt: skip
    works = ("azure", "six")
    cells = {
        (work, knows): Cell(work=work, knows=knows, setting="isrtf")
        for work in works
        for _, *both in pairs
        for knows in both
    }

    def show(rows: Rows) -> None:
        body = []
        for work in works:
            for name, first, again in pairs:
                ones = [cells[work, first], cells[work, again]]
                maes = [plain(rows, one, "mae") for one in ones]
                body.append([f"{work}: {name}", *(None if m is None else f"{m.mean:.0f}" for m in maes),
                             *(ratios(rows, one) for one in ones), ratios(rows, ones[1], base=ones[0])])  # fmt: skip
        heads = [
            "",
            "MAE, first only",
            "MAE, re-scored",
            "JCT, first only",
            "JCT, re-scored",
            "re-scored over first only",
        ]
        print(table(heads, body))

    return list(cells.values()), show


def workers() -> tuple[list[Cell], Callable[[Rows], None]]:
    counts = (1, 10, 20, 30, 50)
    settings = [("first come", "fcfs", "none"), ("default", DEFAULT, GUESS)]
    # Around the rate at which all slots are busy: 4 slots of 30 tokens/s, 212 tokens a job.
    per_worker = 4 * 30 / 212
    shares = (0.7, 0.8, 0.9, 0.95, 1.0)
    cells = {
        (name, n, share): Cell(workers=n, setting=setting, knows=knows, rate=round(n * per_worker * share, 4))
        for name, setting, knows in settings for n in counts for share in shares
    }  # fmt: skip

    def show(rows: Rows) -> None:
        body = []
        peaks: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in settings}
        for count in counts:
            for name, _, _ in settings:
                ours = [cells[name, count, share] for share in shares]
                waits = [plain(rows, cell, "wait") for cell in ours]
                made = [plain(rows, ours[-1], figure) for figure in ("tokens", "end")]
                if any(found is None for found in (*waits, *made)):
                    continue
                means = [found.mean for found in waits if found is not None]
                tokens, end = (found.mean for found in made if found is not None)
                peak = _crossing([share * per_worker * count for share in shares], means, 0.5)
                if peak[0].isdigit():
                    peaks[name].append((count, float(peak)))
                body.append([f"{count}", name, *(f"{mean:.2f}" for mean in means), f"{tokens / end:.0f}", peak])
        heads = ["workers", "", *(f"load {share:g}" for share in shares), "tokens/s at load 1"]
        print(table([*heads, "req/s with a mean wait of 0.5 s"], body))
        if all(len(found) > 1 for found in peaks.values()):
            from benchmarks.studies.picture import scaling

            print(f"\ndrawn: {scaling(peaks, per_worker)}")

    return list(cells.values()), show


def _crossing(at: Sequence[float], values: Sequence[float], limit: float, *, scale: float = 1.0) -> str:
    """Where growing values reach the limit, between the points; told in units of 1 / ``scale``."""
    digits = 2 if scale == 1.0 else 0
    if values[0] > limit:
        return f"under {at[0] * scale:.{digits}f}"
    for (low, a), (high, b) in pairwise(zip(at, values, strict=True)):
        if b > limit:
            return f"{(low + (high - low) * (limit - a) / (b - a)) * scale:.{digits}f}"
    return f"over {at[-1] * scale:.{digits}f}"


def overhead() -> tuple[list[Cell], Callable[[Rows], None]]:
    latencies = (0.0, 0.011, 0.05, 0.1, 0.25)
    waits, goes_on = ("published, waits for every estimate", PUBLISHED), ("default, goes on meanwhile", DEFAULT)
    places = [(*waits, speed, load) for speed in (1.0, 3.0) for load in (0.5, 0.7, 0.85, 0.95)]
    places += [(*goes_on, speed, 0.85) for speed in (1.0, 3.0)]
    cells = {
        (name, speed, load, latency): Cell(setting=setting, knows="late0.6", latency=latency, pace=speed, load=load)
        for name, setting, speed, load in places
        for latency in latencies
    }

    def show(rows: Rows) -> None:
        body = []
        for name, _, speed, load in places:
            ours = [cells[name, speed, load, latency] for latency in latencies]
            found = [ratios(rows, cell) for cell in ours]
            jct = [plain(rows, cell, "mean") for cell in ours]
            if any(one is None for one in (*found, *jct)):
                continue
            seconds = [one.mean for one in jct if one is not None]
            # A fifth of the latency is overhead where that is a quarter more than without.
            fifth = _crossing(latencies, [value / seconds[0] for value in seconds], 1.25, scale=1e3)
            gone = _crossing(latencies, [one.mean for one in found if one is not None], 1.0, scale=1e3)
            body.append([name, f"{30 * speed:g}", f"{load:g}", *found, fifth, gone])
        heads = ["", "tokens/s", "load", *(f"{latency * 1e3:g} ms" for latency in latencies)]
        print(table([*heads, "a fifth of latency at, ms", "no gain from, ms"], body))

    return list(cells.values()), show


STUDIES: dict[str, Callable[[], tuple[list[Cell], Callable[[Rows], None]]]] = {
    study.__name__: study for study in (where, windows, tail, errors, calibrated, margin, rescore, workers, overhead)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=300.0, help="CPU seconds for each study")
    parser.add_argument("--show", action="store_true", help="print the tables of the newest stored rows, run nothing")
    parser.add_argument("--code-trace", type=Path, help="Azure's code trace, a CSV file, for study `where`")
    given = parser.parse_args()
    harness.CODE_TRACE = given.code_trace
    for name in STUDIES if "all" in given.studies else given.studies:
        cells, show = STUDIES[name]()
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        rows = run(name, cells, seeds, given.budget, only=_newest(name) if given.show else None)
        print(f"\n## {name}\n")
        show(rows)


def _newest(study: str) -> str:
    path = RESULTS / f"study-{study}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return str(json.loads(lines[-1])["code"]) if lines else harness.digest()


if __name__ == "__main__":
    main()
