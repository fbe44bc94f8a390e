"""The chaos run in small, in one process: accidents by a seeded plan, and every answer right (benchmarks/chaos.py)."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

from aiohttp import ClientSession, TCPConnector

from benchmarks.chaos import Crowd, Troubles, engine_config, gateway_config, request_of
from elis_gateway.app import Gateway
from elis_gateway.config import from_mapping
from elis_gateway.sim.checker import Checker
from elis_gateway.sim.proxy import FaultProxy
from elis_gateway.sim.server import SimServer
from elis_gateway.tasks import spawn
from tests.gateway.world import until

REQUESTS = 60


async def test_accidents_cost_no_answer() -> None:
    before = len(asyncio.all_tasks())
    async with AsyncExitStack() as stack:
        config = engine_config(600.0)
        engines = [await stack.enter_async_context(SimServer(config)) for _ in range(3)]
        proxies = [FaultProxy(engine.port) for engine in engines]
        for proxy in proxies:
            await proxy.start()
            stack.push_async_callback(proxy.stop)
        settings = gateway_config(proxies)
        for upstream in settings["upstreams"]:
            upstream["timeouts"] = {"connect": 1.0, "first_byte": 2.0, "inter_token": 1.0}
            upstream["health"] = {"interval": 0.1, "timeout": 0.3, "break_for": 0.1, "slow_start": 0.2}
        gateway = Gateway(from_mapping(settings), reload=lambda: from_mapping(settings))
        await gateway.start()
        stack.push_async_callback(gateway.stop, 0.0)
        session = await stack.enter_async_context(ClientSession(connector=TCPConnector(limit=0, force_close=True)))
        crowd = Crowd(lambda: f"http://127.0.0.1:{gateway.port}", Checker(config), session)
        troubles = Troubles(engines, proxies, seed=7, pace=0.1, longest=0.3)
        trouble = spawn(troubles.run(), name="troubles")
        pick = random.Random(7)
        asking = [spawn(crowd.ask(n, *request_of(n, pick)), name="ask") for n in range(REQUESTS)]
        await until(lambda: crowd.verdict.ended() >= REQUESTS // 2, within=60)
        settings["upstreams"][0]["slots"] = 5
        assert (await gateway.reload())["applied"] == ["upstreams"]
        await asyncio.wait_for(asyncio.gather(*asking), 60)
        trouble.cancel()
        await asyncio.wait([trouble])
        verdict = crowd.verdict
        assert not verdict.wrong
        assert not verdict.lost
        assert verdict.right + verdict.cut == REQUESTS
        assert sum(troubles.done.values()) >= 5
        await until(lambda: not gateway.flights and not gateway.core.jobs)
        assert all(not upstream.running for upstream in gateway.core.upstreams.values())
        assert all(key == 0 for key in gateway.door._classes.values())
    assert len(asyncio.all_tasks()) <= before + 1
