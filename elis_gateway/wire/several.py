"""Several choices for one request: as many requests of one choice each, and their answers put together again.

``n`` and a list of prompts ask the engine for sequences that have nothing to do with each other but their prompt. Asked
for one by one each can be queued, interrupted and continued by itself, and each holds a slot of its own, as it does in
the engine.

Knows: how such a request falls apart, and what vLLM 0.32 makes one answer of. Never: who runs the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from elis_gateway.wire.openai import Request
from elis_gateway.wire.sse import DONE, DONE_EVENT, EventDecoder, encode

__all__ = ["MOST", "Several", "split"]

MOST = 64
"""More choices than this are left to the engine: one request must not fill the queue."""


_MOST_BYTES = 64 * 1024 * 1024
"""Bytes of all parts together: each carries the whole conversation."""
_LARGEST_SEED = 2**63


def split(request: Request) -> list[Request]:
    """One request per choice, in the order of their indices; none where there is one choice, or too many."""
    body = request.body
    n = body.get("n")
    n = 1 if n is None else n
    if request.route.foreign:
        return []
    if type(n) is not int or not 1 <= n <= MOST:
        return []
    if n > 1 and body.get("temperature") == 0:
        return []  # vLLM refuses equal choices, in its own words; others would make them together
    prompts = _prompts(request)
    if not 1 < len(prompts) * n <= MOST or len(request.raw) * n > _MOST_BYTES:
        return []
    if type(body.get("seed")) is int and body["seed"] + n > _LARGEST_SEED:
        return []  # no number that could be sent: the engine is to say what it thinks of it
    parts = []
    for prompt in prompts:
        for choice in range(n):
            own = {name: value for name, value in body.items() if name != "n"}
            if not request.chat:
                own["prompt"] = prompt
            if type(own.get("seed")) is int:
                own["seed"] += choice  # as vLLM seeds them (v1/engine/parallel_sampling.py)
            parts.append(Request(request.route, own, orjson.dumps(own)))
    return parts


def _prompts(request: Request) -> list[Any]:
    if request.chat:
        return [None]
    prompt = request.body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(item, str | list) for item in prompt):
        return prompt
    return [prompt]


class Several:
    """The answers of ``parts`` choices as one answer. Belongs to one request."""

    __slots__ = ("_chat", "_created", "_decoders", "_each", "_id", "_usage", "_usage_chunk")

    def __init__(self, request: Request, parts: int) -> None:
        self._chat = request.chat
        self._each = parts // len(_prompts(request))
        """Choices of one prompt, which is counted once."""
        self._decoders = [EventDecoder() for _ in range(parts)]
        self._id: str | None = None
        self._created: Any = None
        self._usage: dict[int, dict[str, Any]] = {}
        self._usage_chunk: dict[str, Any] | None = None

    def feed(self, part: int, data: bytes) -> bytes:
        """What one part's stream says, for the client of all: the same chunks, with its index and one identity."""
        out = []
        for payload in self._decoders[part].feed(data):
            if payload == DONE:
                continue
            chunk = orjson.loads(payload)
            self._identify(chunk)
            if chunk.get("choices"):
                chunk["choices"][0]["index"] = part
                out.append(encode(orjson.dumps(chunk)))
            elif chunk.get("usage"):
                self._usage[part] = chunk["usage"]
                self._usage_chunk = self._usage_chunk or chunk
            else:
                out.append(encode(payload))
        return b"".join(out)

    def close(self, comments: bytes = b"") -> bytes:
        """The end of the stream, after the last part's."""
        out = b""
        if self._usage_chunk is not None:
            out = encode(orjson.dumps(self._usage_chunk | {"usage": self._total()}))
        return out + comments + DONE_EVENT

    def document(self, bodies: Sequence[bytes]) -> bytes:
        """One document of the parts' documents."""
        documents = [orjson.loads(body) for body in bodies]
        choices = []
        for part, document in enumerate(documents):
            choices.append({**document["choices"][0], "index": part})
            self._usage[part] = document.get("usage") or {}
        return orjson.dumps({**documents[0], "choices": choices, "usage": self._total()})

    def _identify(self, chunk: dict[str, Any]) -> None:
        if self._id is None:
            self._id, self._created = chunk.get("id"), chunk.get("created")
        chunk["id"], chunk["created"] = self._id, self._created

    def _total(self) -> dict[str, Any]:
        usages = [self._usage.get(part, {}) for part in range(len(self._decoders))]
        prompt = sum(usage.get("prompt_tokens") or 0 for usage in usages[:: self._each])
        answer = sum(usage.get("completion_tokens") or 0 for usage in usages)
        counts = {"prompt_tokens": prompt, "total_tokens": prompt + answer, "completion_tokens": answer}
        return usages[0] | counts
