"""The life of one call in the embedded engine, from request to log record, and all that it needs.

Knows: the voice, the paced engine, the prefix cache, faults, the log. Never: which routes there are, listening.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from dataclasses import replace

import orjson
from aiohttp import web

from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.faults import Fault, FaultBook
from elis_gateway.sim.language import Sampling
from elis_gateway.sim.replay import Recorded
from elis_gateway.sim.script import Script, Stops, write
from elis_gateway.sim.server_calls import Call, Refusal, Unauthorized, bad_request, parse
from elis_gateway.sim.server_config import ServerConfig
from elis_gateway.sim.server_log import Record, RequestLog
from elis_gateway.sim.server_pace import BlockCache, Pacer, Ticket
from elis_gateway.sim.server_send import EngineDied, send_stream, send_whole
from elis_gateway.sim.server_shapes import StreamShape, whole
from elis_gateway.sim.sockets import reset
from elis_gateway.sim.voice import Spoken, Voice

__all__ = ["Sim", "authorize", "refused"]

_SCRIPTS = 512
"""Worked-out calls kept: a benchmark asks the same again and again."""


class Sim:
    """Everything behind the routes. Survives a ``kill`` and ``restart``, except the engine and its cache."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.voice = _voice(config)
        self.log = RequestLog(config.log_size)
        self.faults = FaultBook()
        self._model = replace(config.engine or EngineModel.load("default"), orders=config.priority == "honour")
        self.cache = BlockCache(self._model)
        self._random = random.Random(config.seed)
        self._scripts: OrderedDict[tuple[tuple[int, ...], Stops, Sampling], Script] = OrderedDict()
        self._pacer: Pacer | None = None

    @property
    def pacer(self) -> Pacer:
        """The engine in real time; made at the first use, on the running loop."""
        if self._pacer is None:
            config = self.config
            self._pacer = Pacer(self._model, speed=config.speed, delay=config.delay, stride=config.stride)
        return self._pacer

    def die(self) -> None:
        """What is lost when the process dies."""
        if self._pacer is not None:
            self._pacer.kill()
        self._pacer = None
        self.cache.clear()

    async def call(self, request: web.Request) -> web.StreamResponse:
        """``/v1/completions`` and ``/v1/chat/completions``."""
        loop = asyncio.get_running_loop()
        headers = request.headers
        record = self.log.open(request.path, headers.get("X-Request-Id"), loop.time())
        record.traceparent = headers.get("traceparent")
        record.rank = headers.get("X-data-parallel-rank")
        try:
            raw = await request.read()
            authorize(headers.get("Authorization"), self.config.api_key)
            call = parse(request.path, raw, self.config, self.voice, priority=headers.get("X-Vllm-Priority"))
            fault = self._fault(call, request)
            return await self._answer(request, call, record, fault)
        except Refusal as exc:
            record.how, record.status, record.ended = "refused", exc.status, loop.time()
            return refused(exc)
        except EngineDied:
            record.how = "killed"
            reset(request.transport)
            raise asyncio.CancelledError from None
        except (asyncio.CancelledError, ConnectionError):
            if record.how == "open":
                record.how = "aborted"
            record.closed = loop.time()
            raise
        finally:
            if record.ended is None:
                record.ended = loop.time()

    def _fault(self, call: Call, request: web.Request) -> Fault | None:
        fault = call.fault
        if fault is None and (header := request.headers.get("X-Sim-Fault")) is not None:
            try:
                fault = Fault.parse(orjson.loads(header))
            except ValueError as exc:
                raise bad_request(str(exc), "X-Sim-Fault") from None
        if fault is None and self.faults.rules:
            fault = self.faults.take(request.path, call.model)
        return fault

    async def _answer(
        self, request: web.Request, call: Call, record: Record, fault: Fault | None
    ) -> web.StreamResponse:
        self._note(record, call)
        if fault is not None:
            record.how = f"fault:{fault.kind}"
            await _fail_early(fault)
        script = self.script(call)
        counted = self.config.delay or self.config.prompt_tokens_details
        record.cached_tokens = cached = self.cache.lookup(call.prompt) if counted else 0
        shown = cached if self.config.prompt_tokens_details else None
        named = record.request_id
        pacer = self.pacer
        ticket = self._start(pacer, call, script, cached, fault)
        try:
            if call.stream:
                shape = StreamShape(call, request_id=named, cached=shown, fingerprint=self.config.fingerprint)
                response = await send_stream(
                    request, script, ticket, shape,
                    interval=self.config.stream_interval, together=self.config.delay, fault=fault,
                )  # fmt: skip
            else:
                body = whole(call, script, request_id=named, cached=shown, fingerprint=self.config.fingerprint)
                response = await send_whole(request, body, ticket, fault=fault)
        finally:
            record.tokens = pacer.stop(ticket)
            record.begun, record.started, record.due = ticket.begun, ticket.started, ticket.due
            if counted and record.tokens:
                self.cache.store(call.prompt + script.ids[: record.tokens])
        record.status = response.status
        if fault is None:
            record.how = script.finish
        return response

    def _start(self, pacer: Pacer, call: Call, script: Script, cached: int, fault: Fault | None) -> Ticket:
        most = self.config.max_queued
        if most is not None and pacer.running + pacer.waiting >= most:
            message = (
                "The engine is currently busy and cannot accept new requests."
                " Please try again later or on a different instance."
            )
            raise Refusal(503, message, "Service Unavailable")
        every = self.config.stream_interval if call.stream else 1 if fault is not None else None
        try:
            return pacer.start(len(call.prompt), cached, len(script.ids), every=every, priority=call.priority)
        except ValueError as exc:
            raise bad_request(str(exc)) from None

    @staticmethod
    def _note(record: Record, call: Call) -> None:
        record.model = call.model
        record.prompt_tokens = len(call.prompt)
        record.max_tokens = call.asked
        record.limit = call.stops.limit
        record.priority = call.priority
        record.stream = call.stream
        record.ids_prompt = call.by_ids

    def script(self, call: Call) -> Script:
        """The whole call worked out, from the cache where the same was asked before."""
        sampling = call.sampling
        if sampling.temperature and not call.seeded:
            return self._write(call, replace(sampling, seed=self._random.getrandbits(63)))
        key = (tuple(call.prompt), call.stops, sampling)
        script = self._scripts.get(key)
        if script is None:
            script = self._scripts[key] = self._write(call, sampling)
            if len(self._scripts) > _SCRIPTS:
                self._scripts.popitem(last=False)
        return script

    def _write(self, call: Call, sampling: Sampling) -> Script:
        try:
            stepper = self.voice.stepper(call.prompt, sampling)
        except ValueError as exc:
            raise bad_request(str(exc)) from None
        return write(
            call.prompt, stepper, call.stops,
            flush_unfinished=self.config.flush_unfinished, decoder=self.voice.decoder,
        )  # fmt: skip


def _voice(config: ServerConfig) -> Voice:
    if config.replay is None:
        return Spoken(config.language)
    return Recorded.load(config.replay, fallback=config.language)


def authorize(header: str | None, key: str | None) -> None:
    if key is not None and header != f"Bearer {key}":
        raise Unauthorized


async def _fail_early(fault: Fault) -> None:
    if fault.kind == "status":
        refusal = Refusal(fault.status, "a fault was asked for", "InternalServerError")
        refusal.retry_after = fault.retry_after
        raise refusal
    if fault.kind == "hang":
        await asyncio.get_running_loop().create_future()


def refused(exc: Refusal) -> web.Response:
    """A refusal as a response."""
    headers = {} if exc.retry_after is None else {"Retry-After": f"{exc.retry_after:g}"}
    return web.Response(status=exc.status, body=exc.body(), content_type="application/json", headers=headers)
