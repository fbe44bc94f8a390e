"""Servers that are neither vLLM nor llama.cpp: what they answer is what the gateway's client gets.

Shaped by what is written of them: SGLang's flat errors and ``matched_stop`` (its OpenAI-compatible API), TGI's errors
as texts and, before its pull request 2221, streams without ``[DONE]``; Ollama's missing ``/health`` and its subset of
fields; OpenAI's refusal of every field it does not know ("Unrecognized request argument supplied"), Azure's first chunk
without choices, OpenRouter's comments and errors in mid-stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession, web

from elis_gateway.app import Gateway
from elis_gateway.config import from_mapping
from tests.gateway.world import CHAT, COMPLETIONS, begin

Event = dict[str, Any] | bytes


def _chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish} | more.pop("choice", {})
    return {"id": "x-1", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [choice]} | more


def _document(**more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello there"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "x-1", "object": "chat.completion", "created": 7, "model": "m", "choices": [choice]} | more


@dataclass(frozen=True)
class Kind:
    """One kind of server. ``strict``: the only fields it takes; others it refuses with ``refusal``."""

    name: str
    stream: tuple[Event, ...]
    document: dict[str, Any]
    refusal: tuple[int, Any]
    models: dict[str, Any] | None = field(default_factory=lambda: {"object": "list", "data": [{"id": "m"}]})
    health: bool = False
    done: bool = True
    strict: frozenset[str] | None = None
    completions: bool = True
    settings: tuple[tuple[str, Any], ...] = ()


_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
_OPENAI = frozenset({"model", "messages", "stream", "stream_options", "max_tokens", "temperature", "stop", "n", "seed"})
SGLANG = Kind(
    "sglang",
    stream=(
        _chunk({"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None}, usage=None),
        _chunk({"role": None, "content": "Hello", "reasoning_content": None, "tool_calls": None}, usage=None),
        _chunk({"role": None, "content": " there"}, "stop", choice={"matched_stop": 2}, usage=None),
    ),
    document=_document(usage=_USAGE | {"prompt_tokens_details": None}, metadata={"weight_version": "default"}),
    refusal=(400, {"object": "error", "message": "bad", "type": "BadRequestError", "param": None, "code": 400}),
    models={"object": "list", "data": [{"id": "m", "owned_by": "sglang", "max_model_len": 4096}]},
    health=True,
)
TGI = Kind(
    "tgi",
    stream=(
        _chunk({"role": "assistant", "content": "Hello"}, choice={"logprobs": None}, system_fingerprint="2.1-native"),
        _chunk({"role": "assistant", "content": " there"}, "eos_token", choice={"logprobs": None}),
    ),
    document=_document(usage=_USAGE),
    refusal=(422, {"error": "Input validation error: `temperature` must be strictly positive", "error_type": "x"}),
    models=None,
    health=True,
    done=False,
    settings=(("models", ["m"]),),
)
OLLAMA = Kind(
    "ollama",
    stream=(
        _chunk({"role": "assistant", "content": "Hello"}, system_fingerprint="fp_ollama"),
        _chunk({"role": "assistant", "content": " there"}, system_fingerprint="fp_ollama"),
        _chunk({"role": "assistant", "content": ""}, "stop", system_fingerprint="fp_ollama"),
    ),
    document=_document(system_fingerprint="fp_ollama", usage=_USAGE),
    refusal=(400, {"error": {"message": "bad", "type": "invalid_request_error", "param": None, "code": None}}),
)
AZURE = Kind(
    "azure",
    stream=(
        {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": [{"index": 0}]},
        _chunk({"role": "assistant", "content": "", "refusal": None}, obfuscation="a"),
        _chunk({"content": "Hello there"}, obfuscation="bb", error=None),
        _chunk({}, "stop", choice={"content_filter_results": {}}),
    ),
    document=_document(service_tier="default", usage=_USAGE, prompt_filter_results=[]),
    refusal=(
        400,
        {
            "error": {
                "message": "Unrecognized request argument supplied",
                "type": "invalid_request_error",
                "param": None,
            }
        },
    ),
    strict=_OPENAI,
    completions=False,
)
ROUTER = Kind(
    "router",
    stream=(b": OPENROUTER PROCESSING", _chunk({"role": "assistant", "content": "Hello"}), _chunk({}, "stop")),
    document=_document(provider="somebody", usage=_USAGE | {"cost": 0.1}),
    refusal=(402, {"error": {"message": "Insufficient credits", "code": 402}, "user_id": "u"}),
)
KINDS = [SGLANG, TGI, OLLAMA, AZURE, ROUTER]
PLAIN = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}


class Stub:
    """A server of one kind."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self.seen: list[dict[str, Any]] = []
        self.breaks = False

    def app(self) -> web.Application:
        app = web.Application()
        if self._kind.health:
            app.router.add_get("/health", self._health)
        if self._kind.models is not None:
            app.router.add_get("/v1/models", self._models)
        app.router.add_post(CHAT, self._chat)
        if self._kind.completions:
            app.router.add_post(COMPLETIONS, self._chat)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(self._kind.models)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        kind, body = self._kind, orjson.loads(await request.read())
        self.seen.append(body)
        unknown = kind.strict is not None and body.keys() - kind.strict
        if unknown or body.get("temperature") == -1:
            status, content = kind.refusal
            return web.json_response(content, status=status)
        if not body.get("stream"):
            return web.json_response(kind.document)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = list(kind.stream)
        if self.breaks:
            events[-1] = {"id": "x-1", "choices": [], "error": {"code": "server_error", "message": "disconnected"}}
        for event in events:
            await response.write((event if isinstance(event, bytes) else b"data: " + orjson.dumps(event)) + b"\n\n")
        if kind.done:
            await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def served(kind: Kind) -> AsyncIterator[tuple[Stub, str, str, ClientSession]]:
    """(server, its URL, the gateway's, a client)"""
    async with AsyncExitStack() as stack:
        stub = Stub(kind)
        runner = web.AppRunner(stub.app())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        upstream = {"url": f"http://127.0.0.1:{port}/v1", "slots": 2, "health": {"interval": 0.05, "up_after": 1}}
        settings = {
            "server": {"host": "127.0.0.1", "port": 0},
            "admin": {"port": 0},
            "upstreams": [upstream | dict(kind.settings)],
            "predictor": {"kind": "history"},
        }
        gateway = Gateway(from_mapping(settings), reload=lambda: from_mapping(settings))
        await begin(gateway)
        stack.push_async_callback(gateway.stop, 0.0)
        session = await stack.enter_async_context(ClientSession())
        stub.seen.clear()
        yield stub, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{gateway.port}", session


async def _post(session: ClientSession, url: str, body: dict[str, Any], **headers: str) -> tuple[int, str, bytes]:
    async with session.post(url, json=body, headers=headers) as response:
        return response.status, response.headers.get("X-Elis-Sliced", ""), await response.read()


def _events(data: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line.startswith(b"data: ")]
    return [orjson.loads(line) for line in lines if line != b"[DONE]"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_what_works_against_it_works_through_the_gateway(kind: Kind) -> None:
    async with served(kind) as (stub, engine, ours, session):
        for more in ({}, {"stream": True}, {"stop": ["x"], "n": 1, "seed": 4}, {"stream": True, "temperature": 0.5}):
            reference = await _post(session, engine + CHAT, PLAIN | more)
            status, sliced, data = await _post(session, ours + CHAT, PLAIN | more, **{"X-Elis-Debug": "1"})
            assert (status, sliced) == (200, "no; no_token_ids"), data
            if more.get("stream"):
                assert _events(data) == _events(reference[2])
                assert data.endswith(b"data: [DONE]\n\n")
            else:
                assert data == reference[2]
            assert stub.seen[-1] == stub.seen[-2]  # the client's own request, nothing added


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("stream", [False, True])
async def test_its_refusals_are_its_own(kind: Kind, stream: bool) -> None:
    async with served(kind) as (_, engine, ours, session):
        body = PLAIN | {"temperature": -1, "stream": stream}
        assert (await _post(session, ours + CHAT, body))[::2] == (await _post(session, engine + CHAT, body))[::2]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_an_error_in_mid_stream_is_the_end_of_the_clients_stream(kind: Kind) -> None:
    async with served(kind) as (stub, _, ours, session):
        stub.breaks = True
        status, _, data = await _post(session, ours + CHAT, PLAIN | {"stream": True})
        *before, last = _events(data)
        assert status == 200
        assert before == [event for event in kind.stream[:-1] if not isinstance(event, bytes)]
        assert last["error"]["message"] == "disconnected"


async def test_a_model_without_the_completions_route() -> None:
    async with served(AZURE) as (_, _, ours, session):
        status, _, data = await _post(session, ours + COMPLETIONS, {"model": "m", "prompt": "x"})
        assert status == 404
        assert orjson.loads(data)["error"]["code"] == "upstream_status_404"  # its words were no JSON
