"""The embedded engine over HTTP: what vLLM's OpenAI-compatible server looks like from outside, modelled inside.

Knows: routes, one call's life from request to log record, starting and killing a server. Never: being used by the
gateway at run time (it serves tests, the demo and the load test).

Entry points: ``make_app(config)``; ``SimServer`` for tests (start, stop, kill, restart on one port); ``serve(config)``
until SIGINT or SIGTERM, for the command line.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web

from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.faults import Fault, FaultBook
from elis_gateway.sim.script import Script, write
from elis_gateway.sim.server_calls import CHAT, COMPLETIONS, Call, Refusal, bad_request, body_of, messages_of, parse
from elis_gateway.sim.server_config import ServerConfig
from elis_gateway.sim.server_log import Record, RequestLog
from elis_gateway.sim.server_pace import BlockCache, Pacer, Ticket
from elis_gateway.sim.server_send import EngineDied, reset, send_stream, send_whole
from elis_gateway.sim.server_shapes import StreamShape, whole
from elis_gateway.sim.voice import Spoken, Voice

__all__ = ["ServerConfig", "Sim", "SimServer", "make_app", "run", "serve"]

_log = logging.getLogger("elis_gateway.sim")
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
        self._scripts: OrderedDict[Any, Script] = OrderedDict()
        self._pacer: Pacer | None = None

    @property
    def pacer(self) -> Pacer:
        """The engine in real time; made at the first use, on the running loop."""
        if self._pacer is None:
            self._pacer = Pacer(self._model, speed=self.config.speed, delay=self.config.delay)
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
        try:
            raw = await request.read()
            _authorize(headers.get("Authorization"), self.config.api_key)
            call = parse(request.path, raw, self.config, self.voice, priority=headers.get("X-Vllm-Priority"))
            fault = self._fault(call, request)
            return await self._answer(request, call, record, fault)
        except Refusal as exc:
            record.how, record.status, record.ended = "refused", exc.status, loop.time()
            retry = {} if exc.retry_after is None else {"Retry-After": f"{exc.retry_after:g}"}
            return web.Response(status=exc.status, body=exc.body(), content_type="application/json", headers=retry)
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
        ticket = self._start(call, script, cached, fault)
        try:
            if call.stream:
                shape = StreamShape(call, cached=shown, fingerprint=self.config.fingerprint)
                response = await send_stream(
                    request, script, ticket, shape,
                    interval=self.config.stream_interval, together=self.config.delay, fault=fault,
                )  # fmt: skip
            else:
                body = whole(call, script, cached=shown, fingerprint=self.config.fingerprint)
                response = await send_whole(request, body, ticket, fault=fault)
        finally:
            record.tokens = self.pacer.stop(ticket)
            record.started = ticket.started
            if counted and record.tokens:
                self.cache.store(call.prompt + script.ids[: record.tokens])
        record.status = response.status
        if fault is None:
            record.how = script.finish
        return response

    def _start(self, call: Call, script: Script, cached: int, fault: Fault | None) -> Ticket:
        pacer = self.pacer
        room = self.config.max_queued
        if room is not None and pacer.running >= self._model.slots and pacer.waiting >= room:
            raise Refusal(503, "The server is overloaded. Please try again later.", "ServiceUnavailableError")
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

    def _write(self, call: Call, sampling: Any) -> Script:
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
    from elis_gateway.sim.replay import Recorded

    return Recorded.load(config.replay, fallback=config.language)


def _authorize(header: str | None, key: str | None) -> None:
    if key is not None and header != f"Bearer {key}":
        raise Refusal(401, "Unauthorized", "AuthenticationError")


async def _fail_early(fault: Fault) -> None:
    if fault.kind == "status":
        refusal = Refusal(fault.status, "a fault was asked for", "InternalServerError")
        refusal.retry_after = fault.retry_after
        raise refusal
    if fault.kind == "hang":
        await asyncio.get_running_loop().create_future()


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(data), content_type="application/json")


class _Routes:
    """The small routes."""

    def __init__(self, sim: Sim) -> None:
        self._sim = sim

    async def models(self, request: web.Request) -> web.Response:
        config = self._sim.config
        try:
            _authorize(request.headers.get("Authorization"), config.api_key)
        except Refusal as exc:
            return web.Response(status=exc.status, body=exc.body(), content_type="application/json")
        created = int(time.time())
        common = {"object": "model", "created": created, "owned_by": "elis-sim", "parent": None}
        data = [{"id": name, **common, "root": name, "max_model_len": config.max_model_len} for name in config.models]
        return _json({"object": "list", "data": data})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        sim, pacer = self._sim, self._sim.pacer
        label = f'{{engine="0",model_name="{sim.config.models[0]}"}}'
        values = {
            "num_requests_running": ("gauge", float(pacer.running)),
            "num_requests_waiting": ("gauge", float(pacer.waiting)),
            "kv_cache_usage_perc": ("gauge", pacer.kv_usage),
            "num_preemptions_total": ("counter", float(pacer.evictions)),
            "prefix_cache_queries_total": ("counter", float(sim.cache.queries)),
            "prefix_cache_hits_total": ("counter", float(sim.cache.hits)),
        }
        lines = [f"# TYPE vllm:{name} {kind}\nvllm:{name}{label} {value}\n" for name, (kind, value) in values.items()]
        return web.Response(text="".join(lines))

    async def tokenize(self, request: web.Request) -> web.Response:
        try:
            body = body_of(await request.read())
            voice = self._sim.voice
            if "messages" in body:
                open_turn = body.get("add_generation_prompt", True) is not False
                ids = voice.chat(messages_of(body), open_turn=open_turn, continue_last=False, length=None)
            elif isinstance(body.get("prompt"), str):
                ids = voice.prompt(body["prompt"], length=None)
            else:
                raise bad_request("prompt or messages must be given", "prompt")
        except Refusal as exc:
            return web.Response(status=exc.status, body=exc.body(), content_type="application/json")
        size = self._sim.config.max_model_len
        return _json({"count": len(ids), "max_model_len": size, "tokens": ids, "token_strs": None})

    async def detokenize(self, request: web.Request) -> web.Response:
        try:
            return _json({"prompt": self._sim.voice.decode(body_of(await request.read()).get("tokens", []))})
        except (Refusal, ValueError, TypeError) as exc:
            refusal = exc if isinstance(exc, Refusal) else bad_request(str(exc), "tokens")
            return web.Response(status=refusal.status, body=refusal.body(), content_type="application/json")

    async def requests(self, request: web.Request) -> web.Response:
        listed = self._sim.log.listed()
        if request.method == "DELETE":
            self._sim.log.clear()
        return _json({"now": asyncio.get_running_loop().time(), "requests": listed})

    async def faults(self, request: web.Request) -> web.Response:
        book = self._sim.faults
        if request.method == "DELETE":
            book.rules.clear()
        elif request.method == "POST":
            try:
                book.add(Fault.parse(body_of(await request.read())))
            except (Refusal, ValueError) as exc:
                return _json({"error": {"message": str(exc)}}, 400)
        return _json({"faults": book.listed()})

    async def missing(self, request: web.Request) -> web.Response:
        return _json({"detail": "Not Found"}, 404)


def make_app(config: ServerConfig, sim: Sim | None = None) -> web.Application:
    """The server as an aiohttp application. Serve it with ``handler_cancellation``, or a client that leaves is seen
    only at the next write."""
    sim = sim or Sim(config)
    routes = _Routes(sim)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post(COMPLETIONS, sim.call)
    app.router.add_post(CHAT, sim.call)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_post("/tokenize", routes.tokenize)
    app.router.add_post("/detokenize", routes.detokenize)
    app.router.add_route("*", "/sim/requests", routes.requests)
    app.router.add_route("*", "/sim/faults", routes.faults)
    app.router.add_route("*", "/{path:.*}", routes.missing)
    return app


class SimServer:
    """A server in this process, for tests: on one port through ``kill`` and ``restart``. Also ``async with``."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.sim = Sim(config)
        self.port = config.port
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{self.config.host}:{self.port}"

    @property
    def log(self) -> RequestLog:
        return self.sim.log

    @property
    def faults(self) -> FaultBook:
        return self.sim.faults

    async def start(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        runner = web.AppRunner(
            make_app(self.config, self.sim), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.config.host, self.port, reuse_address=True, backlog=1024).start()
        except OSError:
            await runner.cleanup()
            raise
        self.port = runner.addresses[0][1]
        self._runner = runner

    async def stop(self) -> None:
        """Stop listening, give calls a second, close."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def kill(self) -> None:
        """As if the process died: no listener, every connection reset, the engine and its cache forgotten."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        self.sim.die()
        for connection in [] if runner.server is None else runner.server.connections:
            reset(connection.transport)
        await runner.cleanup()

    async def restart(self) -> None:
        """``kill``, and a fresh engine on the same port."""
        await self.kill()
        await self.start()

    async def __aenter__(self) -> SimServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


async def serve(config: ServerConfig) -> None:
    """Serve until SIGINT or SIGTERM."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with SimServer(config) as server:
        _log.info("embedded engine on %s, models: %s", server.url, ", ".join(config.models))
        await stopping.wait()


def run(config: ServerConfig) -> None:
    """``serve`` on an event loop of its own."""
    asyncio.run(serve(config))
