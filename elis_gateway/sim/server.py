"""The embedded engine over HTTP: what vLLM's OpenAI-compatible server looks like from outside, modelled inside.

Knows: routes, starting, stopping and killing a server. Never: being used by the gateway at run time (it serves tests,
the demo and the load test).

Entry points: ``make_app(config)``; ``SimServer`` for tests (start, stop, kill, restart on one port); ``serve(config)``
until SIGINT or SIGTERM, for the command line.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from aiohttp import web

from elis_gateway.sim.faults import FaultBook
from elis_gateway.sim.server_calls import CHAT, COMPLETIONS
from elis_gateway.sim.server_config import ServerConfig
from elis_gateway.sim.server_log import RequestLog
from elis_gateway.sim.server_routes import Routes
from elis_gateway.sim.server_sim import Sim
from elis_gateway.sim.sockets import close_listener, reset

__all__ = ["ServerConfig", "Sim", "SimServer", "make_app", "run", "serve"]

_log = logging.getLogger("elis_gateway.sim")


def make_app(config: ServerConfig, sim: Sim | None = None) -> web.Application:
    """The server as an aiohttp application. Serve it with ``handler_cancellation``, or a client that leaves is seen
    only at the next write."""
    sim = sim or Sim(config)
    routes = Routes(sim)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post(COMPLETIONS, sim.call)
    app.router.add_post(CHAT, sim.call)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_post("/tokenize", routes.tokenize)
    app.router.add_post("/detokenize", routes.detokenize)
    app.router.add_route("*", "/sim/requests", routes.requests)
    app.router.add_route("*", "/sim/faults", routes.faults)
    app.router.add_route("*", "/{path:.*}", routes.missing)
    return app


class SimServer:
    """A server in this process, for tests: on one port through ``kill`` and ``restart``. Also ``async with``."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.sim = Sim(config)
        self.port = config.port
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self.config.host}:{self.port}"

    @property
    def running(self) -> bool:
        """It listens."""
        return self._runner is not None

    @property
    def log(self) -> RequestLog:
        return self.sim.log

    @property
    def faults(self) -> FaultBook:
        return self.sim.faults

    async def start(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        runner = web.AppRunner(
            make_app(self.config, self.sim), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        assert runner.server is not None
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                runner.server, self.config.host, self.port, reuse_address=True, backlog=1024
            )
        except OSError:
            await runner.cleanup()
            raise
        self.port = self._listener.sockets[0].getsockname()[1]
        self._runner = runner

    async def stop(self) -> None:
        """Stop listening, give calls a second, close."""
        runner = await self._deaf()
        if runner is not None:
            await runner.cleanup()

    async def kill(self) -> None:
        """As if the process died: no listener, every connection reset, the engine and its cache forgotten."""
        runner = await self._deaf()
        if runner is None:
            return
        self.sim.die()
        assert runner.server is not None
        for connection in runner.server.connections:
            reset(connection.transport)
        await runner.cleanup()

    async def _deaf(self) -> web.AppRunner | None:
        """Listen no more; what answered the connections there are, if this was running."""
        runner, self._runner = self._runner, None
        listener, self._listener = self._listener, None
        if listener is not None:
            await close_listener(listener)
        return runner

    async def restart(self) -> None:
        """``kill``, and a fresh engine on the same port."""
        await self.kill()
        await self.start()

    async def __aenter__(self) -> SimServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


async def serve(config: ServerConfig, *, ready: Callable[[str], object] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. ``ready`` is told the URL once it listens. Raises OSError where the port is
    taken."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with SimServer(config) as server:
        _log.info("embedded engine on %s, models: %s", server.url, ", ".join(config.models))
        if ready is not None:
            ready(server.url)
        await stopping.wait()


def run(config: ServerConfig, *, ready: Callable[[str], object] | None = None) -> None:
    """``serve`` on an event loop of its own."""
    asyncio.run(serve(config, ready=ready))
