"""Does every panel show something? A real Prometheus scrapes a real gateway under traffic, and is asked every query.

    python -m deploy.prometheus.check        needs `prometheus` and `promtool` (Debian: apt install prometheus)

An embedded engine that breaks calls now and then, a gateway in front of it that a few requests are refused by, some
seconds of traffic; then each query of the dashboard and each expression of the alert rules is run. Exit status 1 if a
query fails or a panel's query returns no series.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson
import yaml

from elis_gateway.app import Gateway
from elis_gateway.config import from_mapping
from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.language import Language, Lengths
from elis_gateway.sim.server import ServerConfig, SimServer
from elis_gateway.tasks import spawn
from loadtest.engines import free_port

__all__ = ["PROMETHEUS", "PROMTOOL", "Answer", "ask_all", "rules", "under_traffic"]

HERE = Path(__file__).parent
DASHBOARD = HERE.parent / "grafana" / "elis-gateway.json"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
SCRAPE = "500ms"
RATE = "30s"
"""In place of Grafana's own interval."""


class Answer(NamedTuple):
    """What Prometheus said to one query."""

    where: str
    query: str
    series: int
    error: str


def queries() -> list[tuple[str, str]]:
    """Every query of the dashboard by its panel, with Grafana's variables filled in."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = re.sub(r"\$(job|instance)", ".*", target["expr"]).replace("$__rate_interval", RATE)
            found.append((panel["title"], query))
    return found


def rules() -> list[tuple[str, str]]:
    """Every alert's expression by its name."""
    groups = yaml.safe_load((HERE / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


@asynccontextmanager
async def under_traffic() -> AsyncIterator[int]:
    """A gateway that serves, waits, preempts, refuses and survives broken calls; yields its admin port."""
    model = EngineModel(slots=2, decode=((1, 400.0),), seam_tokens=1.0)
    config = ServerConfig(port=0, engine=model, max_model_len=2048, language=Language(lengths=Lengths(mean=60)))
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(SimServer(config))
        engine.faults.add(Fault("end", after=10, times=None, skip=5))
        gateway = Gateway(
            from_mapping(
                {
                    "server": {"host": "127.0.0.1", "port": 0},
                    "admin": {"port": 0},
                    "upstreams": [{"url": engine.url, "slots": 2, "health": {"interval": 0.2}}],
                    "scheduler": {"queue": {"max_jobs": 200}},
                    "predictor": {"kind": "history"},
                }
            )
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop, 0.0)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        asking = [spawn(_client(session, engine, gateway.port, n), name=f"client {n}") for n in range(6)]
        try:
            yield gateway.admin_port
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)


async def _client(session: aiohttp.ClientSession, engine: SimServer, port: int, number: int) -> None:
    """Asks without end: short and long by turns, so that somebody yields; now and then for what there is not."""
    count = 0
    while True:
        count += 1
        # One call in a few breaks: not so many that the engine counts as down.
        engine.faults.rules.clear()
        if number == 0 and count % 3 == 0:
            engine.faults.add(Fault("end", after=10))
        body: dict[str, Any] = {"model": "sim", "prompt": f"{number} {count}", "stream": True, "ignore_eos": True}
        body |= {"max_tokens": 20 if number % 2 else 250}
        if number == 1 and count % 4 == 0:
            body["model"] = "another"
        headers = {"Content-Type": "application/json", "X-Elis-App": "short" if number % 2 else "long"}
        url = f"http://127.0.0.1:{port}/v1/completions"
        async with session.post(url, data=orjson.dumps(body), headers=headers) as response:
            await response.read()


@asynccontextmanager
async def prometheus(target: int) -> AsyncIterator[str]:
    """A Prometheus of its own that scrapes the admin port and has our rules loaded; yields its URL."""
    assert PROMETHEUS is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = Path(made)
        config = yaml.safe_load((HERE / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE, "scrape_timeout": SCRAPE}
        config["rule_files"] = [str(HERE / "rules.yml")]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def ask_all(url: str, session: aiohttp.ClientSession, *, within: float = 60.0) -> list[Answer]:
    """Run every query; those of panels again until they return series, for so many seconds."""
    deadline = asyncio.get_running_loop().time() + within
    open_queries = queries()
    answers: list[Answer] = []
    while open_queries:
        again = []
        for where, query in open_queries:
            series, error = await _ask(url, session, query)
            late = asyncio.get_running_loop().time() > deadline
            if series or (error and error != "starting") or late:
                answers.append(Answer(where, query, series, error))
            else:
                again.append((where, query))
        open_queries = again
        await asyncio.sleep(0.2)
    for where, query in rules():
        series, error = await _ask(url, session, query)
        answers.append(Answer(f"alert {where}", query, series, error))
    return answers


async def _ask(url: str, session: aiohttp.ClientSession, query: str) -> tuple[int, str]:
    try:
        async with session.get(f"{url}/api/v1/query", params={"query": query}) as response:
            told = orjson.loads(await response.read())
    except (aiohttp.ClientError, orjson.JSONDecodeError):
        return 0, "starting"
    if told["status"] != "success":
        return 0, str(told.get("error"))
    # A quotient of nothing by nothing is a series, but shows nothing.
    return sum(sample["value"][1] != "NaN" for sample in told["data"]["result"]), ""


async def check() -> list[Answer]:
    """The whole run."""
    async with under_traffic() as port, prometheus(port) as url, aiohttp.ClientSession() as session:
        return await ask_all(url, session)


def wrong(answers: list[Answer]) -> list[Answer]:
    """Queries that fail, and panels' queries without series."""
    return [a for a in answers if a.error or (not a.series and not a.where.startswith("alert "))]


def main() -> int:
    """For the command line."""
    if PROMETHEUS is None:
        print("prometheus is not installed (Debian: apt install prometheus)")
        return 2
    answers = asyncio.run(check())
    for answer in answers:
        print(f"{answer.series:3d} series  {answer.where}: {answer.error or answer.query}")
    return 1 if wrong(answers) else 0


if __name__ == "__main__":
    sys.exit(main())
