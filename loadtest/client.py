"""A lean HTTP/1.1 client for load: the generator must never be what is measured.

Knows: connections, framing (chunked, by length, until close), reuse, TLS. Never: what is sent, redirects, cookies,
compression. A request costs some tens of microseconds, several times less than with a general client, so that one core
sends thousands a second on time.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

from elis_gateway.errors import ConfigError, UpstreamUnavailable

__all__ = ["Client", "Reply"]

_HEAD_LIMIT = 256 * 1024
_EXPECTED = "expected a URL such as http://127.0.0.1:8080"


class Reply:
    """One exchange under way: the status, and the body as it comes."""

    __slots__ = ("body", "done", "heard", "sink", "status")

    def __init__(self, done: asyncio.Future[None], sink: Callable[[bytes], None] | None) -> None:
        self.done = done
        self.sink = sink
        self.status = 0
        self.body = b""
        """Of a reply that is no success, or that nobody listens to."""
        self.heard = False
        """Anything at all has come back."""

    def take(self, data: bytes) -> None:
        if self.sink is not None and self.status == 200:
            self.sink(data)
        else:
            self.body += data


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, free: Callable[[_Connection], None]) -> None:
        self._free = free
        self.transport: asyncio.Transport | None = None
        self.reply: Reply | None = None
        self.used = False
        self._buffer = b""
        self._left: int | None = None
        """Bytes of the body, or of the chunk, still to come; None: the head is not read yet."""
        self._chunked = False
        self._until_close = False
        self._keep = True

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, data: bytes, reply: Reply) -> None:
        assert self.transport is not None
        self.reply = reply
        self._buffer = b""
        self._left = None
        self.transport.write(data)

    def abort(self) -> None:
        self.reply = None
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        reply = self.reply
        if reply is None:
            return
        if self._until_close and exc is None:
            self._finish(keep=False)
        else:
            self._fail("reset" if exc is not None else "closed")

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        reply = self.reply
        if reply is None:
            self.abort()  # nobody asked
            return
        reply.heard = True
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        try:
            self._read(reply, data)
        except (ValueError, IndexError):
            self._fail("garbage")
        except UpstreamUnavailable as error:
            self._fail(error.cause)

    def _read(self, reply: Reply, data: bytes) -> None:
        if self._left is None:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > _HEAD_LIMIT:
                    raise ValueError("head too long")
                self._buffer = data
                return
            self._head(reply, data[:end])
            data = data[end + 4 :]
            if reply.status < 200:  # 100 Continue: the real one follows
                self._left = None
                if data:
                    self._read(reply, data)
                return
        if self._until_close:
            if data:
                reply.take(data)
        elif self._chunked:
            self._chunks(reply, data)
        else:
            self._sized(reply, data)

    def _head(self, reply: Reply, head: bytes) -> None:
        lines = head.split(b"\r\n")
        version, status = lines[0].split(b" ", 2)[:2]
        reply.status = int(status)
        self._keep = version != b"HTTP/1.0"
        self._chunked = False
        length: int | None = None
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            name = name.lower()
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                self._chunked = b"chunked" in value.lower()
            elif name == b"connection":
                self._keep = b"close" not in value.lower()
        if reply.status in (204, 304):
            length = 0
        self._until_close = length is None and not self._chunked
        self._left = length or 0

    def _sized(self, reply: Reply, data: bytes) -> None:
        assert self._left is not None
        if data:
            reply.take(data[: self._left])
            self._left -= len(data)
        if self._left <= 0:
            self._finish(keep=self._keep and self._left == 0)

    def _chunks(self, reply: Reply, data: bytes) -> None:
        """``_left``: bytes of the chunk and its line end still to come; 0: a chunk's size comes next."""
        left = self._left or 0
        at, size = 0, len(data)
        parts = []
        while at < size:
            if left:
                part = data[at : at + left]
                at += len(part)
                left -= len(part)
                # The last two bytes of a chunk are its line end, which may come alone.
                text = part if left >= 2 else part[: max(len(part) - 2 + left, 0)]
                if text:
                    parts.append(text)
                continue
            line = data.find(b"\r\n", at)
            if line < 0:
                self._buffer = data[at:]
                break
            length = int(data[at:line].split(b";", 1)[0], 16)
            if length == 0:
                # Trailers are not waited for: nobody sends them.
                if data.find(b"\r\n", line + 2) < 0:
                    self._buffer = data[at:]
                    break
                self._left = 0
                if parts:
                    reply.take(b"".join(parts))
                self._finish(keep=self._keep and data.endswith(b"\r\n\r\n"))
                return
            at = line + 2
            left = length + 2
        self._left = left
        if parts:
            reply.take(parts[0] if len(parts) == 1 else b"".join(parts))

    def _finish(self, *, keep: bool) -> None:
        reply, self.reply = self.reply, None
        self.used = True
        if keep and self.open:
            self._free(self)
        elif self.transport is not None:
            self.transport.close()
        if reply is not None and not reply.done.done():
            reply.done.set_result(None)

    def _fail(self, cause: str) -> None:
        reply = self.reply
        self.abort()
        if reply is not None and not reply.done.done():
            reply.done.set_exception(UpstreamUnavailable(f"the connection ended: {cause}", cause=cause))


class Client:
    """Connections to one server, as many as there are requests under way, reused when they are free.

    An async context manager. ``path`` of every request is below the URL's own path, which may end in ``/v1``.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """``headers``: sent with every request. Raises ConfigError for something that is no http(s) URL."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise ConfigError(f"{url!r}: {_EXPECTED}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r}: {_EXPECTED}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = "".join(
            f"{name}: {value}\r\n" for name, value in _checked({"Host": parts.netloc, **(headers or {})})
        )
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()
        self._busy.clear()

    async def warm(self, count: int) -> None:
        """Open connections ahead, so that the first requests do not pay for them. Raises UpstreamUnavailable."""
        made = await asyncio.gather(*(self._connect() for _ in range(count)))
        self._idle += made

    def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """A request's bytes, to be sent as they are. Raises ConfigError for a header that cannot be sent."""
        own = "".join(f"{name}: {value}\r\n" for name, value in _checked(headers or {}))
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}{own}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body

    async def exchange(self, data: bytes, sink: Callable[[bytes], None] | None = None) -> Reply:
        """Send a request's bytes and wait for the whole reply. ``sink`` hears the body of a 200 as it comes.

        A kept connection that the server closed in the meantime is no failure: the request is sent again on a fresh
        one, as long as nothing was heard. Raises UpstreamUnavailable.
        """
        loop = asyncio.get_running_loop()
        while True:
            connection = self._take() or await self._connect()
            reused = connection.used
            reply = Reply(loop.create_future(), sink)
            self._busy.add(connection)
            connection.send(data, reply)
            try:
                await reply.done
            except UpstreamUnavailable:
                if reused and not reply.heard:
                    continue
                raise
            finally:
                self._busy.discard(connection)
                if connection.reply is reply:
                    connection.abort()  # cancelled
            return reply

    async def get(self, path: str) -> Reply:
        return await self.exchange(self.request("GET", path))

    async def send_json(self, method: str, path: str, body: bytes) -> Reply:
        return await self.exchange(self.request(method, path, body))

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"ssl": self._tls, "server_hostname": self._host} if self._tls else {}
        try:
            _, made = await loop.create_connection(
                lambda: _Connection(self._idle.append), self._host, self._port, **options
            )
        except ssl.SSLError as error:
            raise UpstreamUnavailable(f"{self.url}: {error}", cause="tls") from error
        except OSError as error:
            raise UpstreamUnavailable(f"{self.url}: {error}", cause="connect") from error
        return made


def _checked(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    for name, value in headers.items():
        if any(ord(character) < 32 or ord(character) > 126 for character in name + value) or ":" in name or not name:
            raise ConfigError(f"header {name}: expected printable ASCII, got {value!r}")
    return list(headers.items())
