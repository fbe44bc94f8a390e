"""Asking an OpenAI-compatible server with the stock client, and what of an answer has to be the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from openai import AsyncOpenAI

from tests.engine.prompts import Prompt

__all__ = ["MODEL", "Answer", "Shape", "ask", "ask_all", "client"]

MODEL = "smollm2"


class Shape(Enum):
    """The four ways to ask."""

    CHAT = "chat"
    CHAT_STREAM = "chat-stream"
    COMPLETIONS = "completions"
    COMPLETIONS_STREAM = "completions-stream"

    @property
    def chat(self) -> bool:
        return self in (Shape.CHAT, Shape.CHAT_STREAM)

    @property
    def stream(self) -> bool:
        return self in (Shape.CHAT_STREAM, Shape.COMPLETIONS_STREAM)


@dataclass(frozen=True)
class Answer:
    """What a client sees of an answer, and (not compared) how it came about."""

    text: str
    finish_reason: str | None
    stop_reason: Any
    usage: Mapping[str, Any] | None
    role: str | None
    sliced: str = field(compare=False, default="")
    """The gateway's header X-Elis-Sliced."""
    seconds: float = field(compare=False, default=0.0)
    keys: frozenset[str] = field(compare=False, default=frozenset())
    """Every path of keys that occurred, ``choices.delta.content`` and the like."""


def client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


async def ask(api: AsyncOpenAI, shape: Shape, prompt: Prompt, limit: int | None, **more: Any) -> Answer:
    """One request at temperature 0 with at most ``limit`` answer tokens; ``more`` are further fields of the body."""
    # llama.cpp closes a connection after a streamed answer without saying so; the client would fall over it.
    headers = {"X-Elis-Debug": "1", "Connection": "close"}
    body: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_headers": headers, **more}
    if limit is not None:
        body["max_tokens"] = limit
    start = time.monotonic()
    if shape.chat:
        messages = [{"role": "user", "content": prompt.text}]
        create = api.chat.completions.with_raw_response.create
        raw: Any = await create(messages=messages, **_streaming(shape), **body)  # type: ignore[arg-type]
    else:
        raw = await api.completions.with_raw_response.create(prompt=prompt.text, **_streaming(shape), **body)
    parsed = raw.parse()
    pieces = [chunk.model_dump() async for chunk in parsed] if shape.stream else [parsed.model_dump()]
    return _answer(pieces, raw.headers.get("x-elis-sliced", ""), time.monotonic() - start)


async def ask_all(
    url: str, shape: Shape, prompts: Iterable[Prompt], limit: int, *, at_once: int = 4, **more: Any
) -> dict[str, Answer]:
    """The answers to all prompts by their names, ``at_once`` of them in flight."""
    gate = asyncio.Semaphore(at_once)

    async def one(api: AsyncOpenAI, prompt: Prompt) -> Answer:
        async with gate:
            return await ask(api, shape, prompt, limit, **more)

    chosen = tuple(prompts)
    async with client(url) as api:
        answers = await asyncio.gather(*(one(api, prompt) for prompt in chosen))
    return {prompt.name: answer for prompt, answer in zip(chosen, answers, strict=True)}


def _streaming(shape: Shape) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if shape.stream else {}


def _answer(pieces: list[dict[str, Any]], sliced: str, seconds: float) -> Answer:
    text, finish, stop, usage, role = "", None, None, None, None
    keys: set[str] = set()
    for piece in pieces:
        keys.update(_paths(piece))
        usage = piece.get("usage") or usage
        for choice in piece["choices"]:
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            text += said.get("content") or ""
            role = said.get("role") or role
            finish = choice.get("finish_reason") or finish
            stop = choice.get("stop_reason") or stop
    return Answer(text, finish, stop, usage, role, sliced, seconds, frozenset(keys))


def _paths(value: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _paths(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, prefix)
