"""The public listener: routes, client connections, disconnects. Never: policies, upstream choice, queue internals.

A stream's status line waits for its first bytes, so that an engine's refusal keeps its own status and text, or for
``keepalive_after``: from then on the status is 200, comments keep the connection alive, and whatever goes wrong is an
error event. A client that leaves cancels its handler (aiohttp's ``handler_cancellation``), which cancels its job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, Protocol
from urllib.parse import unquote

import orjson
from aiohttp import HttpVersion11, web, web_protocol
from multidict import CIMultiDict

from elis_gateway.access import Door
from elis_gateway.channel import Channel
from elis_gateway.dispatcher import Dispatcher
from elis_gateway.errors import ClientError, GatewayError, MethodNotAllowed, ModelNotFound, ShuttingDown
from elis_gateway.flight import Flight
from elis_gateway.intake import Intake
from elis_gateway.listener import Request
from elis_gateway.logs import job_id
from elis_gateway.party import Party
from elis_gateway.wire import openai, sse
from elis_gateway.wire.openai import Route
from elis_gateway.wire.problems import problem, reason

__all__ = ["Handlers", "describe", "problem_response"]

_JSON = "application/json"
_OPENAPI = files("elis_gateway").joinpath("openapi.yaml")
_EVENTS = "text/event-stream; charset=utf-8"
_BACKLOG = 64 * 1024
"""Bytes a client may be behind before writing waits for it."""
_COMMENT = sse.comment("waiting")
_MODEL = "/v1/models/"
_ADMINISTRATION = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What changes an engine is not for everybody who may ask it something."""
_RELAYED = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})

Relayed = Callable[[web.BaseRequest, Callable[..., bool] | None], Awaitable[web.StreamResponse]]
"""Passes a request on; the second argument says which models it may be for (None: any)."""
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Directory(Protocol):
    """The models in service, and whether there are any."""

    @property
    def models(self) -> Mapping[str, int | None]: ...


class _EventStream(web.StreamResponse):
    """A response whose head travels with its first bytes, in one write."""

    _send_headers_immediately = False


class Handlers:
    """Answers every request of the public listener: hand it to ``aiohttp.web.Server``."""

    def __init__(
        self,
        intake: Intake,
        dispatcher: Dispatcher,
        directory: Directory,
        relay: Relayed,
        door: Door,
        *,
        keepalive_after: float,
        refused: Callable[[str], None] = lambda reason: None,
        body_timeout: float = 0.0,
        relayed: Sequence[str] = ("/v1/",),
        cors_origins: Sequence[str] = (),
        client_backlog: int = 4 * 1024 * 1024,
    ) -> None:
        """``refused`` is told the reason of every error that is answered in place of an answer."""
        self._refused = refused
        self._intake = intake
        self._dispatcher = dispatcher
        self._directory = directory
        self._relay = relay
        self._door = door
        self._relayed = tuple(relayed)
        self._client_backlog = client_backlog
        self._origins = frozenset(cors_origins)
        self._keepalive_after = keepalive_after
        self._body_timeout = body_timeout
        self._loop = asyncio.get_running_loop()
        self._routes: dict[tuple[str, str], Handler] = {
            **{("POST", str(route)): partial(self._generate, route) for route in Route},
            ("GET", "/v1/models"): self._models,
            ("GET", "/health"): self._health,
            ("HEAD", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("HEAD", "/ready"): self._ready,
            ("GET", "/openapi.yaml"): self._openapi,
        }

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Route by method and path; the rest of /v1 is relayed."""
        path = request.rel_url.raw_path
        if "Expect" in request.headers:
            _go_ahead(request)
        if self._origins and "Origin" in request.headers:
            return await self._across(request, path)
        return await self._answer(request, path)

    async def _answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        try:
            handler = self._routes.get((request.method, path)) or self._other(request.method, path)
            return await handler(request)
        except GatewayError as error:
            return self._problem(error)
        except web.HTTPRequestEntityTooLarge as error:
            self._refused("request_too_large")
            return _error(413, error.text or "the request body is too large", "request_too_large")
        except web_protocol.RequestPayloadError:
            self._refused("invalid_body")
            return _error(400, "the request body is not what its headers say", "invalid_body")

    def _other(self, method: str, path: str) -> Handler:
        """The handler of what is not exactly a route of ours. Raises ``ClientError``."""
        plain = _canonical(path)
        if method == "GET" and path.startswith(_MODEL) and path.rstrip("/") != _MODEL.rstrip("/"):
            return self._model  # its name may be anything, a quoted slash too
        if (handler := self._routes.get((method, plain))) is not None:
            # Another spelling of a route must not go past the queue.
            return handler
        if allowed := [m for m, p in self._routes if p == plain]:
            raise MethodNotAllowed(method, allowed)
        if plain.startswith(_MODEL) and method == "GET":
            return self._model
        if not self._passes(plain):
            raise ClientError(f"unknown path {path[:200]}", code="not_found")
        if method not in _RELAYED:
            raise MethodNotAllowed(method, sorted(_RELAYED))
        return self._pass_on

    def _passes(self, plain: str) -> bool:
        """Is this path one that is relayed?"""
        if plain in _ADMINISTRATION or not plain.startswith("/v1/"):
            return plain in self._relayed
        return plain.startswith(self._relayed)

    async def _pass_on(self, request: web.BaseRequest) -> web.StreamResponse:
        if not self._dispatcher.accepting:
            raise ShuttingDown("the gateway is shutting down")
        grant = self._door.who(request.headers)
        with self._door.relayed(grant, request.content_length or 0):
            return await self._relay(request, grant.may_use if grant is not None and grant.settings.models else None)

    # --- browsers ------------------------------------------------------------------------------------------------

    async def _across(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """A request of a page of another origin, where some are allowed: the browser is told whether it may."""
        origin = request.headers["Origin"]
        if "*" not in self._origins and origin not in self._origins:
            refusal = ClientError("this origin may not use the API from a browser", code="insufficient_permissions")
            return self._problem(refusal)
        allowed = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            asked = request.headers.get("Access-Control-Request-Headers", "")
            return web.Response(
                status=204,
                headers={
                    **allowed,
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": asked or "Authorization, Content-Type",
                    "Access-Control-Max-Age": "600",
                },
            )
        if isinstance(request, Request):
            request.beside = allowed
        response = await self._answer(request, path)
        if not response.prepared:
            response.headers.update(allowed)
        return response

    # --- generation ----------------------------------------------------------------------------------------------

    async def _generate(self, route: Route, request: web.BaseRequest) -> web.StreamResponse:
        headers = request.headers
        grant = self._door.who(headers)
        body = await self._body(request)
        asked = self._intake.take(openai.parse(route, body), len(body), headers, grant)
        # A connection's next request runs in the same task.
        in_context = job_id.set(asked.first.spec.id)
        try:
            self._door.enter(asked.parts, grant)
            for flight in asked.parts:
                self._dispatcher.submit(flight)
            if asked.request.stream:
                response = await self._stream(request, asked)
            else:
                response = await self._whole(request, asked)
        finally:
            # The client has gone, or something broke: nobody wants the rest.
            for flight in asked.parts:
                self._dispatcher.cancel(flight)
                self._door.leave(flight)
            job_id.reset(in_context)
        return response

    async def _body(self, request: web.BaseRequest) -> bytes:
        """The request's body. Raises ``ClientError`` where it takes too long to come."""
        content = request.content
        if content.is_eof() and content.total_bytes <= request.client_max_size:
            return content.read_nowait()  # it came with its head, as most do
        if content.is_eof() or self._body_timeout <= 0:
            return await request.read()
        try:
            async with asyncio.timeout(self._body_timeout):
                return await request.read()
        except TimeoutError:
            limit = self._body_timeout
            raise ClientError(f"the request body did not arrive within {limit:g} s", code="request_timeout") from None

    async def _whole(self, request: web.BaseRequest, asked: Flight | Party) -> web.StreamResponse:
        try:
            body = await asked.channel.get()
        except GatewayError as error:
            return self._problem(error, _headers(request, asked.first))
        return web.Response(body=body, headers=_headers(request, asked.first, _JSON))

    async def _stream(self, request: web.BaseRequest, asked: Flight | Party) -> web.StreamResponse:
        channel = asked.channel
        response: web.StreamResponse | None = None
        alive = _Keepalive(self._loop, channel, self._keepalive_after)
        try:
            data = await channel.get()
            response = _EventStream(headers=_headers(request, asked.first, _EVENTS))
            if request.version < HttpVersion11:
                response.force_close()  # without chunks nothing else tells where it ends, whatever is asked for
            await response.prepare(request)
            if request.transport is not None:
                # Cutting the connection cancels this handler, and that its job.
                channel.bound(self._client_backlog, request.transport.abort)
            while data and not channel.exhausted:
                await response.write(data)
                if request.version == HttpVersion11:
                    channel.attach(_sink(request))
                data = await channel.get()
        except GatewayError as error:
            if response is None:
                return self._problem(error, _headers(request, asked.first))
            data = asked.first.answer.error_event(error)
        finally:
            alive.stop()
        await response.write_eof(data)
        return response

    def _problem(self, error: GatewayError, headers: Mapping[str, str] | None = None) -> web.Response:
        self._refused(reason(error))
        response = problem_response(error, headers)
        if isinstance(error, ShuttingDown):
            response.force_close()  # its next request is for whoever serves then
        return response

    # --- everything else -----------------------------------------------------------------------------------------

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        data = list(self._visible(request).values())
        return web.Response(body=orjson.dumps({"object": "list", "data": data}), content_type=_JSON)

    async def _model(self, request: web.BaseRequest) -> web.StreamResponse:
        name = request.rel_url.path.removeprefix(_MODEL)
        found = self._visible(request).get(name)
        if found is None:
            raise ModelNotFound(name)
        return web.Response(body=orjson.dumps(found), content_type=_JSON)

    def _visible(self, request: web.BaseRequest) -> dict[str, dict[str, Any]]:
        """The models in service that the client may use, by every name it may use for them."""
        grant = self._door.who(request.headers)
        models = dict(self._directory.models)
        aliases = self._intake.aliases
        for alias, model in aliases.items():
            if model in models:
                models.setdefault(alias, models[model])
        return {
            name: {"id": name, "object": "model", "created": 0, "owned_by": "elis-gateway"}
            | ({} if length is None else {"max_model_len": length})
            for name, length in models.items()
            if grant is None or grant.may_use(name, aliases.get(name, name))
        }

    async def _openapi(self, request: web.BaseRequest) -> web.StreamResponse:
        """What is served here, as an OpenAPI description."""
        return web.Response(body=_OPENAPI.read_bytes(), content_type="application/yaml")

    async def _health(self, request: web.BaseRequest) -> web.StreamResponse:
        """The process is alive."""
        return web.Response(body=b'{"status":"ok"}', content_type=_JSON)

    async def _ready(self, request: web.BaseRequest) -> web.StreamResponse:
        """Requests sent here would be served: some upstream is in service, and we are not shutting down."""
        ready = self._dispatcher.accepting and bool(self._directory.models)
        body = b'{"status":"ready"}' if ready else b'{"status":"not ready"}'
        return web.Response(status=200 if ready else 503, body=body, content_type=_JSON)


class _Keepalive:
    """Puts a comment into a stream that has been silent: one lazy timer, no cost per chunk."""

    __slots__ = ("_after", "_channel", "_loop", "_seen", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Channel, after: float) -> None:
        self._loop = loop
        self._channel = channel
        self._after = after
        self._seen = channel.puts
        self._timer = loop.call_later(after, self._look) if after > 0 else None

    def _look(self) -> None:
        channel = self._channel
        if channel.puts == self._seen:
            channel.put(_COMMENT)
        self._seen = channel.puts
        self._timer = self._loop.call_later(self._after, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _go_ahead(request: web.BaseRequest) -> None:
    """Tell a client that asks before it sends a large body to send it: its size is judged while it comes."""
    if request.headers["Expect"].lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _sink(request: web.BaseRequest) -> Callable[[bytes], bool]:
    """Writes chunks of a response whose head is out straight to the connection, while the client keeps up."""
    transport = request.transport

    def write(data: bytes) -> bool:
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > _BACKLOG:
            # The handler's own write waits until the client has caught up, or finds that it has gone.
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    return write


def describe(flight: Flight) -> str:
    """The final comment of a stream with X-Elis-Debug: what is only known at the end."""
    job = flight.job
    if job is None:
        return "elis"
    facts = {
        "job": job.id,
        "slices": job.slices,
        "preemptions": job.preemptions,
        "queue_wait": round(job.waited, 6),
        "jct": None if job.jct is None else round(job.jct, 6),
        "tokens": job.attained,
        "estimates": flight.estimates,
        "upstreams": [leg.upstream for leg in flight.legs],
        "legs": [
            [
                leg.upstream,
                round(leg.sent - job.arrival, 6),
                None if leg.first_token is None else round(leg.first_token - job.arrival, 6),
                round(leg.ended - job.arrival, 6),
                leg.tokens,
                leg.end,
            ]
            for leg in flight.legs
        ],
    }
    return "elis " + orjson.dumps(facts).decode()


def problem_response(error: GatewayError, headers: Mapping[str, str] | None = None) -> web.Response:
    """An OpenAI-shaped error response."""
    answer = problem(error)
    return web.Response(status=answer.status, body=answer.body, headers={**(headers or {}), **answer.headers})


def _headers(request: web.BaseRequest, flight: Flight, content_type: str | None = None) -> CIMultiDict[str]:
    headers: CIMultiDict[str] = CIMultiDict()
    if content_type is not None:
        headers["Content-Type"] = content_type
    if content_type is _EVENTS:
        headers["Cache-Control"] = "no-cache"
    if isinstance(request, Request):
        headers.update(request.beside)
    headers["X-Request-Id"] = request.headers.get("X-Request-Id") or flight.spec.id
    if flight.describe is not None:
        answer = flight.answer
        headers["X-Elis-Job"] = flight.spec.id
        # The reason may quote the client's own words, of which line ends must not get into a header.
        reason = "".join(c if c.isprintable() else "?" for c in answer.reason)
        headers["X-Elis-Sliced"] = f"no; {reason}" if reason else answer.mode
        if flight.first_estimate is not None:
            headers["X-Elis-Estimate"] = f"{flight.first_estimate.remaining:.1f}"
        if flight.job is not None:
            headers["X-Elis-Queue-Wait"] = f"{flight.job.waited:.6f}"
    return headers


def _error(status: int, message: str, code: str) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.Response(status=status, body=orjson.dumps({"error": error}), content_type=_JSON)


def _canonical(path: str) -> str:
    """A path as every server behind us would understand it: unquoted, without empty segments or a last slash.

    Raises ``ClientError`` for one that leads elsewhere depending on who reads it.
    """
    plain = unquote(path, errors="replace")
    segments = [segment for segment in plain.split("/") if segment]
    if any(segment in (".", "..") for segment in segments) or not plain.isprintable() or "\\" in plain:
        raise ClientError("the path is not one that every server reads alike", code="bad_path")
    return "/" + "/".join(segments)
