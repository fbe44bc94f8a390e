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
from elis_gateway.wire.thoughts import Count
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
    """As much of vLLM as tells whether chats are parsed. Token ids are characters; ``<`` and ``>`` mark a thought.

    ``counts``: reasoning tokens by the marks in the answer, by the state its prompt leaves, or at random. ``trims``:
    documents' thoughts lose their first character. ``waits``: a grammar has no say in thoughts.
    """

    def __init__(
        self,
        *,
        thinks: bool,
        calls: bool,
        looks: bool = True,
        vllm: bool = True,
        counts: str = "marked",
        trims: bool = False,
        waits: bool = True,
    ) -> None:
        self.thinks, self.calls, self.looks, self.vllm = thinks, calls, looks, vllm
        self.counts, self.trims, self.waits = counts, trims, waits

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
        if body.get("logit_bias"):
            return await self._forced(request, body, given)
        if body.get("structured_outputs"):
            said = "so th" if self.waits else body["structured_outputs"]["choice"][0]
            return web.json_response({"choices": [{"message": {"reasoning": said}}]})
        if not body.get("stream"):
            details = {"reasoning_tokens": 0} if self.thinks else None
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "completion_tokens_details": details}
            return web.json_response({"choices": [{"message": {}}], "usage": usage, "prompt_token_ids": given})
        field = "content" if self.looks and not self._inside(given) else "reasoning"
        return await self._events(
            request, [{"choices": [{"delta": d}]} for d in ({"role": "assistant", "content": ""}, {field: "x"})]
        )

    async def _events(self, request: web.Request, chunks: list[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(b"data: " + orjson.dumps(chunk) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _forced(self, request: web.Request, body: dict[str, Any], given: list[int]) -> web.StreamResponse:
        """The likeliest token of those that were not said yet, and in the end something else."""
        tokens = sorted((int(token) for token in body["logit_bias"]), key=lambda t: -body["logit_bias"][str(t)])
        tokens += [ord("z")] * (body["max_tokens"] - len(tokens))
        inside, marked, count = self._inside(given), False, 0
        texts, chunks = {"reasoning": "", "content": ""}, []
        for token in tokens:
            delta = {}
            if chr(token) in "<>":
                inside = marked = chr(token) == "<"
            else:
                delta = {"reasoning" if inside else "content": chr(token)}
                count += {"marked": marked, "summed": inside, "odd": len(given)}[self.counts]
            for name, text in delta.items():
                texts[name] += text
            usage = {"completion_tokens_details": {"reasoning_tokens": count}}
            chunks.append({"choices": [{"delta": delta, "token_ids": [token]}], "usage": usage})
        if body.get("stream"):
            return await self._events(request, chunks)
        message = texts | {"reasoning": texts["reasoning"][self.trims :]}
        return web.json_response({"choices": [{"message": message, "token_ids": tokens}], "usage": usage})

    def _inside(self, given: list[int]) -> bool:
        marks = [token for token in given if token in (ord("<"), ord(">"))]
        return bool(marks) and marks[-1] == ord("<")


async def _look(engine: Parsing) -> Capabilities:
    runner = web.AppRunner(engine.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream = HttpUpstream(Settings.model_validate({"url": f"http://127.0.0.1:{runner.addresses[0][1]}", "slots": 2}))
    await upstream.start()
    try:
        return await probe(upstream)
    finally:
        await upstream.close()
        await runner.cleanup()


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
    able = await _look(engine)
    assert (able.reasoning_parser, able.thinking is not None, able.tool_parser) == found
    assert able.chat_ids == engine.vllm


@pytest.mark.parametrize(
    ("ways", "found"),
    [
        ({"counts": "marked"}, (Count.MARKED, Count.MARKED, True)),
        ({"counts": "summed"}, (Count.SUMMED, Count.UNMARKED, True)),
        ({"counts": "odd"}, (None, None, True)),
        ({"counts": "marked", "trims": True}, (Count.MARKED, None, True)),
        ({"counts": "summed", "waits": False}, (Count.SUMMED, Count.UNMARKED, False)),
    ],
    ids=["by marks", "by state", "in no way known", "documents trimmed", "grammar in thoughts"],
)
async def test_how_thoughts_are_counted_is_seen_in_a_forced_answer(
    ways: dict[str, Any], found: tuple[Any, ...]
) -> None:
    able = await _look(Parsing(thinks=True, calls=True, **ways))
    assert able.thinking is not None
    assert able.thinking[:2] == (ord("<"), ord(">"))
    assert able.thinking[2:] == found
