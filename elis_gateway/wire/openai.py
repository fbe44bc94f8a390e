"""The OpenAI request as far as we read it.

Knows: the shapes of ``/v1/chat/completions`` and ``/v1/completions`` requests. Validates only what it reads itself;
ranges, context length and everything else are the engine's to refuse, in its own words. Never: state across requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import cached_property
from hashlib import blake2b
from typing import Any

import orjson

from elis_gateway.errors import ClientError
from elis_gateway.wire import foreign

__all__ = ["Request", "Route", "parse"]

_BOM = b"\xef\xbb\xbf"
"""What some editors begin a file with; engines pass over it."""
_DEPTH = 200
"""orjson reads documents of 1024 levels and writes only about 250; with fewer brackets than this none is that deep."""


class Route(StrEnum):
    """The endpoints whose answers we can schedule by length."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"

    @cached_property
    def foreign(self) -> bool:
        """Its answers are relayed as they come (``wire.foreign``)."""
        return self in (Route.RESPONSES, Route.MESSAGES)


class Request:
    """One parsed request; ``body`` is the client's own, never changed."""

    __slots__ = (
        "body", "chat", "continuous_usage", "include_stop", "include_usage", "logprobs", "max_tokens", "model", "raw",
        "route", "stop", "stream", "wants_ids",
    )  # fmt: skip

    def __init__(self, route: Route, body: dict[str, Any], raw: bytes) -> None:
        self.route = route
        self.chat = route is Route.CHAT
        self.body = body
        self.raw = raw
        """The bytes it came as."""
        self.model: str = body.get("model") or ""
        """The name the client asked for; empty where it named none."""
        self.stream = bool(body.get("stream"))
        options = body.get("stream_options")
        options = options if self.stream and isinstance(options, dict) else {}
        self.include_usage = bool(options.get("include_usage"))
        """The stream is to end with a usage chunk."""
        self.continuous_usage = self.include_usage and bool(options.get("continuous_usage_stats"))
        self.wants_ids = bool(body.get("return_token_ids"))
        asked = body.get("logprobs")
        self.logprobs = asked is True if self.chat else asked is not None
        """Log-probabilities are to be shown."""
        self.include_stop = bool(body.get("include_stop_str_in_output"))
        """Stop strings stay in the text."""
        self.max_tokens = _limit(body, route)
        """Most answer tokens the client asked for; None where it set no limit (or not a readable one)."""
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
        self.stop: tuple[str, ...] = tuple(s for s in stops if isinstance(s, str) and s)

    @property
    def echo(self) -> str:
        """The prompt, where it is a text to be put in front of the answer. vLLM leaves it out if ids are wanted."""
        if self.chat or not self.body.get("echo") or self.wants_ids:
            return ""
        prompt = self.body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        return prompt if isinstance(prompt, str) else ""

    @property
    def prompt_text(self) -> str:
        """What a length predictor reads: the last user turn, or the prompt. Token-id prompts have no text."""
        if self.route.foreign:
            return foreign.asked_text(self.route, self.body)[0]
        if not self.chat:
            prompt = self.body.get("prompt")
            if isinstance(prompt, list):
                prompt = "\n".join(item for item in prompt if isinstance(item, str))
            return prompt if isinstance(prompt, str) else ""
        for message in self._messages()[::-1]:  # mypyc 2.4 cannot compile `reversed` of these
            if message.get("role") == "user":
                return _text(message)
        return "\n".join(_text(message) for message in self._messages())

    @property
    def app_parts(self) -> tuple[str, ...]:
        """What tells one application from another: route, system prompt, tools, response format, token limit."""
        system = "\n".join(
            _text(message) for message in self._messages() if message.get("role") in ("system", "developer")
        )
        if self.route.foreign:
            system = foreign.asked_text(self.route, self.body)[1]
        shape = [self.body.get(name) for name in ("tools", "response_format")]
        return (
            self.route,
            system,
            orjson.dumps(shape, option=orjson.OPT_SORT_KEYS).decode() if any(shape) else "",
            "" if self.max_tokens is None else str(self.max_tokens),
        )

    def conversation_key(self) -> str | None:
        """Name of the history this turn continues: equal to ``next_conversation_key`` of the turn before it.

        None on a first turn and for completions, which carry no history.
        """
        messages = self._messages()
        while messages and messages[-1].get("role") != "assistant":
            messages = messages[:-1]
        return _chain(self.model, messages) if messages else None

    def next_conversation_key(self, answer: str) -> str | None:
        """Name of the history the next turn will continue, once this one was answered with ``answer``."""
        if not self.chat:
            return None
        return _chain(self.model, [*self._messages(), {"role": "assistant", "content": answer}])

    def _messages(self) -> list[dict[str, Any]]:
        messages = self.body.get("messages") if self.chat else None
        return [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []


def parse(route: Route, body: bytes) -> Request:
    """Read a request. Raises ``ClientError`` where it is no JSON object or a field we read has the wrong type."""
    body = body.removeprefix(_BOM)
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ClientError(f"The request body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise ClientError("The request body must be a JSON object.", code="invalid_json")
    if body.count(b"[") + body.count(b"{") >= _DEPTH and not _can_be_written(parsed):
        raise ClientError("The request body is nested too deeply.", code="invalid_json")
    model = parsed.get("model")
    if model is not None and not isinstance(model, str):
        raise ClientError("model must be a string.", param="model", code="invalid_type")
    stream = parsed.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise ClientError("stream must be a boolean.", param="stream", code="invalid_type")
    return Request(route, parsed, body)


def _can_be_written(parsed: dict[str, Any]) -> bool:
    try:
        orjson.dumps(parsed)
    except orjson.JSONEncodeError:
        return False
    return True


def _limit(body: dict[str, Any], route: Route) -> int | None:
    """``max_completion_tokens`` goes before ``max_tokens`` in chat and does not exist in completions."""
    value = body.get("max_completion_tokens") if route is Route.CHAT else None
    value = body.get(foreign.LIMITS.get(route, "max_tokens")) if value is None else value
    return value if type(value) is int and value >= 1 else None


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _chain(model: str, messages: Iterable[dict[str, Any]]) -> str:
    digest = blake2b(model.encode("utf-8", "surrogatepass"), digest_size=16)
    for message in messages:
        for part in (str(message.get("role")), _text(message)):
            digest.update(part.encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
    return digest.hexdigest()
