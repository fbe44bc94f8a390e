"""Looking up host names, every one in a thread of its own.

By the loop's own means a handful of threads look up all of them. A name that no server answers for takes one of these
for ten seconds and more; a few such names, and the probes of healthy upstreams wait behind them until they are late;
and a process that is told to stop stays until all that stand there are through.

Knows: names, addresses, threads. Never: whose they are.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

__all__ = ["Names"]

_NUMBERS = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV


class Names(AbstractResolver):
    """aiohttp's connector asks it once at a time for each name, and remembers what it said for a while."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of ``host``. Raises ``OSError``."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[ResolveResult]] = loop.create_future()

        def tell(what: Callable[[Any], None], value: object) -> None:
            # The loop may be closed by now.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: None if found.done() else what(value))

        def look() -> None:
            try:
                tell(found.set_result, _looked_up(host, port, family))
            except OSError as error:
                tell(found.set_exception, error)

        Thread(target=look, name=f"look up {host}", daemon=True).start()
        return await found

    async def close(self) -> None:
        """Nothing is kept; threads end by themselves."""


def _looked_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    try:
        infos = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
    except UnicodeError as error:
        raise OSError(f"{host[:100]} is no host name: {error}") from error
    return [
        ResolveResult(
            hostname=host,
            # The zone of a link-local address has to stay with it.
            host=socket.getnameinfo(address, _NUMBERS)[0] if len(address) > 3 and address[3] else str(address[0]),
            port=int(address[1]),
            family=family,
            proto=proto,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for family, _, proto, _, address in infos
    ]
