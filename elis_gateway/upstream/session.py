"""One call to an engine: its connection, its silence, and its end.

Two clocks guard a call, both without cost per token: the wait for the first byte and the silence between two reads.
All calls of an upstream share one timer, which is set for the first that is to be looked at and, when it fires, looks
at when that one was last heard (a lazy timer). A call is looked at several times before it is given up: a look that
comes late was late because this process stood still (a suspended machine, a container out of its share), and what the
upstream sent meanwhile is yet to be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

import aiohttp

from elis_gateway.errors import UpstreamError, UpstreamRefused, UpstreamUnavailable
from elis_gateway.upstream.responses import abort, foreign_refusal, read_body, retry_after, unavailable
from elis_gateway.wire.continuation import Call
from elis_gateway.wire.sse import DONE, EventDecoder

if TYPE_CHECKING:
    from elis_gateway.upstream.http import HttpUpstream

__all__ = ["HttpSession", "Watch"]

_ANSWER_LIMIT = 256 * 1024 * 1024
_LOOKS = 4
"""Looks at a call in the longest silence that is borne."""
_APART = 0.02
"""Seconds between two looks of one timer, at least: each goes through all calls to find those whose turn it is, and of
thousands there would be one every millisecond."""
_SETTLE = 1.0
"""Seconds to wait after the last event for the end of the body, so that the connection can be used again."""


class Watch:
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
        body = await read_body(response)
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
