"""/v1/responses and /v1/messages stand in the queue like chats, and reach engines that have them."""

from __future__ import annotations

import orjson
import pytest

from elis_gateway.tasks import spawn
from tests.gateway.world import COMPLETIONS, World, paced, until, world

PATHS = ["/v1/responses", "/v1/messages"]


@pytest.mark.parametrize("path", PATHS)
async def test_an_engine_without_the_route_says_so_itself(path: str) -> None:
    async with world() as w, w.post(path, {"model": "sim", "input": "hi", "messages": []}) as response:
        assert response.status == 404
        assert orjson.loads(await response.read()) == {"detail": "Not Found"}


@pytest.mark.parametrize("path", PATHS)
async def test_they_wait_for_a_slot(path: str) -> None:
    async with world(paced(200, slots=1), slots=1) as w:
        body = {"model": "sim", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
        async with w.post(COMPLETIONS, body) as first:
            await first.content.readany()
            waiting = spawn(_status(w, path), name="ask")
            await until(lambda: len(w.gateway.flights) == 2)
            assert not waiting.done()
        assert await waiting == 404


async def _status(w: World, path: str) -> int:
    async with w.post(path, {"model": "sim", "input": "hi", "messages": []}) as response:
        return int(response.status)


async def test_a_model_nobody_serves() -> None:
    async with world() as w, w.post("/v1/messages", {"model": "nobody", "messages": []}) as response:
        assert response.status == 404
        assert b"nobody" in await response.read()
