"""One engine over HTTP: an aiohttp client without its limits, our timeouts, and our exceptions only.

Knows: sockets, timeouts, aborts, TLS, and which aiohttp or OS exception means what. Never: policies; JSON shapes.

Two clocks guard a call, both without cost per token: the wait for the first byte and the silence between two reads.
All calls of an upstream share one timer, which is set for the first that is to be looked at and, when it fires, looks
at when that one was last heard (a lazy timer). A call is looked at several times before it is given up: a look that
comes late was late because this process stood still (a suspended machine, a container out of its share), and what the
upstream sent meanwhile is yet to be read.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Self

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from elis_gateway import __version__, config, tls
from elis_gateway.errors import ConfigError, UpstreamError, UpstreamRefused, UpstreamUnavailable
from elis_gateway.upstream.base import Capabilities
from elis_gateway.upstream.names import Names
from elis_gateway.upstream.patience import Patience
from elis_gateway.wire.continuation import Call
from elis_gateway.wire.sse import DONE, EventDecoder

__all__ = [
    "CREDENTIALS",
    "RANK",
    "HttpSession",
    "HttpUpstream",
    "abort",
    "check",
    "foreign_refusal",
    "read_body",
    "retry_after",
    "unavailable",
]

CREDENTIALS = frozenset({"authorization", "api-key", "x-api-key"})
"""Headers, in lower case, in which a client says who it is."""
RANK = "X-data-parallel-rank"
"""The header by which a call names the rank of a data-parallel engine (vLLM) that is to run it."""
_POOL_IDLE = 4.0
"""Seconds an idle connection is kept: less than the 5 s after which uvicorn, under vLLM, closes it."""
_READ_BUFFER = 256 * 1024
_HEADER_LIMIT = 64 * 1024
_ERROR_BODY_LIMIT = 1024 * 1024
_ANSWER_LIMIT = 256 * 1024 * 1024
_LOOKS = 4
"""Looks at a call in the longest silence that is borne."""
_APART = 0.02
"""Seconds between two looks of one timer, at least: each goes through all calls to find those whose turn it is, and of
thousands there would be one every millisecond."""
_SETTLE = 1.0
"""Seconds to wait after the last event for the end of the body, so that the connection can be used again."""

Report = Callable[[UpstreamError], None]
"""Told of every failure of the upstream itself, before the caller sees it."""


class HttpUpstream:
    """An engine behind a base URL. ``start`` before use, ``close`` after."""

    def __init__(
        self, settings: config.Upstream, *, report: Report | None = None, well: Callable[[bool], None] | None = None
    ) -> None:
        self.id = settings.name
        self.settings = settings
        self.capabilities = Capabilities(models=frozenset(settings.models))
        self.patience = Patience(settings.timeouts)
        self._report = report
        self._well = well
        self._client: aiohttp.ClientSession | None = None
        self._urls: dict[str, URL] = {}
        # All that aiohttp would add is said here: leaving things out costs it more than looking that they are there.
        self._headers = CIMultiDict(
            {
                "Content-Type": "application/json",
                "Accept": "*/*",
                "Accept-Encoding": "identity",
                "User-Agent": f"elis-gateway/{__version__}",
            }
        )
        if (key := _api_key(settings.api_key_env)) is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        if settings.data_parallel_rank is not None:
            self._headers[RANK] = str(settings.data_parallel_rank)
        self.in_flight = 0
        """Calls that are open."""
        self._timeout = _timeout(settings)
        self.watch = _Watch()

    @property
    def client(self) -> aiohttp.ClientSession:
        """The session of this upstream's connections."""
        if self._client is None:
            raise RuntimeError(f"upstream {self.id} is not started")
        return self._client

    async def start(self) -> None:
        """Make the connection pool. Raises ``ConfigError`` for certificates that cannot be read."""
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=_POOL_IDLE,
                # Authorities take a megabyte and tens of milliseconds: not where nobody will be asked for any.
                ssl=tls.shared(self.settings.tls) if self.settings.url.lower().startswith("https:") else True,
                ttl_dns_cache=10,
                resolver=Names(),
                socket_factory=_watched_socket,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_READ_BUFFER,
            max_line_size=_HEADER_LIMIT,
            max_field_size=_HEADER_LIMIT,
        )

    async def close(self) -> None:
        """Close every connection."""
        self.watch.close()
        if self._client is not None:
            await self._client.close()
            self._client = None

    def open(
        self, call: Call, *, request_id: str, patient: bool = False, headers: Mapping[str, str] | None = None
    ) -> HttpSession:
        """Prepare a call; nothing is sent before the session is entered."""
        return HttpSession(self, call, request_id, 0.0 if patient else self.patience.first_byte(), headers)

    def url(self, path: str) -> URL:
        """The address of ``path``, which starts with a slash; percent-encoding in it is left alone."""
        url = self._urls.get(path)
        if url is None:
            url = URL(self.settings.url + path, encoded=True)
            if len(self._urls) < 64:
                self._urls[path] = url
        return url

    def headers(self, request_id: str | None = None) -> CIMultiDict[str]:
        """Headers of a call of ours: content type, our key, never the client's."""
        headers = self._headers.copy()
        if request_id is not None:
            headers["X-Request-Id"] = request_id
        return headers

    def add(self, headers: CIMultiDict[str], more: Mapping[str, str]) -> None:
        """Put ``more`` into a call's headers; clients' credentials only where this upstream is to have them."""
        credentials = {name for name in more if name.lower() in CREDENTIALS}
        if credentials and self.settings.forward_credentials:
            headers.popall("Authorization", None)
            credentials = set()
        headers.update({name: value for name, value in more.items() if name not in credentials})

    async def get(self, path: str) -> bytes:
        """The body of a GET within the probe's time limit. Raises ``UpstreamError``."""
        limit = self.settings.health.timeout
        try:
            getting = self.client.get(self.url(path), headers=self.headers(), timeout=self._timeout)
            async with asyncio.timeout(limit), getting as response:
                if response.history and _origin(response.url) != _origin(self.url(path)):
                    # A page to log in at, another scheme: calls follow no redirect, so that is not who gets them.
                    raise UpstreamRefused(response.history[0].status, b"")
                body = await read_body(response, _ERROR_BODY_LIMIT)
                if response.status // 100 != 2:
                    raise UpstreamRefused(response.status, body)
                return body
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise unavailable(self.id, error) from error

    def failed(self, error: UpstreamError) -> UpstreamError:
        """Report ``error`` to whoever watches this upstream's health, and hand it back to be raised."""
        if self._report is not None and not error.reported:
            error.reported = True
            self._report(error)
        return error

    def begun(self) -> None:
        """The first byte of an answer has come."""
        if self._well is not None:
            self._well(True)

    def succeeded(self) -> None:
        """A call brought what it should."""
        if self._well is not None:
            self._well(False)

    def change(self, settings: config.Upstream) -> None:
        """Take over what needs no new connections."""
        self.settings = settings
        self._timeout = _timeout(settings)
        self.patience.timeouts = settings.timeouts

    def post(self, call: Call, headers: CIMultiDict[str]) -> Awaitable[aiohttp.ClientResponse]:
        """The head of the answer to a call. Raises what aiohttp raises."""
        return self.client.post(
            self.url(call.path), data=call.body, headers=headers, allow_redirects=False, timeout=self._timeout
        )


class _Watch:
    """Looks at each call that is open when it says it wants to be looked at."""

    __slots__ = ("_calls", "_timer", "_timer_at")

    def __init__(self) -> None:
        self._calls: set[HttpSession] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")

    def add(self, call: HttpSession) -> None:
        """Look at ``call`` at its ``look_at``, which may be another each time it is added."""
        self._calls.add(call)
        if call.look_at < self._timer_at:
            self._set(call.look_at)

    def discard(self, call: HttpSession) -> None:
        """Look at it no more; again is fine. The timer stays: most likely another call wants it."""
        self._calls.discard(call)

    def close(self) -> None:
        """Wait for no call to come. One that is open still is given up in its time: nothing else would wake it."""
        if self._timer is not None and not self._calls:
            self._timer.cancel()
            self._timer = None
            self._timer_at = float("inf")

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_at(at, self._look)

    def _look(self) -> None:
        at, self._timer, self._timer_at = self._timer_at, None, float("inf")
        for call in [call for call in self._calls if call.look_at <= at]:
            self._calls.discard(call)
            call.look()
        if self._calls:
            soonest = asyncio.get_running_loop().time() + _APART
            self._set(max(min(call.look_at for call in self._calls), soonest))


class HttpSession:
    """One call over one connection. See ``base.Session``."""

    __slots__ = (
        "_call", "_content", "_decoder", "_done", "_first", "_gap", "_headers", "_heard", "_limit", "_loop",
        "_request_id", "_response", "_stalled", "_task", "_upstream", "look_at",
    )  # fmt: skip

    def __init__(
        self,
        upstream: HttpUpstream,
        call: Call,
        request_id: str,
        first_byte: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._upstream = upstream
        self._headers = headers
        self._call = call
        self._request_id = request_id
        self._decoder = EventDecoder()
        self._response: aiohttp.ClientResponse | None = None
        self._content: aiohttp.StreamReader | None = None
        self._task: asyncio.Task[object] | None = None
        self._loop = asyncio.get_running_loop()
        self._heard = 0.0
        self._first = -1.0
        """Seconds until the first byte came; below 0: it has not."""
        self._gap = 0.0
        """The longest silence since then."""
        self._limit = first_byte
        """Seconds of silence that are borne; 0: any."""
        self.look_at = 0.0
        self._stalled = False
        self._done = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._watch(self._limit)
        self._upstream.in_flight += 1
        try:
            response = await self._post()
            if response.status != 200:
                raise self._upstream.failed(await self._refusal(response))
            self._content = response.content
            if self._call.stream and response.content_type != "text/event-stream":
                raise self._broken("garbage", f"a stream was asked for, {response.content_type} came")
        except BaseException as error:
            self._upstream.in_flight -= 1
            self._abort()
            if (ours := self._ours(error)) is None:
                raise
            raise ours from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unwatch()
        self._upstream.in_flight -= 1
        if self._response is None:
            return
        if self._done and self._call.stream and self._first >= 0.0:
            self._upstream.patience.heard(self._first, self._gap)
        if kind is not None or not self._done:
            self._abort()
            return
        if self._content is not None and not self._content.at_eof():
            await self._read_on()
        self._release()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[bytes]:
        content = self._content
        if self._done or content is None:
            raise StopAsyncIteration
        while True:
            try:
                data = await content.readany()
            except (asyncio.CancelledError, aiohttp.ClientError, OSError) as error:
                if (ours := self._ours(error)) is None:
                    raise
                raise ours from error
            if not data:
                self._done = True
                raise StopAsyncIteration
            self._hear()
            if payloads := self._decoder.feed(data):
                self._done = payloads[-1] == DONE
                return payloads

    async def whole(self) -> bytes:
        """The whole body. Raises as iterating does."""
        content = self._content
        if content is None:
            raise RuntimeError("the session was not entered")
        parts: list[bytes] = []
        size = 0
        try:
            while data := await content.readany():
                self._hear()
                parts.append(data)
                size += len(data)
                if size > _ANSWER_LIMIT:
                    raise self._broken("garbage", "the answer does not end")
                if content.at_eof():
                    break
        except (asyncio.CancelledError, aiohttp.ClientError, OSError) as error:
            if (ours := self._ours(error)) is None:
                raise
            raise ours from error
        self._done = True
        return b"".join(parts)

    def pending(self) -> list[bytes]:
        """What arrived and was not iterated over yet."""
        if self._content is None or self._done:
            return []
        try:
            return self._decoder.feed(self._content.read_nowait())
        except (aiohttp.ClientError, OSError, RuntimeError, UpstreamError):
            return []

    # --- connecting ----------------------------------------------------------------------------------------------

    async def _post(self) -> aiohttp.ClientResponse:
        upstream, call = self._upstream, self._call
        headers = upstream.headers(self._request_id)
        if self._headers is not None:
            upstream.add(headers, self._headers)
        try:
            response = await upstream.post(call, headers)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                raise
            # An idle connection may close in the moment we use it. No byte of an answer came: once more is safe, and
            # if the upstream is really gone, connecting says so.
            response = await upstream.post(call, headers)
        self._response = response
        return response

    async def _refusal(self, response: aiohttp.ClientResponse) -> UpstreamError:
        if response.status in (401, 407) and not self._upstream.settings.forward_credentials:
            return foreign_refusal(self._upstream.id, response.status)
        body = await read_body(response, _ERROR_BODY_LIMIT)
        self._done = response.content.at_eof()
        return UpstreamRefused(response.status, body, retry_after=retry_after(response.headers.get("Retry-After")))

    # --- ending --------------------------------------------------------------------------------------------------

    async def _read_on(self) -> None:
        """The last event has come: read on to the end of the body, so that the connection goes back to the pool."""
        assert self._content is not None
        try:
            async with asyncio.timeout(_SETTLE):
                while await self._content.readany():
                    pass
        except (TimeoutError, aiohttp.ClientError, OSError):
            self._abort()
        except asyncio.CancelledError:
            self._abort()
            raise

    def _release(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.release()

    def _abort(self) -> None:
        self._unwatch()
        response, self._response = self._response, None
        if response is not None:
            abort(response)

    # --- stalls and errors ---------------------------------------------------------------------------------------

    def _watch(self, limit: float) -> None:
        self._limit = limit
        self._heard = now = self._loop.time()
        if limit > 0:
            self._look_again(now, now + limit)

    def _look_again(self, now: float, at: float) -> None:
        """At that time, or sooner."""
        self.look_at = min(at, now + self._limit / _LOOKS)
        self._upstream.watch.add(self)

    def _unwatch(self) -> None:
        self._upstream.watch.discard(self)

    def _hear(self) -> None:
        now = self._loop.time()
        silence = now - self._heard
        self._heard = now
        if self._first < 0.0:
            # The first byte is here: from now on the shorter patience counts.
            self._first = silence
            self._unwatch()
            if self._content is not None and not self._content.at_eof():
                self._watch(self._upstream.patience.inter_token())
            if self._call.stream:  # what comes in one piece is over before it would matter
                self._upstream.begun()
        elif silence > self._gap:
            self._gap = silence

    def look(self) -> None:
        """The time has come to see whether it still gets anywhere."""
        now = self._loop.time()
        late = now - self.look_at
        if late > self._limit / _LOOKS:
            # We stood still: that was no silence of the upstream's, and what it said then is read before the next look.
            self._heard = min(self._heard + late, now)
            self._look_again(now, now + self._limit)
            return
        if now < self._heard + self._limit:
            self._look_again(now, self._heard + self._limit)
            return
        self._stalled = True
        if self._task is not None:
            self._task.cancel()

    def _ours(self, error: BaseException) -> UpstreamError | None:
        """Our exception for ``error``; None: it is ours already, a true cancellation, or a bug."""
        if isinstance(error, asyncio.CancelledError):
            if not self._stalled or (self._task is not None and self._task.uncancel() > 0):
                return None
            self._upstream.patience.gave_up(self._limit, first=self._first < 0.0)
            return self._broken("stall", f"nothing heard for {self._limit:g} s")
        if isinstance(error, (aiohttp.ClientError, OSError)):
            return self._upstream.failed(unavailable(self._upstream.id, error))
        return None

    def _broken(self, cause: str, message: str) -> UpstreamError:
        return self._upstream.failed(UpstreamUnavailable(f"{self._upstream.id}: {message}", cause=cause))


def abort(response: aiohttp.ClientResponse) -> None:
    """Close a response's socket now: not after a TLS goodbye, not after what is still to be written."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    response.close()


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body, or its first ``limit`` bytes. (``StreamReader.read(limit)`` would give what has come so far.)"""
    parts: list[bytes] = []
    left = limit
    while left > 0 and (data := await response.content.read(left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def unavailable(name: str, error: BaseException) -> UpstreamUnavailable:
    """Our exception for an aiohttp or OS exception; the cause is one of connect, dns, tls, timeout, garbage, reset."""
    if isinstance(error, TimeoutError):
        cause = "timeout"
    elif isinstance(error, aiohttp.ClientConnectorDNSError):
        cause = "dns"
    elif isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        cause = "tls"
    elif isinstance(error, aiohttp.ClientConnectorError):
        cause = "connect"
    elif isinstance(error, (aiohttp.ClientResponseError, aiohttp.InvalidURL)):
        cause = "garbage"
    else:
        cause = "reset"
    return UpstreamUnavailable(f"{name}: {error or type(error).__name__}", cause=cause)


def foreign_refusal(name: str, status: int) -> UpstreamUnavailable:
    """Our exception where an upstream refuses us for who we are: no business of the client's, nor are its words."""
    return UpstreamUnavailable(f"{name}: refused the gateway's own key ({status})", cause="auth")


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, in either of its forms (RFC 9110, 10.2.3); a date that has passed is 0.

    None: absent, unreadable, or more than a day.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        # Without a zone it is UTC, as every date of HTTP.
        seconds = max((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time(), 0.0)
    return seconds if 0 <= seconds < 86_400 else None


def _watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that notices within a minute that its peer's machine is gone, also while nothing is sent.

    A patient call has no other clock: without this it would hold its slot for ever.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def check(settings: config.Upstream) -> None:
    """Is everything there that an upstream's settings refer to? Raises ``ConfigError``."""
    _api_key(settings.api_key_env)
    tls.upstream(settings.tls)


def _origin(url: URL) -> tuple[str, str, int | None]:
    """Whose it is, however it is spelled."""
    return url.scheme.lower(), (url.host or "").lower(), url.port


def _timeout(settings: config.Upstream) -> aiohttp.ClientTimeout:
    """aiohttp's part of the timeouts: the rest is guarded by the two clocks of a session."""
    return aiohttp.ClientTimeout(total=None, sock_connect=settings.timeouts.connect or None)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if key := os.environ.get(variable):
        return key
    raise ConfigError(f"environment variable {variable} (an upstream's api_key_env) is not set")
