"""Which parameters mean the same when an answer is produced by several calls, and why the others do not.

A whitelist: a request is sliced only if every parameter it sets is known here to keep its meaning; everything else runs
as one call, so unknown new parameters work and are never half obeyed. Each row was read in vLLM 0.32's sources
(``SamplingParams``, ``ChatCompletionRequest``, ``CompletionRequest``); ``docs/compatibility.md`` is made from them.

Knows: names, harmless values, what each way of continuing keeps. Never: how a request is continued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, StrEnum
from typing import Any, NamedTuple

from elis_gateway.wire.thoughts import Thinking

__all__ = ["CARRIED", "PARAMETERS", "Kind", "Parameter", "Way", "alone_at_last", "carried", "unsliceable"]


class Way(StrEnum):
    """By what means an answer would go on after a seam."""

    IDS = "ids"
    """vLLM: by token ids, on the completions route."""
    CHAT_IDS = "chat ids"
    """vLLM: by token ids, chats on the chat route too."""
    PARSED = "parsed"
    """The same with a tool parser: chats on the chat route alone, so that the engine parses all of them."""
    THOUGHTS = "thoughts"
    """The same with a reasoning parser, which tells from the prompt whether the answer still thinks."""
    LLAMA = "llama.cpp"
    """llama.cpp: by token ids and texts mixed."""
    TEXT = "text"
    """By text, tokenised again."""


class Kind(Enum):
    """What a parameter has to do with a seam."""

    CARRIED = "carried"
    """Acts on every token: sent again with every continuation."""
    PROMPT = "prompt"
    """Has done its work when the prompt is known."""
    OURS = "ours"
    """Set or taken out by the gateway in its own calls, and accounted for in what the client sees."""
    NOTHING = "nothing"
    """Read by no part of an answer that is sliced."""
    ALONE = "alone"
    """Changes meaning across calls."""


class Parameter(NamedTuple):
    """One row. A value that is null, or one that ``idle`` says does nothing, never makes a request unsliceable."""

    name: str
    kind: Kind
    why: str
    """How it is kept exact, or what a seam would do to it."""
    idle: Callable[[Any], bool] | None = None
    """Of an ALONE parameter: the values that do nothing."""
    idle_words: str = ""


def _zero(value: Any) -> bool:
    return value is False or (type(value) in (int, float) and value == 0)


def _one(value: Any) -> bool:
    return type(value) is int and value == 1


def _false(value: Any) -> bool:
    return value is False


def _empty(value: Any) -> bool:
    return value in ([], {}, "")


def _text_format(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


def _none_chosen(value: Any) -> bool:
    return bool(value == "none")


def _text_alone(value: Any) -> bool:
    return bool(value == ["text"])


_GRAMMAR = "the grammar would start again in each call"
_OUTSIDE = "an option of hosted models; vLLM and llama.cpp do not read it"
_RENDER = "read by the render routes alone"

PARAMETERS: dict[str, Parameter] = {
    row.name: row
    for row in (
        # what is asked
        Parameter("model", Kind.OURS, "an alias is translated both ways"),
        Parameter(
            "messages",
            Kind.PROMPT,
            "text; with other parts: one call, as is on llama.cpp a document that goes on from the assistant's",
        ),
        Parameter(
            "prompt", Kind.PROMPT, "text or token ids; of a list, each is a job of its own (llama.cpp: one call)"
        ),
        Parameter("suffix", Kind.ALONE, "models that fill in the middle see it once", _empty, "empty"),
        Parameter("prompt_embeds", Kind.ALONE, "there are no ids to continue from"),
        Parameter("documents", Kind.PROMPT, ""),
        Parameter("chat_template", Kind.PROMPT, ""),
        Parameter("chat_template_kwargs", Kind.PROMPT, ""),
        Parameter("add_generation_prompt", Kind.PROMPT, ""),
        Parameter("continue_final_message", Kind.PROMPT, ""),
        Parameter("add_special_tokens", Kind.PROMPT, ""),
        Parameter("reasoning_effort", Kind.PROMPT, ""),
        Parameter("truncate_prompt_tokens", Kind.PROMPT, "continuations begin with the prompt as it was truncated"),
        Parameter("truncation_side", Kind.PROMPT, ""),
        Parameter("mm_processor_kwargs", Kind.PROMPT, ""),
        Parameter("media_io_kwargs", Kind.PROMPT, ""),
        Parameter("echo", Kind.OURS, "completions of a text without logprobs: put in front by us; else one call"),
        # how long
        Parameter("max_tokens", Kind.OURS, "each call asks for what is left, or for a window"),
        Parameter(
            "max_completion_tokens",
            Kind.OURS,
            "goes before max_tokens in chats; of completions on llama.cpp, which reads it there too: one call",
        ),
        Parameter("min_tokens", Kind.OURS, "each call asks for what is left of it"),
        Parameter("ignore_eos", Kind.CARRIED, ""),
        Parameter("stop", Kind.CARRIED, "searched over seams by us"),
        Parameter("stop_token_ids", Kind.CARRIED, ""),
        Parameter("include_stop_str_in_output", Kind.CARRIED, "always asked of the engine; cut off by us if unwanted"),
        Parameter("thinking_token_budget", Kind.ALONE, "counts the tokens of one call"),
        Parameter("repetition_detection", Kind.ALONE, "looks at the tokens of one call"),
        # which token
        Parameter("temperature", Kind.CARRIED, ""),
        Parameter("top_p", Kind.CARRIED, ""),
        Parameter("top_k", Kind.CARRIED, ""),
        Parameter("min_p", Kind.CARRIED, ""),
        Parameter("logit_bias", Kind.CARRIED, ""),
        Parameter("allowed_token_ids", Kind.CARRIED, ""),
        Parameter("repetition_penalty", Kind.CARRIED, "counts prompt and answer alike, so a seam changes nothing"),
        Parameter("presence_penalty", Kind.CARRIED, "llama.cpp; on vLLM one call: a token said again counts twice"),
        Parameter("frequency_penalty", Kind.CARRIED, "vLLM: what was said goes into logit_bias, if not negative"),
        Parameter("seed", Kind.CARRIED, "at temperature 0; else one call, as its draws would begin again"),
        Parameter("watermarking", Kind.ALONE, "not shown to survive a seam", _false, "false"),
        Parameter("bad_words", Kind.ALONE, "a word of several tokens could hide in a seam", _empty, "empty"),
        Parameter("logits_processors", Kind.ALONE, "may count the tokens of one call", _empty, "empty"),
        Parameter("vllm_xargs", Kind.ALONE, "for extensions we do not know", _empty, "empty"),
        Parameter(
            "n",
            Kind.ALONE,
            "choices differ: each is a job of its own, where ids are told (up to 64; not on llama.cpp)",
            _one,
            "1",
        ),
        Parameter("best_of", Kind.ALONE, "compares whole answers", _one, "1"),
        Parameter("use_beam_search", Kind.ALONE, "compares whole answers", _false, "false"),
        Parameter("early_stopping", Kind.NOTHING, "of beam search alone"),
        Parameter("length_penalty", Kind.NOTHING, "of beam search alone"),
        # what form
        Parameter("response_format", Kind.ALONE, _GRAMMAR, _text_format, "text"),
        Parameter("structured_outputs", Kind.ALONE, _GRAMMAR),
        Parameter("guided_json", Kind.ALONE, _GRAMMAR),
        Parameter("guided_regex", Kind.ALONE, _GRAMMAR),
        Parameter("guided_choice", Kind.ALONE, _GRAMMAR),
        Parameter("guided_grammar", Kind.ALONE, _GRAMMAR),
        Parameter("tools", Kind.PROMPT, "with tool_choice none; else see Parsers"),
        Parameter("tool_choice", Kind.ALONE, "a parser or a grammar follows the whole answer", _none_chosen, "none"),
        Parameter("functions", Kind.ALONE, "a parser follows the whole answer", _empty, "empty"),
        Parameter("function_call", Kind.ALONE, "a parser follows the whole answer", _none_chosen, "none"),
        Parameter("parallel_tool_calls", Kind.NOTHING, "read where tools may be called"),
        Parameter("include_reasoning", Kind.NOTHING, "one call where it is false and a parser finds thoughts"),
        Parameter("skip_special_tokens", Kind.CARRIED, ""),
        Parameter("spaces_between_special_tokens", Kind.CARRIED, "not with special tokens shown"),
        # what is told beside the text
        Parameter("stream", Kind.OURS, ""),
        Parameter("stream_options", Kind.OURS, "usage is counted over the whole answer"),
        Parameter("stream_interval", Kind.OURS, "taken out: text comes token by token, sooner than asked for"),
        Parameter("logprobs", Kind.CARRIED, "text_offset is counted from the beginning of the answer"),
        Parameter("top_logprobs", Kind.CARRIED, ""),
        Parameter("logprob_token_ids", Kind.CARRIED, ""),
        Parameter("return_tokens_as_token_ids", Kind.CARRIED, ""),
        Parameter("return_token_ids", Kind.OURS, "not llama.cpp's, which tells none: one call there"),
        Parameter("prompt_logprobs", Kind.ALONE, "the first call alone could tell, and not as a stream"),
        Parameter("return_prompt_text", Kind.ALONE, "the first call alone could tell", _false, "false"),
        Parameter("return_token_offsets", Kind.NOTHING, _RENDER),
        Parameter("mm_payload", Kind.NOTHING, _RENDER),
        Parameter("return_mm_kwargs", Kind.NOTHING, _RENDER),
        Parameter("routed_experts_prompt_start", Kind.ALONE, "experts of one call alone", _zero, "0"),
        # who asks
        Parameter("user", Kind.CARRIED, ""),
        Parameter("priority", Kind.OURS, "clients do not order the engine's queue: replaced by the scheduler's"),
        Parameter("request_id", Kind.OURS, "each call has an id of its own"),
        Parameter("session_id", Kind.CARRIED, ""),
        Parameter("cache_salt", Kind.CARRIED, ""),
        Parameter("kv_transfer_params", Kind.ALONE, "belongs to one call", _empty, "empty"),
        Parameter("ec_transfer_params", Kind.ALONE, "belongs to one call", _empty, "empty"),
        Parameter("sim_output_tokens", Kind.PROMPT, "our embedded engine's forced length, written into the prompt"),
        # of hosted models
        Parameter("metadata", Kind.NOTHING, _OUTSIDE),
        Parameter("store", Kind.NOTHING, _OUTSIDE),
        Parameter("service_tier", Kind.NOTHING, _OUTSIDE),
        Parameter("safety_identifier", Kind.NOTHING, _OUTSIDE),
        Parameter("prompt_cache_key", Kind.NOTHING, _OUTSIDE),
        Parameter("prompt_cache_options", Kind.NOTHING, _OUTSIDE),
        Parameter("prompt_cache_retention", Kind.NOTHING, _OUTSIDE),
        Parameter("verbosity", Kind.NOTHING, _OUTSIDE),
        Parameter("moderation", Kind.ALONE, "may judge the answer as a whole"),
        Parameter("prediction", Kind.ALONE, "may be compared with the answer as a whole"),
        Parameter("modalities", Kind.ALONE, "may ask for more than text", _text_alone, '["text"]'),
        Parameter("audio", Kind.ALONE, "asks for more than text"),
        Parameter("web_search_options", Kind.ALONE, "a tool of hosted models"),
    )
}
"""Every parameter of the two generating routes, as vLLM 0.32, llama.cpp's users and OpenAI's reference name them."""

CARRIED = frozenset(name for name, row in PARAMETERS.items() if row.kind is Kind.CARRIED)
"""Sent again with every continuation; the rest has done its work when the prompt is known, or is set by us."""

_LOGPROBS = frozenset({"logprobs", "top_logprobs", "logprob_token_ids", "return_tokens_as_token_ids"})

_LLAMA_CARRIED = frozenset({"repeat_penalty", "repeat_last_n", "typical_p", "id_slot", "cache_prompt"})
"""llama.cpp's own, which act on each token and what is before it, whether prompt or answer."""


_NOT_BY_TEXT = frozenset({"truncate_prompt_tokens", "continue_final_message"})
"""What would be done to the answer too, where it is sent back as a part of the prompt."""


_HARMLESS = {way: frozenset(row.name for row in PARAMETERS.values() if row.kind is not Kind.ALONE) for way in Way}
_HARMLESS[Way.TEXT] -= _NOT_BY_TEXT
_HARMLESS[Way.LLAMA] |= _LLAMA_CARRIED
"""What is no reason for one call, whatever its value, by how an answer would go on."""


_PARSER_CARRIED = frozenset({"chat_template_kwargs", "reasoning_effort", "tools", "tool_choice", "parallel_tool_calls"})
"""What a parser is made with, beside what acts on every token."""

_GRAMMARS = frozenset({"response_format", "structured_outputs"})
_AFTER_THOUGHTS = _GRAMMARS | {"tool_choice"}
"""Beside tools: what has no say before the thoughts are over, and then needs one call."""

_BY_CHAT = frozenset({Way.CHAT_IDS, Way.PARSED, Way.THOUGHTS})
_BY_IDS = _BY_CHAT | {Way.IDS}


def carried(body: Mapping[str, Any], way: Way) -> dict[str, Any]:
    """What of a request goes into each of its continuations."""
    more = _LLAMA_CARRIED if way is Way.LLAMA else frozenset[str]()
    if way in (Way.PARSED, Way.THOUGHTS):
        more = _PARSER_CARRIED if way is Way.PARSED else _PARSER_CARRIED | _GRAMMARS
    return {name: value for name, value in body.items() if value is not None and (name in CARRIED or name in more)}


def alone_at_last(body: Mapping[str, Any]) -> bool:
    """Of an answer whose thoughts are sliced: is the rest to be one call?"""
    return not body.get("stream") or _offers_tools(body) or any(not _idle(name, body) for name in _AFTER_THOUGHTS)


def _idle(name: str, body: Mapping[str, Any]) -> bool:
    """Is this ALONE parameter absent, or of a value that does nothing?"""
    value, row = body.get(name), PARAMETERS[name]
    return value is None or (row.idle is not None and row.idle(value))


def _offers_tools(body: Mapping[str, Any]) -> bool:
    return body.get("tools") is not None and not _empty(body["tools"]) and body.get("tool_choice") != "none"


def unsliceable(body: Mapping[str, Any], chat: bool, way: Way, thinking: Thinking | None = None) -> str | None:
    """Why this request must be one call (a parameter's name or a few words), or None where it may be sliced.

    ``body`` is the request as the client sent it; malformed values are reasons too: the engine is to refuse them.
    ``thinking``: what is known of the engine's reasoning parser.
    """
    later = _AFTER_THOUGHTS if way is Way.THOUGHTS and thinking is not None and thinking.waits else frozenset[str]()
    harmless = _HARMLESS[way]
    for name, value in body.items():
        if name in harmless or value is None:
            continue
        row = PARAMETERS.get(name)
        if row is None:
            return f"unknown parameter {name[:60]}"
        if name in _NOT_BY_TEXT and value is not False:
            return name
        if row.kind is Kind.ALONE and name not in later and not (row.idle is not None and row.idle(value)):
            return name
    return (
        _limits(body, chat, way)
        or _stops(body, way)
        or _draws(body, way)
        or _told(body, chat, way)
        or (_chat(body, way, bool(later)) if chat else _prompt(body.get("prompt")) or _echo(body, way))
        or (_thoughts(body, thinking) if way is Way.THOUGHTS else None)
    )


def _thoughts(body: Mapping[str, Any], thinking: Thinking | None) -> str | None:
    """What of an answer that is thoughts first and content after would not be the engine's own."""
    if not body.get("stream") and (thinking is None or thinking.whole is None):
        return "reasoning of a whole document"
    if body.get("include_reasoning") is False:
        return "include_reasoning"  # no token is told while thoughts are hidden
    options = body.get("stream_options") or {}
    if options.get("include_usage") and (thinking is None or thinking.streamed is None):
        return "usage of reasoning tokens"  # counted in a way we do not know
    if options.get("include_usage") and options.get("continuous_usage_stats"):
        return "running usage of reasoning tokens"
    if body.get("skip_special_tokens") is False:
        return "skip_special_tokens"
    return next((name for name in ("logprobs", "return_token_ids", "stop") if body.get(name)), None)


def _least(body: Mapping[str, Any], chat: bool) -> float:
    """The request's own limit, which ``min_tokens`` must not exceed."""
    asked = [body[n] for n in ("max_completion_tokens", "max_tokens") if (chat or n == "max_tokens") and body.get(n)]
    return float(asked[0] if asked else "inf" if chat else 16)


def _limits(body: Mapping[str, Any], chat: bool, way: Way) -> str | None:
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and name == "max_completion_tokens" and not chat and way not in _BY_IDS:
            return name  # of chats, and vLLM reads it there alone; llama.cpp everywhere
        if value is not None and (type(value) is not int or value < 1):
            return name
    minimum = body.get("min_tokens")
    if minimum is not None and (type(minimum) is not int or minimum < 0 or minimum > _least(body, chat)):
        return "min_tokens"
    return None


def _stops(body: Mapping[str, Any], way: Way) -> str | None:
    stop = body.get("stop")
    if stop and not (isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(s, str) for s in stop))):
        return "stop"
    if body.get("skip_special_tokens") is False:
        if body.get("spaces_between_special_tokens") is False:
            return "spaces_between_special_tokens"  # the detokeniser looks back one token for it
        if stop:
            return "stop with special tokens shown"  # which of them ends an answer only the engine knows
    if body.get("include_stop_str_in_output") not in (None, False) and way in (Way.LLAMA, Way.TEXT):
        return "include_stop_str_in_output"  # not theirs: an engine that ignores it answers otherwise than we would
    if stop and way in (Way.LLAMA, Way.TEXT) and body.get("min_tokens"):
        return "stop with min_tokens"  # where in the text a token stands is not told
    if stop and way is Way.TEXT and body.get("stop_token_ids"):
        return "stop with stop_token_ids"
    return None


def _draws(body: Mapping[str, Any], way: Way) -> str | None:
    """Parameters of the choice of a token that keep their meaning only here and there."""
    temperature, seed = body.get("temperature"), body.get("seed")
    if seed is not None and not (type(seed) is int and type(temperature) in (int, float) and temperature == 0):
        # The generator starts again in each call: the same draws again. Beyond 64 bits it would be sent as a float.
        return "seed"
    if way is Way.LLAMA:
        return None  # its penalties count prompt and answer alike
    presence, frequency = body.get("presence_penalty"), body.get("frequency_penalty")
    if presence is not None and not _zero(presence):
        return "presence_penalty"  # of a token said before and again, a bias and the engine would each take it off
    if frequency is None or _zero(frequency):
        return None
    if way is Way.TEXT or type(frequency) not in (int, float):
        return "frequency_penalty"
    if frequency < 0:
        return "negative frequency_penalty"  # grows without end, while logit_bias ends at 100
    repetition = body.get("repetition_penalty")
    if repetition is not None and repetition != 1:
        return "frequency_penalty with repetition_penalty"  # that one is multiplied between the bias and this
    bias = body.get("logit_bias")
    if bias is not None and not (
        isinstance(bias, dict)
        and all(
            token.isascii() and token.isdigit() and type(value) in (int, float) and -100 <= value <= 100
            for token, value in bias.items()
        )
    ):
        return "logit_bias"
    return None


def _told(body: Mapping[str, Any], chat: bool, way: Way) -> str | None:
    """What is to be told beside the text."""
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or (options and not body.get("stream"))):
        return "stream_options"
    if body.get("return_token_ids") and way is Way.LLAMA:
        return "return_token_ids"  # not its own, so it tells none
    if _LOGPROBS.isdisjoint(body):
        return None
    asked = [name for name in _LOGPROBS if body.get(name) is not None and not _zero(body[name])]
    if chat:
        if not asked:
            return None
        return None if way in _BY_CHAT and body.get("logprobs") is True else "logprobs"
    if body.get("logprobs") is None:  # of completions, 0 asks for something
        asked = [name for name in asked if name == "logprob_token_ids"]
    elif way in _BY_IDS and not body.get("echo"):
        return None
    else:
        asked.append("logprobs")
    return asked[0] if asked else None


def _chat(body: Mapping[str, Any], way: Way, tools: bool) -> str | None:
    """``tools``: they may be called."""
    if body.get("echo") not in (None, False):
        return "echo"
    if _offers_tools(body) and not tools:
        return "tools"
    messages = body.get("messages")
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
    if way is Way.LLAMA and not body.get("stream") and messages[-1].get("role") == "assistant":
        return "an answer that its client has begun"  # llama.cpp's documents repeat that beginning, its streams do not
    return None


def _echo(body: Mapping[str, Any], way: Way) -> str | None:
    """The prompt in front of the answer, which we can put there if it is a text."""
    if body.get("echo") in (None, False):
        return None
    prompt = body.get("prompt")
    prompt = prompt[0] if isinstance(prompt, list) else prompt
    return None if isinstance(prompt, str) and way in _BY_IDS and body["echo"] is True else "echo"


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
