"""Stopping: no more is accepted, what runs may finish for a while, the rest is told, everything is closed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import ClientConnectorError, ClientError, ClientSession

from elis_gateway.app import _FLUSH, Gateway
from elis_gateway.config import from_mapping
from elis_gateway.errors import ConfigError
from elis_gateway.predictor.make import make_predictor
from elis_gateway.sim.server import SimServer
from elis_gateway.tasks import spawn
from tests.gateway.test_hardening import bare, halves
from tests.gateway.world import COMPLETIONS, paced, payloads, read_until, until, world

BODY: dict[str, Any] = {"model": "sim", "prompt": "long", "max_tokens": 300, "ignore_eos": True, "stream": True}


async def test_what_runs_finishes_and_nothing_new_is_taken() -> None:
    async with world(paced(1000)) as w:
        async with w.post(COMPLETIONS, BODY) as response:
            data = await read_until(response, 1)
            stopping = spawn(w.gateway.stop(60.0), name="stop")
            await until(lambda: not w.gateway.dispatcher.accepting)
            async with ClientSession() as fresh:
                with pytest.raises(ClientConnectorError):
                    await fresh.post(w.url + COMPLETIONS, json=BODY)
            data += await response.content.read()
        assert payloads(data)[-1] == b"[DONE]"
        await stopping


async def test_what_does_not_finish_in_time_ends_with_an_error_event() -> None:
    async with world(paced(20), slots=1) as w:
        async with w.post(COMPLETIONS, BODY) as response:
            data = await read_until(response, 1)
            queued = spawn(_status(w.session, w.url, {**BODY, "stream": False}), name="queued")
            await until(lambda: len(w.gateway.flights) == 2)
            await w.gateway.stop(0.05)
            data += await response.content.read()
        assert orjson.loads(payloads(data)[-1])["error"]["code"] == "shutting_down"
        assert await queued == 503
        assert w.engine.log[-1].how == "aborted"


async def test_a_second_signal_ends_the_grace() -> None:
    async with world(paced(20)) as w, w.post(COMPLETIONS, BODY) as response:
        await read_until(response, 1)
        stopping = spawn(w.gateway.stop(60.0), name="stop")
        await until(lambda: not w.gateway.dispatcher.accepting)
        w.gateway.hurry()
        await asyncio.wait_for(stopping, 50)
        assert b"shutting_down" in await response.content.read()


async def test_a_second_signal_counts_though_the_grace_has_not_begun() -> None:
    """Two signals may come in one turn of the event loop."""
    async with world(paced(20)) as w, w.post(COMPLETIONS, BODY) as response:
        await read_until(response, 1)
        w.gateway.hurry()
        await asyncio.wait_for(w.gateway.stop(600.0), 50)
        assert b"shutting_down" in await response.content.read()


async def test_what_is_only_passed_on_may_finish_too_and_nothing_new_is_taken() -> None:
    go_on = asyncio.Event()
    async with bare(halves(go_on)) as (gateway, url), ClientSession() as session:
        async with session.get(url + "/v1/thing") as response, session.get(url + "/health") as before:
            assert await response.content.readany() == b"abc"
            await before.read()
            stopping = spawn(gateway.stop(60.0), name="stop")
            await until(lambda: not gateway.dispatcher.accepting)
            # Over a connection that is open already.
            async with session.get(url + "/v1/thing") as late:
                assert (late.status, orjson.loads(await late.read())["error"]["code"]) == (503, "shutting_down")
                assert int(late.headers["Retry-After"]) >= 1
                assert late.headers["Connection"] == "close"
            await asyncio.sleep(_FLUSH + 0.5)
            assert not stopping.done()
            go_on.set()
            assert await response.content.read() == b"def"
        await stopping


async def test_what_is_passed_on_does_not_outlast_a_second_signal() -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with bare(never) as (gateway, url), ClientSession() as session:
        asking = spawn(_get(session, url + "/v1/thing"), name="ask")
        await until(lambda: bool(gateway._relay._in_flight))
        stopping = spawn(gateway.stop(600.0), name="stop")
        await until(lambda: not gateway.dispatcher.accepting)
        gateway.hurry()
        await asyncio.wait_for(stopping, 60)
        await asking


async def _get(session: ClientSession, url: str) -> None:
    with suppress(ClientError):
        async with session.get(url) as response:
            await response.read()


async def test_a_reload_during_the_shutdown_changes_nothing_and_leaves_nothing_open() -> None:
    async with world(paced(20)) as w, w.post(COMPLETIONS, BODY) as response:
        await read_until(response, 1)
        stopping = spawn(w.gateway.stop(60.0), name="stop")
        await until(lambda: not w.gateway.dispatcher.accepting)
        more = {"upstreams": [{"url": "http://127.0.0.1:9", "slots": 1}]}
        w.gateway._reload = lambda: from_mapping(more)
        with pytest.raises(ConfigError, match="shutting down"):
            await w.gateway.reload()
        with pytest.raises(ConfigError, match="shutting down"):
            await w.gateway.add_upstream({"url": "http://127.0.0.1:10", "slots": 1})
        w.gateway.hurry()
        await stopping
        assert b"shutting_down" in await response.content.read()
        assert all(u._client is None for u in w.gateway.fleet.upstreams.values())


async def test_an_upstream_being_replaced_when_the_shutdown_comes_is_not_begun_anew() -> None:
    async with world(paced(20)) as w, w.post(COMPLETIONS, BODY) as response:
        await read_until(response, 1)
        (name,) = w.gateway.fleet.upstreams
        other = {"upstreams": [{"name": name, "url": w.engine.url, "slots": 4, "context": 1000}]}
        w.gateway._reload = lambda: from_mapping(other)
        assert "upstreams" in (await w.gateway.reload())["applied"]
        await w.gateway.stop(0.05)
        await until(lambda: not any("replace" in task.get_name() for task in asyncio.all_tasks()))
        assert all(u._client is None for u in w.gateway.fleet.upstreams.values())
        assert b"shutting_down" in await response.content.read()


async def test_several_reloads_at_once_and_before_everything_has_begun() -> None:
    async with SimServer(paced(1000)) as engine:
        settings = {
            "server": {"host": "127.0.0.1", "port": 0},
            "admin": {"port": 0},
            "upstreams": [{"url": engine.url, "slots": 1}, {"url": "http://127.0.0.1:9", "slots": 1}],
        }
        given = iter(range(1, 100))
        gateway = Gateway(
            from_mapping(settings),
            reload=lambda: from_mapping(
                {**settings, "upstreams": [{"url": engine.url, "slots": 1 + next(given)}], "models": {"alias": "sim"}}
            ),
        )
        starting = spawn(gateway.start(), name="start")
        done = await asyncio.gather(gateway.reload(), gateway.reload(), gateway.reload())
        await starting
        assert all("upstreams" in one["applied"] for one in done)
        await until(lambda: len(gateway.fleet.upstreams) == 1)
        assert gateway.upstreams()[0]["slots"] == 4
        assert gateway._relay.aliases == {"alias": "sim"}
        await gateway.stop(0.0)


async def test_the_last_save_waits_for_the_one_under_way() -> None:
    """Both write the same file; what stays must be the later of them, and whole."""
    async with world() as w:
        order: list[str] = []
        begun = threading.Event()

        class Slow:
            def save(self) -> None:
                order.append("begin")
                begun.set()
                time.sleep(0.05)
                order.append("end")

        kept, w.gateway.predictor = w.gateway.predictor, Slow()  # type: ignore[assignment]
        thread = spawn(asyncio.to_thread(w.gateway._save), name="save")
        await asyncio.to_thread(begun.wait)
        w.gateway._save()
        await thread
        assert order == ["begin", "end"] * 2
        w.gateway.predictor = kept


async def _status(session: ClientSession, url: str, body: dict[str, Any]) -> int:
    async with session.post(url + COMPLETIONS, json=body) as response:
        return response.status


async def test_the_command_stops_on_sigterm_and_reloads_on_sighup(tmp_path: Path) -> None:
    """The real process: starts, serves, reads its file again, drains and exits with 0."""
    async with SimServer(paced(500)) as engine, ClientSession() as session:
        settings: dict[str, Any] = {
            "server": {"host": "127.0.0.1", "port": 0},
            "admin": {"port": 0},
            "upstreams": [{"url": engine.url, "slots": 2}],
            "logging": {"format": "json"},
        }
        path = tmp_path / "gateway.yaml"
        path.write_text(json.dumps(settings))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "elis_gateway", "serve", str(path), stderr=asyncio.subprocess.PIPE, env={**os.environ}
        )
        assert process.stderr is not None
        url = await _line(process.stderr, "listening on ")
        path.write_text(json.dumps({**settings, "models": {"alias": "sim"}}))
        process.send_signal(signal.SIGHUP)
        await _line(process.stderr, "configuration read again")
        async with session.post(url + COMPLETIONS, json={**BODY, "model": "alias"}) as response:
            assert response.status == 200
            data = await read_until(response, 1)
            process.send_signal(signal.SIGTERM)
            data += await response.content.read()
        assert payloads(data)[-1] == b"[DONE]"
        assert await asyncio.wait_for(process.wait(), 60) == 0


_OFTEN = """
import elis_gateway.app
from elis_gateway.cli import main
elis_gateway.app._SAVE_EVERY = 0.1
main()
"""


@pytest.mark.parametrize(("kind", "key"), [("history", "path"), ("bge", "state")])
async def test_what_was_learned_outlives_a_kill(tmp_path: Path, kind: str, key: str) -> None:
    """No warning, no last breath: what was written down regularly is there, and whole, after SIGKILL at any moment."""
    state = tmp_path / "learned"
    async with SimServer(paced(5000)) as engine, ClientSession() as session:
        settings: dict[str, Any] = {
            "server": {"host": "127.0.0.1", "port": 0},
            "admin": {"port": 0},
            "upstreams": [{"url": engine.url, "slots": 2}],
            "predictor": {"kind": kind, key: str(state)},
            "logging": {"format": "json"},
        }
        path = tmp_path / "gateway.yaml"
        path.write_text(json.dumps(settings))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _OFTEN, "serve", str(path), stderr=asyncio.subprocess.PIPE, env={**os.environ}
        )
        assert process.stderr is not None
        url = await _line(process.stderr, "listening on ")
        asked = {**BODY, "max_tokens": 700, "ignore_eos": False, "stream": False}
        async with asyncio.timeout(60):
            # A busy gateway learns from a sample of its answers: asked until enough of them were in it.
            for number in itertools.count():
                async with session.post(url + COMPLETIONS, json={**asked, "prompt": f"long {number}"}) as response:
                    assert response.status == 200
                if number >= 4 and _seen(kind, state) >= 4:
                    break
        process.kill()
        await process.wait()
    assert _seen(kind, state) >= 4


def _seen(kind: str, state: Path) -> int:
    """Answers that a predictor starting now knows of."""
    if not state.exists():
        return 0
    made: Any = make_predictor(kind, **{"path" if kind == "history" else "state": str(state)})
    history = made if kind == "history" else made.learner.history
    seen = history._all.changes
    if kind == "bge":
        seen = min(seen, made.learner._all.count)
        made.close()
    return int(seen)


async def _line(stream: asyncio.StreamReader, wanted: str) -> str:
    """Read the log until a message begins so; returns its last word."""
    async with asyncio.timeout(60):
        while True:
            line = await stream.readline()
            assert line, f"the log ended before {wanted!r}"
            message: str = orjson.loads(line)["message"]
            if message.startswith(wanted):
                return message.split()[-1]
