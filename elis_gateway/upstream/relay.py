"""Passes on what the gateway does not schedule: any other /v1 path, both directions streamed, nothing changed.

Knows: which headers belong to one hop, which must not come from a client, which upstreams serve the model named in
the body. Never: queues, slots. A relayed call holds no slot: embeddings and the like are the engine's to order.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Container, Mapping

import aiohttp
import orjson
from aiohttp import HttpVersion11, web, web_protocol
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from elis_gateway.errors import ClientError, Forbidden, ModelNotFound, Overloaded, UpstreamError, UpstreamRefused
from elis_gateway.upstream.fleet import Fleet
from elis_gateway.upstream.http import CREDENTIALS, RANK, HttpUpstream
from elis_gateway.upstream.responses import abort, foreign_refusal, read_body, retry_after, unavailable

__all__ = ["Relay"]

_HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_NOT_FROM_CLIENTS = frozenset({"host", "x-vllm-priority", "x-data-parallel-rank", "expect"})
_NEVER_OURS = CREDENTIALS | {"x-goog-api-key", "cookie"}
"""What says who the client is: ours to know, not an upstream's."""
_NOT_FROM_UPSTREAMS = ("access-control-", "set-cookie", "www-authenticate")
"""Beginnings of response headers by which an engine would speak for us."""
_BOUNDARY = re.compile(r'^multipart/form-data\s*;.*\bboundary="?([^";,]+)', re.IGNORECASE)
_FORM_HEAD = 64 * 1024
"""Bytes of a form in which its model is looked for: clients send the fields before the file."""
_RETRY_AFTER = 5.0


class Relay:
    """A handler for requests that are not ours. ``aliases``: client's model name to upstream's."""

    def __init__(
        self, fleet: Fleet, aliases: Mapping[str, str], *, body_timeout: float = 0.0, max_body: int = 1 << 62
    ) -> None:
        self.aliases = dict(aliases)
        self._fleet = fleet
        self._body_timeout = body_timeout
        self._max_body = max_body
        self._in_flight: dict[str, int] = {}
        self._open = 0
        """Requests that have come and are not answered, those too whose bodies are still on their way."""
        self._ended = asyncio.Event()
        """Set whenever a call or a request is over."""

    async def __call__(
        self, request: web.BaseRequest, may_use: Callable[..., bool] | None = None
    ) -> web.StreamResponse:
        """Relay one request. Raises ``GatewayError`` while nothing was sent to the client.

        ``may_use``: whether a model may be asked for, under any of its names; None: all may. Then a request has to name
        its model where it can be read.
        """
        self._open += 1
        try:
            return await self._pass_on(request, may_use)
        finally:
            self._open -= 1
            self._ended.set()

    async def _pass_on(self, request: web.BaseRequest, may_use: Callable[..., bool] | None) -> web.StreamResponse:
        body: bytes | None = None
        model: str | None = None
        if request.can_read_body and request.content_type == "application/json":
            # JSON names its model where it can be found cheaply; it is small enough to be sent again, too.
            body, model = self._with_model(await self._body(request), may_use)
        if may_use is not None and model is None:
            raise Forbidden("this key is for certain models only, and the request does not name one")
        upload: _Upload | None = None
        if body is None and request.can_read_body:
            upload = _Upload(request.content, self._body_timeout, self._max_body)
            if (boundary := _BOUNDARY.search(request.headers.get("Content-Type", ""))) is not None:
                named = await upload.model(boundary[1].encode("utf-8", "surrogateescape"))
                named = self.aliases.get(named, named)
                # Nobody is refused for a field of a form: what no upstream lists, one of them may serve all the same.
                model = named if self._fleet.lists(named) else None
        tried: set[str] = set()
        upstream = self._first(model)
        while True:
            try:
                return await self._through(upstream, request, body, upload)
            except UpstreamError as error:
                upstream.failed(error)
                tried.add(upstream.id)
                another = self._least_busy(model, tried)
                if another is None or upload is not None or not error.retryable:
                    raise
                upstream = another

    async def idle(self, upstream_id: str | None = None) -> None:
        """Wait until nothing is passed through this upstream (None: nor about to be through any). It should be
        draining, or this may take for ever."""
        while self._open if upstream_id is None else upstream_id in self._in_flight:
            self._ended.clear()
            await self._ended.wait()

    async def _body(self, request: web.BaseRequest) -> bytes:
        try:
            async with asyncio.timeout(self._body_timeout or None):
                return await request.read()
        except TimeoutError:
            raise ClientError("the request body took too long to arrive", code="request_timeout") from None

    def _with_model(self, body: bytes, may_use: Callable[..., bool] | None) -> tuple[bytes, str | None]:
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            return body, None
        model = fields.get("model") if isinstance(fields, dict) else None
        if not isinstance(model, str):
            return body, None
        if may_use is not None and not may_use(model, self.aliases.get(model, model)):
            raise ModelNotFound(model)
        if model in self.aliases or may_use is not None:
            # Written anew for a key with models of its own, too: of two fields `model` the engine might read the other.
            fields["model"] = model = self.aliases.get(model, model)
            try:
                body = orjson.dumps(fields)
            except orjson.JSONEncodeError as error:
                raise ClientError("The request body is nested too deeply.", code="invalid_json") from error
        return body, model

    def _first(self, model: str | None) -> HttpUpstream:
        if model is not None and not self._fleet.knows(model):
            raise ModelNotFound(model)
        if (found := self._least_busy(model)) is None:
            raise Overloaded("no upstream is healthy", cause="unavailable", retry_after=_RETRY_AFTER)
        return found

    def _least_busy(self, model: str | None, but: Container[str] = ()) -> HttpUpstream | None:
        """Of those that serve now: one may have come or gone since another was asked."""
        able = [upstream for upstream in self._fleet.serving(model) if upstream.id not in but]
        return min(able, key=lambda upstream: self._in_flight.get(upstream.id, 0), default=None)

    async def _through(
        self, upstream: HttpUpstream, request: web.BaseRequest, body: bytes | None, upload: _Upload | None
    ) -> web.StreamResponse:
        headers = _request_headers(request.headers, upstream)
        data = body if upload is None else upload.pieces()
        if upload is None or headers.popall("Content-Encoding", None) is not None:
            # The body is counted anew: what came compressed has been unpacked on the way in.
            headers.popall("Content-Length", None)
            headers.popall("Content-Encoding", None)
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=upstream.settings.timeouts.connect or None,
            sock_read=upstream.settings.timeouts.first_byte or None,
        )
        self._in_flight[upstream.id] = self._in_flight.get(upstream.id, 0) + 1
        answer: aiohttp.ClientResponse | None = None
        response: web.StreamResponse | None = None
        try:
            answer = await upstream.client.request(
                request.method,
                upstream.url(request.rel_url.raw_path_qs),
                data=data,
                headers=headers,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept"),
                timeout=timeout,
            )
            if answer.status in (429, 503):
                # It asks to be left alone: another may have room, and whoever comes next is not sent here.
                wait = retry_after(answer.headers.get("Retry-After"))
                raise UpstreamRefused(answer.status, await read_body(answer), retry_after=wait)
            if answer.status in (401, 407) and not upstream.settings.forward_credentials:
                # It is our key that was refused, and its words may quote it.
                raise foreign_refusal(upstream.id, answer.status)
            given = _response_headers(answer.headers)
            given.update(getattr(request, "beside", {}))
            reason = answer.reason if answer.reason is not None and answer.reason.isprintable() else ""
            response = web.StreamResponse(status=answer.status, reason=reason, headers=given)
            if request.version < HttpVersion11 and "Content-Length" not in given:
                response.force_close()  # without chunks nothing else tells where it ends
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            answer.release()
        except (aiohttp.ClientError, OSError, asyncio.CancelledError, UpstreamError) as error:
            if answer is not None:
                abort(answer)
            if isinstance(error, (UpstreamError, asyncio.CancelledError)):
                raise
            if response is None and upload is not None and upload.error is not None:
                # It was the client's body that broke: the upstream must not be blamed for it.
                raise upload.error from error
            if response is None:
                raise unavailable(upstream.id, error) from error
            if request.transport is not None:
                # The status is out: all that is left is to let the client see that the body was cut.
                request.transport.abort()
            raise ConnectionResetError("the answer broke off") from error
        finally:
            self._in_flight[upstream.id] -= 1
            if not self._in_flight[upstream.id]:
                del self._in_flight[upstream.id]
            self._ended.set()
        return response


class _Upload:
    """A client's body on its way through. ``error``: what went wrong with it, which is no fault of the upstream's."""

    def __init__(self, content: aiohttp.StreamReader, seconds: float, most: int) -> None:
        self.error: ClientError | None = None
        self._content = content
        self._deadline = asyncio.get_running_loop().time() + seconds if seconds > 0 else None
        self._left = most
        self._begun = b""
        """What was read to find the model."""

    async def model(self, boundary: bytes) -> str:
        """The field ``model`` of a form, if it is one of the first; else an empty name. Raises ``ClientError``."""
        try:
            mark, part, seen = b"--" + boundary, -1, 0
            while len(self._begun) < _FORM_HEAD and (piece := await self._next()):
                self._begun += piece
                # Only what is new is looked at: a client may send a byte at a time.
                while (end := self._begun.find(mark, seen)) >= 0:
                    if part >= 0:
                        head, _, value = self._begun[part:end].partition(b"\r\n\r\n")
                        if b'; name="model"' in head:
                            return value.removesuffix(b"\r\n").decode("utf-8", "replace")
                    part = seen = end + len(mark)
                seen = max(seen, len(self._begun) - len(mark) + 1)
        except aiohttp.ClientPayloadError:
            assert self.error is not None
            raise self.error from None
        return ""

    async def pieces(self) -> AsyncIterator[bytes]:
        """As they come, within the limits of time and size."""
        if self._begun:
            yield self._begun
        while piece := await self._next():
            yield piece

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout_at(self._deadline):
                piece = await self._content.readany()
        except TimeoutError:
            self.error = ClientError("the request body took too long to arrive", code="request_timeout")
        except (web_protocol.RequestPayloadError, HttpProcessingError, aiohttp.ClientError, OSError):
            self.error = ClientError("the request body is not what its headers say", code="invalid_body")
        else:
            self._left -= len(piece)
            if self._left >= 0:
                return piece
            self.error = ClientError("the request body is too large", code="request_too_large")
        raise aiohttp.ClientPayloadError(str(self.error))


def _request_headers(given: Mapping[str, str], upstream: HttpUpstream) -> CIMultiDict[str]:
    headers = _without_hop(given)
    forward = upstream.settings.forward_credentials
    for name in list(headers):
        lower = name.lower()
        if forward and lower in CREDENTIALS:
            continue
        if lower in _NOT_FROM_CLIENTS or lower in _NEVER_OURS or lower.startswith("x-elis-"):
            headers.popall(name, None)
    ours = upstream.headers()
    if RANK in ours:
        headers[RANK] = ours[RANK]
    key = ours.get("Authorization")
    if key is not None and not (forward and CREDENTIALS & {name.lower() for name in headers}):
        headers["Authorization"] = key
    return headers


def _response_headers(given: Mapping[str, str]) -> CIMultiDict[str]:
    headers = _without_hop(given)
    for name in {
        name
        for name, value in headers.items()
        if name.lower().startswith(_NOT_FROM_UPSTREAMS) or not value.replace("\t", " ").isprintable()
    }:
        headers.popall(name)
    return headers


def _without_hop(given: Mapping[str, str]) -> CIMultiDict[str]:
    named = {
        name.strip().lower() for key, value in given.items() if key.lower() == "connection" for name in value.split(",")
    }
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in given.items():
        if (lower := name.lower()) not in _HOP_BY_HOP and lower not in named:
            headers.add(name, value)
    return headers
