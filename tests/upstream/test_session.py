"""One suite over every upstream: HTTP to the embedded engine, and the fake that other tests use in its place."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from elis_gateway.config import Upstream as Settings
from elis_gateway.errors import UpstreamError, UpstreamRefused, UpstreamUnavailable
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.server import SimServer
from elis_gateway.tasks import spawn
from elis_gateway.upstream.base import Upstream
from elis_gateway.upstream.http import HttpUpstream
from elis_gateway.upstream.responses import retry_after
from elis_gateway.upstream.session import HttpSession
from elis_gateway.wire.continuation import Call
from elis_gateway.wire.problems import problem
from elis_gateway.wire.sse import DONE
from tests.gateway.world import AT_ONCE, paced, until
from tests.upstream.autojump import JumpingLoop, run_local
from tests.upstream.fake import FakeUpstream, answer

PATH = "/v1/completions"


async def test_upstreams_with_tls_share_what_they_trust_as_long_as_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Authorities take a megabyte and tens of milliseconds: an engine of 500 ranks took half a gigabyte."""
    read = 0

    def reading(cafile: Path | None) -> ssl.SSLContext:
        nonlocal read
        read += 1
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    monkeypatch.setattr(ssl, "create_default_context", reading)
    authority = tmp_path / "ca.pem"
    authority.touch()

    async def started(count: int, **tls: Any) -> list[HttpUpstream]:
        made = [
            HttpUpstream(Settings.model_validate({"url": "https://x", "slots": 1, "tls": tls})) for _ in range(count)
        ]
        for upstream in made:
            await upstream.start()
        return made

    ranks = await started(20) + await started(20, ca=str(authority))
    assert read == 2
    os.utime(authority, ns=(1, 1))
    ranks += await started(2, ca=str(authority))
    assert read == 3, "the file has changed: what it says now counts for those that come now"
    for upstream in ranks:
        await upstream.close()


def call(count: int = 10, *, stream: bool = True) -> Call:
    body = {"model": "sim", "prompt": "x", "max_tokens": count, "ignore_eos": True, "stream": stream}
    return Call(PATH, orjson.dumps(body), stream)


class Bench(NamedTuple):
    upstream: Upstream
    misbehave: Callable[[str, int], None]
    """(kind, after): what the next call shall suffer."""
    closed: Callable[[], bool]
    """Has the last call's other end seen it closed?"""


@pytest.fixture(params=["http", "fake"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "fake":
        fake = FakeUpstream(pace=0.0)

        def misbehave(kind: str, after: int) -> None:
            ends: dict[str, Any] = {
                "status": UpstreamRefused(500, b"{}"),
                "reset": UpstreamUnavailable("reset", cause="reset"),
                "stall": UpstreamUnavailable("stall", cause="stall"),
                "hang": None,
            }
            fake.scripts.append([*answer(after, finish=None), ends[kind]])

        yield Bench(fake, misbehave, lambda: fake.sessions[-1].closed_after is not None)
        return
    async with SimServer(AT_ONCE) as engine:
        upstream = HttpUpstream(
            Settings.model_validate(
                {"url": engine.url, "slots": 4, "timeouts": {"first_byte": 2.0, "inter_token": 0.2}}
            )
        )
        await upstream.start()
        yield Bench(
            upstream,
            lambda kind, after: engine.faults.add(Fault(kind, after=after)),  # type: ignore[arg-type]
            lambda: engine.log[-1].closed is not None,
        )
        await upstream.close()


async def _tokens(upstream: Upstream, wanted: Call) -> int:
    count = 0
    async with upstream.open(wanted, request_id="r") as session:
        async for payloads in session:
            count += sum(payload != DONE for payload in payloads)
    return count


async def test_every_token_comes_and_the_stream_ends(bench: Bench) -> None:
    assert await _tokens(bench.upstream, call(10)) == 10
    assert await _tokens(bench.upstream, call(3)) == 3


async def test_an_error_status_is_a_refusal(bench: Bench) -> None:
    bench.misbehave("status", 0)
    with pytest.raises(UpstreamRefused) as caught:
        await _tokens(bench.upstream, call())
    assert (caught.value.status, caught.value.retryable) == (500, True)


@pytest.mark.parametrize("kind", ["reset", "stall"])
async def test_what_breaks_off_says_why_after_what_came(bench: Bench, kind: str) -> None:
    bench.misbehave(kind, 5)
    with pytest.raises(UpstreamUnavailable) as caught:
        await _tokens(bench.upstream, call(50))
    assert caught.value.cause == kind
    assert await _tokens(bench.upstream, call(3)) == 3


async def test_leaving_early_closes_at_once(bench: Bench) -> None:
    bench.misbehave("stall", 5)
    async with bench.upstream.open(call(50), request_id="r") as session:
        async for _ in session:
            break
    assert await until(bench.closed) < 0.1


async def test_cancelled_while_nothing_comes(bench: Bench) -> None:
    bench.misbehave("hang", 0)
    task = spawn(_tokens(bench.upstream, call()), name="call")
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _tokens(bench.upstream, call(3)) == 3


# --- HTTP alone ------------------------------------------------------------------------------------------------------


async def _http(engine: SimServer, reports: list[UpstreamError], **settings: Any) -> HttpUpstream:
    given = Settings.model_validate({"url": engine.url, "slots": 4, **settings})
    upstream = HttpUpstream(given, report=reports.append)
    await upstream.start()
    return upstream


async def test_a_connection_is_used_again_after_a_finished_call() -> None:
    async with SimServer(AT_ONCE) as engine:
        upstream = await _http(engine, [])
        for stream in (True, False, True, False):
            async with upstream.open(call(5, stream=stream), request_id="r") as session:
                if stream:
                    async for _ in session:
                        pass
                else:
                    await session.whole()
        connections = upstream.client.connector._conns  # type: ignore[union-attr]
        assert [len(pool) for pool in connections.values()] == [1]
        await upstream.close()


async def test_a_pooled_connection_that_died_is_no_failure_of_the_upstream() -> None:
    async with SimServer(AT_ONCE) as engine:
        reports: list[UpstreamError] = []
        upstream = await _http(engine, reports)
        await _tokens(upstream, call())
        await engine.restart()
        assert await _tokens(upstream, call(4)) == 4
        assert reports == []
        await engine.kill()
        with pytest.raises(UpstreamUnavailable) as caught:
            await _tokens(upstream, call())
        assert caught.value.cause == "connect"
        assert reports == [caught.value]
        await upstream.close()


@pytest.mark.parametrize(("kind", "cause"), [("close", "reset"), ("reset", "reset")])
async def test_foreign_exceptions_become_ours(kind: Any, cause: str) -> None:
    async with SimServer(AT_ONCE) as engine:
        upstream = await _http(engine, [])
        engine.faults.add(Fault(kind, after=3))
        with pytest.raises(UpstreamUnavailable) as caught:
            await _tokens(upstream, call(40))
        assert caught.value.cause == cause
        await upstream.close()


@pytest.mark.parametrize(("at", "stalls"), [(0.05, False), (0.55, False), (0.55, True)])
def test_standing_still_ourselves_is_no_silence_of_the_upstream_s(at: float, stalls: bool) -> None:
    """A machine suspended, a container out of its share: what came meanwhile is read before anything is given up, and
    an upstream that says nothing afterwards either is given up as soon as ever."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingLoop)
        reports: list[UpstreamError] = []
        async with SimServer(replace(paced(10), stride=None)) as engine:
            upstream = await _http(engine, reports, timeouts={"first_byte": 1.0, "inter_token": 0.5})
            if stalls:
                engine.faults.add(Fault("stall", after=5))
            loop.call_later(at, loop.stand_still, 30.0)
            began = loop.time()
            if stalls:
                with pytest.raises(UpstreamUnavailable, match=r"nothing heard for 0\.5 s"):
                    await _tokens(upstream, call(20))
                assert loop.time() - began < 32.0
            else:
                assert await _tokens(upstream, call(20)) == 20
            assert len(reports) == stalls
            await upstream.close()

    run_local(story())


def test_each_of_several_calls_is_given_up_when_it_has_been_silent_for_long_enough() -> None:
    """They share a timer: one that stalls ends at its own time, before one that fell silent later, while a third,
    which goes on, is left alone, and the timer is for calls alone that are still open."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        reports: list[UpstreamError] = []
        given_up: list[float] = []
        began = loop.time()

        async def fails(upstream: HttpUpstream) -> None:
            with pytest.raises(UpstreamUnavailable, match=r"nothing heard for 0\.5 s"):
                await _tokens(upstream, call(200))
            given_up.append(loop.time() - began)

        async with SimServer(replace(paced(100), stride=None)) as engine:
            upstream = await _http(engine, reports, timeouts={"first_byte": 1.0, "inter_token": 0.5})
            engine.faults.add(Fault("stall", after=2))
            first = spawn(fails(upstream), name="first")
            await asyncio.sleep(0.3)
            goes_on = spawn(_tokens(upstream, call(200)), name="goes on")
            await asyncio.sleep(0.1)
            engine.faults.add(Fault("stall", after=2))
            second = spawn(fails(upstream), name="second")
            await asyncio.gather(first, second)
            assert given_up == [pytest.approx(0.53, abs=0.05), pytest.approx(0.93, abs=0.05)]
            assert await goes_on == 200
            assert len(reports) == 2
            await upstream.close()

    run_local(story())


@pytest.mark.patches
def test_thousands_of_calls_are_looked_at_together() -> None:
    """The timer goes through all of them each time: once for every call it would take a quarter of a core for 4000."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        looks: Counter[float] = Counter()

        class Call:
            def __init__(self, look_at: float) -> None:
                self.look_at = look_at

            def look(self) -> None:
                assert self.look_at <= loop.time() < self.look_at + 0.05
                looks[loop.time()] += 1
                self.look_at += 1.0
                watch.add(cast("HttpSession", self))

        async with SimServer(AT_ONCE) as engine:
            upstream = await _http(engine, [])
            watch = upstream.watch
            for n in range(1000):
                watch.add(cast("HttpSession", Call(loop.time() + 0.1 + n / 1000)))
            await asyncio.sleep(2.12)
            assert looks.total() >= 2000
            assert len(looks) <= 2.12 / 0.02 + 2
            await upstream.close()

    run_local(story())


@pytest.mark.parametrize("after", [0, 3])
def test_a_call_that_is_open_when_its_upstream_is_closed_does_not_wait_for_ever(after: int) -> None:
    """aiohttp closes the connection and wakes nobody who waits for it."""

    async def story() -> None:
        async with SimServer(replace(paced(100), stride=None)) as engine:
            upstream = await _http(engine, [], timeouts={"first_byte": 1.0, "inter_token": 0.5})
            engine.faults.add(Fault("stall", after=after))
            waiting = spawn(_tokens(upstream, call(200)), name="waiting")
            await asyncio.sleep(0.2)
            await upstream.close()
            with pytest.raises(UpstreamUnavailable, match="nothing heard"):
                await asyncio.wait_for(waiting, 2.0)

    run_local(story())


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7.0, 7.0),
        ("0.5", 0.5, 0.5),
        (format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), 3000.0, 3600.0),
        (format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True), 0.0, 0.0),
    ],
)
def test_an_upstream_may_say_in_seconds_or_by_a_date_when_to_come_back(said: str, least: float, most: float) -> None:
    wait = retry_after(said)
    assert wait is not None
    assert least <= wait <= most


LATE = "Mon, 01 Jan 99999999999 00:00:00 GMT"


@pytest.mark.parametrize("said", [None, "", "soon", "-1", "nan", "inf", "1e9", "Mon, 99 Nov 2026 00:00:00 GMT", LATE])
def test_what_says_nothing_of_when_to_come_back_is_as_if_it_were_not_there(said: str | None) -> None:
    assert retry_after(said) is None


async def test_a_slow_drip_is_one_stream() -> None:
    async with SimServer(AT_ONCE) as engine:
        upstream = await _http(engine, [])
        engine.faults.add(Fault("drip", seconds=0.0))
        assert await _tokens(upstream, call(5)) == 5
        await upstream.close()


async def test_keys_and_tls_files_that_are_not_there_are_named() -> None:
    from elis_gateway.errors import ConfigError

    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE"):
        HttpUpstream(Settings.model_validate({"url": "http://x", "slots": 1, "api_key_env": "NOT_SET_ANYWHERE"}))
    upstream = HttpUpstream(Settings.model_validate({"url": "https://x", "slots": 1, "tls": {"ca": "/nowhere.pem"}}))
    with pytest.raises(ConfigError, match=r"tls: /nowhere\.pem"):
        await upstream.start()


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "secret")
    async with SimServer(replace(AT_ONCE, api_key="secret")) as engine:
        upstream = await _http(engine, [], api_key_env="ENGINE_KEY")
        assert await _tokens(upstream, call(4)) == 4
        await upstream.close()


async def test_a_machine_that_is_gone_is_noticed_while_nothing_is_sent() -> None:
    async with SimServer(AT_ONCE) as engine:
        upstream = HttpUpstream(Settings.model_validate({"url": engine.url, "slots": 4}))
        await upstream.start()
        async with upstream.open(call(2000), request_id="a") as session:
            response = session._response
            assert response is not None
            assert response.connection is not None
            assert response.connection.transport is not None
            found = response.connection.transport.get_extra_info("socket")
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        await upstream.close()


async def test_another_limit_for_connecting_counts_from_the_next_call_on() -> None:
    """It is taken over in place, so no new connection pool may be needed for it."""
    settings = {"slots": 4, "timeouts": {"connect": 300}, "health": {"timeout": 300}}
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        # Its queue of connections is full, and nobody takes any of them.
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        settings["url"] = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        upstream = HttpUpstream(Settings.model_validate(settings))
        await upstream.start()
        upstream.change(Settings.model_validate({**settings, "timeouts": {"connect": 0.2}}))
        with pytest.raises(UpstreamUnavailable):
            await asyncio.wait_for(_tokens(upstream, call(4)), 60)
        with pytest.raises(UpstreamUnavailable):
            await asyncio.wait_for(upstream.get("/health"), 60)
        await upstream.close()
        for one in waiting:
            one.close()


async def test_who_is_redirected_to_somebody_else_is_not_there() -> None:
    """A page to log in at is a fine page, and no engine: its health would be good and every call would fail."""
    home: list[str] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/slash":
            return web.Response(status=307, headers={"Location": f"http://localhost:{request.url.port}/slash/"})
        if request.path == "/away" or request.method == "POST":
            return web.Response(status=302, headers={"Location": home[0]})
        return web.Response(text="fine")

    async with RawTestServer(answer) as away, RawTestServer(answer) as here:
        home.append(str(away.make_url("/login")))
        reports: list[UpstreamError] = []
        given = Settings.model_validate({"url": f"http://LocalHost:{here.port}", "slots": 1})
        upstream = HttpUpstream(given, report=reports.append)
        await upstream.start()
        assert await upstream.get("/slash") == b"fine"
        with pytest.raises(UpstreamRefused) as refused:
            await upstream.get("/away")
        assert refused.value.status == 302
        with pytest.raises(UpstreamRefused) as refused:
            await _tokens(upstream, call(3))
        answer = problem(refused.value)
        assert (answer.status, orjson.loads(answer.body)["error"]["code"]) == (502, "upstream_status_302")
        await upstream.close()
