"""Answers that come from one call: relayed as the engine sends them, read only to count.

Knows: where an event says how many tokens there are, and that it is the last. Never: continuation.
"""

from __future__ import annotations

from typing import Any

import orjson

from elis_gateway.errors import UpstreamRefused, UpstreamUnavailable
from elis_gateway.wire import foreign
from elis_gateway.wire.encode import Encoder
from elis_gateway.wire.openai import Request
from elis_gateway.wire.sse import DONE, encode

__all__ = ["WholeStream", "number", "reported"]


_UNSEEN = ("reasoning", "reasoning_content", "tool_calls")
"""Where a parser puts tokens that are not content."""


class WholeStream:
    """One streamed call, passed through."""

    __slots__ = (
        "_encoder",
        "_foreign",
        "_single",
        "complete",
        "count",
        "error",
        "finish_reason",
        "prompt_tokens",
        "text",
    )

    def __init__(self, request: Request, encoder: Encoder) -> None:
        self._encoder = encoder
        self._single = _single(request)
        self._foreign = request.route.foreign
        self.text: list[str] = []
        """Of the first choice."""
        self.count = 0
        """Tokens by usage where the engine tells, else deltas with text."""
        self.prompt_tokens: int | None = None
        self.finish_reason: str | None = None
        self.complete = False
        """The stream said that it is at its end."""
        self.error: UpstreamRefused | UpstreamUnavailable | None = None

    def relay(self, payloads: list[bytes]) -> bytes:
        """Events for the client: everything up to an error or [DONE], which are the caller's to send."""
        out: list[bytes] = []
        for payload in payloads:
            if payload == DONE:
                self.complete = True
                continue
            try:
                chunk = orjson.loads(payload)
                (self._note_foreign if self._foreign else self._note)(chunk)
            except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
                self.error = UpstreamUnavailable(f"the upstream sent an unreadable event: {error}", cause="garbage")
                if not out:
                    raise self.error from error
            if self.error is not None:
                break
            if self._foreign:
                alias = self._encoder.name
                renamed = alias is not None and foreign.rename(chunk, alias)
                out.append(foreign.event(chunk, orjson.dumps(chunk) if renamed else payload))
                continue
            renamed = self._encoder.name is not None and chunk is not None and "model" in chunk
            out.append(encode(self._encoder.rename(chunk) if renamed else payload))
        return b"".join(out)

    def _note(self, chunk: dict[str, Any] | None) -> None:
        if chunk is None:
            return
        if chunk.get("error") is not None:
            self.error = reported(chunk)
            return
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content")
            if text and isinstance(text, str):
                self.text.append(text)
            if text or any(delta.get(name) for name in _UNSEEN):
                self.count += 1
            if choice.get("finish_reason"):
                self.finish_reason = choice["finish_reason"]
                self.complete = self.complete or self._single
        usage = chunk.get("usage")
        if usage:
            self.prompt_tokens = number(usage.get("prompt_tokens"))
            self.count = number(usage.get("completion_tokens")) or self.count

    def _note_foreign(self, chunk: dict[str, Any]) -> None:
        kind = chunk.get("type")
        if kind == "error" or chunk.get("error") is not None:
            self.error = reported(chunk if isinstance(chunk.get("error"), dict) else {"error": chunk})
            return
        if text := foreign.said(chunk) if kind not in foreign.ENDS else "":
            self.text.append(text)
            self.count += 1
        told = foreign.usage(chunk)
        self.prompt_tokens = number(told.get("input_tokens")) or self.prompt_tokens
        if kind in foreign.ENDS or kind == "message_delta":
            self.count = number(told.get("output_tokens")) or self.count
        if kind in foreign.ENDS:
            self.complete = True
            self.finish_reason = "stop"


def _single(request: Request) -> bool:
    """Does the answer surely have one choice, so that its end is the stream's?"""
    body = request.body
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not all(type(item) is int for item in prompt)
    return body.get("n") in (None, 1) and not (body.get("use_beam_search") or several)


def number(count: object) -> int | None:
    """A count of tokens, if it is one."""
    return count if type(count) is int and 0 <= count < 1 << 40 else None


def reported(chunk: dict[str, Any]) -> UpstreamRefused:
    """An error the engine sent as an event, with the status it would have had."""
    error = chunk.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    status = code if type(code) is int and 400 <= code < 600 else 500
    return UpstreamRefused(status, orjson.dumps({"error": error}))
