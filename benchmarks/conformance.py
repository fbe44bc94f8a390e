"""The whole OpenAI surface, asked of a real engine directly and through the gateway, field by field.

    python -m benchmarks.conformance --engine vllm --output benchmarks/results/conformance-vllm.json
    python -m benchmarks.conformance --engine llama --output benchmarks/results/conformance-llama.json
    python -m benchmarks.conformance --engine parsers --output benchmarks/results/conformance-parsers.json

Windows of 1, 3 and 50 tokens, and elastic windows with a preemption forced at every third token (two slots, round
robin, no cost of a seam, everything at once). float32, temperature 0 where it matters. Exit status 1 where something
differs.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import click

from benchmarks import vllm_engine
from loadtest import engines
from tests.engine.gateway import Gateway, gateway
from tests.engine.surface import CASES, ENDLESS, HALF, PARSED, Case, Reply, ask, bodies, differences

FIXED: dict[str, Any] = {"mode": "fixed", "seam_cost": 0, "aging": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "window-1": FIXED | {"window": 1},
    "window-3": FIXED | {"window": 3},
    "window-50": FIXED | {"window": 50},
    "elastic": {"mode": "elastic", "seam_cost": 0, "window": 3, "policy": "round_robin"},
}
EXPECTED = {
    "logprobs-many/completions-stream": "the engine says it in a stream that has begun; the gateway's has not",
    "bias-unknown/chat-stream": "the engine says it in a stream that has begun; the gateway's has not",
    "bias-unknown/completions-stream": "the engine says it in a stream that has begun; the gateway's has not",
    "n-bias/chat-stream": "the engine says it in a stream that has begun; the gateway's has not",
    "n-bias/completions-stream": "the engine says it in a stream that has begun; the gateway's has not",
    "model/chat": "no engine of that name to ask: the gateway's own words, OpenAI's code",
    "model/completions": "no engine of that name to ask: the gateway's own words, OpenAI's code",
}
"""Differences that are meant, and why."""
Request = tuple[str, Case, str, dict[str, Any]]


async def everything(url: str, requests: list[Request], at_once: int) -> dict[str, Reply]:
    gate = asyncio.Semaphore(at_once)

    async def one(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> Reply:
        async with gate:
            return await ask(session, url, path, body)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        asked = (one(session, path, body) for _, _, path, body in requests)
        replies = await asyncio.gather(*asked)
    return {name: reply for (name, *_), reply in zip(requests, replies, strict=True)}


def compare(
    setting: str, requests: list[Request], reference: dict[str, Reply], replies: dict[str, Reply], *, fates: bool = True
) -> list[dict[str, Any]]:
    """``fates``: what is sliced is known beforehand."""
    rows = []
    for name, case, _, _ in requests:
        found = differences(reference[name], replies[name], cached=False)
        sliced = replies[name].sliced
        rows.append(
            {"case": name, "setting": setting, "status": reference[name].status, "sliced": sliced, "differences": found}
        )
        meant = EXPECTED if fates else dict.fromkeys(HALF, "half a character at the end of a whole completion")
        if found and name in meant:
            rows[-1]["meant"] = meant[name]
        expected = {True: "ids", False: "no;"}.get(case.sliced)  # type: ignore[arg-type]
        if fates and expected is not None and replies[name].status == 200 and not sliced.startswith(expected):
            rows[-1]["unexpected"] = f"sliced: {sliced}, expected {expected}"
    return rows


def alone(row: dict[str, Any], engine: str, gate: str, requests: list[Request]) -> dict[str, Any]:
    """A difference, looked at again with nothing else in the engine's batch: its arithmetic, and which of its tied
    log-probabilities it shows, depend on the neighbours."""
    if not row["differences"] or "meant" in row or "alone" in row or row["setting"] == "engine again":
        return row
    request = [next(request for request in requests if request[0] == row["case"])]
    found = compare(row["setting"], request, *(asyncio.run(everything(url, request, 1)) for url in (engine, gate)))[0]
    return row | {"alone": found["differences"]}


def differs(row: dict[str, Any]) -> bool:
    return bool(row["differences"]) and "meant" not in row and row.get("alone") != []


def tell(rows: list[dict[str, Any]], setting: str) -> None:
    """Print what differs."""
    for row in rows:
        if row["setting"] == setting and (differs(row) or row.get("unexpected")):
            click.echo(f"{setting} {row['case']} ({row['sliced']}): {row.get('unexpected', '')}")
            for line in row.get("alone", row["differences"])[:4]:
                click.echo(f"    {line[:400]}")


def run(url: str, requests: list[Request], settings: list[str], engine: str, *, again: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    at_once = 1 if engine == "llama" else 4
    start = time.monotonic()
    reference = asyncio.run(everything(url, requests, at_once))
    click.echo(f"directly: {len(requests)} requests in {time.monotonic() - start:.0f} s")
    if again:
        rows += compare("engine again", requests, reference, asyncio.run(everything(url, requests, at_once)))
        for row in rows:
            row.pop("unexpected", None)
        tell(rows, "engine again")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in settings:
            (folder / name).mkdir()
            elastic = name == "elastic"
            upstream = {"url": url, "slots": 2 if elastic else 4, "engine_priority": "off"}
            gate: Gateway
            with gateway(folder / name, [upstream], scheduler=SETTINGS[name]) as gate:
                start = time.monotonic()
                replies = asyncio.run(everything(gate.url, requests, 12 if elastic and engine != "llama" else at_once))
                rows += compare(name, requests, reference, replies, fates=engine != "llama")
                rows = [alone(row, url, gate.url, requests) for row in rows]
                tell(rows, name)
                slices, preempted = gate.metric("elis_slices_total"), gate.metric("elis_preemptions_total")
            different = sum(differs(row) for row in rows if row["setting"] == name)
            click.echo(
                f"{name}: {len(requests)} requests in {time.monotonic() - start:.0f} s, {slices:.0f} slices,"
                f" {preempted:.0f} preemptions, {different} different"
            )
    return rows


@click.command()
@click.option("--engine", type=click.Choice(["vllm", "parsers", "llama"]), default="vllm", show_default=True)
@click.option("--url", help="An engine that runs already.")
@click.option("--setting", "settings", multiple=True, type=click.Choice(list(SETTINGS)), help="Default: all.")
@click.option("--only", default="", help="Only cases whose name contains this.")
@click.option("--subset", is_flag=True, help="The cases of continuous integration.")
@click.option("--again", is_flag=True, help="Compare the engine with itself too.")
@click.option("--limit", default=24, show_default=True, help="Answer tokens asked for.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path))
def main(
    engine: str,
    url: str | None,
    settings: tuple[str, ...],
    only: str,
    subset: bool,
    again: bool,
    limit: int,
    output: Path | None,
) -> None:
    """Compare, print what differs, store everything."""
    requests = [
        (name, case, path, body)
        for case in (PARSED if engine == "parsers" else CASES)
        if only in case.name and (case.subset or not subset) and not (engine == "llama" and case.name in ENDLESS)
        for name, path, body in bodies(case, limit=limit)
    ]
    with ExitStack() as stack:
        if url is None and engine == "vllm":
            url = stack.enter_context(vllm_engine.vllm(slots=4, say=click.echo))
        elif url is None and engine == "parsers":
            flags = vllm_engine.marked(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model")
            flags += ["--reasoning-parser", "deepseek_r1", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
            url = stack.enter_context(vllm_engine.vllm(slots=4, extra=flags, say=click.echo))
        elif url is None:
            url = stack.enter_context(engines.llama(slots=4, log=Path(tempfile.mkdtemp()) / "llama.log"))
        rows = run(url, requests, list(settings or SETTINGS), engine, again=again)
    bad = [row for row in rows if differs(row) or row.get("unexpected")]
    click.echo(f"{len(rows)} comparisons, {sum(map(differs, rows))} different")
    if output is not None:
        store(output, engine, limit, rows)
    sys.exit(1 if bad else 0)


def store(output: Path, engine: str, limit: int, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "engine": engine,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "tokens": limit,
        "requests": len({row["case"] for row in rows}),
        "comparisons": {
            setting: {
                "equal": sum(not row["differences"] for row in rows if row["setting"] == setting),
                "of": sum(row["setting"] == setting for row in rows),
                "equal_alone": sum(row.get("alone") == [] for row in rows if row["setting"] == setting),
                "meant": sum("meant" in row for row in rows if row["setting"] == setting),
                "sliced": sum(row["sliced"] == "ids" for row in rows if row["setting"] == setting),
            }
            for setting in dict.fromkeys(row["setting"] for row in rows)
        },
    }
    lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps(about, indent=2).removesuffix("\n}")
    output.write_text(f'{head},\n  "rows": [\n    {lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
