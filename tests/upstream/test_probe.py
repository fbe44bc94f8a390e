"""Capabilities are seen, not believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from aiohttp import web

from elis_gateway.config import Upstream as Settings
from elis_gateway.errors import UpstreamRefused
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.server import ServerConfig, SimServer
from elis_gateway.upstream.base import Capabilities
from elis_gateway.upstream.fleet import Fleet
from elis_gateway.upstream.http import HttpUpstream
from elis_gateway.upstream.probe import probe
from tests.gateway.world import AT_ONCE, paced, until


async def _probe(config: ServerConfig, *, orders: bool = False, **settings: Any) -> Capabilities:
    async with SimServer(config) as engine:
        given = {"url": engine.url, "slots": 2, "health": {"timeout": 5.0}, **settings}
        upstream = HttpUpstream(Settings.model_validate(given))
        await upstream.start()
        try:
            return await probe(upstream, orders=orders)
        finally:
            await upstream.close()


async def test_models_context_and_token_ids() -> None:
    found = await _probe(replace(AT_ONCE, models=("a", "b")))
    assert found.models == {"a", "b"}
    assert dict(found.context) == {"a": 2048, "b": 2048}
    assert found.ids
    assert not found.text


@pytest.mark.parametrize("config", [replace(AT_ONCE, token_ids=False), replace(AT_ONCE, id_prompts=False)])
async def test_an_engine_that_does_not_return_or_take_ids(config: ServerConfig) -> None:
    assert not (await _probe(config)).ids


@pytest.mark.parametrize(
    ("continuation", "ids", "text"), [("ids", True, False), ("text", False, True), ("off", False, False)]
)
async def test_the_operator_has_the_last_word(continuation: str, ids: bool, text: bool) -> None:
    found = await _probe(AT_ONCE, continuation=continuation, models=["mine"], context=99, chat_parser=True)
    assert (found.ids, found.text, found.chat_parser) == (ids, text, True)
    assert (found.models, dict(found.context)) == ({"mine"}, {"mine": 99})


@pytest.mark.parametrize(("priority", "orders"), [("honour", True), ("ignore", False), ("refuse", False)])
async def test_priority_is_settled_by_who_starts_first(priority: Any, orders: bool) -> None:
    found = await _probe(replace(paced(1000, slots=2), priority=priority), orders=True)
    assert found.orders == orders


async def test_a_server_that_refuses_to_list_its_models_is_not_usable() -> None:
    with pytest.raises(UpstreamRefused):
        await _probe(replace(AT_ONCE, api_key="secret"))


@pytest.mark.parametrize("skip", [0, 1])
async def test_an_engine_that_was_busy_for_a_moment_is_asked_again(skip: int) -> None:
    async with SimServer(AT_ONCE) as engine:
        engine.faults.add(Fault("status", status=503, skip=skip, path="/v1/completions"))
        settings = Settings.model_validate({"url": engine.url, "slots": 2, "health": {"interval": 0.02}})
        fleet = Fleet([settings], lambda info: None)
        await fleet.start()
        (upstream,) = fleet.upstreams.values()
        await until(lambda: upstream.capabilities.ids)
        assert upstream.capabilities.settled
        await fleet.close()


class Parsing:
    """As much of vLLM as tells whether chats are parsed. Token ids are characters; ``<`` and ``>`` mark a thought."""

    def __init__(self, *, thinks: bool, calls: bool, looks: bool = True, vllm: bool = True) -> None:
        self.thinks, self.calls, self.looks, self.vllm = thinks, calls, looks, vllm

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        for path, handler in (("/tokenize", self._tokens), ("/v1/completions", self._text)):
            app.router.add_post(path, handler)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"} if self.vllm else {})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": 64}]})

    async def _tokens(self, request: web.Request) -> web.Response:
        text = orjson.loads(await request.read())["prompt"]
        marks = {"<think>": "<", "</think>": ">"}
        return web.json_response({"tokens": [ord(c) for c in marks.get(text, text)]})

    async def _text(self, request: web.Request) -> web.Response:
        prompt = orjson.loads(await request.read())["prompt"]
        ids = [ord(c) for c in prompt] if isinstance(prompt, str) else prompt
        return web.json_response({"choices": [{"prompt_token_ids": ids, "token_ids": [9]}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        if body.get("tools") and not self.calls:
            return web.json_response({"error": {"message": "auto tool choice requires a parser"}}, status=400)
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids") or [1]
        if not body.get("stream"):
            details = {"reasoning_tokens": 0} if self.thinks else None
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "completion_tokens_details": details}
            return web.json_response({"choices": [{"message": {}}], "usage": usage, "prompt_token_ids": given})
        marks = [token for token in given if token in (ord("<"), ord(">"))]
        field = "content" if self.looks and marks[-1] == ord(">") else "reasoning"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta in ({"role": "assistant", "content": ""}, {field: "x"}):
            await response.write(b"data: " + orjson.dumps({"choices": [{"delta": delta}]}) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.mark.parametrize(
    ("engine", "found"),
    [
        (Parsing(thinks=False, calls=False), (False, False, False)),
        (Parsing(thinks=False, calls=True), (False, False, True)),
        (Parsing(thinks=True, calls=True), (True, True, True)),
        (Parsing(thinks=True, calls=False, looks=False), (True, False, False)),
        (Parsing(thinks=True, calls=True, vllm=False), (False, False, False)),
    ],
    ids=["none", "tools", "both", "blind to the prompt", "not vLLM"],
)
async def test_parsers_are_seen_by_what_they_do(engine: Parsing, found: tuple[bool, bool, bool]) -> None:
    runner = web.AppRunner(engine.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream = HttpUpstream(Settings.model_validate({"url": f"http://127.0.0.1:{runner.addresses[0][1]}", "slots": 2}))
    await upstream.start()
    able = await probe(upstream)
    await upstream.close()
    await runner.cleanup()
    assert (able.reasoning_parser, able.resumes_thoughts, able.tool_parser) == found
    assert able.chat_ids == engine.vllm
