"""What the upstreams together can do: the least of them, but not what one said in a bad moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from elis_gateway.config import Health, Upstream
from elis_gateway.sim.faults import Fault
from elis_gateway.upstream.fleet import Fleet, in_place
from tests.gateway.world import AT_ONCE, COMPLETIONS, until, world


async def test_an_upstream_that_stumbles_when_it_is_asked_does_not_unslice_its_model() -> None:
    """Killed and back, and refusing just then: what it can do is not known, which is not a no."""
    async with world(AT_ONCE, AT_ONCE) as w:
        fleet = w.gateway.fleet
        assert fleet.capabilities("sim").ids
        await w.engine.kill()
        w.engine.faults.add(Fault("status", status=500, times=None, path=COMPLETIONS))
        await until(lambda: len(fleet.serving("sim")) == 1)
        await w.engine.start()
        await until(lambda: len(fleet.serving("sim")) == 2)
        assert fleet.capabilities("sim").ids


@pytest.mark.parametrize("kind", ["garbage", "close", "end", "error_event", "reset", "status"])
async def test_no_answer_to_the_question_is_not_a_no(kind: Any) -> None:
    """Whatever goes wrong while the only upstream is asked: the best is assumed until it has said something."""
    async with world(AT_ONCE) as w:
        w.engine.faults.add(Fault(kind, times=None, path=COMPLETIONS))
        settings = Upstream.model_validate({"url": w.engine.url, "slots": 1, "health": {"interval": 0.02}})
        fleet = Fleet([settings], lambda info: None)
        await fleet.start()
        await until(lambda: bool(fleet.models))
        assert fleet.capabilities("sim").ids
        w.engine.faults.rules.clear()
        upstream = next(iter(fleet.upstreams.values()))
        await until(lambda: upstream.capabilities.settled and upstream.capabilities.ids)
        await fleet.close()


def test_what_can_be_taken_over_in_place() -> None:
    base = Upstream.model_validate({"url": "http://a", "slots": 1})
    assert in_place(base, base.model_copy(update={"slots": 5, "overcommit": 2, "health": Health(interval=9)}))
    assert not in_place(base, base.model_copy(update={"slots": 5, "url": "http://b"}))
    assert not in_place(base, base.model_copy(update={"api_key_env": "KEY"}))


async def test_close_leaves_no_task_behind() -> None:
    before = len(asyncio.all_tasks())
    fleet = Fleet([Upstream.model_validate({"url": "http://127.0.0.1:9", "slots": 1})], lambda info: None)
    await fleet.start(patience=0.1)
    await fleet.close()
    assert len(asyncio.all_tasks()) <= before + 1
