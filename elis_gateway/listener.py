"""aiohttp's server with errors of ours: what it refuses before a handler sees it is OpenAI-shaped JSON, too.

Knows: malformed requests, bugs that reached the top, heads that never come to their end. Never: routes, keys, jobs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from aiohttp import web, web_protocol
from aiohttp.http import SERVER_SOFTWARE
from aiohttp.http_exceptions import HttpProcessingError

from elis_gateway.errors import ClientError, GatewayError
from elis_gateway.wire.problems import problem, reason

__all__ = ["AppRunner", "Listener", "Request", "sign"]

_log = logging.getLogger("elis_gateway.listener")
_MALFORMED = (web_protocol.RequestPayloadError, HttpProcessingError)
_NAME = "elis-gateway"


async def sign(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Say our name where aiohttp would say its own and Python's, with the versions of both.

    What a relayed answer says of its engine stays.
    """
    if response.headers.get("Server") == SERVER_SOFTWARE:
        response.headers["Server"] = _NAME


class Request(web.BaseRequest):
    """A request, and the headers that its response is to carry whatever it will be."""

    ATTRS = web.BaseRequest.ATTRS | frozenset({"beside"})

    beside: Mapping[str, str] = MappingProxyType({})

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        """Called when a response's headers are complete: for a server without an application there is no signal."""
        await sign(self, response)


class Listener(web.Server):
    """A listener's protocol factory. ``refused`` is told of what no handler sees.

    ``head_timeout``: seconds a request's head may take; ``stall``: seconds in which a client that is behind has to read
    something. 0: any.
    """

    def __init__(
        self,
        handler: Any,
        *,
        head_timeout: float = 0.0,
        stall: float = 0.0,
        refused: Callable[[str], None] = lambda reason: None,
        **options: Any,
    ) -> None:
        super().__init__(handler, **options)
        self.refused = refused
        self.head_timeout = head_timeout
        self.stall = stall

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class AppRunner(web.AppRunner):
    """Runs an application, with routes, on a ``Listener``."""

    def __init__(self, app: web.Application, *, head_timeout: float, **options: Any) -> None:
        super().__init__(app, **options)
        self._head_timeout = head_timeout

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()
        return Listener(
            plain.request_handler,
            head_timeout=self._head_timeout,
            request_factory=plain.request_factory,
            **self._kwargs,
        )


class _Connection(web.RequestHandler):
    """One client connection."""

    __slots__ = ("_behind", "_head_timeout", "_head_timer", "_refused", "_stall", "_stall_timer")

    def __init__(self, manager: Listener, *, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        super().__init__(manager, loop=loop, **options)
        self._refused = manager.refused
        self._head_timeout = manager.head_timeout
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall = manager.stall
        self._stall_timer: asyncio.TimerHandle | None = None
        self._behind = 0
        """Bytes the client had not taken when it was looked at last."""

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._head_timeout <= 0:
            return
        if self._request_count != before:
            self._stop_timer()
        elif self._head_timer is None and not self._request_in_progress and not self._messages:
            # The beginning of a head, byte by byte perhaps: all of it has to be here in time.
            self._head_timer = self._loop.call_later(self._head_timeout, self._too_slow)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall > 0 and self.transport is not None:
            self._behind = self.transport.get_write_buffer_size()
            self._stall_timer = self._loop.call_later(self._stall, self._stalled)

    def resume_writing(self) -> None:
        self._forgive()
        super().resume_writing()

    def _stalled(self) -> None:
        """The client is behind: has it taken anything since?"""
        self._stall_timer = None
        if self.transport is None:
            return
        behind = self.transport.get_write_buffer_size()
        if behind >= self._behind:
            _log.info("a client that reads nothing any more is cut off")
            self.transport.abort()
            return
        self._behind = behind
        self._stall_timer = self._loop.call_later(self._stall, self._stalled)

    def _forgive(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        self._forgive()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self._request_in_progress:
            self.force_close()

    def log_exception(self, *args: Any, **options: Any) -> None:
        """A body that cannot be unpacked, met again while the rest of it is read away, is no bug of ours."""
        if isinstance(options.get("exc_info"), _MALFORMED):
            _log.debug("the rest of a refused request cannot be read")
        else:
            super().log_exception(*args, **options)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The response for what no handler answered; the connection closes after it."""
        error: GatewayError
        if isinstance(exc, ConnectionError) and (request.transport is None or request.transport.is_closing()):
            # The client went while its handler wrote. aiohttp knows what to do with this one.
            raise ConnectionError("the client is gone") from exc
        if status < 500:
            # In our words alone: what cannot be read may be a key, or a prompt.
            words = _words(exc, message)
            _log.debug("malformed request from %s: %s", request.remote, words)
            error = ClientError(f"malformed HTTP request: {words}", code="bad_request")
        else:
            _log.error("a bug of ours answering %s", request.remote, exc_info=exc)
            error = GatewayError("internal error")
        if request.writer.output_size > 0:
            raise ConnectionError("part of a response is out, an error cannot follow it")
        self._refused(reason(error))
        answer = problem(error)
        # An application's signals are not sent for a request that never got to it.
        response = web.Response(status=answer.status, body=answer.body, headers={**answer.headers, "Server": _NAME})
        response.force_close()
        return response


def _words(error: BaseException | None, message: str | None) -> str:
    """What is wrong, in one line, without quoting the client's bytes back."""
    text = error.message if isinstance(error, HttpProcessingError) else message or ""
    return (text.splitlines() or ["it cannot be read"])[0].rstrip(": ") or "it cannot be read"
