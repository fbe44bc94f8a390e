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
from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.server import SimServer
from loadtest import calibrate
from loadtest.client import Client
from tests.gateway.world import paced

ENGINE = EngineModel(
    slots=3,
    decode=((1, 400.0), (3, 250.0)),
    prefill_tokens_per_second=8000.0,
    seam_tokens=6.0,
    prefill_stalls=True,
)


@pytest.mark.parametrize("ids", [True, False])
async def test_a_known_engine_is_found_again(ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "JOBS", 2)
    config = replace(paced(), engine=ENGINE, token_ids=ids, prompt_tokens_details=True)
    async with SimServer(config) as engine, Client(engine.url) as client:
        found = await calibrate.measure(calibrate.Server(client, "sim"), slots=None, rounds=1)
    assert found.slots == 3
    assert found.by_ids == ids
    rates = dict(found.decode)
    # Real time on a shared machine: the embedded engine's own timers are late by a millisecond or so.
    assert rates[1] == pytest.approx(400, rel=0.25)
    assert rates[3] == pytest.approx(250, rel=0.25)
    assert found.capacity == pytest.approx(750, rel=0.3)
    if ids:
        assert found.prefill == pytest.approx(8000, rel=0.4)
        assert found.stalls
    assert 0 < found.seam["alone"] < 20
    model = calibrate.fitted(found, block=16, kv_tokens=None, about="x")
    assert model.slots == 3
    assert model.seam_tokens >= 0


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
