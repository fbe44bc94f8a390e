"""The same workload against a live server or against the modelled engine: one interface, the same rows.

Knows: how a request of a workload becomes an HTTP call, or a job of the simulator. Never: when to send it (``runner``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import orjson

from elis_gateway import build
from elis_gateway.config import Scheduler as SchedulerSection
from elis_gateway.core.actions import Action
from elis_gateway.core.actions import Run as RunSlice
from elis_gateway.core.policy import FCFS, Policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.slice import SliceResult
from elis_gateway.errors import ConfigError, GatewayError, UpstreamUnavailable
from elis_gateway.predictor.base import Predictor
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import Result, SimJob, simulate
from elis_gateway.wire.sse import DONE, EventDecoder
from loadtest.client import Client
from loadtest.records import Leg, Row, Run
from loadtest.workload import Request, Workload

__all__ = ["HttpTarget", "Steering", "Target", "capacity", "rows_of", "sim_jobs", "simulated"]

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
        client: Client,
        model: str,
        *,
        start: float = 0.0,
        apps: bool = True,
        body: Mapping[str, Any] | None = None,
        on_text: Callable[[Request, str], None] | None = None,
        debug: bool = False,
        gaps: bool = False,
        on_refusal: Callable[[int, str], None] | None = None,
    ) -> None:
        """``start``: the run's beginning on ``time.perf_counter``. ``apps``: say the kind of request in X-Elis-App.
        ``body``: fields added to every request. ``on_text`` sees the answer as it arrives. ``debug``: ask the gateway
        how it served each request. ``gaps``: keep the time between deltas. ``on_refusal`` is told the status and the
        words of every answer that is an error."""
        self.client = client
        self.start = start
        self._model = model
        self._apps = apps
        self._body = dict(body or {})
        self._on_text = on_text
        self._debug = debug
        self._gaps = gaps
        self._on_refusal = on_refusal
        self._ready: dict[str, bytes] = {}
        self.guessed = 0
        """Answers whose tokens the server did not count: their deltas were."""

    def prepare(self, requests: Sequence[Request]) -> None:
        """Encode requests ahead, so that at their time they only have to be written."""
        self._ready = {request.id: self._encoded(request) for request in requests}

    async def send(self, request: Request, row: Row) -> None:
        data = self._ready.get(request.id) or self._encoded(request)
        reader = _Reader(self, request, row)
        try:
            reply = await self.client.exchange(data, reader.feed)
        except UpstreamUnavailable as error:
            row.error = row.error or error.cause
            return
        if reply.status != 200:
            row.error = f"status {reply.status}"
            if self._on_refusal is not None:
                self._on_refusal(reply.status, _words(reply.body))
        elif not reader.done and not row.error:
            row.error = "cut off"

    def _encoded(self, request: Request) -> bytes:
        messages = [{"role": role, "content": text} for role, text in request.turns]
        body = {
            "model": self._model,
            "messages": [*messages, {"role": "user", "content": request.prompt}],
            "max_tokens": request.tokens if request.forced else request.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if request.forced else {}),
            **self._body,
        }
        headers = {"X-Request-Id": request.id}
        if self._apps and request.app:
            headers["X-Elis-App"] = request.app
        if self._debug:
            headers["X-Elis-Debug"] = "1"
        return self.client.request("POST", "/v1/chat/completions", orjson.dumps(body), headers)


def _words(body: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        said = orjson.loads(body)["error"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        said = body.decode("utf-8", "replace")
    return " ".join(str(said).split())[:300]


class _Reader:
    """One answer as it comes."""

    __slots__ = ("_decoder", "_deltas", "_last", "_note", "_request", "_row", "_target", "done")

    def __init__(self, target: HttpTarget, request: Request, row: Row) -> None:
        self._target = target
        self._request = request
        self._row = row
        self._decoder = EventDecoder()
        self._last = 0.0
        self._deltas = 0
        self._note = b""
        """The gateway's comment, as far as it has come."""
        self.done = False

    def feed(self, data: bytes) -> None:
        target, row = self._target, self._row
        now = time.perf_counter() - target.start
        if target._debug and (self._note or _TOLD in data):
            self._listen(data)
        for payload in self._decoder.feed(data):
            if payload == DONE:
                self.done = True
                row.end = now
                if not row.tokens and self._deltas:
                    row.tokens = self._deltas
                    target.guessed += 1
            else:
                self._chunk(orjson.loads(payload), now)

    def _listen(self, data: bytes) -> None:
        self._note = self._note + data if self._note else data[data.index(_TOLD) :]
        if b"\n" in self._note:
            _told(self._note[len(_TOLD) :].split(b"\n", 1)[0], self._row)

    def _chunk(self, chunk: dict[str, Any], now: float) -> None:
        row = self._row
        if "error" in chunk:
            row.error = str(chunk["error"].get("code") or "error event")
            return
        if usage := chunk.get("usage"):
            row.tokens = usage["completion_tokens"]
            row.prompt_tokens = usage.get("prompt_tokens") or row.prompt_tokens
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta", {})
            text = delta.get("content")
            # Thoughts are tokens as well; who calls them what differs.
            if text or delta.get("reasoning_content") or delta.get("reasoning"):
                self._deltas += 1
                if row.first is None:
                    row.first = now
                elif self._target._gaps:
                    row.gaps.append(now - self._last)
                self._last = now
                if text and self._target._on_text is not None:
                    self._target._on_text(self._request, text)


def _told(note: bytes, row: Row) -> None:
    """What the gateway says of a job in a comment before the end of its stream. Its times begin when the request
    reached it, which is when we sent it as far as we can tell."""
    facts = orjson.loads(note)
    row.slices = facts["slices"]
    row.preemptions = facts["preemptions"]
    row.wait = facts.get("queue_wait")
    row.predictions = [(int(at), float(left)) for at, left in facts.get("estimates", ())]
    at = row.sent
    row.legs = [
        Leg(upstream, at + start, None if first is None else at + first, at + end, tokens, why)
        for upstream, start, first, end, tokens, why in facts.get("legs", ())
    ]


class Steering:
    """A gateway's admin listener: says and changes how it orders."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def policy(self) -> dict[str, Any]:
        """The policy in effect. Raises GatewayError where there is no such listener."""
        return await self._ask("GET", b"")

    async def use(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Order so from now on. Raises GatewayError where it is refused, or the gateway is too old to know windows."""
        effect = await self._ask("PUT", orjson.dumps(wanted))
        if wrong := [name for name, value in wanted.items() if effect.get(name) != value]:
            raise GatewayError(f"{self._client.url}: the gateway did not take over {', '.join(wrong)}")
        return effect

    async def _ask(self, method: str, body: bytes) -> dict[str, Any]:
        try:
            reply = await self._client.send_json(method, "/admin/policy", body)
            found = orjson.loads(reply.body)
        except (UpstreamUnavailable, orjson.JSONDecodeError) as error:
            raise GatewayError(f"{self._client.url}: no admin listener of a gateway answers there: {error}") from error
        if reply.status != 200 or not isinstance(found, dict):
            raise GatewayError(f"{self._client.url}/admin/policy answered {reply.status}: {reply.body[:300]!r}")
        return found


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


class _Watched(Scheduler):
    """A scheduler that notes each call's life; the simulator's own records tell only of jobs."""

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        super().__init__(config, policy)
        self.legs: dict[str, list[Leg]] = {}
        self._runs: dict[int, tuple[str, str, float, int]] = {}
        self._firsts: dict[int, float] = {}

    def note(self, now: float, action: Action) -> None:
        """As the simulator performs it."""
        if type(action) is RunSlice:
            slice_ = action.slice
            self._runs[slice_.id] = (slice_.job.spec.id, slice_.upstream, now, slice_.job.attained)

    def slice_started(self, slice_id: int, now: float) -> list[Action]:
        self._firsts.setdefault(slice_id, now)
        return super().slice_started(slice_id, now)

    def slice_ended(self, slice_id: int, result: SliceResult, now: float) -> list[Action]:
        job, upstream, begun, base = self._runs.pop(slice_id)
        leg = Leg(upstream, begun, self._firsts.pop(slice_id, None), now, result.attained - base, result.end.value)
        self.legs.setdefault(job, []).append(leg)
        return super().slice_ended(slice_id, result, now)


def simulated(
    workload: Workload,
    section: SchedulerSection,
    engine: EngineModel,
    predictor: Predictor | None,
    *,
    name: str = "",
    apps: bool = True,
    workers: int = 1,
    delay: float = 0.0,
    latency: float = 0.0,
    watch: bool = False,
) -> Run:
    """Run a workload on ``workers`` modelled engines in virtual time. The predictor learns as it would live.

    ``delay``: seconds between gateway and engine, each way. ``latency``: seconds that a predictor which refines takes.
    ``watch``: keep every call and every estimate, as a live run with the gateway's notes has them; twice as slow.
    """
    if missing := [request.id for request in workload.requests if request.tokens < 1]:
        raise ConfigError(f"{len(missing)} requests have no answer length, and nothing else can be simulated")
    dials = build.scheduler_config(section, estimates=predictor is not None)
    policy = build.policy(section.policy, section.aging)
    core = _Watched(dials, policy) if watch else Scheduler(dials, policy)
    names = ["engine"] if workers == 1 else [f"engine {n + 1}" for n in range(workers)]
    engines = {name: Engine(engine) for name in names}
    texts = {request.id: request.answer for request in workload.requests}
    result = simulate(
        sim_jobs(workload, apps=apps),
        core,
        engines,
        predictor,
        latency=latency,
        delay=delay,
        overcommit=section.in_hand,
        text=lambda job, tokens: _so_far(texts[job.id], tokens, job.output_tokens),
        predictions=watch,
        observe=core.note if isinstance(core, _Watched) else None,
    )
    rows = rows_of(result)
    if isinstance(core, _Watched):
        for row in rows:
            row.legs = core.legs.get(row.id, [])
    return Run(name or section.policy.kind, workload.hash, rows)


def _so_far(answer: str, tokens: int, whole: int) -> str:
    """The recorded answer up to so many of its tokens, by characters."""
    return answer[: round(len(answer) * min(tokens / max(whole, 1), 1.0))]


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
            app=record.app,
            prompt_tokens=record.prompt_tokens,
            expected=record.output_tokens,
            wait=record.wait,
            predictions=record.predictions or [],
            error="" if record.completed else record.cause or "not completed",
        )
        for record in result.records
    ]
