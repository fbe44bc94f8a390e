"""The OpenAI surface as requests, and what of two answers to the same request has to be the same.

Asked with plain HTTP: a client library would hide what it does not know. Compared is every field of a document and of a
stream's joined events, but for ids, timestamps and the number of chunks; log-probabilities within ``TOLERANCE``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.engine.asking import MODEL

__all__ = ["CASES", "ENDLESS", "HALF", "PARSED", "TOLERANCE", "Case", "Reply", "ask", "bodies", "differences"]

TOLERANCE = 2e-3
"""Of a log-probability: prefill and decode add up in another order."""

COUNT = "1, 2, 3, 4, 5, 6,"
EMOJI = "Answer only with emoji: what do you eat for breakfast? 🥐🍳🥑"
KOREAN = "한국의 사계절을 짧게 설명해 주세요."
FLAGS = "What do these flags have in common? 🇰🇷🇯🇵🇨🇳🇺🇸🇫🇷 👨‍👩‍👧‍👦"
TEXT = "List five things to pack for a rainy weekend in the mountains."
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}


@dataclass(frozen=True)
class Case:
    """One way to ask. ``routes``: c(hat), t(ext) or both. ``sliced``: on vLLM; None where the engine
    refuses, or behind parsers where it is theirs to say (how they count, whether the answer thinks)."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    routes: str = "ct"
    prompt: Any = TEXT
    sliced: bool | None = True
    streams: tuple[bool, ...] = (False, True)
    subset: bool = False
    """In continuous integration too."""


CASES: tuple[Case, ...] = (
    Case("plain", subset=True),
    Case("no-limit", {"max_tokens": None, "stop": ["4"]}, routes="c", prompt=COUNT),
    Case("default-limit", {"max_tokens": None}, routes="t"),
    Case("max-completion-tokens", {"max_completion_tokens": 11, "max_tokens": 5}, routes="c"),
    Case("emoji", prompt=EMOJI, subset=True),
    Case("korean", prompt=KOREAN),
    Case("flags", prompt=FLAGS),
    # where it ends
    Case("stop", {"stop": ["10, 11"]}, prompt=COUNT, subset=True),
    Case("stop-overlapping", {"stop": ["0, 11", "10, 11,", "9, 10, 12"]}, prompt=COUNT),
    Case("stop-multi-byte", {"stop": ["🥑", "한국"]}, prompt=EMOJI),
    Case("stop-kept", {"stop": ["9, 10", "never"], "include_stop_str_in_output": True}, prompt=COUNT, subset=True),
    Case("stop-token", {"stop_token_ids": [41, 28, 30]}),
    Case("stop-token-kept", {"stop_token_ids": [41, 28], "include_stop_str_in_output": True}),
    Case("stop-and-token", {"stop": ["never", "the"], "stop_token_ids": [28, 198]}, subset=True),
    Case("stop-min-tokens", {"stop": [",", " the"], "min_tokens": 9}, prompt=COUNT, subset=True),
    Case("min-tokens", {"min_tokens": 20}, prompt="Answer with one word: what colour is snow?"),
    Case("ignore-eos", {"ignore_eos": True}, prompt="Answer with one word: what colour is snow?", subset=True),
    # which token
    Case("top-k-1", {"temperature": 1, "top_k": 1, "top_p": 0.9, "min_p": 0.1}),
    Case("logit-bias", {"logit_bias": {"28": -100, "30": 3.5, "284": 2}}),
    Case("allowed-tokens", {"allowed_token_ids": list(range(200, 900))}),
    Case("repetition", {"repetition_penalty": 1.3}, subset=True),
    Case("frequency", {"frequency_penalty": 1.1}, prompt=COUNT, subset=True),
    Case("frequency-bias", {"frequency_penalty": 0.7, "logit_bias": {"28": -4, "30": 2}}, prompt=COUNT),
    Case("frequency-negative", {"frequency_penalty": -0.5}, sliced=False),
    Case("presence", {"presence_penalty": 1.5}, sliced=False),
    Case("bad-words", {"bad_words": ["rain", "mountain"]}, sliced=False),
    Case("seed-greedy", {"seed": 7}),
    Case("seed", {"seed": 7, "temperature": 0.9}, sliced=False, subset=True),
    Case("beam", {"use_beam_search": True, "n": 2}, sliced=False, streams=(False,)),
    # what is told beside the text
    Case("logprobs", {"logprobs": 3}, routes="t", subset=True),
    Case("logprobs-0", {"logprobs": 0}, routes="t"),
    Case("logprobs-emoji", {"logprobs": 2}, routes="t", prompt=EMOJI),
    Case("logprobs-as-ids", {"logprobs": 2, "return_tokens_as_token_ids": True}, routes="t", prompt=EMOJI),
    Case("logprobs-of-ids", {"logprobs": 1, "logprob_token_ids": [28, 30, 41]}, routes="t"),
    Case("logprobs-stop", {"logprobs": 1, "stop": ["10, 11"]}, routes="t", prompt=COUNT),
    Case("chat-logprobs", {"logprobs": True, "top_logprobs": 3}, routes="c", subset=True),
    Case("chat-logprobs-0", {"logprobs": True}, routes="c", prompt=KOREAN),
    Case("chat-logprobs-emoji", {"logprobs": True, "top_logprobs": 2}, routes="c", prompt=EMOJI),
    Case("chat-logprobs-stop", {"logprobs": True, "top_logprobs": 1, "stop": ["rain"]}, routes="c"),
    Case("ids", {"return_token_ids": True}, subset=True),
    Case("ids-emoji", {"return_token_ids": True}, prompt=EMOJI),
    Case("ids-logprobs-stop", {"return_token_ids": True, "logprobs": 1, "stop": ["12, 13"]}, routes="t", prompt=COUNT),
    Case("prompt-logprobs", {"prompt_logprobs": 1}, sliced=False, streams=(False,)),
    Case("prompt-text", {"return_prompt_text": True}, routes="c", sliced=False),
    Case("usage", {"stream_options": {"include_usage": True}}, streams=(True,), subset=True),
    Case(
        "usage-running",
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        streams=(True,),
        subset=True,
    ),
    Case("special-tokens", {"skip_special_tokens": False}),
    Case("special-tokens-ids", {"skip_special_tokens": False, "return_token_ids": True, "ignore_eos": True}),
    Case("echo", {"echo": True}, routes="t", subset=True),
    Case("echo-ids", {"echo": True, "return_token_ids": True}, routes="t"),
    Case("echo-logprobs", {"echo": True, "logprobs": 1}, routes="t", sliced=False),
    Case("echo-chat", {"echo": True}, routes="c", sliced=False),
    Case("echo-alone", {"echo": True, "max_tokens": 0}, routes="t", sliced=False),
    Case("stream-interval", {"stream_interval": 5}),
    # several choices
    Case("n-greedy", {"n": 2}, sliced=None),
    Case("n", {"n": 2, "temperature": 1, "top_k": 1}, subset=True),
    Case("n-seed", {"n": 3, "seed": 5, "temperature": 0.9}, sliced=False),
    Case("n-logprobs", {"n": 2, "temperature": 1, "top_k": 1, "logprobs": 1, "stop": ["11"]}, routes="t", prompt=COUNT),
    Case("n-usage", {"n": 2, "temperature": 1, "top_k": 1, "stream_options": {"include_usage": True}}, streams=(True,)),
    Case("prompts", routes="t", prompt=[COUNT, TEXT, EMOJI], subset=True),
    Case("prompts-n", {"n": 2, "temperature": 1, "top_k": 1, "echo": True}, routes="t", prompt=[COUNT, TEXT]),
    Case("prompts-ids", {"return_token_ids": True}, routes="t", prompt=[[504, 1, 28], [30, 28]]),
    Case("token-prompt", routes="t", prompt=[504, 216, 33, 28, 216, 34, 28], subset=True),
    # what shapes the prompt
    Case("truncate", {"truncate_prompt_tokens": 6}),
    Case("truncate-left", {"truncate_prompt_tokens": 6, "truncation_side": "left"}),
    Case("no-special", {"add_special_tokens": False}),
    Case("kwargs", {"chat_template_kwargs": {"x": 1}, "documents": [{"text": "a"}]}, routes="c"),
    Case("salt", {"cache_salt": "salt", "user": "me", "session_id": "s"}),
    Case("priority", {"priority": 7, "request_id": "mine"}),
    Case("reasoning-effort", {"reasoning_effort": "low"}, routes="c"),
    Case("hosted", {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low"}),
    Case("unknown", {"frobnicate": 3}, sliced=False),
    # forms
    Case("json-object", {"response_format": {"type": "json_object"}}, sliced=False),
    Case(
        "json-schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}},
        sliced=False,
        subset=True,
    ),
    Case("choice", {"structured_outputs": {"choice": ["red", "blue"]}}, sliced=False),
    Case("text-format", {"response_format": {"type": "text"}}),
    Case("tools-none", {"tools": [TOOL], "tool_choice": "none"}, routes="c", subset=True),
    # refused
    Case("tools-auto", {"tools": [TOOL]}, routes="c", sliced=None),
    Case("tools-required", {"tools": [TOOL], "tool_choice": "required"}, routes="c", sliced=None),
    Case("tools-empty", {"tools": []}, routes="c", sliced=None),
    Case("image", {}, routes="c", sliced=None, prompt=[{"type": "image_url", "image_url": {"url": "data:x"}}]),
    Case("suffix", {"suffix": "the end"}, routes="t", sliced=None),
    Case("max-tokens-0", {"max_tokens": 0}, sliced=None),
    Case("max-tokens-negative", {"max_tokens": -3}, sliced=None),
    Case("max-tokens-huge", {"max_tokens": 5000}, sliced=None, subset=True),
    Case("max-tokens-text", {"max_tokens": "many"}, sliced=None),
    Case("min-above-max", {"min_tokens": 30}, sliced=None, subset=True),
    Case("temperature", {"temperature": -1}, sliced=None, subset=True),
    Case("top-p", {"top_p": 1.5}, sliced=None),
    Case("logprobs-negative", {"logprobs": -5}, routes="t", sliced=None),
    Case("top-logprobs-alone", {"top_logprobs": 3}, routes="c", sliced=None),
    Case("logprobs-many", {"logprobs": 500}, routes="t", sliced=None),
    Case("n-0", {"n": 0}, sliced=None),
    Case("n-bias", {"n": 2, "temperature": 1, "logit_bias": {"99999999": 1}}, sliced=None),
    Case("bias-unknown", {"logit_bias": {"99999999": 1}}, sliced=None),
    Case("stop-empty", {"stop": [""]}, sliced=None),
    Case("stop-many", {"stop": [f"{n}" for n in range(300)]}, sliced=None),
    Case("prompt-long", routes="ct", prompt="rain " * 3000, sliced=None, subset=True),
    Case("prompt-empty", routes="t", prompt="", sliced=None),
    Case("prompts-long", routes="t", prompt=[COUNT, "rain " * 3000], sliced=None, streams=(False,)),
    Case("options-without-stream", {"stream_options": {"include_usage": True}}, sliced=None, streams=(False,)),
    Case("seed-huge", {"seed": 2**70}, sliced=None),
    Case("model", {"model": "nobody"}, sliced=None, streams=(False,)),
)


ENDLESS = frozenset(
    {"max-tokens-huge", "max-tokens-negative", "max-tokens-text", "max-tokens-0", "default-limit", "no-limit",
     "echo-alone", "prompt-long", "prompts-long"}
)  # fmt: skip
"""Cases that vLLM refuses, or ends, and llama.cpp answers to the end of its context."""
HALF = frozenset({"korean/chat", *(f"{name}/completions" for name in ("emoji", "flags", "korean", "stop-multi-byte"))})
"""Requests whose answer llama.cpp may end with half a character, which it shows in whole completions and in no stream;
an answer of several calls shows it if its last call is a whole completion."""

_SAID = {"39122": 100, "28": 95, "588": 90, "2683": 85, "416": 80, "4": 50}
_OPEN = {
    "chat_template_kwargs": {"open": True}, "logit_bias": {"1": -100, "2": -100} | _SAID, "repetition_penalty": 1e6
}  # fmt: skip
"""The prompt ends in an open thought, of which five words are made to be said before it is closed (token 4)."""
_OPENED = {"logit_bias": {"3": 30, "4": 8}, "frequency_penalty": 8, "ignore_eos": True}
_TOOL = {"tools": [TOOL]}
_NAMED = {"tool_choice": {"type": "function", "function": {"name": TOOL["function"]["name"]}}}
_CALLED = _OPEN | _TOOL | {"parallel_tool_calls": False, "logit_bias": {**_OPEN["logit_bias"], "5": 40}}
"""The thoughts are followed by the mark of a call (token 5), and where one at most is allowed a grammar by the rest."""
_JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}}
_USAGE = {"stream_options": {"include_usage": True}}
_RUNNING = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}

PARSED: tuple[Case, ...] = (
    Case("thoughts", streams=(True,), subset=True, routes="c"),
    Case("thoughts-document", subset=True, streams=(False,), routes="c"),
    Case("thoughts-document-emoji", streams=(False,), prompt=EMOJI, routes="c"),
    Case("closed-document", _OPEN, subset=True, streams=(False,), routes="c"),
    Case("closed-late-document", _OPEN | {"min_tokens": 20}, streams=(False,), routes="c"),
    Case("closed-usage", _OPEN | _USAGE, subset=True, streams=(True,), routes="c"),
    Case("opened-usage", _OPENED | _USAGE, sliced=None, streams=(True,), routes="c"),
    Case("opened-document", _OPENED, sliced=None, streams=(False,), routes="c"),
    Case("usage-running", _RUNNING, sliced=False, streams=(True,), routes="c"),
    Case("thoughts-emoji", streams=(True,), prompt=EMOJI, routes="c"),
    Case("thoughts-korean", streams=(True,), prompt=KOREAN, routes="c"),
    Case("thoughts-flags", streams=(True,), prompt=FLAGS, routes="c"),
    Case("closed", _OPEN, streams=(True,), subset=True, routes="c"),
    Case("closed-emoji", _OPEN, streams=(True,), prompt=EMOJI, routes="c"),
    Case("closed-late", _OPEN | {"min_tokens": 20}, streams=(True,), routes="c"),
    Case("opened", _OPENED, streams=(True,), routes="c"),
    Case("n", {"n": 2, "temperature": 1, "top_k": 1}, streams=(True,), routes="c"),
    Case("no-limit", _OPEN | {"max_tokens": None, "stop_token_ids": [28]}, streams=(True,), routes="c"),
    Case("usage", _USAGE, sliced=None, subset=True, streams=(True,), routes="c"),
    Case("stop", {"stop": ["rain"]}, sliced=False, streams=(True,), routes="c"),
    Case("hidden", {"include_reasoning": False}, sliced=False, streams=(True,), routes="c"),
    Case("logprobs", {"logprobs": True, "top_logprobs": 1}, sliced=False, streams=(True,), routes="c"),
    Case("ids", {"return_token_ids": True}, sliced=False, streams=(True,), routes="c"),
    Case("tools-none", _TOOL | {"tool_choice": "none"}, streams=(True,), subset=True, routes="c"),
    Case("tools", _TOOL, sliced=None, subset=True, routes="c"),
    Case("tools-required", _TOOL | {"tool_choice": "required"}, sliced=None, routes="c"),
    Case("json", {"response_format": {"type": "json_object"}}, sliced=None, routes="c"),
    Case("closed-tools", _OPEN | _TOOL, subset=True, routes="c"),
    Case("closed-tools-usage", _OPEN | _TOOL | _USAGE, streams=(True,), routes="c"),
    Case("closed-tools-required", _OPEN | _TOOL | {"tool_choice": "required", "max_tokens": 60}, routes="c"),
    Case("closed-tools-named", _OPEN | _TOOL | _NAMED | {"max_tokens": 60}, routes="c"),
    Case("closed-tools-called", _CALLED | {"max_tokens": 60}, routes="c"),
    Case("closed-json", _OPEN | _JSON | {"max_tokens": 40}, subset=True, routes="c"),
    Case("closed-choice", _OPEN | {"structured_outputs": {"choice": ["red", "blue"]}}, routes="c"),
)
"""Chats of an engine with a reasoning and a tool parser (``benchmarks.vllm_engine.marked``)."""


def bodies(case: Case, *, limit: int = 24) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, path, body) of each request of a case."""
    for route in case.routes:
        for stream in case.streams:
            body: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": limit}
            path = "/v1/chat/completions" if route == "c" else "/v1/completions"
            body |= (
                {"messages": [{"role": "user", "content": case.prompt}]} if route == "c" else {"prompt": case.prompt}
            )
            body |= case.fields
            body = {name: value for name, value in body.items() if value is not None}
            if stream:
                body["stream"] = True
            kind = f"{'chat' if route == 'c' else 'completions'}{'-stream' if stream else ''}"
            yield f"{case.name}/{kind}", path, body


@dataclass
class Reply:
    """What came back: compared whole but for ``sliced``."""

    status: int
    content: Any
    sliced: str = field(compare=False, default="")


async def ask(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> Reply:
    """One request. A stream comes back joined."""
    headers = {"X-Elis-Debug": "1", "Connection": "close"}
    async with session.post(url + path, json=body, headers=headers) as response:
        data = await response.read()
        sliced = response.headers.get("X-Elis-Sliced", "")
        if response.content_type == "text/event-stream":
            return Reply(response.status, _joined(data), sliced)
        content = json.loads(data)
        if response.status == 200:
            content = _document(content)
        return Reply(response.status, content, sliced)


def _document(content: dict[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in content.items() if name not in ("id", "created")}
    for choice in content.get("choices", ()):
        for call in (choice.get("message") or {}).get("tool_calls") or ():
            call.pop("id", None)
    return content


def _joined(data: bytes) -> dict[str, Any]:
    """A stream as its client adds it up."""
    events = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events if event not in ("[DONE]", "null")]  # null: llama.cpp
    result: dict[str, Any] = {
        "done": events[-1:] == ["[DONE]"],
        "ids": len({chunk.get("id") for chunk in chunks}),
        "errors": [chunk["error"] for chunk in chunks if "error" in chunk],
        "models": sorted({(chunk["model"], chunk["object"]) for chunk in chunks if "model" in chunk}),
        "fingerprints": sorted({chunk["system_fingerprint"] for chunk in chunks if chunk.get("system_fingerprint")}),
        "usage": [chunk["usage"] for chunk in chunks if chunk.get("usage") and not chunk["choices"]],
        "prompt_ids": [chunk["prompt_token_ids"] for chunk in chunks if chunk.get("prompt_token_ids")],
        "prompt_text": [chunk["prompt_text"] for chunk in chunks if chunk.get("prompt_text")],
        "choices": {},
    }
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            said = result["choices"].setdefault(
                choice["index"],
                {
                    "text": "",
                    "thoughts": "",
                    "tools": {},
                    "logprobs": [],
                    "ids": [],
                    "ends": [],
                    "roles": [],
                    "prompts": [],
                    "keys": set(),
                },
            )
            delta = choice.get("delta") or {"content": choice.get("text")}
            said["text"] += delta.get("content") or ""
            said["thoughts"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or ():
                parts = said["tools"].setdefault(call["index"], {"name": "", "arguments": ""})
                for name, part in (call.get("function") or {}).items():
                    parts[name] += part or ""
            said["roles"] += [delta["role"]] if "role" in delta else []
            said["ids"] += choice.get("token_ids") or []
            said["prompts"] += [choice["prompt_token_ids"]] if choice.get("prompt_token_ids") else []
            if lists := choice.get("logprobs"):
                said["logprobs"] += lists["content"] if "content" in lists else list(zip(*lists.values(), strict=True))
            if choice.get("finish_reason"):
                said["ends"].append((choice["finish_reason"], choice.get("stop_reason")))
            said["running"] = chunk.get("usage")
            said["keys"].update((*chunk, *(f"choices.{name}" for name in choice), *(f"delta.{name}" for name in delta)))
    return result


def differences(reference: Reply, reply: Reply, *, cached: bool = True) -> list[str]:
    """One line per difference: path, the engine's value, the gateway's. ``cached``: usage details are compared too."""
    found = [] if reference.status == reply.status else [f"status: {reference.status} != {reply.status}"]
    found += _compare(reference.content, reply.content, "", cached)
    return found


def _compare(one: Any, other: Any, path: str, cached: bool) -> list[str]:
    if path.endswith("prompt_tokens_details") and not cached:
        return []
    if isinstance(one, dict) and isinstance(other, dict):  # llama.cpp: how long its calls took
        one, other = ({k: v for k, v in d.items() if k not in ("timings", "__verbose")} for d in (one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        found = (
            [f"{path}: keys {sorted(map(str, one))} != {sorted(map(str, other))}"] if one.keys() != other.keys() else []
        )
        for name in one.keys() & other.keys():
            found += _compare(one[name], other[name], f"{path}.{name}", cached)
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{path}: {len(one)} entries != {len(other)}: {one!r:.200} != {other!r:.200}"]
        return [
            line
            for n, (a, b) in enumerate(zip(one, other, strict=True))
            for line in _compare(a, b, f"{path}.{n}", cached)
        ]
    if isinstance(one, float) and isinstance(other, float | int) and not isinstance(other, bool):
        return [] if abs(one - other) <= TOLERANCE else [f"{path}: {one!r} != {other!r}"]
    return [] if one == other else [f"{path}: {one!r:.300} != {other!r:.300}"]
