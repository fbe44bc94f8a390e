"""One job's stream of bytes to its client. Knows neither who produces nor who consumes them.

The producer never waits: ``put`` appends and, at most, wakes the reader. The reader takes everything pending in one
piece, so a slow client coalesces its own backlog into few large writes. A reader may attach a *sink*: then bytes go
straight through as long as it takes them, without waking a task for each. One reader, one event loop, no locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Channel"]


class Channel:
    """Bytes in, bytes out, then the end or an error. The error is raised after the last byte was taken."""

    __slots__ = ("_chunks", "_closed", "_error", "_limit", "_overflow", "_sink", "_size", "_waiter", "puts")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self._limit: int | None = None
        self._overflow: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._error: Exception | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self.puts = 0
        """Times something was put: tells silence from traffic without a clock."""

    @property
    def closed(self) -> bool:
        """Nothing more can be put."""
        return self._closed

    @property
    def exhausted(self) -> bool:
        """Closed without an error, and every byte was taken: what ``get`` returned last was the last."""
        return self._closed and not self._chunks and self._error is None

    @property
    def pending(self) -> int:
        """Bytes put and not taken."""
        return self._size

    def bound(self, limit: int, overflow: Callable[[], None]) -> None:
        """Call ``overflow``, once, when more than ``limit`` bytes are pending."""
        self._limit, self._overflow = limit, overflow

    def put(self, data: bytes) -> None:
        """Append ``data``. Dropped without a sound after ``close``: late text of a job whose client has gone."""
        if self._closed:
            return
        self.puts += 1
        if self._sink is not None and not self._chunks and self._sink(data):
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._limit is not None and self._size > self._limit and self._overflow is not None:
            self._limit = None
            self._overflow()
        self._wake()

    def attach(self, sink: Callable[[bytes], bool]) -> None:
        """Let ``sink`` have what is put while nothing is pending. It must take all of it at once, or refuse (False)."""
        self._sink = sink

    def close(self, error: Exception | None = None, *, last: bytes = b"") -> None:
        """No more bytes will come but ``last``, which is left for the reader so that it can end the stream with it.

        The first call counts, later ones change nothing.
        """
        if self._closed:
            return
        self._closed = True
        if last:
            self._chunks.append(last)
            self._size += len(last)
        self._error = error
        self._wake()

    async def get(self) -> bytes:
        """Everything pending, waiting for some if there is none; ``b""`` is the end.

        Raises:
            Exception: the error the channel was closed with, once every byte before it was taken.
        """
        chunks = self._chunks
        if not chunks and not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if chunks:
            data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
            self._size = 0
            return data
        if self._error is not None:
            raise self._error
        return b""

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
