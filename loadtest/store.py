"""One folder per experiment: everything that was asked and what came of it, so that it can be read again years later.

    config.json      the options, the machine, the versions
    workloads/       the frozen work, one file per seed
    rows.jsonl       one row per request and run (``records``)
    summary.json     versioned; its top level has the field names of the public re-implementation
    summary.csv      one line per run
    comparison.csv   one line per setting and figure
    report.md, report.html, plots/*.png

Knows: the files. Never: how figures are made.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elis_gateway import __version__
from elis_gateway.errors import ConfigError
from elis_gateway.sim.model import EngineModel
from loadtest.compare import Arm
from loadtest.experiment import Experiment
from loadtest.figures import Objectives, flat
from loadtest.make import about as about_work
from loadtest.records import Row, Run, read_rows, write_rows
from loadtest.tables import differences, markdown, tables, verdict
from loadtest.workload import Workload

__all__ = ["VERSION", "new_folder", "read", "write"]

VERSION = 1
"""Of what stands under ``elis`` in summary.json."""


def new_folder(wanted: Path | None) -> Path:
    """``wanted``, or a fresh one under ``runs/``. Raises ConfigError where a run is stored already."""
    folder = wanted or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if (folder / "summary.json").exists():
        raise ConfigError(f"{folder} holds a run already; give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine() -> dict[str, Any]:
    """What the figures of a live run depend on."""
    return {
        "elis_gateway": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def write(folder: Path, experiment: Experiment) -> dict[str, Arm]:
    """Everything but the plots and the HTML report. Returns the arms with their figures."""
    arms = experiment.arms()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workloads").mkdir(exist_ok=True)
    for seed, workload in experiment.workloads.items():
        workload.save(folder / "workloads" / f"seed-{seed}.json")
    _json(folder / "config.json", {**experiment.config, **machine()})
    write_rows(folder / "rows.jsonl", experiment.runs)
    _json(folder / "summary.json", summary(experiment, arms))
    _csv(folder / "summary.csv", _lines(experiment, arms))
    _csv(folder / "comparison.csv", _compared(experiment, arms))
    (folder / "report.md").write_text(report(experiment, arms), encoding="utf-8")
    return arms


def summary(experiment: Experiment, arms: dict[str, Arm]) -> dict[str, Any]:
    """The top level tells of one run in the re-implementation's words: the last setting, the one under test, with the
    first seed. Everything else stands under ``elis``."""
    shown = next((run for run in experiment.runs if run.setting == experiment.settings[-1] and not run.arm), None)
    return {
        "config": experiment.config,
        "start_time": _when(experiment.begun),
        "end_time": _when(experiment.ended),
        "elapsed_time": round(experiment.ended - experiment.begun, 3),
        **_plain(shown),
        "elis": {
            "version": VERSION,
            "shown": None if shown is None else {"setting": shown.setting, "seed": shown.seed},
            "target": experiment.target,
            "complete": experiment.complete,
            "valid": experiment.valid,
            "verdict": verdict(experiment, arms),
            "settings": experiment.settings,
            "again": experiment.again,
            "window": experiment.window,
            "max_lag": experiment.max_lag,
            "objectives": asdict(experiment.objectives),
            "engine": None if experiment.engine is None else asdict(experiment.engine),
            "workloads": [
                {"seed": seed, "hash": work.hash, **about_work(work)} for seed, work in experiment.workloads.items()
            ],
            "runs": [
                {
                    "setting": run.setting,
                    "seed": run.seed,
                    "arm": run.arm,
                    "workload": run.workload,
                    "complete": run.complete,
                    "unsent": run.unsent,
                    "closed_loop_users": run.users,
                    "lag_p99": experiment.lag(run),
                    "about": run.about,
                    "figures": arms[run.name].figures[run.seed],
                }
                for run in experiment.runs
            ],
            "comparison": [difference.as_json() for difference in differences(experiment, arms)],
        },
    }


def _plain(run: Run | None) -> dict[str, Any]:
    rows: list[Row] = [] if run is None else run.rows
    done = [row for row in rows if not row.error and row.end is not None]
    return {
        "final_stats": {
            "total_requests": len(rows),
            "completed_jobs": len(done),
            "avg_jct": sum(row.jct for row in done) / len(done) if done else None,
            "preemptions": sum(row.preemptions for row in rows),
            "predictions_made": sum(len(row.predictions) for row in rows),
        },
        "jobs": [
            {
                "job_id": row.id,
                "request_id": row.id,
                "generated_tokens": row.tokens,
                "jct": None if row.end is None or row.error else row.jct,
                "preemption_count": row.preemptions,
                "predicted_remaining_history": [left for _, left in row.predictions],
            }
            for row in rows
        ],
    }


def report(experiment: Experiment, arms: dict[str, Arm]) -> str:
    """The Markdown report."""
    lines = ["# Load test", "", *(f"- {line}" for line in introduction(experiment)), ""]
    if said := verdict(experiment, arms):
        lines += ["## In short", "", *(f"- {line}" for line in said), ""]
    return "\n".join([*lines, *(markdown(table) for table in tables(experiment, arms))])


def introduction(experiment: Experiment) -> list[str]:
    """What was run on what, a line each."""
    first = next(iter(experiment.workloads.values()))
    about = about_work(first)
    users = next((run.users for run in experiment.runs if run.users is not None), None)
    engine = experiment.engine
    lines = [
        f"target: {experiment.config.get('target', experiment.target)}"
        + (f", {engine.slots} slots, in virtual time" if engine is not None else ", live"),
        f"work: {about['requests']} requests, {about['tokens']} tokens over {about['seconds']:.0f} s (first seed)",
        answers(about, live=engine is None),
        *offered(first, measured=experiment.config.get("capacity") is not None),
        f"workloads (seed, hash): {', '.join(f'{s} {w.hash}' for s, w in experiment.workloads.items())}",
        f"settings: {', '.join(experiment.settings)}"
        + (f"; {experiment.again} twice, as the noise floor" if experiment.again else ""),
        f"{_when(experiment.begun)}, {experiment.ended - experiment.begun:.1f} s, elis-gateway {__version__}",
    ]
    if users is not None:
        lines.append(
            f"CLOSED LOOP of {users} users: arrivals wait for answers, so latencies are not those of open traffic"
        )
    if engine is not None:
        lines.append(f"engine model: {engine.about or 'no word of where its numbers come from'}")
    if engine is not None and (knowledge := experiment.config.get("predictor")):
        lines.append(f"predictor: {knowledge}")
    return lines


def answers(about: Mapping[str, Any], *, live: bool) -> str:
    """How long the answers are, in words: what a gain depends on more than on anything else."""
    tokens, forced = about["answer_tokens"], about["forced"]
    if not tokens["max"]:
        return "answers: of unknown length"
    said = f"answers: {tokens['mean']:.0f} tokens on average, median {tokens['p50']}, p90 {tokens['p90']}, longest "
    said += f"{tokens['max']}; " + (f"{forced:.0%} of forced length" if forced else "none of forced length")
    if forced and live:
        said += ", which every predictor sees in max_tokens: this judges orders, not predictors"
    return said


def offered(work: Workload, *, measured: bool) -> list[str]:
    """The load in words, where it was drawn as a share of a capacity."""
    load, capacity = work.about.get("load"), work.about.get("capacity")
    if load is None or capacity is None:
        return []
    whence = "measured before the runs" if measured else "as told"
    return [f"load: {load:g} of a capacity of {capacity:.0f} tokens/s, {whence}"]


def _lines(experiment: Experiment, arms: dict[str, Arm]) -> list[dict[str, Any]]:
    return [
        {"setting": run.setting, "arm": run.arm, "seed": run.seed, "workload": run.workload}
        | flat(arms[run.name].figures[run.seed])
        for run in experiment.runs
    ]


def _compared(experiment: Experiment, arms: dict[str, Arm]) -> list[dict[str, Any]]:
    found = []
    for difference in differences(experiment, arms):
        for name, entry in difference.as_json()["metrics"].items():
            found.append({"setting": difference.arm, "base": difference.base, "figure": name, **entry})
    return found


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, heads, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, default=str) + "\n", encoding="utf-8")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


# ---- and back -------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Experiment:
    """An experiment from its folder. Raises ConfigError where a part is missing, changed, or of another version."""
    path = folder / "summary.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        told = whole["elis"]
        version = told["version"]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a summary of ours: {error}") from error
    if version != VERSION:
        raise ConfigError(f"{path}: version {version}, expected {VERSION}")
    try:
        return _experiment(folder, whole, told)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: incomplete: {error!r}") from error


def _experiment(folder: Path, whole: dict[str, Any], told: dict[str, Any]) -> Experiment:
    workloads = {}
    for entry in told["workloads"]:
        work = Workload.load(folder / "workloads" / f"seed-{entry['seed']}.json")
        if work.hash != entry["hash"]:
            raise ConfigError(f"{folder}: the workload of seed {entry['seed']} is another than the one that was run")
        workloads[entry["seed"]] = work
    rows: dict[tuple[str, int, str], list[Row]] = {}
    for head, row in read_rows(folder / "rows.jsonl"):
        rows.setdefault((head["setting"], head["seed"], head["arm"]), []).append(row)
    runs = [
        Run(
            entry["setting"],
            entry["workload"],
            rows.get((entry["setting"], entry["seed"], entry["arm"]), []),
            entry["seed"],
            entry["arm"],
            entry["complete"],
            entry["unsent"],
            entry["closed_loop_users"],
            entry["about"],
        )
        for entry in told["runs"]
    ]
    return Experiment(
        whole["config"],
        told["target"],
        told["settings"],
        workloads,
        told["again"],
        told["window"],
        Objectives(**told["objectives"]),
        None if told["engine"] is None else EngineModel.from_dict(told["engine"]),
        told["max_lag"],
        runs,
        datetime.fromisoformat(whole["start_time"]).timestamp(),
        datetime.fromisoformat(whole["end_time"]).timestamp(),
        told["complete"],
    )
