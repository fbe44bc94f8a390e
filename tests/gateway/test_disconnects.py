"""A client that goes, at any moment, closes the upstream's socket within 100 ms and gives its slot back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import ClientSession

from elis_gateway.sim.checker import of_stream
from elis_gateway.sim.faults import Fault
from elis_gateway.tasks import spawn
from tests.gateway.test_relay import before
from tests.gateway.world import CHAT, COMPLETIONS, World, paced, payloads, read_until, until, world

LONG: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "sim", "prompt": "long", "max_tokens": 1500, "ignore_eos": True},
    CHAT: {"model": "sim", "messages": [{"role": "user", "content": "long"}], "max_tokens": 1500, "ignore_eos": True},
}
AT_ONCE = 0.1
"""Seconds in which the upstream must have seen its socket closed."""


async def _gone(w: World) -> None:
    """The gateway has forgotten the job, the engine has seen the client go, the slot is free again."""
    took = await until(lambda: w.engine.log[-1].closed is not None)
    assert took < AT_ONCE
    assert w.engine.log[-1].how in ("aborted", "fault:hang")
    assert not w.gateway.flights
    await until(lambda: all(not u.running for u in w.gateway.core.upstreams.values()))
    await w.check(COMPLETIONS, {"model": "sim", "prompt": "next", "max_tokens": 5})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_gone_in_the_middle_of_a_stream(path: str) -> None:
    async with world(paced(), slots=1) as w:
        async with w.post(path, {**LONG[path], "stream": True}) as response:
            await read_until(response, 20)
            response.close()
        await _gone(w)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_gone_while_waiting_for_a_whole_answer(path: str) -> None:
    async with world(paced(), slots=1) as w:
        asking = spawn(w.ask(path, LONG[path]), name="ask")
        await until(lambda: _begun(w) == 1)
        asking.cancel()
        await _gone(w)


async def test_gone_before_the_first_byte() -> None:
    """The engine has taken the request and says nothing yet: not even a status line."""
    async with world(slots=1) as w:
        w.engine.faults.add(Fault("hang"))
        asking = spawn(w.ask(COMPLETIONS, {**LONG[COMPLETIONS], "stream": True}), name="ask")
        await until(lambda: len(w.engine.log) == 1)
        asking.cancel()
        await _gone(w)


async def test_gone_while_queued() -> None:
    """Its call is never made."""
    async with world(paced(), slots=1, upstream={"overcommit": 0}) as w:
        async with w.post(COMPLETIONS, {**LONG[COMPLETIONS], "stream": True}) as response:
            await read_until(response, 1)
            before = len(w.engine.log)
            queued = spawn(w.ask(COMPLETIONS, {**LONG[COMPLETIONS], "prompt": "queued"}), name="queued")
            await until(lambda: len(w.gateway.flights) == 2)
            queued.cancel()
            assert await until(lambda: len(w.gateway.flights) == 1) < AT_ONCE
            assert w.gateway.core.waiting() == 0
            response.close()
        await _gone(w)
        assert len(w.engine.log) == before + 1


@pytest.mark.parametrize("begun", [False, True])
async def test_gone_while_a_relayed_answer_comes(begun: bool) -> None:
    async with before("a") as (gateway, (engine,)), ClientSession() as session:
        engine.hangs, engine.begins = asyncio.Event(), begun
        asking = spawn(session.get(f"http://127.0.0.1:{gateway.port}/v1/anything"), name="relayed")
        await until(lambda: engine.path == "/v1/anything")
        if begun:
            (await asking).close()
        asking.cancel()
        asked = engine.asked
        assert asked is not None
        assert await until(lambda: asked.transport is None) < AT_ONCE
        engine.hangs.set()


def _begun(w: World) -> int:
    """Jobs that have had a token."""
    return sum(flight.answer.started for flight in w.gateway.flights.values())


async def test_many_leave_at_once_and_nothing_leaks() -> None:
    async with world(paced(), slots=4) as w:
        asking = [
            spawn(w.ask(COMPLETIONS, {**LONG[COMPLETIONS], "prompt": f"{n}", "stream": n % 2 == 0}), name="ask")
            for n in range(24)
        ]
        await until(lambda: len(w.gateway.flights) == 24)
        await until(lambda: _begun(w) >= 4)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        await _gone(w)
        assert not w.gateway.core.jobs
        assert not w.gateway.dispatcher._calls


async def test_a_client_that_reads_slowly_gets_everything_in_order() -> None:
    """The answer is far larger than what sockets hold, and the client begins to read when it is complete."""
    body = {"model": "sim", "prompt": "slow reader", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    fat = {**body, "logprobs": 0, "stream_options": {"include_usage": True}}
    async with world() as w:
        async with w.post(COMPLETIONS, fat) as response:
            await until(lambda: not w.gateway.flights)
            data = await response.content.read()
        assert w.checker.check(COMPLETIONS, fat, of_stream(payloads(data))) == []
