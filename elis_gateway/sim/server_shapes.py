"""The bytes vLLM 0.32.0 sends, chunk by chunk and whole (compared with a running one, key by key).

Knows: field names, their order, which chunk carries what. Never: when anything is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import Any
from uuid import uuid4

import orjson

from elis_gateway.sim.script import Script
from elis_gateway.sim.server_calls import Call

__all__ = ["DONE", "StreamShape", "error_event", "usage", "whole"]

DONE = b"data: [DONE]\n\n"


def _name(call: Call, request_id: str | None) -> str:
    """vLLM takes the header ``X-Request-Id`` over into the answer's id."""
    return f"{'chatcmpl' if call.chat else 'cmpl'}-{request_id or uuid4().hex[:16]}"


def error_event(message: str, code: int = 500) -> bytes:
    """An error after the status line: the event vLLM sends before ``[DONE]``."""
    error = {"message": message, "type": "InternalServerError", "param": None, "code": code}
    return b"data: " + orjson.dumps({"error": error}) + b"\n\n" + DONE


def usage(prompt: int, made: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made}


class StreamShape:
    """One call's chunks. Everything that repeats is joined once."""

    def __init__(self, call: Call, *, request_id: str | None, cached: int | None, fingerprint: str) -> None:
        """``cached``: for ``prompt_tokens_details``; None: the engine does not report them."""
        self._chat = call.chat
        self._ids = call.token_ids
        self._prompt = call.prompt
        self._cached = cached
        self._usage = call.include_usage
        self._continuous = call.continuous_usage
        self._made = 0
        self._fingerprint = b',"system_fingerprint":' + orjson.dumps(fingerprint)
        kind = b"chat.completion.chunk" if call.chat else b"text_completion"
        self._head = b'data: {"id":%s,"object":"%s","created":%d,"model":%s,"choices":[' % (
            orjson.dumps(_name(call, request_id)), kind, int(time()), orjson.dumps(call.model),
        )  # fmt: skip
        self._open = self._head + (b'{"index":0,"delta":{"content":' if call.chat else b'{"index":0,"text":')
        self._going = (
            b'},"logprobs":null,"finish_reason":null,"token_ids":'
            if call.chat
            else b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":'
        )

    def first(self) -> bytes:
        """The chunk before the first token: a chat's role; nothing for completions."""
        if not self._chat:
            return b""
        ids = orjson.dumps(self._prompt) if self._ids else b"null"
        return (
            self._head
            + b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            + self._running_usage()
            + b',"prompt_token_ids":'
            + ids
            + b',"prompt_text":null}\n\n'
        )

    def delta(self, text: str, ids: Sequence[int]) -> bytes:
        """A chunk in the middle."""
        first = self._made == 0
        self._made += len(ids)
        if first and self._ids and not self._chat:
            return self._completion(text, ids, None, None, first=True, end=b"")
        return (
            self._open
            + orjson.dumps(text)
            + self._going
            + (orjson.dumps(ids) if self._ids else b"null")
            + (b"}]" + self._running_usage() + b"}\n\n" if self._continuous else b"}]}\n\n")
        )

    def last(self, text: str, ids: Sequence[int], finish: str, stop_reason: str | int | None) -> bytes:
        """The chunk of the last token, the usage chunk where it was asked for, and ``[DONE]``."""
        first = self._made == 0
        self._made += len(ids)
        end = b"" if self._usage else self._fingerprint
        if self._chat:
            chunk = (
                self._open
                + orjson.dumps(text)
                + b'},"logprobs":null,"finish_reason":%s,"stop_reason":%s,"token_ids":%s}]'
                % (orjson.dumps(finish), orjson.dumps(stop_reason), orjson.dumps(ids) if self._ids else b"null")
                + end
                + self._running_usage()
                + b"}\n\n"
            )
        else:
            chunk = self._completion(text, ids, finish, stop_reason, first=first, end=end)
        return chunk + self._final_usage() + DONE

    def _completion(
        self,
        text: str,
        ids: Sequence[int],
        finish: str | None,
        stop_reason: str | int | None,
        *,
        first: bool,
        end: bytes,
    ) -> bytes:
        return (
            self._open
            + orjson.dumps(text)
            + b',"logprobs":null,"finish_reason":%s,"stop_reason":%s,"prompt_token_ids":%s,"token_ids":%s}]'
            % (
                orjson.dumps(finish),
                orjson.dumps(stop_reason),
                orjson.dumps(self._prompt) if first and self._ids else b"null",
                orjson.dumps(ids) if self._ids else b"null",
            )
            + self._running_usage()
            + end
            + b"}\n\n"
        )

    def _running_usage(self) -> bytes:
        if not self._continuous:
            return b""
        return b',"usage":' + orjson.dumps(usage(len(self._prompt), self._made))

    def _final_usage(self) -> bytes:
        if not self._usage:
            return b""
        data = usage(len(self._prompt), self._made)
        if self._cached is not None:
            data["prompt_tokens_details"] = {"cached_tokens": self._cached}
            if self._chat:
                data["prompt_tokens_details"]["created_cache_tokens"] = 0
        return self._head + b'],"usage":' + orjson.dumps(data) + self._fingerprint + b"}\n\n"


def whole(call: Call, script: Script, *, request_id: str | None, cached: int | None, fingerprint: str) -> bytes:
    """The JSON of a call that is not streamed."""
    counted = usage(len(call.prompt), len(script.ids))
    details = {"cached_tokens": cached, "created_cache_tokens": 0 if call.chat else None, "multimodal_tokens": None}
    counted |= {"prompt_tokens_details": None if cached is None else details, "completion_tokens_details": None}
    ids = script.ids if call.token_ids else None
    prompt = call.prompt if call.token_ids else None
    ending: dict[str, Any] = {"finish_reason": script.finish, "stop_reason": script.stop_reason, "token_ids": ids}
    if call.chat:
        message = {"role": "assistant", "content": script.text, "refusal": None, "annotations": None, "audio": None}
        message |= {"function_call": None, "reasoning": None}
        choice = {"index": 0, "message": message, "logprobs": None, **ending, "routed_experts": None}
        extra: dict[str, Any] = {"prompt_logprobs": None, "prompt_token_ids": prompt, "prompt_text": None}
    else:
        choice = {"index": 0, "text": script.text, "logprobs": None, **ending}
        choice |= {"prompt_logprobs": None, "prompt_token_ids": prompt, "routed_experts": None}
        extra = {}
    return orjson.dumps(
        {
            "id": _name(call, request_id),
            "object": "chat.completion" if call.chat else "text_completion",
            "created": int(time()),
            "model": call.model,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": fingerprint,
            "usage": counted,
            **extra,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )
