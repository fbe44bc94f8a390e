"""A bad network between two ends of TCP, for tests: frozen, slow, torn off. Never: what the bytes mean.

A frozen proxy accepts connections and bytes and passes nothing on, which is what a stopped process (SIGSTOP) or a
machine that has gone away looks like from outside.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from elis_gateway.sim.sockets import close_listener, reset
from elis_gateway.tasks import spawn

__all__ = ["FaultProxy"]

_PIECE = 64 * 1024


class FaultProxy:
    """Passes on what comes to ``port`` to a port of this machine. Change its fields at any moment."""

    def __init__(self, target: int, *, host: str = "127.0.0.1") -> None:
        self.target = target
        self.host = host
        self.port = 0
        self.delay = 0.0
        """Seconds that every piece takes, in either direction."""
        self.piece = _PIECE
        """Bytes passed on at once."""
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._pairs)

    async def start(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and tear off everything."""
        server, self._server = self._server, None
        if server is not None:
            await close_listener(server)
        self.tear()
        self.thaw()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def freeze(self) -> None:
        """Pass nothing on any more."""
        self._open.clear()

    def thaw(self) -> None:
        """Go on, with what has been held back first."""
        self._open.set()

    def tear(self) -> None:
        """Reset every connection there is, on both sides."""
        for pair in list(self._pairs):
            for writer in pair:
                reset(writer.transport)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await self._open.wait()
            there, back = await asyncio.open_connection(self.host, self.target)
        except OSError:
            reset(writer.transport)
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            return
        pair = (writer, back)
        self._pairs.add(pair)
        pumps = [
            spawn(self._pump(reader, back), name="proxy, to the engine"),
            spawn(self._pump(there, writer), name="proxy, from the engine"),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass
        finally:
            self._pairs.discard(pair)
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            for end in pair:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until either end is gone. The other direction ends with it: HTTP has no use for half a connection."""
        with suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(self.piece):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._open.wait()
                writer.write(data)
                await writer.drain()
            # What was written last is to arrive before the connection goes.
            writer.close()
            await writer.wait_closed()
