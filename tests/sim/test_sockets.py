"""Nobody who was let in is forgotten when a listener closes, whatever turn of the loop they came in."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings
from collections.abc import Awaitable, Callable

import pytest

from elis_gateway.sim.proxy import FaultProxy
from elis_gateway.sim.server import ServerConfig, SimServer


async def _killed() -> tuple[int, Callable[[], Awaitable[None]]]:
    engine = SimServer(ServerConfig(port=0, delay=False))
    await engine.start()
    return engine.port, engine.kill


async def _stopped() -> tuple[int, Callable[[], Awaitable[None]]]:
    engine = SimServer(ServerConfig(port=0, delay=False))
    await engine.start()
    return engine.port, engine.stop


async def _proxy() -> tuple[int, Callable[[], Awaitable[None]]]:
    target = socket.create_server(("127.0.0.1", 0))
    proxy = FaultProxy(target.getsockname()[1])
    await proxy.start()

    async def stop() -> None:
        await proxy.stop()
        target.close()
        await asyncio.sleep(0)  # aborted transports close in the next turn

    return proxy.port, stop


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("begin", [_killed, _stopped, _proxy])
async def test_connections_made_as_it_ends_are_closed(
    begin: Callable[[], Awaitable[tuple[int, Callable[[], Awaitable[None]]]]], turns: int
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        port, end = await begin()
        clients = [socket.create_connection(("127.0.0.1", port), 60.0) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await end()
        gc.collect()
        assert not seen, [str(each.message) for each in seen]
        for client in clients:
            with client:
                assert await asyncio.to_thread(_ended, client)


def _ended(client: socket.socket) -> bool:
    """The other side has closed. Raises TimeoutError where it has not."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
