"""What the upstreams together can do: the least of them, but not what one said in a bad moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from elis_gateway.config import Health, Upstream, dump, from_mapping
from elis_gateway.errors import ConfigError
from elis_gateway.sim.faults import Fault
from elis_gateway.tasks import spawn
from elis_gateway.upstream.fleet import Fleet, in_place
from tests.gateway.world import AT_ONCE, CHAT, COMPLETIONS, paced, until, world
from tests.upstream.autojump import run_local


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


async def test_an_upstream_that_does_not_answer_at_the_start_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"url": "http://127.0.0.1:9", "slots": 1, "health": {"interval": 0.01}}
    fleet = Fleet([Upstream.model_validate(settings)], lambda info: None)
    await fleet.start()
    await until(lambda: "does not answer yet" in caplog.text)
    await asyncio.sleep(0.05)  # in which it is looked at again
    await fleet.close()
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("upstream 127.0.0.1:9 does not answer yet: 127.0.0.1:9: Cannot connect")


# --- slots: auto, and ranks ----------------------------------------------------------------------------------------


def test_auto_slots_find_what_the_engine_runs() -> None:
    """On a clock that jumps: what an engine is seen to run must not depend on what else this machine does."""
    run_local(_find_slots())


async def _find_slots() -> None:
    async with world(paced(400.0, slots=6), upstream={"slots": "auto"}) as w:
        body = {"model": "sim", "prompt": "Tell me", "max_tokens": 40, "stream": True}
        busy = [spawn(_for_ever(w, body), name="client") for _ in range(24)]
        seen: set[int] = set()

        def found() -> bool:
            shown = w.gateway.upstreams()[0]["slots"]
            seen.add(shown)
            # It goes on to look whether there is more: one above, now and then.
            return max(seen) >= 8 and 5 <= shown <= 7

        try:
            await until(found)
            assert w.gateway.upstreams()[0]["slots_auto"]
            async with w.session.get(w.admin + "/metrics") as response:
                page = await response.text()
            name = w.gateway.upstreams()[0]["id"]
            assert f'elis_engine_running{{upstream="{name}"}}' in page
            assert f'elis_engine_waiting{{upstream="{name}"}}' in page
        finally:
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)


async def _for_ever(w: Any, body: dict[str, Any]) -> None:
    while True:
        await w.ask(COMPLETIONS, body)


async def test_auto_slots_of_a_mute_engine_and_a_list_of_models_that_comes_in_pieces(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def models(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in (b'{"data": [{"id": "o', b'ne"}, {"id": ', b'"two"}]}'):
            await response.write(piece)
            await asyncio.sleep(0.01)
        await response.write_eof()
        return response

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    async with TestServer(app) as server:
        settings = Upstream.model_validate(
            {"url": str(server.make_url("")).rstrip("/"), "slots": "auto", "continuation": "off"}
        )
        fleet = Fleet([settings], lambda info: None)
        with caplog.at_level("WARNING", logger="elis_gateway.upstream"):
            await fleet.start()
        try:
            assert sorted(fleet.models) == ["one", "two"]
            assert fleet.describe()[0]["slots"] == 4
            assert "slots: auto, but it shows neither" in caplog.text
        finally:
            await fleet.close()


async def test_ranks_of_one_engine_are_upstreams_and_an_answer_stays_where_it_began() -> None:
    async with world(paced(2000.0, slots=8), upstream={"data_parallel_size": 2, "slots": 2}) as w:
        names = [u["id"] for u in w.gateway.upstreams()]
        assert [name.rpartition("-rank-")[2] for name in names] == ["0", "1"]
        async with w.session.put(w.admin + "/admin/policy", json={"kind": "round_robin", "mode": "fixed"}) as response:
            assert response.status == 200
        body = {"model": "sim", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 120, "stream": True}
        await asyncio.gather(*(w.check(CHAT, body) for _ in range(8)))
        calls = w.engine.log.listed()
        assert {call["rank"] for call in calls} == {"0", "1"}
        # A client may not choose.
        await w.ask(CHAT, body, **{"X-data-parallel-rank": "7"})
        assert {call["rank"] for call in w.engine.log.listed()} == {"0", "1"}


def test_what_does_not_go_with_auto() -> None:
    for more in ({"overcommit": 2}, {"engine_priority": "on"}):
        with pytest.raises(ValueError, match="not both"):
            Upstream.model_validate({"url": "http://a", "slots": "auto", **more})
    with pytest.raises(ConfigError, match=r"no scheduler\.overcommit"):
        from_mapping({"upstreams": [{"url": "http://a", "slots": "auto"}], "scheduler": {"overcommit": 1}})
    with pytest.raises(ConfigError, match="data_parallel_size or data_parallel_rank"):
        from_mapping({"upstreams": [{"url": "http://a", "slots": 1, "data_parallel_size": 2, "data_parallel_rank": 0}]})
    kept = from_mapping({"upstreams": [{"url": "http://a", "slots": "auto", "data_parallel_size": 2}]})
    assert [u.name for u in kept.upstreams] == ["a-rank-0", "a-rank-1"]
    assert from_mapping(yaml.safe_load(dump(kept))) == kept


async def test_an_upstream_that_cannot_begin_is_not_there() -> None:
    """Its certificate is gone in the moment it is read. Listed, and never looked at, it would be there for ever."""
    fleet = Fleet([], lambda info: None)
    settings = Upstream.model_validate({"url": "https://127.0.0.1:9", "slots": 1, "tls": {"ca": "/nowhere.pem"}})
    with pytest.raises(ConfigError, match=r"/nowhere\.pem"):
        await fleet.add(settings)
    assert not fleet.describe()
    assert not fleet.upstreams


@pytest.mark.parametrize("models_too", [False, True])
async def test_a_health_page_that_leads_elsewhere_is_none(models_too: bool) -> None:
    """Hosted models answer what they do not know by leading to their website; a page to log in at takes everything."""

    async def website(request: web.Request) -> web.Response:
        return web.Response(text="welcome")

    async def answer(request: web.Request) -> web.Response:
        if models_too or not request.path.startswith("/v1/"):
            raise web.HTTPFound(elsewhere.make_url("/login"))
        return web.json_response({"data": [{"id": "one"}]})

    apps = (web.Application(), web.Application())
    for app, handler in zip(apps, (website, answer), strict=True):
        app.router.add_get("/{any:.*}", handler)
    async with TestServer(apps[0]) as elsewhere, TestServer(apps[1]) as server:
        given = {"url": str(server.make_url("")).rstrip("/"), "slots": 1, "continuation": "off"}
        fleet = Fleet([Upstream.model_validate(given)], lambda info: None)
        await fleet.start()
        try:
            assert (fleet.describe()[0]["up"], set(fleet.models)) == ((False, set()) if models_too else (True, {"one"}))
        finally:
            await fleet.close()


async def test_another_health_page_is_asked_though_there_was_none() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path == "/health":
            return web.Response(status=404)
        return web.json_response({"data": [{"id": "one"}]})

    app = web.Application()
    app.router.add_get("/{any:.*}", answer)
    async with TestServer(app) as server:
        given = {"url": str(server.make_url("")).rstrip("/"), "slots": 1, "continuation": "off"}
        settings = Upstream.model_validate({**given, "health": {"interval": 0.02}})
        fleet = Fleet([settings], lambda info: None)
        await fleet.start()
        try:
            await until(lambda: bool(fleet.models))
            fleet.change(Upstream.model_validate({**given, "health": {"interval": 0.02, "path": "/alive"}}))
            await until(lambda: "/alive" in asked)
        finally:
            await fleet.close()
