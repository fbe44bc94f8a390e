"""Several engines behind one address: noticed by what continuations find cached, and by what a metrics page shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from elis_gateway.flight import Leg
from elis_gateway.sim.server import SimServer
from elis_gateway.warmth import Warmth
from tests.gateway.test_metrics import over, samples
from tests.gateway.world import AT_ONCE, COMPLETIONS, world

TELLING = replace(AT_ONCE, prompt_tokens_details=True)
PROMPT = " ".join(f"word{n}" for n in range(120))
ASKED = {
    "model": "sim",
    "max_tokens": 150,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@asynccontextmanager
async def balancer(urls: list[str]) -> AsyncIterator[str]:
    """Sends every request to the next engine, whatever it is about, as load balancers do."""
    turn = 0

    async def relay(request: web.Request) -> web.StreamResponse:
        nonlocal turn
        turn += 1
        headers = {"Content-Type": request.headers.get("Content-Type", "")}
        url = urls[turn % len(urls)] + request.path_qs
        async with session.request(request.method, url, data=await request.read(), headers=headers) as answer:
            response = web.StreamResponse(
                status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")}
            )
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", relay)
    async with ClientSession() as session, TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def served(url: str | None, caplog: pytest.LogCaptureFixture) -> tuple[float, bool]:
    """Serve thirty answers in fixed windows; the share of cold continuations, and whether that was thought odd."""
    upstream: dict[str, Any] = {} if url is None else {"url": url}
    with caplog.at_level("WARNING", logger="elis_gateway.upstream"):
        async with world(TELLING, upstream=upstream, scheduler={"mode": "fixed"}) as w:
            for n in range(30):
                await w.ask(COMPLETIONS, {**ASKED, "prompt": f"{n} {PROMPT}"})
            await over(w, 30)
            (name,) = w.gateway.fleet.upstreams
            found = await samples(w)
            return found[f'elis_continuations_cold_ratio{{upstream="{name}"}}'], w.gateway.upstreams()[0][
                "several_engines"
            ]


async def test_one_engine_is_warm(caplog: pytest.LogCaptureFixture) -> None:
    assert await served(None, caplog) == (0.0, False)
    assert "continuations did not find" not in caplog.text


async def test_a_load_balancer_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    async with SimServer(TELLING) as one, SimServer(TELLING) as other, balancer([one.url, other.url]) as url:
        share, suspected = await served(url, caplog)
    assert share > 0.3
    assert suspected
    assert caplog.text.count("continuations did not find their prompt cached") == 1


async def test_an_engine_that_shows_several_ranks_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="elis_gateway.upstream"):
        async with world(replace(AT_ONCE, engines=4)) as w:
            assert w.gateway.upstreams()[0]["several_engines"]
            assert "say data_parallel_size: 4" in caplog.text
            caplog.clear()
    with caplog.at_level("WARNING", logger="elis_gateway.upstream"):
        async with world(replace(AT_ONCE, engines=4), upstream={"data_parallel_size": 4}) as w:
            assert len(w.gateway.upstreams()) == 4
            assert not any(u["several_engines"] for u in w.gateway.upstreams())
            assert "data_parallel_size" not in caplog.text


class _Flight:
    def __init__(self) -> None:
        self.legs: list[Leg] = []


def ended(warmth: Warmth, cached: int, *, before: str = "a") -> None:
    flight: Any = _Flight()
    flight.legs = [leg(before, None), leg("a", (cached, 100))]
    warmth.slice_ended(flight, flight.legs[-1])


def leg(upstream: str, cached: tuple[int, int] | None) -> Leg:
    return Leg(upstream, 0.0, 0.1, 1.0, 50, "window", "", True, cached)


def test_one_that_was_suspected_may_turn_out_well() -> None:
    warmth = Warmth()
    for n in range(40):
        ended(warmth, 96 if n % 2 else 0)
    assert warmth.suspected("a")
    for _ in range(64):
        ended(warmth, 96)
    assert not warmth.suspected("a")
    assert list(warmth.cold()) == [("a", 0.0)]


def test_moving_to_another_engine_says_nothing_of_it() -> None:
    warmth = Warmth()
    for _ in range(40):
        ended(warmth, 0, before="b")
    assert list(warmth.cold()) == []
