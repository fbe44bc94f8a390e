"""Calibration finds the numbers of an engine that is known: the embedded one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner

from elis_gateway.cli import cli
from elis_gateway.errors import GatewayError
from elis_gateway.sim.engine import Engine, EngineModel, EventKind
from elis_gateway.sim.server import SimServer
from loadtest import calibrate
from loadtest.client import Client
from tests.gateway.world import paced
from tests.upstream.autojump import START, run

ENGINE = EngineModel(
    slots=6,
    decode=((1, 40.0), (6, 25.0)),
    prefill_tokens_per_second=800.0,
    seam_tokens=3.0,
    prefill_stalls=True,
)


class Modelled(calibrate.Server):
    """The embedded engine without sockets, on the loop's clock, which jumps: exact, and no test waits."""

    def __init__(self, model: EngineModel) -> None:
        self.engine = Engine(model, now=START)
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, tuple[calibrate.Timing, asyncio.Event, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0

    @property
    def by_ids(self) -> bool:
        return True

    async def learn(self) -> None:
        pass

    def prompt(self, length: int = 24) -> calibrate.Prompt:
        return [1] * length

    async def call(self, prompt: calibrate.Prompt, tokens: int) -> calibrate.Timing:
        self._count += 1
        timing = calibrate.Timing(self._loop.time(), prompt_tokens=len(prompt))
        # A continuation finds all but the last block of its prompt.
        timing.cached = len(prompt) - 16 if len(prompt) > 24 and len(prompt) < 500 else 0
        ended = asyncio.Event()
        self._calls[self._count] = timing, ended, tokens
        self.engine.start(self._count, len(prompt), timing.cached, tokens, self._loop.time(), mark_every=1)
        self._arm()
        await ended.wait()
        timing.ids = [1] * tokens
        return timing

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self.engine.next_event()
        self._timer = None if due is None else self._loop.call_at(due, self._advance)

    def _advance(self) -> None:
        for event in self.engine.advance(self._loop.time()):
            timing, ended, tokens = self._calls[event.call_id]  # type: ignore[index]
            if event.kind is not EventKind.STARTED or tokens == 1 or not timing.arrivals:
                timing.arrivals.append(event.at)
            timing.arrivals = timing.arrivals[: event.tokens]
            if event.kind is EventKind.ENDED:
                timing.done = event.at
                ended.set()
        self._arm()


def test_a_known_engine_is_found_again() -> None:
    results: list[calibrate.Calibration] = []

    async def story() -> None:
        results.append(await calibrate.measure(Modelled(ENGINE), slots=None, rounds=1))

    run(story())
    (found,) = results
    assert found.slots == 6
    rates = dict(found.decode)
    assert list(rates) == [1, 2, 4, 6]
    assert rates[1] == pytest.approx(40, rel=0.02)
    assert rates[6] == pytest.approx(25, rel=0.02)
    assert found.prefill == pytest.approx(800, rel=0.05)
    assert found.stalls
    assert found.capacity == pytest.approx(150, rel=0.1)
    # Three tokens, and sixteen of the prompt again: 0.8 tokens' worth of time.
    assert found.seam["alone"] == pytest.approx(3.8, abs=0.3)
    model = calibrate.fitted(found, block=16, kv_tokens=None, about="x")
    assert model.seam_tokens == pytest.approx(3.0, abs=0.3)
    assert model.prefill_stalls


async def test_an_engine_that_returns_no_ids_is_continued_by_text() -> None:
    async with SimServer(replace(paced(3000.0), token_ids=False)) as engine, Client(engine.url) as client:
        server = calibrate.Server(client, "sim")
        await server.learn()
        assert not server.by_ids
        prompt = server.prompt()
        call = await server.call(prompt, 8)
        assert server.longer(prompt, call) == str(prompt) + call.text
        assert len(call.arrivals) <= 8


async def test_an_engine_that_refuses_is_said() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": "no"}, status=400)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    async with TestServer(app) as server, Client(str(server.make_url("/"))) as client:
        with pytest.raises(GatewayError, match="answered 400"):
            await calibrate.measure(calibrate.Server(client, "m"), slots=1, rounds=1)


async def test_the_command_writes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "JOBS", 2)
    path = tmp_path / "engine.json"
    async with SimServer(replace(paced(2000.0, slots=2))) as engine:
        args = ["loadtest", "calibrate", engine.url, "--output", str(path), "--rounds", "1", "--slots", "2"]
        result = await asyncio.to_thread(CliRunner().invoke, cli, args)
    assert result.exit_code == 0, result.output
    assert "capacity:" in result.output
    assert EngineModel.load(path).slots == 2
