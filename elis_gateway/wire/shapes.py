"""Whole responses, blank: what stands in for an engine's own shape until it has shown one.

Knows: vLLM 0.32's documents and the plainest OpenAI ones. Never: answers.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DETAILS", "PLAIN_CHAT", "PLAIN_COMPLETION", "VLLM_CHAT", "VLLM_COMPLETION"]

_VLLM_USAGE = {
    "prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": None,
    "completion_tokens_details": None,
}  # fmt: skip

DETAILS = {"cached_tokens": None, "created_cache_tokens": None, "multimodal_tokens": None}

VLLM_CHAT: dict[str, Any] = {
    "id": None, "object": "chat.completion", "created": 0, "model": None,
    "choices": [{
        "index": 0,
        "message": {
            "role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None,
            "function_call": None, "reasoning": None,
        },
        "logprobs": None, "finish_reason": None, "stop_reason": None, "token_ids": None, "routed_experts": None,
    }],
    "service_tier": None, "system_fingerprint": None, "usage": _VLLM_USAGE, "prompt_logprobs": None,
    "prompt_token_ids": None, "prompt_text": None, "kv_transfer_params": None, "ec_transfer_params": None,
    "metrics": None,
}  # fmt: skip

VLLM_COMPLETION: dict[str, Any] = {
    "id": None, "object": "text_completion", "created": 0, "model": None,
    "choices": [{
        "index": 0, "text": "", "logprobs": None, "finish_reason": None, "stop_reason": None, "token_ids": None,
        "prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None,
    }],
    "service_tier": None, "system_fingerprint": None, "usage": _VLLM_USAGE, "kv_transfer_params": None,
    "ec_transfer_params": None, "metrics": None,
}  # fmt: skip

PLAIN_CHAT: dict[str, Any] = {
    "id": None, "object": "chat.completion", "created": 0, "model": None,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": None}],
    "usage": {},
}  # fmt: skip

PLAIN_COMPLETION: dict[str, Any] = {
    "id": None, "object": "text_completion", "created": 0, "model": None,
    "choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": None}],
    "usage": {},
}  # fmt: skip
