"""How connections end here: reset, and listeners closed without losing one. Never: what goes over them."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

__all__ = ["close_listener", "reset"]

_TURNS = 4
"""Of the loop, until a socket that was accepted has become a connection: a task, its transport, the protocol."""


def reset(transport: asyncio.BaseTransport | None) -> None:
    """Close a connection the way a dying process does: at once, with a reset, without what is still buffered."""
    if transport is None:
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        # Closed already, from the other side: there is nothing left to reset.
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "abort"):
        transport.abort()
    else:
        transport.close()


async def close_listener(server: asyncio.Server) -> None:
    """Stop listening. Whatever has been accepted is a connection afterwards, which somebody can close.

    asyncio drops, unclosed, what it accepted in the turn in which the listener closes (before Python 3.13): so first
    nothing more is accepted, and then what was has its turns.
    """
    loop = asyncio.get_running_loop()
    for listening in server.sockets:
        loop.remove_reader(listening.fileno())
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    server.close()
