"""What is refused before any scheduling: in OpenAI's shape, whatever part of the gateway refuses it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import orjson
import pytest
from yarl import URL

from tests.gateway.world import AT_ONCE, CHAT, COMPLETIONS, until, world

BODY: dict[str, Any] = {"model": "sim", "prompt": "a", "max_tokens": 3}


async def raw(port: int, data: bytes, *, within: float = 60.0) -> bytes:
    """Everything that comes back for these bytes until the gateway closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(within):
        answer = await reader.read()
    writer.close()
    return answer


def refusal(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error object of a whole response; fails where it is not in OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), answer
    error = orjson.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return int(head.split(b" ", 2)[1]), error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", COMPLETIONS, 405, "method_not_allowed"),
        ("OPTIONS", CHAT, 405, "method_not_allowed"),
        ("OPTIONS", "/v1/embeddings", 405, "method_not_allowed"),
        ("TRACE", "/v1/embeddings", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/%2F", 404, "model_not_found"),
        ("GET", "/v1/../metrics", 400, "bad_path"),
        ("GET", "/v1/%2e%2E/metrics", 400, "bad_path"),
        ("POST", "/v1/x/..%2fcompletions", 400, "bad_path"),
        ("POST", "/v1/completions%00", 400, "bad_path"),
        ("POST", "/v1\\completions", 400, "bad_path"),
    ],
)
async def test_wrong_paths_and_methods(method: str, path: str, status: int, code: str) -> None:
    async with world() as w:
        start = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        got, error = refusal(await raw(w.gateway.port, start.encode()))
        assert (got, error["code"]) == (status, code)
        assert not list(w.engine.log)


async def test_a_refused_method_names_those_there_are() -> None:
    async with world() as w, w.session.get(w.url + CHAT) as response:
        assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1//completions", "//v1/completions", "/v1/%63ompletions//"])
async def test_another_spelling_of_a_route_is_the_route(path: str) -> None:
    async with world() as w:
        async with w.session.post(URL(w.url + path, encoded=True), json=BODY) as response:
            assert response.status == 200
        await until(lambda: len(w.gateway.journal.recent(9)) == 1)


@pytest.mark.parametrize(
    "data",
    [
        b"NONSENSE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A : 1\r\nContent-Length: 0\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Null: a\x00b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n0\r\n\r\n",
    ],
)
async def test_malformed_requests(data: bytes) -> None:
    async with world() as w:
        status, _ = refusal(await raw(w.gateway.port, data))
        assert 400 <= status < 500
        assert not list(w.engine.log)
        assert sum(w.gateway.metrics._refusals.values()) == 1


async def test_a_body_above_the_limit() -> None:
    big = {**BODY, "prompt": "x" * 2000}
    async with world(server={"max_body": 1000}) as w, w.post(COMPLETIONS, big) as response:
        assert response.status == 413
        assert orjson.loads(await response.read())["error"]["code"] == "request_too_large"


@pytest.mark.patches
async def test_a_bug_of_ours_is_told_in_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as w:

        def broken(*_: object) -> None:
            raise RuntimeError("a secret of the inside")

        monkeypatch.setattr(w.gateway._intake, "flight", broken)
        async with w.post(COMPLETIONS, BODY) as response:
            data = await response.read()
            assert response.status == 500
        assert orjson.loads(data)["error"]["code"] == "internal_error"
        assert b"secret" not in data


async def test_a_head_that_never_ends_and_a_body_that_never_comes_are_given_up() -> None:
    async with world(server={"head_timeout": 0.1, "body_timeout": 0.1}) as w:
        for port in (w.gateway.port, w.gateway.admin_port):
            assert await raw(port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow") == b""
        start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 50\r\n\r\n{"
        status, error = refusal((await raw(w.gateway.port, start)) or b"")
        assert (status, error["code"]) == (408, "request_timeout")
        await w.check(COMPLETIONS, BODY)


async def test_a_client_without_chunks_learns_by_the_close_where_a_stream_ends() -> None:
    """HTTP/1.0 that would like to keep its connection, as `ab -k` does."""
    body = orjson.dumps({**BODY, "stream": True})
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {len(body)}\r\n\r\n"
    async with world() as w:
        answer = await raw(w.gateway.port, head.encode() + body)
        assert answer.endswith(b"data: [DONE]\n\n")


async def test_errors_of_the_admin_listener_are_json() -> None:
    async with world() as w:
        for method, path, status in (("GET", "/admin/nothing", 404), ("DELETE", "/admin/policy", 405)):
            async with w.session.request(method, w.admin + path) as response:
                assert response.status == status
                assert "error" in orjson.loads(await response.read())
        answer = (await raw(w.gateway.admin_port, b"GET / HTTP/1.1\r\nHost: x\r\na b: c\r\n\r\n")) or b""
        status, error = refusal(answer)
        assert (status, error["code"]) == (400, "bad_request")
        assert b"\r\nServer: elis-gateway\r\n" in answer  # not what we are made of, with its versions


async def test_the_engine_s_refusal_of_our_own_key_stays_between_us() -> None:
    """An engine that wants a key we do not have: its words may quote keys, and its 401 is not the client's fault."""
    async with world(replace(AT_ONCE), upstream={"models": ["sim"], "continuation": "ids"}) as w:
        object.__setattr__(w.engine.config, "api_key", "wanted")  # of this engine alone
        for path, body in ((COMPLETIONS, BODY), ("/v1/embeddings", {"model": "sim", "input": "x"})):
            async with w.post(path, body, Authorization="Bearer of-the-client") as response:
                data = await response.read()
                assert response.status in (404, 502), data
                if path == COMPLETIONS:
                    assert (response.status, orjson.loads(data)["error"]["code"]) == (502, "upstream_auth")
