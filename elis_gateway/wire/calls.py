"""The bodies of upstream calls: the client's own request, its first window, and its continuations.

Knows: request fields of vLLM 0.32 (and, for continuation by text, what most OpenAI-like servers share). Never: what
came back, or why a call is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from elis_gateway.wire.openai import Request, Route
from elis_gateway.wire.parameters import Way, carried

__all__ = ["BLIND_LIMIT", "COMPLETIONS_DEFAULT", "Call", "by_ids", "by_text", "detokenize", "first", "own"]

COMPLETIONS_DEFAULT = 16
"""``max_tokens`` of a completion that names none: OpenAI's default and vLLM's."""

BLIND_LIMIT = 256
"""Tokens to ask for where neither the client nor the engine's context says how many may follow."""


class Call(NamedTuple):
    """One POST to an upstream."""

    path: str
    body: bytes
    stream: bool
    """The response is an event stream; else one JSON document."""


def own(request: Request, model: str, priority: int | None) -> Call:
    """The client's request as it is, but for the model's name and the engine priority, which are ours to set."""
    body = request.body
    if request.route is Route.MESSAGES:
        priority = None  # Anthropic's has no such field
    if model == body.get("model") and priority is None and "priority" not in body:
        return Call(request.route, request.raw, request.stream)
    return Call(request.route, orjson.dumps(_ours(body, model, priority)), request.stream)


def first(
    request: Request, model: str, priority: int | None, limit: int | None, *, ids: bool, whole_stops: bool,
    counts: bool = False,
) -> Call:  # fmt: skip
    """The client's request as a stream that tells what a continuation needs.

    ``limit``: answer tokens to ask for where fewer than the client's own limit, else None. ``ids``: ask for token ids,
    else for running usage. ``whole_stops``: let stop strings end the call but stay in its text, so that no text
    is held back; without it they are not sent. ``counts``: usage with every delta.
    """
    body = _ours(request.body, model, priority)
    body.pop("echo", None)  # put in front by us
    body.pop("stream_interval", None)  # tokens are counted, and shown, one by one
    if limit is not None:
        chats = request.chat and body.get("max_completion_tokens") is not None
        name = "max_completion_tokens" if chats else "max_tokens"
        body[name] = limit
        if (body.get("min_tokens") or 0) > limit:
            body["min_tokens"] = limit
    _streamed(body, request, ids, counts)
    _stops(body, request, whole_stops)
    return Call(request.route, orjson.dumps(body), True)


def by_ids(
    request: Request, model: str, priority: int | None, limit: int, prompt: Sequence[int | str] | str, attained: int,
    *, stream: bool, whole_stops: bool, way: Way = Way.IDS, said: Sequence[int | str] = (), counts: bool = False,
) -> Call:  # fmt: skip
    """Go on after ``prompt`` (the prompt's and the answer's token ids, of which ``attained`` are the answer's).

    ``said``: the answer's own, which penalties count. A chat goes on as a chat where the client wants to see
    log-probabilities, whose form differs, or where the engine parses it, and as a completion everywhere else.
    ``counts``: usage with every delta.
    """
    body = _ours(carried(request.body, way), model, priority)
    chat = request.chat and (way in (Way.PARSED, Way.THOUGHTS) or (way is Way.CHAT_IDS and request.logprobs))
    if request.chat and not chat:
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
    _penalise(body, said)
    if chat:
        # The ids stand for the messages, of which the engine wants to see some; ids of tool calls may count theirs.
        body["messages"] = request.body["messages"] if body.get("tools") else [{"role": "user", "content": ""}]
        body["kv_transfer_params"] = {"prompt_token_ids": prompt}
    else:
        body["prompt"] = prompt
    _limits(body, request.body, limit, attained)
    if stream:
        _streamed(body, request, True, counts)
    elif request.wants_ids or way is Way.THOUGHTS:
        body["return_token_ids"] = True
    _stops(body, request, whole_stops)
    return Call(Route.CHAT if chat else Route.COMPLETIONS, orjson.dumps(body), stream)


def by_text(request: Request, model: str, priority: int | None, limit: int | None, text: str, attained: int) -> Call:
    """Go on after the answer's text so far, where the server gives no ids: the text is tokenised again."""
    body = _ours(request.body, model, priority)
    if request.chat:
        body["messages"] = [*body["messages"], {"role": "assistant", "content": text}]
        body["continue_final_message"] = True
        body["add_generation_prompt"] = False
    else:
        prompt = body["prompt"]
        body["prompt"] = (prompt[0] if isinstance(prompt, list) else prompt) + text
    if limit is not None:
        body.pop("max_completion_tokens", None)
        _limits(body, request.body, limit, attained)
    _streamed(body, request, False)
    _stops(body, request, False)
    return Call(request.route, orjson.dumps(body), True)


def detokenize(model: str, tokens: Sequence[int | str]) -> Call:
    """The text of some tokens."""
    return Call("/detokenize", orjson.dumps({"model": model, "tokens": tokens}), False)


def _ours(body: Mapping[str, Any], model: str, priority: int | None) -> dict[str, Any]:
    body = dict(body)
    body["model"] = model
    body.pop("priority", None)  # clients do not order the engine's queue
    if priority is not None:
        body["priority"] = priority
    return body


def _penalise(body: dict[str, Any], said: Sequence[int | str]) -> None:
    """The frequency penalty of what was said before this call, as a bias; what the call says the engine counts.

    vLLM subtracts the penalty times the count from the same logits a bias is added to
    (``model_executor/layers/utils.py``), so the sum is the same but for rounding. It limits a bias to 100: a token less
    likely by that is never drawn anyway.
    """
    frequency = body.get("frequency_penalty")
    if not (said and frequency):
        return
    bias = {str(int(token)): value for token, value in (body.get("logit_bias") or {}).items()}
    for token, times in Counter(said).items():
        bias[str(token)] = max(bias.get(str(token), 0) - frequency * times, -100)
    body["logit_bias"] = bias


def _limits(body: dict[str, Any], asked: Mapping[str, Any], limit: int, attained: int) -> None:
    """``min_tokens`` counts the whole answer and must not exceed the call's own limit."""
    body["max_tokens"] = limit
    minimum = min((asked.get("min_tokens") or 0) - attained, limit)
    if minimum > 0:
        body["min_tokens"] = minimum
    else:
        body.pop("min_tokens", None)


def _streamed(body: dict[str, Any], request: Request, ids: bool, counts: bool = False) -> None:
    """Ask for usage where the client would see it (its last chunk differs with it), or where it is all we count by.

    ``counts``: with every delta.
    """
    body["stream"] = True
    options = dict(body.get("stream_options") or {}) if request.stream else {}
    if request.include_usage or not request.stream or not ids:
        options["include_usage"] = True
    if not ids or request.continuous_usage or counts:
        options["continuous_usage_stats"] = True
    if options:
        body["stream_options"] = options
    else:
        body.pop("stream_options", None)
    if ids:
        body["return_token_ids"] = True


def _stops(body: dict[str, Any], request: Request, whole: bool) -> None:
    if not request.stop:
        return
    if whole:
        body["include_stop_str_in_output"] = True
    else:
        body.pop("stop", None)
