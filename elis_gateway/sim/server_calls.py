"""A request body understood, or refused as the engine would refuse it.

Knows: the request fields, vLLM 0.32.0's error bodies (measured), what is not modelled here (refused rather than
ignored, so that no test passes by accident). Never: sockets, pacing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from elis_gateway.sim.faults import Fault
from elis_gateway.sim.language import Sampling
from elis_gateway.sim.script import Stops
from elis_gateway.sim.server_config import ServerConfig
from elis_gateway.sim.voice import Message, Voice

__all__ = ["CHAT", "COMPLETIONS", "Call", "Refusal", "Unauthorized", "bad_request", "body_of", "messages_of", "parse"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_PLAIN: dict[str, tuple[object, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "logprobs": (None, False), "top_logprobs": (None, 0),
    "suffix": (None, ""), "tools": (None, []), "bad_words": (None, []),
    "prompt_logprobs": (None,), "use_beam_search": (None, False), "prompt_embeds": (None,),
    "structured_outputs": (None,), "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,),
    "response_format": (None, {"type": "text"}),
}  # fmt: skip
"""Fields whose other values are not modelled."""


class Refusal(Exception):
    """The engine says no."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.retry_after: float | None = None

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return orjson.dumps({"error": error})


class Unauthorized(Refusal):
    """401, whose body vLLM's middleware writes in its own way."""

    def __init__(self) -> None:
        super().__init__(401, "Unauthorized", "")

    def body(self) -> bytes:
        return b'{"error":"Unauthorized"}'


def bad_request(message: str, param: str | None = None, value: object = None) -> Refusal:
    """400 in vLLM's words: with the parameter's name and value at the end where there is one."""
    if param is not None and value is not None:
        message = f"{message} (parameter={param}, value={value})"
    elif param is not None:
        message = f"{message} (parameter={param})"
    return Refusal(400, message, "BadRequestError", param)


def _invalid(param: str, expected: str, value: object) -> Refusal:
    where, said = f"body.{param}", f"Input should be a valid {expected}"
    detail = f"{{'type': '{expected}_type', 'loc': '{where}', 'msg': '{said}', 'input': {value!r}}}"
    return Refusal(400, f"1 validation error:\n  {detail}", "Bad Request", where)


@dataclass(slots=True)
class Call:
    """One understood request."""

    chat: bool
    model: str
    prompt: list[int]
    stops: Stops
    sampling: Sampling
    stream: bool
    include_usage: bool
    continuous_usage: bool
    token_ids: bool
    priority: int
    seeded: bool
    """The sampled draws are the request's own, so the same call says the same."""
    fault: Fault | None
    asked: int | None
    """The request's own token limit."""
    by_ids: bool
    """The prompt came as token ids."""


class _Fields:
    """Typed access to a body."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body

    def integer(self, name: str) -> int | None:
        value = self.body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise _invalid(name, "integer", value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _invalid(name, "number", value)
        if not low <= value <= high:
            word = "non-negative" if high == float("inf") else f"in [{low:g}, {high:g}]"
            raise bad_request(f"{name} must be {word}, got {float(value)}.", name, float(value))
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise _invalid(name, "boolean", value)
        return bool(value)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.body.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _invalid(name, "list", value)
        if "" in value:
            raise bad_request(f"{name} cannot contain an empty string.", name)
        return tuple(value)


def body_of(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request body."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        detail = f"{{'type': 'json_invalid', 'msg': 'JSON decode error', 'ctx': {{'error': '{exc}'}}}}"
        raise Refusal(400, f"1 validation error:\n  {detail}", "Bad Request", "body") from None
    if not isinstance(body, dict):
        raise _invalid("", "dictionary", type(body).__name__)
    return body


def messages_of(body: Mapping[str, Any]) -> list[Message]:
    """(role, text) of a chat body. Text parts of a message are joined."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise _invalid("messages", "list", messages)
    if not messages:
        raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
    found = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _invalid("messages", "dictionary", message)
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise bad_request("only text parts are modelled", "messages")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str | None):
            raise _invalid("messages", "string", content)
        found.append((message["role"], content or ""))
    return found


def parse(path: str, raw: bytes, config: ServerConfig, voice: Voice, *, priority: str | None = None) -> Call:
    """Understand a request. ``priority`` is the header ``X-Vllm-Priority``. Raises Refusal."""
    body = body_of(raw)
    fields = _Fields(body)
    chat = path == CHAT
    model = body.get("model", config.models[0])
    if model not in config.models:
        names = ", ".join(config.models)
        raise Refusal(404, f"The model `{model}` does not exist. Valid aliases: {names}.", "NotFoundError", "model")
    for name, plain in _PLAIN.items():
        if name in body and body[name] not in plain:
            raise bad_request(f"{name} is not modelled by this engine", name)
    asked = fields.integer("max_completion_tokens") if chat else None
    if asked is None:
        asked = fields.integer("max_tokens")
    length = fields.integer("sim_output_tokens")
    prompt = _chat_prompt(body, fields, voice, length) if chat else _completion_prompt(body, config, voice, length)
    stream = fields.flag("stream")
    options = body.get("stream_options")
    if options is not None and not stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    options = options if isinstance(options, dict) else {}
    seed = fields.integer("seed")
    fault = body.get("sim_fault")
    return Call(
        chat=chat,
        model=model,
        prompt=prompt,
        stops=_stops(fields, _limit(asked, len(prompt), chat, config)),
        sampling=Sampling(
            temperature=fields.number("temperature", config.temperature, 0, float("inf")),
            seed=seed or 0,
            presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
            repetition_penalty=fields.number("repetition_penalty", 1.0, 1e-6, 1e6),
            bias=_bias(body.get("logit_bias")),
        ),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("include_usage")) and bool(options.get("continuous_usage_stats")),
        token_ids=config.token_ids and fields.flag("return_token_ids"),
        priority=_priority(fields.integer("priority"), priority, config),
        seeded=seed is not None,
        fault=None if fault is None else _fault(fault),
        asked=asked,
        by_ids=not chat and not isinstance(body["prompt"], str),
    )


def _limit(asked: int | None, prompt: int, chat: bool, config: ServerConfig) -> int:
    """Tokens this call may make: the checks and defaults of vLLM 0.32.0, in its order."""
    context = config.max_model_len
    if asked is not None and asked > context:
        raise bad_request(
            f"max_tokens={asked} cannot be greater than max_model_len={context}. Please request fewer output tokens.",
            "max_tokens",
            asked,
        )
    if prompt > context:
        raise bad_request(
            f"This model's maximum context length is {context} tokens. However, your prompt contains at least"
            f" {context + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce the"
            " length of the input prompt.",
            "input_tokens",
            context + 1,
        )
    if asked is None:
        asked = context if chat else 16
    limit = min(asked, context - prompt)
    if limit < 1:
        raise bad_request(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    return limit


def _stops(fields: _Fields, limit: int) -> Stops:
    minimum = fields.integer("min_tokens") or 0
    if minimum < 0:
        raise bad_request(f"min_tokens must be greater than or equal to 0, got {minimum}.")
    if minimum > limit:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={limit}, got {minimum}.")
    tokens = fields.body.get("stop_token_ids") or []
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise _invalid("stop_token_ids", "list", tokens)
    return Stops(
        limit=limit,
        strings=fields.texts("stop"),
        tokens=frozenset(tokens),
        include=fields.flag("include_stop_str_in_output"),
        minimum=minimum,
        ignore_end=fields.flag("ignore_eos"),
    )


def _bias(given: object) -> tuple[tuple[int, float], ...]:
    if given is None:
        return ()
    if not isinstance(given, dict):
        raise _invalid("logit_bias", "dictionary", given)
    try:
        return tuple((int(token), min(max(float(value), -100.0), 100.0)) for token, value in given.items())
    except (TypeError, ValueError):
        raise bad_request("logit_bias contains key(s) that cannot be converted to integers", "logit_bias") from None


def _chat_prompt(body: Mapping[str, Any], fields: _Fields, voice: Voice, length: int | None) -> list[int]:
    continue_last = fields.flag("continue_final_message")
    open_turn = body.get("add_generation_prompt", True) is not False
    if continue_last and open_turn:
        raise bad_request(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "add_generation_prompt"
        )
    messages = messages_of(body)
    return voice.chat(messages, open_turn=open_turn, continue_last=continue_last, length=length)


def _completion_prompt(body: Mapping[str, Any], config: ServerConfig, voice: Voice, length: int | None) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if prompt is None or prompt == "":
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(prompt, str):
        return voice.prompt(prompt, length=length)
    if prompt == []:
        raise bad_request("You must pass at least one prompt")
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise bad_request("prompt: one string or one list of token ids is modelled by this engine", "prompt")
    if not config.id_prompts:
        raise bad_request("prompt: token ids are not accepted by this engine", "prompt")
    return prompt


def _priority(field: int | None, header: str | None, config: ServerConfig) -> int:
    if header is not None and header.lstrip("-").isdigit():
        field = int(header)
    if field and config.priority == "refuse":
        raise bad_request("Got priority but Priority scheduling is not enabled.", "priority", field)
    return field or 0


def _fault(data: object) -> Fault:
    try:
        return Fault.parse(data)
    except ValueError as exc:
        raise bad_request(str(exc), "sim_fault") from None
