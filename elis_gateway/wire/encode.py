"""Chunks and documents in the client's shape, with one identity over the whole answer.

An answer's first call gives its id, time, model name and, chunk by chunk, its shape; continuations are calls of their
own (completions, whatever the client speaks) and are re-dressed here.

Knows: response shapes of both routes. Never: which text or tokens belong to the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from elis_gateway.wire.openai import Request
from elis_gateway.wire.shapes import DETAILS

__all__ = ["Encoder", "blank"]

_NOTHING: dict[str, Any] = {}
_PASSED = ("usage", "system_fingerprint", "timings")
"""Fields beside the choices that continue in a chunk of another route."""


class Encoder:
    """Renders one answer for one client."""

    __slots__ = (
        "_chat", "_choice", "_chunk", "_wants_ids", "_wants_prompt_ids", "created", "details", "id", "model", "name",
    )  # fmt: skip

    def __init__(self, request: Request) -> None:
        self._chat = request.chat
        self._wants_ids = request.wants_ids
        self._wants_prompt_ids = request.wants_ids or bool(request.echo)  # vLLM's streams show them with the prompt
        self.id: str | None = None
        self.created = 0
        self.model = ""
        """The name the client sees."""
        self.name: str | None = None
        """The alias it asked for, where the engine has another name for the model."""
        self.details: dict[str, Any] | None = None
        """``prompt_tokens_details`` of the call that read the client's prompt."""
        self._chunk: dict[str, Any] | None = None
        """A delta of the client's route, used again for deltas that came in another shape."""
        self._choice: dict[str, Any] = _NOTHING

    def open(self, chunk: Mapping[str, Any]) -> None:
        """Take the identity from the first thing the engine said about this answer."""
        if self.id is None:
            self.id = str(chunk.get("id"))
            self.created = chunk.get("created") or 0
            self.model = self.name if self.name is not None else str(chunk.get("model"))

    def preamble(self, chunk: dict[str, Any]) -> bytes:
        """The chunk that opens a chat stream: the role, and the prompt's ids only where the client wants them."""
        if not self._wants_ids and "prompt_token_ids" in chunk:
            chunk["prompt_token_ids"] = None
        return self._dump(chunk)

    def relay(
        self, chunk: dict[str, Any], choice: dict[str, Any], text: str, finish: str | None, stop_reason: object
    ) -> bytes:
        """A chunk of the client's own route: the engine's, with what is ours in it corrected."""
        if not self._wants_ids and choice.get("token_ids") is not None:
            choice["token_ids"] = None
        if not self._wants_prompt_ids and choice.get("prompt_token_ids") is not None:
            choice["prompt_token_ids"] = None
        if not self._chat:
            choice["text"] = text
        elif text or choice["delta"].get("content"):
            choice["delta"]["content"] = text
        self._finish(choice, finish, stop_reason, "stop_reason" in choice)
        return self._dump(chunk)

    def dress(
        self, source: Mapping[str, Any], text: str, ids: Sequence[int], finish: str | None, stop_reason: object
    ) -> bytes:
        """A chat chunk for text that came from the completions route; ``source``: the chunk it came in."""
        chunk = self._chunk or self._shape()
        choice = self._choice
        if finish is not None:
            chunk, choice = self._copy(chunk, choice)
        choice["delta"]["content"] = text
        if self._wants_ids:
            choice["token_ids"] = ids
        self._finish(choice, finish, stop_reason, "stop_reason" in source["choices"][0])
        for name in _PASSED:
            if source.get(name) is not None:
                chunk[name] = source[name]
            else:
                chunk.pop(name, None)
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def last(self, text: str, finish: str, usage: Mapping[str, Any] | None, fingerprint: str | None) -> bytes:
        """A chunk that ends the answer, where the engine sent none."""
        if self._chat:
            return self.dress({"choices": [{}], "system_fingerprint": fingerprint}, text, (), finish, None)
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        chunk = {"id": None, "object": "text_completion", "created": 0, "model": None, "choices": [choice]}
        more = {"usage": usage, "system_fingerprint": fingerprint}
        return self._dump(chunk | {name: value for name, value in more.items() if value is not None})

    def usage(self, prompt_tokens: int, completion_tokens: int, shape: Mapping[str, Any] | None) -> dict[str, Any]:
        """Usage of the whole answer; ``shape``: the engine's own of some call, for its other fields."""
        usage: dict[str, Any] = dict(shape or {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0})
        usage["prompt_tokens"] = prompt_tokens
        usage["total_tokens"] = prompt_tokens + completion_tokens
        usage["completion_tokens"] = completion_tokens
        details = self.details
        if details is None and isinstance(details := usage.get("prompt_tokens_details"), dict):
            # Only a continuation told: of its prompt, what was cached beyond the client's is our own doing.
            details = {**details, "cached_tokens": min(details.get("cached_tokens") or 0, prompt_tokens)}
        if details is not None:
            usage["prompt_tokens_details"] = details
        return usage

    def usage_chunk(self, usage: Mapping[str, Any], own: Mapping[str, Any] | None, fingerprint: str | None) -> bytes:
        """The last chunk of a stream whose client asked for usage; ``own``: the engine's, where it sent one."""
        chunk: dict[str, Any] = dict(own or {})
        chunk["id"] = self.id
        chunk["object"] = "chat.completion.chunk" if self._chat else "text_completion"
        chunk["created"] = self.created
        chunk["model"] = self.model
        chunk["choices"] = []
        chunk["usage"] = usage
        if fingerprint is not None:
            chunk["system_fingerprint"] = fingerprint
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def document(
        self,
        shape: Mapping[str, Any],
        text: str,
        usage: Mapping[str, Any],
        finish: str | None,
        stop_reason: object,
        prompt_ids: Sequence[int],
        ids: Sequence[int | str],
        fingerprint: str | None,
        logprobs: Mapping[str, Any] | None = None,
        message: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The whole answer as one JSON document; ``shape``: a document of this route with the answer blanked out.

        ``message``: a chat's, where it is more than text.
        """
        choice = dict(shape["choices"][0])
        if message is not None:
            choice["message"] = message
        elif self._chat:
            choice["message"] = {**choice["message"], "content": text}
        else:
            choice["text"] = text
        if logprobs is not None:
            choice["logprobs"] = logprobs
        choice["finish_reason"] = finish
        if "stop_reason" in choice:
            choice["stop_reason"] = stop_reason
        document = {**shape, "id": self.id, "created": self.created, "model": self.model, "choices": [choice]}
        if fingerprint is not None or "system_fingerprint" in shape:
            document["system_fingerprint"] = fingerprint
        document["usage"] = {**shape["usage"], **usage}
        if (
            isinstance(details := usage.get("prompt_tokens_details"), dict)
            and "completion_tokens_details" in shape["usage"]
        ):
            document["usage"]["prompt_tokens_details"] = {**DETAILS, **details}  # streams leave out what is null
        if self._wants_ids:
            choice["token_ids"] = ids
            (document if self._chat else choice)["prompt_token_ids"] = prompt_ids
        return orjson.dumps(document)

    def rename(self, document: dict[str, Any]) -> bytes:
        """A whole response of the engine, under the name the client knows the model by."""
        if self.name is not None and "model" in document:
            document["model"] = self.name
        return orjson.dumps(document)

    def remember(self, chunk: dict[str, Any], choice: dict[str, Any]) -> None:
        """Keep the shape of a delta of the client's own route."""
        if self._chunk is None and self._chat and choice.get("finish_reason") is None:
            self._chunk, self._choice = self._copy(chunk, choice)
            self._chunk.update(id=self.id, created=self.created, model=self.model)
            self._choice["delta"] = {"content": ""}
            if not self._wants_ids and "token_ids" in self._choice:
                self._choice["token_ids"] = None

    def _dump(self, chunk: dict[str, Any]) -> bytes:
        chunk["id"] = self.id
        chunk["created"] = self.created
        chunk["model"] = self.model
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _finish(self, choice: dict[str, Any], finish: str | None, stop_reason: object, named: bool) -> None:
        """``named``: the engine has a ``stop_reason``; vLLM's chat shows it only where there is a finish reason."""
        choice["finish_reason"] = finish
        if finish is None and self._chat:
            choice.pop("stop_reason", None)
        elif named or stop_reason is not None:
            last: dict[str, Any] = {
                name: choice.pop(name) for name in ("prompt_token_ids", "token_ids") if name in choice
            }
            choice["stop_reason"] = stop_reason
            choice.update(last)  # ids come after it

    def _copy(self, chunk: dict[str, Any], choice: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        choice = {**choice, "delta": {**choice["delta"]}}
        return {**chunk, "choices": [choice]}, choice

    def _shape(self) -> dict[str, Any]:
        self._choice = {
            "index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": None, "token_ids": None
        }  # fmt: skip
        self._chunk = {
            "id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
            "choices": [self._choice],
        }  # fmt: skip
        return self._chunk


def blank(document: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a whole response, to be filled by ``Encoder.document``; keeps nothing of the answer."""
    choice = dict(document["choices"][0])
    if "message" in choice:
        choice["message"] = {**choice["message"], "content": None}
    else:
        choice["text"] = ""
    for holder in (choice, blanked := {**document, "choices": [choice]}):
        for name in ("logprobs", "token_ids", "prompt_token_ids", "prompt_logprobs", "metrics", "routed_experts"):
            if name in holder:
                holder[name] = None
    usage = dict(document.get("usage") or {})
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        if name in usage:
            usage[name] = None
    blanked["usage"] = usage
    blanked.pop("timings", None)
    return blanked
