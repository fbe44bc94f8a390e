"""The other ways to ask for text: OpenAI's ``/v1/responses`` and Anthropic's ``/v1/messages``.

Their answers are one call, queued and ordered like any other; all that is read of them is what a predictor needs before
and a count needs after. Their events have names, which are the ``type`` of their data.

Knows: where prompt, limit, text, usage and the end stand in their documents and events. Never: continuation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

__all__ = ["ENDS", "LIMITS", "asked_text", "event", "failure", "rename", "said", "usage"]

LIMITS = {"/v1/responses": "max_output_tokens", "/v1/messages": "max_tokens"}
"""Where each route's token limit stands."""

ENDS = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})
"""Types of the events after which nothing comes."""


def asked_text(path: str, body: Mapping[str, Any]) -> tuple[str, str]:
    """(what the user says last, the instructions above it)."""
    if path == "/v1/responses":
        given, system = body.get("input"), body.get("instructions")
    else:
        given, system = body.get("messages"), body.get("system")
    if isinstance(given, list):
        turns = [turn for turn in given if isinstance(turn, dict) and turn.get("role") == "user"]
        given = turns[-1].get("content") if turns else ""
    return _text(given), _text(system)


def event(chunk: Mapping[str, Any], payload: bytes) -> bytes:
    """An event with the name its data has."""
    kind = chunk.get("type")
    if not isinstance(kind, str) or not kind.isprintable():
        return b"data: " + payload + b"\n\n"
    return b"event: " + kind.encode("utf-8", "replace") + b"\ndata: " + payload + b"\n\n"


def said(chunk: Mapping[str, Any]) -> str:
    """The text of an event, or all of a document."""
    kind = chunk.get("type")
    if kind == "response.output_text.delta":
        return str(chunk.get("delta") or "")
    if kind == "content_block_delta":
        return str((chunk.get("delta") or {}).get("text") or "")
    parts = [part for item in chunk.get("output") or () for part in item.get("content") or ()]
    content = chunk.get("content")
    parts += content if isinstance(content, list) else ()
    return "".join(str(part.get("text") or "") for part in parts)


def usage(chunk: Mapping[str, Any]) -> Mapping[str, Any]:
    """``input_tokens`` and ``output_tokens``, where an event or a document tells."""
    for holder in (chunk, chunk.get("response"), chunk.get("message")):
        if isinstance(holder, dict) and isinstance(found := holder.get("usage"), dict):
            return found
    return {}


def rename(chunk: dict[str, Any], name: str) -> bool:
    """Put the client's name for the model wherever the engine's stands."""
    found = False
    for holder in (chunk, chunk.get("response"), chunk.get("message")):
        if isinstance(holder, dict) and "model" in holder:
            holder["model"] = name
            found = True
    return found


def failure(path: str, error: Mapping[str, Any]) -> bytes:
    """The event that ends a stream which cannot go on. ``error``: OpenAI's object."""
    chunk: dict[str, Any] = {**error, "type": "error"}
    if path == "/v1/messages":
        chunk = {"type": "error", "error": {"type": error.get("type"), "message": error["message"]}}
    return event(chunk, orjson.dumps(chunk))


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
