"""Upstreams that die, stall, refuse or talk nonsense: a sliceable answer loses nothing, the rest says so properly."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import orjson
import pytest

from elis_gateway.config import from_mapping
from elis_gateway.sim.checker import of_stream
from elis_gateway.sim.faults import Fault
from elis_gateway.tasks import spawn
from tests.gateway.world import AT_ONCE, CHAT, COMPLETIONS, PATIENT, World, paced, payloads, read_until, until, world

BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "sim", "prompt": "long", "max_tokens": 200, "ignore_eos": True},
    CHAT: {"model": "sim", "messages": [{"role": "user", "content": "long"}], "max_tokens": 200, "ignore_eos": True},
}
WHOLE = {"presence_penalty": 0.5}
"""Makes a request unsliceable."""


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["reset", "close", "end", "garbage", "error_event"])
async def test_an_answer_that_breaks_off_is_continued(path: str, stream: bool, kind: Any) -> None:
    async with world() as w:
        w.engine.faults.add(Fault(kind, after=30, times=2))
        await w.check(path, {**BODIES[path], "stream": stream})
        assert not w.engine.faults.rules


async def test_a_stalled_call_is_given_up_and_continued() -> None:
    async with world(upstream={"timeouts": {"inter_token": 0.2, "first_byte": 5}}) as w:
        w.engine.faults.add(Fault("stall", after=30))
        await w.check(COMPLETIONS, {**BODIES[COMPLETIONS], "stream": True})
        assert [record.how for record in w.engine.log][-2:] == ["fault:stall", "length"]


async def test_an_engine_that_never_answers_is_given_up() -> None:
    async with world(upstream={"timeouts": {"inter_token": 5, "first_byte": 0.2}}) as w:
        w.engine.faults.add(Fault("hang"))
        await w.check(COMPLETIONS, {**BODIES[COMPLETIONS], "stream": True})


async def test_an_answer_in_one_piece_may_take_longer_than_a_first_byte() -> None:
    async with world(paced(400), upstream={"timeouts": {"inter_token": 0.1, "first_byte": 0.1}}) as w:
        await w.check(COMPLETIONS, {**BODIES[COMPLETIONS], **WHOLE})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_killed_in_the_middle_the_other_upstream_goes_on(path: str) -> None:
    body = {**BODIES[path], "stream": True}
    async with world(paced(400), paced(400)) as w, w.post(path, body) as response:
        data = await read_until(response, 20)
        busy = next(e for e in w.engines if any(r.how == "open" for r in e.log))
        await busy.kill()
        data += await response.content.read()
        assert w.checker.check(path, body, of_stream(payloads(data))) == []
        other = next(e for e in w.engines if e is not busy)
        assert [record.ids_prompt for record in other.log][-1]


async def test_killed_and_restarted_the_same_upstream_goes_on() -> None:
    body = {**BODIES[COMPLETIONS], "stream": True}
    async with world(paced(400)) as w, w.post(COMPLETIONS, body) as response:
        data = await read_until(response, 20)
        await w.engine.restart()
        data += await response.content.read()
        assert w.checker.check(COMPLETIONS, body, of_stream(payloads(data))) == []


async def test_an_unsliceable_request_is_sent_again_whole_before_its_first_byte() -> None:
    for body in (BODIES[COMPLETIONS], BODIES[CHAT]):
        path = CHAT if "messages" in body else COMPLETIONS
        async with world() as w:
            w.engine.faults.add(Fault("status", status=500))
            await w.check(path, {**body, **WHOLE, "stream": True})
            w.engine.faults.add(Fault("reset", after=30))
            await w.check(path, {**body, **WHOLE})


async def test_an_unsliceable_stream_that_breaks_off_ends_with_an_error_event() -> None:
    async with world() as w:
        w.engine.faults.add(Fault("reset", after=30))
        async with w.post(COMPLETIONS, {**BODIES[COMPLETIONS], **WHOLE, "stream": True}) as response:
            assert response.status == 200
            events = payloads(await response.read())
        assert b"[DONE]" not in events
        assert orjson.loads(events[-1])["error"]["code"] == "upstream_reset"


@pytest.mark.parametrize("status", [500, 502])
async def test_an_engine_s_error_is_tried_again_and_then_passed_on(status: int) -> None:
    async with world(scheduler={"retries": 2}) as w:
        w.engine.faults.add(Fault("status", status=status))
        await w.check(COMPLETIONS, BODIES[COMPLETIONS])
        w.engine.faults.add(Fault("status", status=status, times=None))
        async with w.post(COMPLETIONS, BODIES[COMPLETIONS]) as response:
            assert response.status == status
            assert orjson.loads(await response.read())["error"]["message"] == "a fault was asked for"
        assert [r.status for r in w.engine.log][-3:] == [status] * 3


@pytest.mark.parametrize("status", [429, 503])
async def test_an_upstream_that_sheds_load_is_left_alone_for_as_long_as_it_says(status: int) -> None:
    async with world(AT_ONCE, AT_ONCE, upstream={"health": {"interval": 5}}) as w:
        for engine in w.engines:
            engine.faults.add(Fault("status", status=status, retry_after=0.3))
        loop = asyncio.get_running_loop()
        start = loop.time()
        await w.check(COMPLETIONS, BODIES[COMPLETIONS])
        assert loop.time() - start >= 0.3
        refused = {e: [r for r in e.log if r.status == status] for e in w.engines}
        assert [len(found) for found in refused.values()] == [1, 1]


async def test_without_a_healthy_upstream_requests_wait_and_then_get_503() -> None:
    async with world(scheduler={"queue": {"unavailable_timeout": 0.2}}) as w:
        given = w.gateway.config.model_dump(mode="json", exclude_defaults=True)
        patient = {**given, "scheduler": {"queue": PATIENT}}
        await w.engine.kill()
        await until(lambda: not w.gateway.fleet.models)
        for stream in (False, True):
            async with w.post(COMPLETIONS, {**BODIES[COMPLETIONS], "stream": stream}) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
        w.gateway._reload = lambda: from_mapping(patient)
        assert (await w.gateway.reload())["applied"] == ["scheduler.queue, retries and tail"]
        waiting = spawn(w.ask(COMPLETIONS, BODIES[COMPLETIONS]), name="waiting")
        await until(lambda: w.gateway.core.waiting() == 1)
        await w.engine.start()
        await waiting


async def test_after_keepalive_the_status_is_out_and_trouble_is_an_event() -> None:
    async with world(server={"keepalive_after": 0.1}) as w:
        await w.engine.kill()
        await until(lambda: not w.gateway.fleet.models)
        async with w.post(COMPLETIONS, {**BODIES[COMPLETIONS], "stream": True}) as response:
            assert response.status == 200
            much_later = asyncio.get_running_loop().time() + PATIENT["unavailable_timeout"]
            w.gateway.dispatcher._perform(w.gateway.core.tick(much_later))
            data = await response.read()
        assert data.startswith(b": ")
        assert orjson.loads(payloads(data)[-1])["error"]["code"] == "overloaded"


async def test_a_backlog_survives_the_death_of_an_engine() -> None:
    """Two engines kept backlogged, one killed mid-run and restarted: every answer is right, checked independently."""
    bodies = [
        {"model": "sim", "prompt": f"request {n}, 요청 {n}", "max_tokens": 40 + 13 * n % 120, "stream": n % 3 == 0}
        for n in range(60)
    ]
    async with world(paced(800), paced(800)) as w:
        asking = [spawn(w.ask(COMPLETIONS, body), name="ask") for body in bodies]
        await until(lambda: _done(w) >= 10)
        await w.engines[1].kill()
        await until(lambda: _done(w) >= 25)
        await w.engines[1].start()
        answers = await asyncio.gather(*asking)
        wrong = [w.checker.check(COMPLETIONS, b, a) for b, a in zip(bodies, answers, strict=True)]
        assert not [found for found in wrong if found]
        assert not w.gateway.core.jobs


def _done(w: World) -> int:
    return len(w.gateway.journal.recent(1000))


async def test_what_came_before_any_upstream_was_known_is_served_as_the_upstream_can() -> None:
    """The gateway started first; the engine that then appears returns no token ids."""
    plain = replace(AT_ONCE, token_ids=False)
    async with world(plain, upstream={"models": ["sim"]}, silent=True) as w:
        assert not w.gateway.fleet.models
        asking = spawn(w.check(COMPLETIONS, {**BODIES[COMPLETIONS], "stream": True}), name="early")
        await until(lambda: w.gateway.core.waiting() == 1)
        await w.engine.start()
        await asking
        assert [record.max_tokens for record in w.engine.log][-1] == 200
        assert w.gateway.journal.recent(1)[0]["sliced"] == "no; no_token_ids"


PATIENT_BREAKER = {"health": {"break_for": 600.0, "interval": 600.0}}


async def _status(w: World, path: str) -> int:
    async with w.post(path, {**BODIES[path], "max_tokens": 3}) as response:
        return response.status


async def test_requests_that_the_engine_cannot_digest_hold_up_nobody_else() -> None:
    """One kind of request always ends in a 500, an image for a model that sees none: the others are still answered."""
    async with world(upstream=PATIENT_BREAKER, scheduler={"queue": {"unavailable_timeout": 600.0}}) as w:
        w.engine.faults.add(Fault("status", status=500, times=None, path=CHAT))
        assert {await _status(w, CHAT) for _ in range(8)} == {500}
        assert await _status(w, COMPLETIONS) == 200
        assert [upstream["breaker"] for upstream in w.gateway.upstreams()] == ["closed"]


async def test_an_engine_that_answers_nobody_is_left_alone() -> None:
    async with world(upstream=PATIENT_BREAKER, scheduler={"queue": {"unavailable_timeout": 0.05}}) as w:
        refusing = Fault("status", status=500, times=100_000)
        w.engine.faults.add(refusing)
        assert [await _status(w, COMPLETIONS) for _ in range(8)][-1] == 503
        assert [upstream["breaker"] for upstream in w.gateway.upstreams()] == ["open"]
        asked, turns = refusing.times, iter(range(300))
        await until(lambda: next(turns) == 299)
        assert refusing.times == asked, "it is asked again and again"
