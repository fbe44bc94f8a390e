"""What somebody with bad intentions, or a broken engine, tries on the ways around the scheduler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import orjson
import pytest

from elis_gateway.app import Gateway
from elis_gateway.config import from_mapping
from elis_gateway.flight import Flight
from tests.gateway.test_listener import raw, refusal
from tests.gateway.world import COMPLETIONS, begin, until, world

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
UPLOAD = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Type: audio/wav\r\n"


def halves(go_on: asyncio.Event) -> Serve:
    """Sends half of an answer, and the rest when told to."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
        await go_on.wait()
        writer.write(b"def")
        await writer.drain()

    return serve


@asynccontextmanager
async def bare(serve: Serve) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway before an engine that lists a model and does with everything else under /v1 what ``serve`` does."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split(b" ", 2)[1]
                if path in (b"/health", b"/v1/models"):
                    body = b'{"data": [{"id": "a"}]}'
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                elif path.startswith((b"/v1/audio", b"/v1/thing")):
                    await serve(reader, writer)
                    return
                else:
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = {
        "server": {"host": "127.0.0.1", "port": 0, "body_timeout": 0.5},
        "admin": {"port": 0},
        "upstreams": [{"url": f"http://127.0.0.1:{port}", "slots": 1, "continuation": "off"}],
    }
    gateway = Gateway(from_mapping(settings))
    await begin(gateway)
    try:
        yield gateway, f"http://127.0.0.1:{gateway.port}"
    finally:
        await gateway.stop(0.0)
        server.close()
        await server.wait_closed()


def quiet(caplog: pytest.LogCaptureFixture) -> bool:
    """Nothing in the log that looks like a bug of ours."""
    return not [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]


async def _swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        pass


async def test_a_broken_upload_does_not_take_the_upstream_out_of_service(caplog: pytest.LogCaptureFixture) -> None:
    """Chunks that are none, sent after good ones: the client's fault, and nobody else's."""
    async with bare(_swallow) as (gateway, _):
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            await until(lambda: gateway._relay._in_flight.get(next(iter(gateway.fleet.upstreams)), 0) == 1)
            writer.write(b"nonsense\r\n")
            assert refusal(await reader.read())[0] in (400, 408)  # the parser may just say no more
            writer.close()
        assert gateway.fleet.serving("a")
        assert quiet(caplog)


async def test_an_upload_that_trickles_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async with bare(_swallow) as (gateway, _):
        answer = await raw(gateway.port, UPLOAD + b"Content-Length: 1000\r\n\r\nabc")
        assert refusal(answer)[0] == 408
        assert gateway.fleet.serving("a")
        assert quiet(caplog)


async def test_a_relayed_answer_that_breaks_off_is_seen_to_and_is_no_bug_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = asyncio.Event()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nbeginning")
        await begun.wait()

    async with bare(cut) as (_, url), aiohttp.ClientSession() as session:
        async with session.get(url + "/v1/thing") as response:
            assert await response.content.readany() == b"beginning"
            begun.set()
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        assert quiet(caplog)


async def test_an_upstream_is_not_forgotten_before_what_passes_through_it_is_over() -> None:
    """Its connections are closed with it, and a relayed answer over one of them would never end."""
    go_on = asyncio.Event()
    async with bare(halves(go_on)) as (gateway, url), aiohttp.ClientSession() as session:
        async with session.get(url + "/v1/thing") as response:
            assert await response.content.readany() == b"abc"
            await gateway.remove_upstream(next(iter(gateway.fleet.upstreams)))
            await asyncio.sleep(0.05)
            go_on.set()
            async with asyncio.timeout(60):
                assert await response.content.read() == b"def"
        await until(lambda: not gateway.fleet.upstreams)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX-Evil: a\x0b\x01b\r\n",
        b"HTTP/1.1 200 O\x01K\r\n",
        b"HTTP/1.1 200 OK\r\nX-Folded: a\r\n X-Injected: b\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: X-One\r\nConnection: X-Two\r\nX-Two: hop\r\n",
        b"HTTP/1.1 999 Odd\r\n",
    ],
)
async def test_an_engine_s_odd_head_gets_no_further(head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head + b"Content-Length: 2\r\n\r\nok")
        await writer.drain()
        await asyncio.sleep(0.05)

    async with bare(odd) as (gateway, _):
        answer = await raw(gateway.port, b"GET /v1/thing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        status = int(answer.split(b" ")[1])
        assert status in (200, 502, 999)
        shown = answer.split(b"\r\n\r\n")[0].lower()
        assert b"\nx-injected" not in shown
        assert b"x-two" not in shown
        assert not any(byte < 32 for line in shown.split(b"\r\n") for byte in line)
        assert quiet(caplog)


async def test_names_of_models_nobody_has_are_not_remembered_for_ever() -> None:
    """Before any engine has told its models every name might be one. Not every name is kept."""
    async with world(silent=True, scheduler={"queue": {"unavailable_timeout": 0.1}}) as w:

        async def guess(n: int) -> int:
            async with w.post(COMPLETIONS, {"model": f"guess-{n}", "prompt": "a"}) as response:
                assert response.headers["Retry-After"]
                return int(response.status)

        seen = set(await asyncio.gather(*(guess(n) for n in range(300))))
        assert seen == {503}
        assert len(w.gateway._intake._lore) <= 256
        assert len(w.gateway.core.pools) <= 260


async def test_a_long_name_of_an_application_is_kept_short() -> None:
    async with world() as w:
        seen: list[Flight] = []
        w.gateway.dispatcher._tell_submitted.append(seen.append)
        for name in ("short", "x" * 50_000, "x" * 49_999):
            await w.ask(COMPLETIONS, {"model": "sim", "prompt": "a", "max_tokens": 2}, **{"X-Elis-App": name})
        apps = [flight.spec.app for flight in seen]
        assert apps[0] == "short"
        assert len(set(apps)) == 3
        assert max(map(len, apps)) <= 128


async def test_a_name_made_to_point_at_us_does_not_read_the_admin_listener() -> None:
    """A page whose name resolves to 127.0.0.1 is of the same origin: no Origin header tells it from a program."""
    async with world() as w:
        for host, status in ((f"evil.example:{w.gateway.admin_port}", 403), ("localhost", 200), ("127.0.0.1", 200)):
            async with w.session.get(w.admin + "/admin/jobs", headers={"Host": host}) as response:
                assert response.status == status, host
                if status == 403:
                    assert "error" in orjson.loads(await response.read())


async def test_a_client_that_is_gone_is_no_bug_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """Its connection closes while its handler writes, before anybody has told the handler."""
    async with world() as w:
        handlers = w.gateway._runners[0].server
        assert handlers is not None

        async def gone(request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
            response = aiohttp.web.StreamResponse()
            await response.prepare(request)
            assert request.transport is not None
            request.transport.abort()
            await response.write(b"too late")
            return response

        original, handlers.request_handler = handlers.request_handler, gone
        with pytest.raises(aiohttp.ClientError):
            async with w.session.get(w.url + "/health") as response:
                await response.read()
        handlers.request_handler = original
        assert quiet(caplog)


async def test_what_cannot_be_read_is_not_written_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It may be a key with a slip in it, or a prompt whose length was wrong."""
    caplog.set_level(logging.DEBUG)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nAuthorization: Bearer SECRET"
    async with world() as w:
        for port in (w.gateway.port, w.gateway.admin_port):
            for data in (
                head + b"\x0b\r\n\r\n",
                head + b"\r\nTransfer-Encoding: chunked\r\n\r\nSECRET\r\n",
                head + b"\r\nContent-Encoding: gzip\r\nContent-Length: 6\r\n\r\nSECRET",
                head + b'\r\nContent-Length: 14\r\n\r\n{"a": SECRET\xff}',
                b"SECRET\r\n\r\n",
            ):
                assert b" 40" in (await raw(port, data))[:13]
    assert "SECRET" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
