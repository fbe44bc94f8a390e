"""Passes on what the gateway does not schedule: any other /v1 path, both directions streamed, nothing changed.

Knows: which headers belong to one hop, which must not come from a client, which upstreams serve the model named in
the body. Never: queues, slots. A relayed call holds no slot: embeddings and the like are the engine's to order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict

from elis_gateway.errors import ClientError, ModelNotFound, Overloaded, UpstreamError
from elis_gateway.upstream.fleet import Fleet
from elis_gateway.upstream.http import HttpUpstream, abort, unavailable

__all__ = ["Relay"]

_HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_NOT_FROM_CLIENTS = frozenset({"host", "authorization", "x-vllm-priority", "x-data-parallel-rank", "expect"})
_RETRY_AFTER = 5.0


class Relay:
    """A handler for requests that are not ours. ``aliases``: client's model name to upstream's."""

    def __init__(self, fleet: Fleet, aliases: Mapping[str, str]) -> None:
        self.aliases = dict(aliases)
        self._fleet = fleet
        self._in_flight: dict[str, int] = {}

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Relay one request. Raises ``GatewayError`` while nothing was sent to the client."""
        body: bytes | None = None
        model: str | None = None
        if request.can_read_body and request.content_type == "application/json":
            # Only JSON names its model where it can be found cheaply; it is small enough to be sent again, too.
            body, model = self._with_model(await request.read())
        streamed = body is None and request.can_read_body
        upstreams = self._candidates(model)
        for last, upstream in zip(range(len(upstreams) - 1, -1, -1), upstreams, strict=True):
            try:
                return await self._through(upstream, request, body, streamed=streamed)
            except UpstreamError as error:
                upstream.failed(error)
                if not last or streamed or not error.retryable:
                    raise
        raise AssertionError("unreachable: there is at least one candidate")

    def _with_model(self, body: bytes) -> tuple[bytes, str | None]:
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            return body, None
        model = fields.get("model") if isinstance(fields, dict) else None
        if not isinstance(model, str):
            return body, None
        if model in self.aliases:
            fields["model"] = model = self.aliases[model]
            try:
                body = orjson.dumps(fields)
            except orjson.JSONEncodeError as error:
                raise ClientError("The request body is nested too deeply.", code="invalid_json") from error
        return body, model

    def _candidates(self, model: str | None) -> list[HttpUpstream]:
        if model is not None and not self._fleet.knows(model):
            raise ModelNotFound(model)
        upstreams = self._fleet.serving(model)
        if not upstreams:
            raise Overloaded("no upstream is healthy", cause="unavailable", retry_after=_RETRY_AFTER)
        return sorted(upstreams, key=lambda u: self._in_flight.get(u.id, 0))

    async def _through(
        self, upstream: HttpUpstream, request: web.BaseRequest, body: bytes | None, *, streamed: bool
    ) -> web.StreamResponse:
        headers = _request_headers(request.headers, upstream)
        data: bytes | aiohttp.StreamReader | None = request.content if streamed else body
        if not streamed or headers.popall("Content-Encoding", None) is not None:
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
                timeout=timeout,
            )
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_without_hop(answer.headers)
            )
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            answer.release()
        except (aiohttp.ClientError, OSError, asyncio.CancelledError) as error:
            if answer is not None:
                abort(answer)
            if response is None and not isinstance(error, asyncio.CancelledError):
                raise unavailable(upstream.id, error) from error
            if isinstance(error, aiohttp.ClientError) and request.transport is not None:
                # The status is out: all that is left is to let the client see that the body was cut.
                request.transport.abort()
            raise
        finally:
            self._in_flight[upstream.id] -= 1
        return response


def _request_headers(given: Mapping[str, str], upstream: HttpUpstream) -> CIMultiDict[str]:
    headers = _without_hop(given)
    for name in list(headers):
        lower = name.lower()
        if lower in _NOT_FROM_CLIENTS or lower.startswith("x-elis-"):
            headers.popall(name, None)
    if (key := upstream.headers().get("Authorization")) is not None:
        headers["Authorization"] = key
    return headers


def _without_hop(given: Mapping[str, str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in given.get("Connection", "").split(",")}
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in given.items():
        if (lower := name.lower()) not in _HOP_BY_HOP and lower not in named:
            headers.add(name, value)
    return headers
