"""Which parameters mean the same when an answer is produced by several calls.

A whitelist: a request is sliced only if every parameter it sets is known here to keep its meaning, because it acts on
each token alone, only on the prompt, or not at all. Everything else runs as one call. Each entry was read in vLLM
0.32's sources (``SamplingParams``, ``ChatCompletionRequest``, ``CompletionRequest``).

Knows: names and harmless values. Never: how a request is continued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["CARRIED", "unsliceable"]

CARRIED = frozenset({
    "allowed_token_ids", "cache_salt", "frequency_penalty", "ignore_eos", "include_stop_str_in_output", "logit_bias",
    "min_p", "presence_penalty", "repetition_penalty", "seed", "session_id", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_token_ids", "temperature", "top_k", "top_p", "user",
})  # fmt: skip
"""Sent again with every continuation; the rest has done its work when the prompt is known."""

_OURS = frozenset({
    "max_completion_tokens", "max_tokens", "min_tokens", "model", "priority", "request_id", "return_token_ids",
    "stream", "stream_options",
})  # fmt: skip

_PROMPT_ONLY = frozenset({
    "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs", "continue_final_message",
    "documents", "messages", "prompt", "reasoning_effort", "sim_output_tokens",
})  # fmt: skip

# sim_output_tokens: our embedded engine's forced answer length, which it writes into the prompt's ids.

_WITHOUT_EFFECT = frozenset({
    "include_reasoning", "length_penalty", "metadata", "parallel_tool_calls", "prompt_cache_key",
    "safety_identifier", "service_tier", "store", "truncation_side",
})  # fmt: skip
"""Read by no part of a plain answer; tools and reasoning are excluded elsewhere."""

_KNOWN = CARRIED | _OURS | _PROMPT_ONLY | _WITHOUT_EFFECT


def _zero(value: Any) -> bool:
    return value is False or (type(value) in (int, float) and value == 0)


def _one(value: Any) -> bool:
    return type(value) is int and value == 1


def _false(value: Any) -> bool:
    return value is False


def _empty(value: Any) -> bool:
    return value in ([], {}, "")


_HARMLESS: dict[str, Callable[[Any], bool]] = {
    # Count the tokens of one call only, so a seam would reset them.
    "frequency_penalty": _zero,
    "presence_penalty": _zero,
    "bad_words": _empty,
    # Branches differ from each other; a continuation could follow only one.
    "n": _one,
    "best_of": _one,
    "use_beam_search": _false,
    # A grammar starts again in each call.
    "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
    "tools": _empty,
    "functions": _empty,
    "tool_choice": lambda value: value == "none",
    "function_call": lambda value: value == "none",
    # Would need rebasing or the first call's data in the last chunk.
    "echo": _false,
    "suffix": _empty,
    "return_tokens_as_token_ids": _false,
    "include_stop_str_in_output": _false,
    "top_logprobs": _zero,
    "vllm_xargs": _empty,
}
"""Parameters that change meaning across calls, and which values of theirs do nothing. Null never does anything."""


def unsliceable(body: Mapping[str, Any], chat: bool) -> str | None:
    """Why this request must be one call (a parameter's name or a few words), or None where it may be sliced.

    ``body`` is the request as the client sent it; malformed values are reasons too: the engine is to refuse them.
    """
    for name, value in body.items():
        if value is None:
            continue
        harmless = _HARMLESS.get(name)
        if harmless is not None:
            if not harmless(value):
                return name
        elif name == "logprobs":
            # Chat: a boolean. Completions: a number, of which 0 asks for something.
            if not (chat and value is False):
                return name
        elif name not in _KNOWN:
            return f"unknown parameter {name[:60]}"
    return _combinations(body) or (_messages(body.get("messages")) if chat else _prompt(body.get("prompt")))


def _combinations(body: Mapping[str, Any]) -> str | None:
    """Parameters that are harmless alone and not together, or whose value we cannot read."""
    if body.get("seed") is not None and not (
        type(body.get("temperature")) in (int, float) and body["temperature"] == 0
    ):
        return "seed"  # the generator starts again in each call: the same draws again
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and (type(value) is not int or value < 1):
            return name
    minimum = body.get("min_tokens")
    if minimum is not None and (type(minimum) is not int or minimum < 0):
        return "min_tokens"
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        return "stream_options"
    stop = body.get("stop")
    if stop and not (isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(s, str) for s in stop))):
        return "stop"
    if body.get("skip_special_tokens") is False and body.get("spaces_between_special_tokens") is False:
        return "spaces_between_special_tokens"  # the detokeniser looks back one token for it
    if stop:
        if minimum:
            return "stop with min_tokens"  # the search begins at a token we could not place in the text
        if body.get("stop_token_ids") or body.get("skip_special_tokens") is False:
            return "stop with visible stop tokens"
    return None


def _messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "messages"
    for message in messages:
        if not isinstance(message, dict):
            return "messages"
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            return "messages"
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                return "multimodal content"
    return None


def _prompt(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list) or not prompt:
        return "prompt"
    if all(type(item) is int for item in prompt):
        return None
    if len(prompt) > 1:
        return "list of prompts"
    # Many clients always send a list, of one prompt.
    return _prompt(prompt[0]) if isinstance(prompt[0], str | list) else "prompt"
