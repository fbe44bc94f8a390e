"""Stock requests through the gateway: right answers in the engine's own form, and what the responses tell."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from yarl import URL

from tests.gateway.test_listener import raw
from tests.gateway.world import CHAT, COMPLETIONS, paced, payloads, read_until, until, world

BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "sim", "prompt": "Say hi, 안녕 😀", "max_tokens": 130, "ignore_eos": True},
    CHAT: {
        "model": "sim",
        "messages": [{"role": "user", "content": "Say hi, 안녕 😀"}],
        "max_tokens": 130,
        "ignore_eos": True,
    },
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scheduler", [{"mode": "elastic"}, {"mode": "fixed", "window": 7}])
async def test_an_answer_is_the_engine_s_own(path: str, stream: bool, scheduler: dict[str, Any]) -> None:
    body = {**BODIES[path], "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with world(scheduler=scheduler) as w:
        await w.check(path, body)
        async with w.post(path, body) as through, w.session.post(w.engine.url + path, json=body) as direct:
            assert through.status == direct.status
            assert through.content_type == direct.content_type
            ours, its = await through.read(), await direct.read()
        if stream:
            assert _without_identity(payloads(ours)) == _without_identity(payloads(its))
        else:
            assert _without_identity([ours]) == _without_identity([its])


def _without_identity(documents: list[bytes]) -> list[Any]:
    """Documents less what differs from call to call."""
    found = []
    for document in documents:
        data = orjson.loads(document) if document != b"[DONE]" else {}
        found.append({k: v for k, v in data.items() if k not in ("id", "created")})
    return found


async def test_bytes_reach_the_client_as_they_arrive() -> None:
    """The first token of a long answer does not wait for the second window, nor for the end."""
    async with (
        world(paced(20.0)) as w,
        w.post(COMPLETIONS, {"model": "sim", "prompt": "slow", "stream": True, "max_tokens": 1000}) as response,
    ):
        assert response.status == 200
        await read_until(response, 1)
        assert len(w.gateway.flights) == 1
        assert w.engine.log[-1].how == "open"


async def test_what_the_engine_refuses_keeps_its_status_and_text() -> None:
    body = {"model": "sim", "prompt": "x", "max_tokens": 5000}
    async with world() as w:
        async with w.session.post(w.engine.url + COMPLETIONS, json=body) as direct:
            status, text = direct.status, await direct.read()
        assert status == 400
        for stream in (False, True):
            async with w.post(COMPLETIONS, {**body, "stream": stream}) as response:
                assert (response.status, await response.read()) == (status, text)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        ({"model": 3}, 400, "invalid_type"),
        ({"model": "nope", "prompt": "x"}, 404, "model_not_found"),
    ],
)
async def test_a_request_we_cannot_read_is_refused_in_openai_s_form(body: Any, status: int, code: str) -> None:
    async with world() as w, w.post(COMPLETIONS, body) as response:
        error = orjson.loads(await response.read())["error"]
        assert (response.status, error["code"]) == (status, code)
        assert error["message"]


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"X-Elis-Class": "gold"}, "X-Elis-Class"),
        *(
            ({"X-Elis-Deadline": value}, "X-Elis-Deadline")
            for value in ("soon", "nan", "inf", "-1", "0", "1e300", "2592001")
        ),
    ],
)
async def test_a_header_without_sense_is_refused(headers: dict[str, str], param: str) -> None:
    async with world() as w, w.post(COMPLETIONS, BODIES[COMPLETIONS], **headers) as response:
        assert response.status == 400
        assert orjson.loads(await response.read())["error"]["param"] == param


async def test_a_body_beyond_the_limit_is_refused() -> None:
    async with world(server={"max_body": 1000}) as w, w.post(COMPLETIONS, b"x" * 2000) as response:
        assert response.status == 413
        assert orjson.loads(await response.read())["error"]["code"] == "request_too_large"


async def test_debug_headers_and_the_final_comment() -> None:
    body = {**BODIES[COMPLETIONS], "stream": True}
    async with world() as w:
        async with w.post(COMPLETIONS, body, **{"X-Elis-Debug": "1", "X-Request-Id": "mine"}) as response:
            assert response.headers["X-Elis-Sliced"] == "ids"
            assert float(response.headers["X-Elis-Queue-Wait"]) >= 0
            assert response.headers["X-Request-Id"] == "mine"
            job_id = response.headers["X-Elis-Job"]
            events = (await response.read()).split(b"\n\n")
        assert events[-2] == b"data: [DONE]"
        assert events[-3].startswith(b": elis {")
        facts = orjson.loads(events[-3].removeprefix(b": elis "))
        assert (facts["job"], facts["tokens"]) == (job_id, 130)
        async with w.post(COMPLETIONS, {**body, "presence_penalty": 1}, **{"X-Elis-Debug": "1"}) as response:
            assert response.headers["X-Elis-Sliced"] == "no; presence_penalty"
        async with w.post(COMPLETIONS, body) as response:
            assert not [name for name in response.headers if name.startswith("X-Elis")]
            assert b"elis" not in (await response.read()).replace(b"elis-sim", b"")


async def test_each_upstream_call_has_a_request_id_of_its_own() -> None:
    async with world(scheduler={"mode": "fixed"}) as w:
        await w.check(COMPLETIONS, BODIES[COMPLETIONS])
        ids = [record.request_id for record in w.engine.log]
        assert len(ids) == len(set(ids)) == 3


async def test_models_and_aliases() -> None:
    async with world(models={"gpt": "sim"}) as w:
        async with w.session.get(w.url + "/v1/models") as response:
            listed = (await response.json())["data"]
        assert [(m["id"], m["max_model_len"]) for m in listed] == [("sim", 2048), ("gpt", 2048)]
        async with w.post(COMPLETIONS, {**BODIES[COMPLETIONS], "model": "gpt"}) as response:
            assert response.status == 200
            assert orjson.loads(await response.read())["model"] == "gpt"


async def test_health_ready_and_unknown_paths() -> None:
    async with world() as w:
        for path, status in (("/health", 200), ("/ready", 200), ("/nothing", 404), ("/metrics", 404)):
            async with w.session.get(w.url + path) as response:
                assert response.status == status, path
                assert response.headers["Server"] == "elis-gateway", "no versions of Python and its libraries"
        async with w.session.head(w.url + "/health") as response:
            assert (response.status, await response.read()) == (200, b""), "some load balancers ask so"
        assert (await raw(w.gateway.port, b"nonsense\r\n\r\n")).count(b"Server: elis-gateway\r\n") == 1
        async with w.session.get(f"http://127.0.0.1:{w.gateway.admin_port}/metrics") as response:
            assert response.headers["Server"] == "elis-gateway"
        await w.engine.kill()
        await until(lambda: not w.gateway.fleet.models)
        async with w.session.get(w.url + "/ready") as response:
            assert response.status == 503
        async with w.session.get(w.url + "/health") as response:
            assert response.status == 200


async def test_applications_are_told_apart() -> None:
    async with world() as w:
        body = BODIES[CHAT]
        await w.ask(CHAT, body)
        await w.ask(CHAT, body)
        await w.ask(CHAT, body, Authorization="Bearer other")
        await w.ask(CHAT, body, **{"api-key": "another"})
        await w.ask(CHAT, {**body, "max_tokens": 20})
        await w.ask(CHAT, {**body, "messages": [{"role": "system", "content": "Be brief"}, *body["messages"]]})
        await w.ask(CHAT, body, **{"X-Elis-App": "mine"})
        await until(lambda: len(w.gateway.journal.recent(9)) == 7)
        seen = [job["app"] for job in reversed(w.gateway.journal.recent(9))]
        assert seen[0] == seen[1]
        assert len(set(seen)) == 6
        assert seen[-1] == "mine"


async def test_the_next_turn_goes_where_the_conversation_is_warm() -> None:
    """Both upstreams idle, the second turn still goes to the one that served the first."""
    first = {"model": "sim", "messages": [{"role": "user", "content": "one"}], "max_tokens": 20}
    async with world(paced(2000), paced(2000)) as w:
        async with w.post(COMPLETIONS, {"model": "sim", "prompt": "busy", "max_tokens": 1500, "stream": True}) as busy:
            await read_until(busy, 1)
            answer = await w.ask(CHAT, first)
            busy.close()
        await until(lambda: not w.gateway.flights)
        home = next(e for e in w.engines if any(r.path == CHAT for r in e.log))
        turns = [*first["messages"], {"role": "assistant", "content": answer.text}, {"role": "user", "content": "two"}]
        for _ in range(3):
            home.log.clear()
            await w.check(CHAT, {**first, "messages": turns})
            assert len(home.log) == 1


async def test_a_client_that_asks_before_sending_is_told_to_go_ahead() -> None:
    body = orjson.dumps(BODIES[COMPLETIONS])
    async with world() as w:
        reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.port)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        writer.write(head.encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()


DEEP = b"[" * 300 + b"]" * 300


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        (COMPLETIONS, b'{"model": "sim", "prompt": "a", "tools": ' + DEEP + b"}", {}, 400),
        ("/v1/embeddings", b'{"model": "alias", "input": ' + DEEP + b"}", {}, 400),
        (COMPLETIONS, b"{}", {"Content-Encoding": "gzip"}, 400),
        (COMPLETIONS, b'{"model": "sim", "prompt": "a", "x\\r\\ny\\u0000": 1}', {"X-Elis-Debug": "1"}, 200),
        (COMPLETIONS, b'{"model": "sim", "prompt": "a"}', {"Authorization": "\udcff", "X-Elis-App": "\udcff"}, 200),
        (COMPLETIONS, b'{"model": "sim", "prompt": "a"}', {"Authorization": "\udcff"}, 200),
    ],
)
async def test_a_hostile_request_is_answered_like_any_other(
    path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    async with world(models={"alias": "sim"}) as w:
        reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.port)
        head = {"Host": "x", "Content-Type": "application/json", "Connection": "close", **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        start = f"POST {path} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n"
        writer.write(start.encode("utf-8", "surrogateescape") + body)
        answer = await reader.read()
        writer.close()
        got, _, document = answer.partition(b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 %d " % status), answer
        assert ("error" in orjson.loads(document)) is (status != 200)
        async with w.session.get(w.admin + "/admin/jobs") as response:
            assert response.status == 200


async def test_another_spelling_of_the_path_does_not_go_past_the_queue() -> None:
    async with world() as w:
        url = URL(w.url + "/v1/%63ompletions", encoded=True)
        async with w.session.post(url, json={"model": "sim", "prompt": "a"}) as response:
            assert response.status == 200
        await until(lambda: len(w.gateway.journal.recent(9)) == 1)
