"""Whatever else is under /v1 goes through unchanged, in both directions, to an upstream that serves the model."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import ClientSession, FormData, web
from multidict import CIMultiDict

from elis_gateway.app import Gateway
from elis_gateway.config import Server, from_mapping
from elis_gateway.tasks import spawn
from tests.gateway.test_listener import raw
from tests.gateway.world import begin, until


class Engine:
    """Lists one model, or none, and shows what it was sent under /v1/echo."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.path = ""
        self.bodies: list[bytes] = []
        self.extra: dict[str, str] = {}
        self.fails_after: asyncio.Event | None = None
        """It cuts the connection in place of an answer, once this is set."""
        self.hangs: asyncio.Event | None = None
        """It stands still until this is set, ``begins``: in the middle of its answer, else before."""
        self.begins = False
        self.asked: web.Request | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/health", self._ok)
        app.router.add_get("/v1/models", self._models)
        app.router.add_route("*", "/{rest:.*}", self._echo)
        self._runner = web.AppRunner(app, auto_decompress=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _ok(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model}] if self.model else []})

    async def _echo(self, request: web.Request) -> web.StreamResponse:
        self.headers = request.headers.copy()
        self.path = request.path_qs
        self.bodies.append(b"")
        self.asked = request
        if self.hangs is not None and not self.begins:
            await self.hangs.wait()
        if self.fails_after is not None:
            await self.fails_after.wait()
            assert request.transport is not None
            request.transport.abort()
        response = web.StreamResponse(status=201, headers={"X-Engine": self.model, "Keep-Alive": "5", **self.extra})
        await response.prepare(request)
        if self.hangs is not None:
            await response.write(b"begun")
            await self.hangs.wait()
        async for piece in request.content.iter_any():
            self.bodies[-1] += piece
            await response.write(piece)
        return response


@asynccontextmanager
async def behind(*models: str, **sections: Any) -> AsyncIterator[tuple[str, list[Engine], ClientSession]]:
    async with before(*models, **sections) as (gateway, engines), ClientSession() as session:
        yield f"http://127.0.0.1:{gateway.port}", engines, session


@asynccontextmanager
async def before(*models: str, **sections: Any) -> AsyncIterator[tuple[Gateway, list[Engine]]]:
    engines = [Engine(model) for model in models]
    urls = [await engine.start() for engine in engines]
    settings = {
        "server": {"host": "127.0.0.1", "port": 0},
        "admin": {"port": 0},
        "upstreams": [{"url": url, "slots": 1, "health": {"interval": 0.1}} for url in urls],
        **sections,
    }
    gateway = Gateway(from_mapping(settings))
    await begin(gateway)
    yield gateway, engines
    await gateway.stop(0.0)
    for engine in engines:
        await engine.stop()


async def test_method_path_query_status_and_body_are_untouched() -> None:
    async with behind("a") as (url, (engine,), session):
        async with session.put(url + "/v1/files/x%2Fy?limit=3&a=%20", data=b"\x00raw") as response:
            assert response.status == 201
            assert response.headers["X-Engine"] == "a"
            assert "Keep-Alive" not in response.headers
            assert await response.read() == b"\x00raw"
        assert engine.path == "/v1/files/x%2Fy?limit=3&a=%20"


async def test_outside_v1_only_what_is_named_in_full_passes() -> None:
    server = {"host": "127.0.0.1", "port": 0, "relay": ["/v1/", "/tokenize"]}
    async with behind("a", server=server) as (url, [engine], session):
        async with session.post(url + "/tokenize", json={"model": "a", "prompt": "x"}) as response:
            assert response.status == 201
        assert engine.path == "/tokenize"
        for path in ("/tokenizer_info", "/tokenize/x", "/detokenize", "/sleep"):
            async with session.post(url + path, json={"model": "a"}) as response:
                assert response.status == 404, path
        assert engine.path == "/tokenize"
    assert "/detokenize" in Server().relay


async def test_headers_of_one_hop_and_of_scheduling_do_not_pass() -> None:
    sent = {
        "X-Vllm-Priority": "-5", "X-data-parallel-rank": "0", "X-Elis-Class": "default",
        "Authorization": "Bearer client", "Connection": "X-Mine", "X-Mine": "1", "X-Other": "2",
        "Accept-Encoding": "gzip",
    }  # fmt: skip
    async with behind("a") as (url, (engine,), session):
        async with session.post(url + "/v1/embeddings", data=b"{}", headers=sent) as response:
            await response.read()
        names = {name.lower() for name in engine.headers}
        assert names.isdisjoint({"x-vllm-priority", "x-data-parallel-rank", "x-elis-class", "authorization", "x-mine"})
        assert engine.headers["X-Other"] == "2"
        assert engine.headers["Accept-Encoding"] == "gzip"


async def test_who_the_client_is_does_not_pass_and_the_engine_does_not_speak_for_us() -> None:
    sent = {"Authorization": "Bearer c", "api-key": "c", "X-Api-Key": "c", "Cookie": "a=c", "X-Goog-Api-Key": "c"}
    async with behind("a") as (url, (engine,), session):
        engine.extra = {"Access-Control-Allow-Origin": "*", "Set-Cookie": "a=b", "X-Engine-Own": "1"}
        async with session.post(url + "/v1/embeddings", data=b"{}", headers=sent) as response:
            await response.read()
            assert "Access-Control-Allow-Origin" not in response.headers
            assert "Set-Cookie" not in response.headers
            assert response.headers["X-Engine-Own"] == "1"
        assert {name.lower() for name in engine.headers}.isdisjoint({name.lower() for name in sent})


async def test_the_model_decides_where_and_aliases_are_translated() -> None:
    async with behind("a", "b", models={"nick": "b"}) as (url, (_, engine_b), session):
        for model in ("b", "nick"):
            async with session.post(url + "/v1/embeddings", json={"model": model, "input": "x"}) as response:
                assert response.headers["X-Engine"] == "b"
            assert orjson.loads(engine_b.bodies[-1]) == {"model": "b", "input": "x"}
        async with session.post(url + "/v1/embeddings", json={"model": "c"}) as response:
            assert response.status == 404


async def test_a_form_goes_to_who_serves_its_model() -> None:
    """Transcriptions are uploads: `client.audio.transcriptions.create(model=..., file=...)`."""
    async with behind("a", "b", models={"nick": "b"}) as (url, engines, session):
        for model, first, serves in (("a", 1, "a"), ("b", 1, "b"), ("nick", 1, "b"), ("b", 0, "b"), ("c", 1, "")):
            form = FormData()
            fields = [("file", b"--\r\n" * 9000, "model.wav"), ("model", model, None)]
            for name, value, filename in fields[::-1] if first else fields:
                form.add_field(name, value, filename=filename)
            async with session.post(url + "/v1/audio/transcriptions", data=form) as response:
                assert response.headers["X-Engine"] == serves or not serves
                sent = await response.read()
            assert sent.count(b"--\r\n") >= 9000
            assert sent in [engine.bodies[-1] for engine in engines if engine.bodies]
        # The file before it is longer than what is looked at: somebody gets it.
        form = FormData()
        form.add_field("file", b"x" * 200_000, filename="long.wav")
        form.add_field("model", "b")
        async with session.post(url + "/v1/audio/transcriptions", data=form) as response:
            assert response.status == 201
            assert (await response.read()).count(b"x") >= 200_000


async def test_a_form_that_names_no_model_goes_to_anybody() -> None:
    """Also while no upstream has told which models it serves: any name may be one then, but none is not."""
    async with behind("") as (url, (engine,), session):
        for model in ("", "whisper-1"):
            form = FormData()
            if model:
                form.add_field("model", model)
            form.add_field("file", b"x" * 9000, filename="short.wav")
            async with session.post(url + "/v1/audio/transcriptions", data=form) as response:
                assert response.status == 201
                assert await response.read() == engine.bodies[-1]


async def test_the_model_of_a_form_is_found_in_whatever_pieces_it_comes() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n--x--\r\n'

    async def bytewise() -> AsyncIterator[bytes]:
        for n in range(len(form)):
            yield form[n : n + 1]

    async with behind("a", "b") as (url, _, session):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        async with session.post(url + "/v1/audio", data=bytewise(), headers=headers) as response:
            assert response.headers["X-Engine"] == "b"
            assert await response.read() == form


async def test_a_boundary_that_is_no_text_is_the_engines_to_refuse() -> None:
    async with before("a") as (gateway, _):
        head = b"POST /v1/audio HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 3\r\n"
        head += b"Content-Type: multipart/form-data; boundary=a\xffb\r\n\r\n"
        assert (await raw(gateway.port, head + b"abc")).startswith(b"HTTP/1.1 201 ")


async def test_a_body_on_its_way_has_the_grace_of_a_shutdown_too() -> None:
    async with before("a") as (gateway, (engine,)):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        writer.write(head + b'Content-Length: 13\r\n\r\n{"model"')
        await until(lambda: gateway._relay._open == 1)
        stopping = spawn(gateway.stop(5.0), name="stop")
        await until(lambda: not gateway.dispatcher.accepting)
        writer.write(b':"a"}')
        assert (await reader.readline()).startswith(b"HTTP/1.1 201 ")
        await stopping
        writer.close()
        assert engine.bodies[-1] == b'{"model":"a"}'


async def test_bodies_stream_both_ways() -> None:
    async with behind("a") as (url, (engine,), session):

        async def upload() -> AsyncIterator[bytes]:
            for n in range(100):
                yield b"%d," % n * 1000

        async with session.post(url + "/v1/audio", data=upload(), headers={"Content-Type": "audio/wav"}) as response:
            got = await response.read()
        assert got == engine.bodies[-1] == b"".join([b"%d," % n * 1000 for n in range(100)])


async def test_a_client_without_chunks_learns_by_the_close_where_an_answer_ends() -> None:
    async with behind("a") as (url, _, _):
        head = b"PUT /v1/thing HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc"
        assert (await raw(int(url.rpartition(":")[2]), head)).endswith(b"\r\n\r\nabc")


async def test_with_no_upstream_left_the_answer_is_503() -> None:
    async with behind("a") as (url, (engine,), session):
        await engine.stop()
        async with session.get(url + "/v1/thing") as response:
            assert response.status == 502
        async with session.get(url + "/v1/thing") as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
        await engine.start()


async def test_what_is_asked_again_is_asked_of_those_who_are_there_then() -> None:
    """The second of two engines is removed while the first one, which will break off, has the request."""
    async with before("a", "a") as (gateway, engines), ClientSession() as session:
        breaks = asyncio.Event()
        for engine in engines:
            engine.fails_after = breaks
        asking = spawn(session.get(f"http://127.0.0.1:{gateway.port}/v1/thing"), name="asking")
        await until(lambda: any(engine.path == "/v1/thing" for engine in engines))
        (name,) = (u["id"] for u, e in zip(gateway.upstreams(), engines, strict=True) if e.path != "/v1/thing")
        await gateway.remove_upstream(name)
        await until(lambda: len(gateway.upstreams()) == 1)
        breaks.set()
        response = await asking
        assert response.status == 502
        assert [engine.path for engine in engines].count("/v1/thing") == 1


async def test_a_compressed_body_arrives_unpacked_and_says_so() -> None:
    packed = gzip.compress(b'{"model": "a"}' * 50)
    for kind in ("application/octet-stream", "application/json"):
        async with behind("a") as (url, (engine,), session):
            sent = {"Content-Type": kind, "Content-Encoding": "gzip"}
            async with session.post(url + "/v1/thing", data=packed, headers=sent) as response:
                await response.read()
            assert engine.bodies[-1] == b'{"model": "a"}' * 50
            assert "Content-Encoding" not in engine.headers
