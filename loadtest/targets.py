"""The same workload against a live server or against the modelled engine: one interface, the same rows.

Knows: how a request of a workload becomes an HTTP call, or a job of the simulator. Never: when to send it (``runner``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import aiohttp
import orjson

from elis_gateway import build
from elis_gateway.config import Scheduler as SchedulerSection
from elis_gateway.core.policy import FCFS
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.errors import UpstreamUnavailable
from elis_gateway.predictor.base import Predictor
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import Result, SimJob, simulate
from elis_gateway.wire.sse import DONE, EventDecoder
from loadtest.records import Row, Run
from loadtest.workload import Request, Workload

__all__ = ["HttpTarget", "Target", "capacity", "sim_jobs", "simulated"]

MODEL = "model"
"""The model's name in simulations."""


_TOLD = b": elis "


class Target(Protocol):
    """Something a request can be sent to."""

    async def send(self, request: Request, row: Row) -> None:
        """Send it; fill in ``first``, ``end`` and ``tokens`` on the clock of ``row.sent``, or ``error``."""


class HttpTarget:
    """An OpenAI-compatible server, asked for streamed chat answers."""

    def __init__(
        self,
        url: str,
        model: str,
        session: aiohttp.ClientSession,
        *,
        start: float,
        apps: bool = True,
        body: Mapping[str, Any] | None = None,
        on_text: Callable[[Request, str], None] | None = None,
        debug: bool = False,
    ) -> None:
        """``start``: the run's beginning on ``time.perf_counter``. ``apps``: say the kind of request in X-Elis-App.
        ``body``: fields added to every request. ``on_text`` sees the answer as it arrives. ``debug``: ask the gateway
        how it served each request, for the row's ``slices`` and ``preemptions``."""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._model = model
        self._session = session
        self._start = start
        self._apps = apps
        self._body = dict(body or {})
        self._on_text = on_text
        self._debug = debug

    async def send(self, request: Request, row: Row) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": request.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._body,
        }
        headers = {"Content-Type": "application/json", "X-Request-Id": request.id}
        if self._apps and request.app:
            headers["X-Elis-App"] = request.app
        if self._debug:
            headers["X-Elis-Debug"] = "1"
        try:
            async with self._session.post(self._url, data=orjson.dumps(body), headers=headers) as reply:
                if reply.status != 200:
                    row.error = f"status {reply.status}"
                    return
                await self._read(reply, request, row)
        except aiohttp.ClientError as error:
            row.error = type(error).__name__
        except UpstreamUnavailable as error:
            row.error = error.cause
        except TimeoutError:
            row.error = "timeout"

    async def _read(self, reply: aiohttp.ClientResponse, request: Request, row: Row) -> None:
        decoder = EventDecoder()
        done = False
        async for data in reply.content.iter_any():
            now = time.perf_counter() - self._start
            if self._debug and _TOLD in data:
                _told(data, row)
            for payload in decoder.feed(data):
                if payload == DONE:
                    done = True
                    row.end = now
                else:
                    self._chunk(orjson.loads(payload), request, row, now)
        if not done and not row.error:
            row.error = "cut off"

    def _chunk(self, chunk: dict[str, Any], request: Request, row: Row, now: float) -> None:
        if "error" in chunk:
            row.error = str(chunk["error"].get("code") or "error event")
            return
        if usage := chunk.get("usage"):
            row.tokens = usage["completion_tokens"]
        for choice in chunk.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                if row.first is None:
                    row.first = now
                if self._on_text is not None:
                    self._on_text(request, text)


def _told(data: bytes, row: Row) -> None:
    """What the gateway says of a job in a comment before the end of its stream."""
    facts = orjson.loads(data.split(_TOLD, 1)[1].split(b"\n", 1)[0])
    row.slices = facts["slices"]
    row.preemptions = facts["preemptions"]


def sim_jobs(workload: Workload, *, apps: bool = True) -> list[SimJob]:
    """The workload as jobs of the simulator. ``apps``: tell the gateway what kind of request each one is."""
    return [
        SimJob(
            id=request.id,
            arrival=request.at,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.tokens,
            model=MODEL,
            app=request.app if apps else "",
            prompt=request.prompt,
            limit=request.max_tokens,
        )
        for request in workload.requests
    ]


def simulated(
    workload: Workload,
    section: SchedulerSection,
    engine: EngineModel,
    predictor: Predictor | None,
    *,
    name: str = "",
    apps: bool = True,
) -> Run:
    """Run a workload on one modelled engine in virtual time. The predictor learns as it would live."""
    core = Scheduler(
        build.scheduler_config(section, estimates=predictor is not None), build.policy(section.policy, section.aging)
    )
    result = simulate(
        sim_jobs(workload, apps=apps),
        core,
        {"engine": Engine(engine)},
        predictor,
        overcommit=section.overcommit,
    )
    return Run(name or section.policy.kind, workload.hash, rows_of(result))


def capacity(engine: EngineModel, workload: Workload) -> float:
    """Tokens per second with every slot at work: the workload's requests all at once, first come first served.

    Only the time with all slots taken counts, since the end of a finite batch drains half-empty.
    """
    at_once = [job._replace(arrival=0.0) for job in sim_jobs(workload)]
    made = Engine(engine)
    simulate(at_once, Scheduler(SchedulerConfig(estimates=False), FCFS()), {"engine": made})
    return made.totals.full_tokens / made.totals.full


def rows_of(result: Result) -> list[Row]:
    """A simulation's records as rows."""
    return [
        Row(
            id=record.id,
            intended=record.arrival,
            sent=record.arrival,
            first=record.first_token,
            end=record.end,
            tokens=record.tokens,
            preemptions=record.preemptions,
            slices=record.slices,
            error="" if record.completed else record.cause or "not completed",
        )
        for record in result.records
    ]
