"""Changing a gateway while it serves: upstreams come, go and are emptied, files are read again, history is kept."""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from elis_gateway import app, config
from elis_gateway.access import hashed, new_key
from elis_gateway.config import from_mapping
from elis_gateway.errors import ConfigError
from elis_gateway.sim.checker import of_stream
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.proxy import FaultProxy
from elis_gateway.tasks import spawn
from elis_gateway.upstream.http import HttpUpstream
from tests.gateway.world import CHAT, COMPLETIONS, World, paced, payloads, read_until, until, world
from tests.predictor import tiny

BODY: dict[str, Any] = {"model": "sim", "prompt": "long", "max_tokens": 300, "ignore_eos": True, "stream": True}


async def admin(w: World, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    async with w.session.request(method, w.admin + path, json=body) as response:
        return response.status, orjson.loads(await response.read())


def names(w: World) -> list[str]:
    return list(w.gateway.fleet.upstreams)


def changed(w: World, **sections: Any) -> None:
    """The file now says something else in these sections."""
    given = {**w.gateway.config.model_dump(mode="json", exclude_defaults=True), **sections}
    w.gateway._reload = lambda: from_mapping(given)


async def test_emptying_an_upstream_moves_its_answers_and_loses_none() -> None:
    async with world(paced(300), paced(300)) as w, w.post(COMPLETIONS, BODY) as response:
        data = await read_until(response, 5)
        busy = next(e for e in w.engines if any(r.how == "open" for r in e.log))
        name = busy.url.removeprefix("http://")
        status, found = await admin(w, "POST", f"/admin/upstreams/{name}/drain")
        assert status == 200
        assert {u["id"]: u["draining"] for u in found["upstreams"]}[name]
        data += await response.content.read()
        assert w.checker.check(COMPLETIONS, BODY, of_stream(payloads(data))) == []
        assert busy.log[-1].how == "aborted"
        await w.check(COMPLETIONS, BODY)
        assert len(list(busy.log)) == 1
        await admin(w, "POST", f"/admin/upstreams/{name}/undrain")
        assert {u["id"]: u["draining"] for u in w.gateway.upstreams()}[name] is False


async def test_upstreams_come_and_go_while_serving() -> None:
    async with world(paced(300), paced(300)) as w:
        first, second = names(w)
        async with w.post(COMPLETIONS, BODY) as response:
            data = await read_until(response, 5)
            busy = next(e for e in w.engines if any(r.how == "open" for r in e.log))
            gone = busy.url.removeprefix("http://")
            assert (await admin(w, "DELETE", f"/admin/upstreams/{gone}"))[0] == 200
            data += await response.content.read()
        assert w.checker.check(COMPLETIONS, BODY, of_stream(payloads(data))) == []
        await until(lambda: len(names(w)) == 1)
        # Nor do the metrics speak of it any more.
        await until(lambda: gone.encode() not in w.gateway.render_metrics())
        wanted = {"url": busy.url, "slots": 2, "health": {"interval": 0.05}}
        assert (await admin(w, "POST", "/admin/upstreams", wanted))[0] == 200
        await until(lambda: len(w.gateway.fleet.serving("sim")) == 2)
        assert sorted(names(w)) == sorted([first, second])
        assert (await admin(w, "POST", "/admin/reload"))[1]["applied"] == ["upstreams"]  # what the file says
        await until(lambda: w.gateway.core.upstreams[gone].info.slots == 4)


async def test_an_upstream_that_broke_and_was_removed_is_not_counted_when_its_answer_ends_elsewhere() -> None:
    """Machines that die take their calls with them: the metrics hear of the failover when its next call is over."""
    async with world(paced(300), paced(300)) as w:
        for engine in w.engines:
            engine.faults.add(Fault("close", after=100))
        async with w.post(COMPLETIONS, BODY) as response:
            data = await read_until(response, 5)
            running = w.gateway.core.running
            (gone,) = (name for name in names(w) if running(name))
            (other,) = (name for name in names(w) if name != gone)
            next(e for e in w.engines if e.url.endswith(other)).faults.rules.clear()
            await until(lambda: running(other) == 1)
            assert (await admin(w, "DELETE", f"/admin/upstreams/{gone}"))[0] == 200
            await until(lambda: gone not in names(w))
            data += await response.content.read()
        assert w.checker.check(COMPLETIONS, BODY, of_stream(payloads(data))) == []
        await until(lambda: bool(w.gateway.journal.recent(1)))
        assert len(w.gateway.journal.recent(1)[0]["slices"]) >= 2
        assert gone.encode() not in w.gateway.render_metrics()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/admin/upstreams", {"url": "http://a"}),
        ("POST", "/admin/upstreams", {"url": "http://a", "slots": 1, "api_key_env": "HOME"}),
        ("POST", "/admin/upstreams", {"url": "http://a", "slots": 1, "tls": {"ca": "/etc/passwd"}}),
        ("POST", "/admin/upstreams", {"url": "http://a", "slots": 1, "name": "EXISTS"}),
        ("POST", "/admin/upstreams", {"url": "http://a", "slots": 1, "data_parallel_size": 10**6}),
        ("POST", "/admin/upstreams", {"url": "http://a", "slots": 10**12}),
        ("POST", "/admin/upstreams", 3),
        ("DELETE", "/admin/upstreams/nobody", None),
        ("POST", "/admin/upstreams/nobody/drain", None),
    ],
)
async def test_what_makes_no_sense_or_would_tell_secrets_is_refused(method: str, path: str, body: Any) -> None:
    async with world() as w:
        (name,) = names(w)
        if isinstance(body, dict) and body.get("name") == "EXISTS":
            body = {**body, "name": name}
        status, found = await admin(w, method, path, body)
        assert status == (404 if "nobody" in path else 400)
        assert found["error"]
        assert names(w) == [name]


async def test_many_ranks_are_added_without_holding_anybody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of many ranks is many upstreams; without TLS none of them reads certificates, and a shutdown does not
    wait until the last one is there."""
    monkeypatch.setattr(ssl, "create_default_context", lambda *args, **more: pytest.fail("nobody asked for TLS"))
    async with world() as w:
        before = len(names(w))
        many = {"url": "http://127.0.0.1:9", "name": "many", "slots": 1, "data_parallel_size": 300}
        adding = spawn(w.gateway.add_upstream(many), name="add")
        await until(lambda: len(names(w)) > before)
        assert len(names(w)) < 300, "others have their turn in between"
        w.gateway.roster.closed = True
        with pytest.raises(ConfigError, match="shutting down"):
            await adding


async def test_upstreams_out_of_the_air_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is probed and remembered; calls of the admin listener, one after the other, could take all memory."""
    many = {"url": "http://a", "slots": 1, "data_parallel_size": 511}
    with pytest.raises(ConfigError, match="at most 1024, ranks counted"):
        from_mapping({"upstreams": [{**many, "name": str(n)} for n in range(3)]})
    monkeypatch.setattr(config.upstreams, "_MOST_UPSTREAMS", 24)  # so many real ones take a slow machine minutes
    async with world() as w:
        for n in (1, 2):
            many = {"url": f"http://127.0.0.1:{n}", "slots": 1, "data_parallel_size": 11}
            assert (await admin(w, "POST", "/admin/upstreams", many))[0] == 200
        before = names(w)
        status, found = await admin(w, "POST", "/admin/upstreams", {**many, "url": "http://127.0.0.1:3"})
        assert (status, found["error"]) == (400, "upstreams: expected at most 24, ranks counted; got 34")
        assert names(w) == before


async def test_another_number_of_slots_disturbs_nothing() -> None:
    async with world(paced(300)) as w, w.post(COMPLETIONS, BODY) as response:
        data = await read_until(response, 5)
        before = w.gateway.fleet.upstreams[names(w)[0]]
        upstream = w.gateway.config.upstreams[0].model_dump(mode="json")
        changed(w, upstreams=[{**upstream, "slots": 2, "timeouts": {"inter_token": 7}}])
        assert (await admin(w, "POST", "/admin/reload"))[1]["applied"] == ["upstreams"]
        assert w.gateway.core.upstreams[names(w)[0]].info.slots == 2
        assert w.gateway.fleet.upstreams[names(w)[0]] is before
        assert before.patience.timeouts.inter_token == 7
        data += await response.content.read()
        assert w.checker.check(COMPLETIONS, BODY, of_stream(payloads(data))) == []
        assert len(list(w.engine.log)) == 1


async def test_queue_limits_and_retries_apply_at_once() -> None:
    async with world(paced(300, slots=1), slots=1, upstream={"overcommit": 0}) as w:
        changed(w, scheduler={"queue": {"max_jobs": 1}, "retries": 9})
        assert (await admin(w, "POST", "/admin/reload"))[1] == {
            "applied": ["scheduler.queue, retries and tail"],
            "needs_restart": [],
        }
        asking = [spawn(w.ask(COMPLETIONS, BODY), name="ask") for _ in range(2)]
        await until(lambda: w.gateway.core.waiting() == 1)
        async with w.post(COMPLETIONS, BODY) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
        for task in asking:
            await task


async def test_an_upstream_wanted_again_while_its_connections_close_comes_back_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Begun twice, one of the two is watched and published for ever, and what the other runs is forgotten."""
    closed, close = asyncio.Event(), HttpUpstream.close

    async def slowly(self: HttpUpstream) -> None:
        await closed.wait()
        await close(self)

    monkeypatch.setattr(HttpUpstream, "close", slowly)
    async with world() as w:
        (name,) = names(w)
        assert (await admin(w, "DELETE", f"/admin/upstreams/{name}"))[0] == 200
        await until(lambda: not names(w))
        assert (await admin(w, "POST", "/admin/reload"))[0] == 200
        await asyncio.sleep(0.05)
        closed.set()
        await until(lambda: w.gateway.roster.settled and len(w.gateway.fleet.serving("sim")) == 1)
        await w.check(COMPLETIONS, {**BODY, "max_tokens": 20})
        assert [task.get_name() for task in asyncio.all_tasks()].count(f"watch {name}") == 1


async def test_reloads_do_not_get_in_each_other_s_way() -> None:
    async with world(paced(300), paced(300)) as w:
        first, second = (u.model_dump(mode="json") for u in w.gateway.config.upstreams)
        asking = [spawn(w.ask(COMPLETIONS, BODY), name="ask") for _ in range(6)]
        await until(lambda: len(w.gateway.flights) == 6)
        for upstreams in ([first], [second], [first, second], [second], [first, second]):
            changed(w, upstreams=upstreams)
            await asyncio.gather(*(w.gateway.reload() for _ in range(3)))
        await asyncio.gather(*asking)
        await until(lambda: len(w.gateway.fleet.serving("sim")) == 2)
        await w.check(COMPLETIONS, BODY)


async def test_what_was_learned_is_written_down_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_SAVE_EVERY", 0.05)
    path = tmp_path / "history.json"
    async with world(predictor={"kind": "history", "path": str(path)}) as w:
        await w.check(COMPLETIONS, BODY)
        await until(lambda: path.exists() and orjson.loads(path.read_bytes())["all"]["seen"] >= 1)


async def test_a_frozen_engine_s_answers_go_on_elsewhere_once_it_is_down() -> None:
    """Its connections stay open and the stall limits are far away: what its silent calls wait for is the probes."""
    health = {"interval": 0.1, "timeout": 0.2, "up_after": 1, "down_after": 2, "slow_start": 0}
    async with world(paced(300), paced(300)) as w, AsyncExitStack() as stack:
        proxies = [FaultProxy(engine.port) for engine in w.engines]
        for proxy in proxies:
            await proxy.start()
            stack.push_async_callback(proxy.stop)
        changed(w, upstreams=[{"url": p.url, "slots": 4, "health": health, "name": f"u{p.port}"} for p in proxies])
        await w.gateway.reload()
        await until(lambda: len(w.gateway.fleet.serving("sim")) == 2 and len(names(w)) == 2)
        for path in (COMPLETIONS, CHAT):
            body = {**BODY, "messages": [{"role": "user", "content": "x"}]} if path == CHAT else BODY
            for engine in w.engines:
                engine.log.clear()
            async with w.post(path, body) as response:
                data = await read_until(response, 5)
                busy = next(n for n, e in enumerate(w.engines) if any(r.how == "open" for r in e.log))
                proxies[busy].freeze()
                data += await asyncio.wait_for(response.content.read(), 60)
                proxies[busy].thaw()
            assert w.checker.check(path, body, of_stream(payloads(data))) == []
            await until(lambda: len(w.gateway.fleet.serving("sim")) == 2)


async def test_a_class_is_promised_something_of_its_own() -> None:
    classes = {"classes": {"default": 0, "rush": 0}}
    async with world(scheduler=classes) as w:
        for promise in ({}, {"class_tail": {"rush": 1.1}}):
            changed(w, scheduler={**classes, **promise})
            await w.gateway.reload()
            seen = []
            w.gateway.dispatcher._tell_submitted.append(lambda flight, seen=seen: seen.append(flight.spec.tail))
            for name in ("default", "rush"):
                await w.ask(COMPLETIONS, {**BODY, "max_tokens": 5}, **{"X-Elis-Class": name})
            assert seen == [None, promise.get("class_tail", {}).get("rush")]
            w.gateway.dispatcher._tell_submitted.pop()
    with pytest.raises(ConfigError, match="class_tail to name classes"):
        from_mapping({"upstreams": [{"url": "http://a", "slots": 1}], "scheduler": {"class_tail": {"other": 1.1}}})


async def test_a_client_that_stops_reading_is_cut_off_and_costs_little() -> None:
    limits = {"client_stall": 0.3, "client_backlog": 200_000}
    async with world(limits=limits, server={"keepalive_after": 0}) as w:
        body = orjson.dumps({**BODY, "max_tokens": 1900, "prompt": "x" * 10})
        connections = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.port, limit=1024)
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.transport.pause_reading()
            for _ in range(20):
                writer.write(head.encode() + body)
            connections.append((reader, writer))
        await until(lambda: not w.gateway.flights and not _busy(w))
        for _, writer in connections:
            writer.transport.abort()
        await w.check(COMPLETIONS, BODY)


def _busy(w: World) -> list[Any]:
    server = w.gateway._runners[0].server
    assert server is not None
    return [c for c in server.connections if c._request_in_progress]


async def test_an_upstream_whose_calls_fail_is_paused_though_its_health_page_is_fine() -> None:
    health = {"interval": 0.05, "up_after": 1, "break_after": 3, "break_for": 0.2, "slow_start": 0.2}
    async with world(scheduler={"retries": 10}, upstream={"health": health}) as w:
        w.engine.faults.add(Fault("garbage", times=3))
        await w.check(COMPLETIONS, {**BODY, "max_tokens": 20})
        assert [r.how for r in w.engine.log][:3] == ["fault:garbage"] * 3
        gap = w.engine.log[3].arrival - w.engine.log[2].arrival
        assert gap >= 0.19
        await until(lambda: w.gateway.upstreams()[0]["slots_allowed"] == 4)
        assert w.gateway.upstreams()[0]["breaker"] == "closed"


async def test_what_was_emptied_stays_so_when_it_is_made_anew() -> None:
    """Somebody mends that engine; a reload by somebody else must not send it work."""
    async with world(paced(300), paced(300)) as w:
        first, second = names(w)
        await admin(w, "POST", f"/admin/upstreams/{first}/drain")
        before = w.gateway.fleet.upstreams[first]
        one, two = (u.model_dump(mode="json") for u in w.gateway.config.upstreams)
        changed(w, upstreams=[{**one, "context": 1000}, two])
        assert (await admin(w, "POST", "/admin/reload"))[1]["applied"] == ["upstreams"]
        await until(lambda: w.gateway.fleet.upstreams.get(first, before) is not before and w.gateway.roster.settled)
        await until(lambda: {u["id"]: u["up"] for u in w.gateway.upstreams()}[first])
        assert [u.id for u in w.gateway.fleet.serving("sim")] == [second]
        await admin(w, "POST", f"/admin/upstreams/{first}/undrain")
        await until(lambda: len(w.gateway.fleet.serving("sim")) == 2)
        await admin(w, "POST", f"/admin/upstreams/{first}/drain")
        await admin(w, "DELETE", f"/admin/upstreams/{first}")
        # Whoever takes it away means another, whenever that comes; asking for it while it is not there is no bug.
        await admin(w, "POST", "/admin/reload")
        await until(lambda: len(w.gateway.fleet.serving("sim")) == 2)


async def test_every_dial_that_is_said_to_apply_does_so_alone() -> None:
    async with world() as w:
        changed(w, scheduler={"queue": {"unavailable_timeout": 300.0}, "retry_budget": 0.7})
        assert (await admin(w, "POST", "/admin/reload"))[1] == {
            "applied": ["scheduler.retry_budget"],
            "needs_restart": [],
        }
        assert w.gateway.dispatcher.budget.share == 0.7


async def test_what_needs_a_restart_is_told_until_there_was_one_and_nothing_else_is() -> None:
    hash_ = hashed(new_key())
    async with world() as w:
        server, port = w.gateway.config.server.model_dump(mode="json"), {"port": 0}
        changed(
            w,
            server={**server, "max_body": 1000, "shutdown_grace": 7},
            admin={**port, "key_hash": hash_},
            logging={"level": "warning"},
            limits={"client_stall": 5},
        )
        for applied in (["logging.level", "server.shutdown_grace", "admin.key_hash", "auth and limits"], []):
            found = await w.gateway.reload()
            assert sorted(found["applied"]) == sorted(applied)
            assert found["needs_restart"] == ["server", "limits.client_stall"]
        async with w.session.get(w.admin + "/metrics") as response:
            assert response.status == 401
        changed(w, server=server, admin=port, logging={}, limits={})
        found = await w.gateway.reload()
        assert found["needs_restart"] == []
        assert "admin.key_hash" in found["applied"]


async def test_another_kind_of_predictor_waits_for_a_restart_however_often_it_is_read(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    async with world(predictor={"kind": "bge", "path": str(tiny.build(tmp_path)), "deadline": 60.0}) as w:
        before = w.gateway.config.predictor.model_dump(mode="json")
        changed(w, predictor={"kind": "history", "path": str(tmp_path / "history.json")})
        for _ in range(2):
            found = await w.gateway.reload()
            assert found == {"applied": [], "needs_restart": ["predictor"]}
        changed(w, predictor=before)
        assert (await w.gateway.reload())["needs_restart"] == []


async def test_tokens_move_while_a_long_file_is_read() -> None:
    async with world(paced(300)) as w, w.post(COMPLETIONS, BODY) as response:
        data = await read_until(response, 1)
        given = w.gateway.config
        seen = threading.Event()

        def long_file() -> config.Config:
            assert seen.wait(60)
            return given

        w.gateway._reload = long_file
        reading = spawn(w.gateway.reload(), name="reload")
        data += await read_until(response, 3)
        assert not reading.done()
        seen.set()
        await reading
        data += await response.content.read()
        assert w.checker.check(COMPLETIONS, BODY, of_stream(payloads(data))) == []
