"""Schemathesis against both listeners, as their own descriptions say they are.

    python3 -m venv /tmp/st && /tmp/st/bin/pip install schemathesis
    python -m benchmarks.schemathesis_run --st /tmp/st/bin/st [--seconds 120] [--output benchmarks/results/…jsonl]

Schemathesis is not among the project's packages (it brings some thirty of its own), so it is run where it is. All its
checks but three: that whatever the schema allows is accepted (an engine's limits and names of upstreams and classes are
in no schema), that whatever it does not allow is refused (bodies are the engine's to judge), and what ``Allow`` says
(of relayed paths, more than is described). Deadlines are set, because one that passes is answered 504, which is meant.
Afterwards the gateway must have nothing left over and no traceback in its log. In CI ``tests/gateway/test_openapi.py``
does the same with a generator of our own.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import click
import orjson

import elis_gateway
from benchmarks.chaos import Process, free_port
from benchmarks.rows import show
from elis_gateway.sim.server import SimServer
from tests.gateway.world import AT_ONCE

HERE = Path(elis_gateway.__file__).parent
EXCLUDED = ("positive_data_acceptance", "negative_data_rejection", "allow_header_conformance")
DESCRIBED = {"public": "openapi.yaml", "admin": "openapi-admin.yaml"}


async def tried(st: str, description: Path, url: str, seconds: int, folder: Path) -> dict[str, Any]:
    """One listener: what schemathesis counted, and its report where it found something."""
    command = [
        *(st, "run", str(description), "-u", url, "--max-time", str(seconds)),
        *("--phases", "examples,coverage,fuzzing,stateful", "--exclude-checks", ",".join(EXCLUDED)),
        *(
            "--continue-on-failure",
            "--request-timeout",
            "120",
            "-H",
            "X-Elis-Deadline: 60",
            "--generation-deterministic",
        ),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, cwd=folder, capture_output=True, text=True, timeout=seconds * 3 + 120
    )
    generated = re.search(r"(\d+) generated", done.stdout)
    return {
        "calls": int(generated[1]) if generated else 0,
        "found": _found(done.stdout) if done.returncode else "",
        "errors": done.stderr[-2000:] if done.returncode and "generated" not in done.stdout else "",
    }


def _found(said: str) -> str:
    """What it complains of: failures, or errors of its own; else how it ended."""
    begin = re.search(r"^=+ (?:FAILURES|ERRORS) =+$", said, re.MULTILINE)
    return said[begin.start() :][:20000] if begin else said[-3000:]


async def run(st: str, seconds: int) -> dict[str, Any]:
    """Both listeners of one gateway process."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = await stack.enter_async_context(SimServer(AT_ONCE))
        settings: dict[str, Any] = {
            "server": {"host": "127.0.0.1", "port": free_port(), "shutdown_grace": 2.0},
            "admin": {"port": free_port()},
            "upstreams": [{"name": "engine", "url": engine.url, "slots": 4}],
            "logging": {"level": "warning"},
        }
        session = await stack.enter_async_context(aiohttp.ClientSession())
        gateway = Process(settings, folder)
        await gateway.start(session)
        try:
            urls = {"public": gateway.url, "admin": gateway.admin}
            result: dict[str, Any] = {
                name: await tried(st, HERE / file, urls[name], seconds, folder) for name, file in DESCRIBED.items()
            }
            async with session.get(gateway.admin + "/admin/jobs") as response:
                result["jobs_left"] = orjson.loads(await response.read())["live"]
            result |= gateway.held()
        finally:
            await gateway.stop()
        log = gateway.log.read_text()
    result["bugs_in_the_log"] = log.count("Traceback")
    result["first_bug"] = log[log.find("Traceback") :][:3000] if "Traceback" in log else ""
    return result


@click.command()
@click.option("--st", default="st", show_default=True, help="Schemathesis's command.")
@click.option("--seconds", default=120, show_default=True, help="For each listener.")
@click.option("--output", type=click.Path(path_type=Path), help="Append the result to this file of JSON lines.")
def main(st: str, seconds: int, output: Path | None) -> None:
    """Try both listeners."""
    version = subprocess.run([st, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    result = {"schemathesis": version, "seconds_each": seconds, **asyncio.run(run(st, seconds))}
    for name in DESCRIBED:
        if found := result[name]["found"] or result[name]["errors"]:
            print(found)
    show(result, output)
    if result["jobs_left"] or result["bugs_in_the_log"] or any(result[n]["found"] for n in DESCRIBED):
        sys.exit("not as described")


if __name__ == "__main__":
    main()
