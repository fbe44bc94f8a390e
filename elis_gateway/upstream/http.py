"""One engine over HTTP: an aiohttp client without its limits, our timeouts, and our exceptions only.

Knows: sockets, connection pools, TLS, and what is sent with every call. Never: policies; JSON shapes.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from elis_gateway import __version__, config, tls
from elis_gateway.errors import ConfigError, UpstreamError, UpstreamRefused
from elis_gateway.upstream.base import Capabilities
from elis_gateway.upstream.names import Names
from elis_gateway.upstream.patience import Patience
from elis_gateway.upstream.responses import read_body, unavailable
from elis_gateway.upstream.session import HttpSession, Watch
from elis_gateway.wire.continuation import Call

__all__ = ["CREDENTIALS", "RANK", "HttpUpstream", "check"]

CREDENTIALS = frozenset({"authorization", "api-key", "x-api-key"})
"""Headers, in lower case, in which a client says who it is."""
RANK = "X-data-parallel-rank"
"""The header by which a call names the rank of a data-parallel engine (vLLM) that is to run it."""
_POOL_IDLE = 4.0
"""Seconds an idle connection is kept: less than the 5 s after which uvicorn, under vLLM, closes it."""
_READ_BUFFER = 256 * 1024
_HEADER_LIMIT = 64 * 1024

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
        self.watch = Watch()

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
                body = await read_body(response)
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
