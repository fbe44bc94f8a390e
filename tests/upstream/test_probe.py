"""Capabilities are seen, not believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from elis_gateway.config import Upstream as Settings
from elis_gateway.errors import UpstreamRefused
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.server import ServerConfig, SimServer
from elis_gateway.upstream.base import Capabilities
from elis_gateway.upstream.fleet import Fleet
from elis_gateway.upstream.http import HttpUpstream
from elis_gateway.upstream.probe import probe
from tests.gateway.world import AT_ONCE, paced, until


async def _probe(config: ServerConfig, *, orders: bool = False, **settings: Any) -> Capabilities:
    async with SimServer(config) as engine:
        given = {"url": engine.url, "slots": 2, "health": {"timeout": 5.0}, **settings}
        upstream = HttpUpstream(Settings.model_validate(given))
        await upstream.start()
        try:
            return await probe(upstream, orders=orders)
        finally:
            await upstream.close()


async def test_models_context_and_token_ids() -> None:
    found = await _probe(replace(AT_ONCE, models=("a", "b")))
    assert found.models == {"a", "b"}
    assert dict(found.context) == {"a": 2048, "b": 2048}
    assert found.ids
    assert not found.text


@pytest.mark.parametrize("config", [replace(AT_ONCE, token_ids=False), replace(AT_ONCE, id_prompts=False)])
async def test_an_engine_that_does_not_return_or_take_ids(config: ServerConfig) -> None:
    assert not (await _probe(config)).ids


@pytest.mark.parametrize(
    ("continuation", "ids", "text"), [("ids", True, False), ("text", False, True), ("off", False, False)]
)
async def test_the_operator_has_the_last_word(continuation: str, ids: bool, text: bool) -> None:
    found = await _probe(AT_ONCE, continuation=continuation, models=["mine"], context=99, chat_parser=True)
    assert (found.ids, found.text, found.chat_parser) == (ids, text, True)
    assert (found.models, dict(found.context)) == ({"mine"}, {"mine": 99})


@pytest.mark.parametrize(("priority", "orders"), [("honour", True), ("ignore", False), ("refuse", False)])
async def test_priority_is_settled_by_who_starts_first(priority: Any, orders: bool) -> None:
    found = await _probe(replace(paced(1000, slots=2), priority=priority), orders=True)
    assert found.orders == orders


async def test_a_server_that_refuses_to_list_its_models_is_not_usable() -> None:
    with pytest.raises(UpstreamRefused):
        await _probe(replace(AT_ONCE, api_key="secret"))


@pytest.mark.parametrize("skip", [0, 1])
async def test_an_engine_that_was_busy_for_a_moment_is_asked_again(skip: int) -> None:
    async with SimServer(AT_ONCE) as engine:
        engine.faults.add(Fault("status", status=503, skip=skip, path="/v1/completions"))
        settings = Settings.model_validate({"url": engine.url, "slots": 2, "health": {"interval": 0.02}})
        fleet = Fleet([settings], lambda info: None)
        await fleet.start()
        (upstream,) = fleet.upstreams.values()
        await until(lambda: upstream.capabilities.ids)
        assert upstream.capabilities.settled
        await fleet.close()
