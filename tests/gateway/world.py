"""Embedded engines, a gateway in front of them and a client, in one process, on free ports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
from aiohttp import ClientResponse, ClientSession

from elis_gateway.app import Gateway
from elis_gateway.config import from_mapping
from elis_gateway.sim.checker import Answer, Checker, of_stream, of_whole
from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.language import Language, Lengths
from elis_gateway.sim.server import ServerConfig, SimServer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
AT_ONCE = ServerConfig(port=0, delay=False, max_model_len=2048, language=Language(lengths=Lengths(mean=60)))
"""Tokens come as fast as they can be sent."""
PATIENT = {"unavailable_timeout": 300.0}
"""What waits for an engine that starts may wait for it on a slow machine, too."""


def paced(tokens_per_second: float = 1000.0, *, slots: int = 4, seam: float = 0.0) -> ServerConfig:
    """An engine that takes its time: every sequence makes so many tokens a second, whatever the batch. It stands still
    where this process does: what it was at when a test looked away it is at still."""
    model = EngineModel(
        slots=slots,
        decode=((1, tokens_per_second), (slots + 1, tokens_per_second)),
        prefill_tokens_per_second=None,
        seam_tokens=seam,
    )
    return ServerConfig(port=0, engine=model, max_model_len=2048, language=AT_ONCE.language, stride=0.005)


class World:
    """What a test touches."""

    def __init__(self, engines: list[SimServer], gateway: Gateway, session: ClientSession) -> None:
        self.engines = engines
        self.engine = engines[0]
        self.gateway = gateway
        self.session = session
        self.url = f"http://127.0.0.1:{gateway.port}"
        self.admin = f"http://127.0.0.1:{gateway.admin_port}"
        self.checker = Checker(engines[0].config)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        """An async context manager of the response."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        return self.session.post(self.url + path, data=data, headers=headers)

    async def ask(self, path: str, body: dict[str, Any], **headers: str) -> Answer:
        """The answer to a request that must succeed, streamed or not."""
        async with self.post(path, body, **headers) as response:
            data = await response.read()
            assert response.status == 200, data
        return of_stream(payloads(data)) if body.get("stream") else of_whole(data)

    async def check(self, path: str, body: dict[str, Any], **headers: str) -> None:
        """Ask, and compare with the right answer worked out independently."""
        got = await self.ask(path, body, **headers)
        wrong = self.checker.check(path, body, got)
        assert not wrong, wrong


def payloads(data: bytes) -> list[bytes]:
    """Payloads of a whole event stream; comments are skipped."""
    events = data.split(b"\n\n")
    assert events.pop() == b"", data[-200:]
    found = [event for event in events if not event.startswith(b":")]
    assert all(event.startswith(b"data: ") for event in found), data[:300]
    return [event[6:] for event in found]


async def read_until(response: ClientResponse, events: int) -> bytes:
    """Read a stream until so many events have come."""
    data = b""
    while data.count(b"data: ") < events:
        piece = await response.content.readany()
        assert piece, data
        data += piece
    return data


async def until(condition: Callable[[], bool], *, within: float = 60.0) -> float:
    """Wait for a condition, event-loop turn by event-loop turn; returns how long it took, in seconds.

    Counted in turns of a millisecond that the loop really had, so that a machine that stands still does not count.
    """
    turns = 0
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.001)
            turns += 1
    return turns * 0.001


async def begin(gateway: Gateway) -> None:
    """Start it, and wait for the first look at every upstream for longer than two seconds, as it does by itself."""
    await gateway.start()
    for member in gateway.fleet._members.values():
        await member.looked.wait()


@asynccontextmanager
async def world(
    *configs: ServerConfig, slots: int = 4, upstream: Any = None, silent: bool = False, **sections: Any
) -> AsyncIterator[World]:
    """``upstream``: settings of every upstream; other keywords: sections of the configuration. ``silent``: the engines
    are stopped before the gateway starts."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimServer(c)) for c in configs or (AT_ONCE,)]
        health = {"interval": 0.05, "up_after": 1, "timeout": 20.0}
        given = upstream or {}
        upstreams = [{"url": e.url, "slots": slots, "health": health, **given} for e in engines]
        settings = {
            "server": {"host": "127.0.0.1", "port": 0, **sections.pop("server", {})},
            "admin": {"port": 0},
            "upstreams": upstreams,
            "predictor": {"kind": "history"},
            "scheduler": {"queue": PATIENT, **sections.pop("scheduler", {})},
            **sections,
        }
        if silent:
            for engine in engines:
                await engine.stop()
        gateway = Gateway(from_mapping(settings), reload=lambda: from_mapping(settings))
        # Every estimate is made and every answer learned from, whatever that costs on this machine.
        gateway.dispatcher._estimator._stopwatch = lambda: 0.0
        await begin(gateway)
        for engine in engines:
            engine.log.clear()  # of the probes
        stack.push_async_callback(gateway.stop, 0.0)
        # A reload may change it, for the tests that follow too.
        stack.callback(logging.getLogger("elis_gateway").setLevel, logging.NOTSET)
        session = await stack.enter_async_context(ClientSession())
        yield World(engines, gateway, session)
