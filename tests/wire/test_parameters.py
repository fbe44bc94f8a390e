"""Which requests may be sliced, on which engines, and whether the list of parameters is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from elis_gateway.wire.continuation import Answer, Mode
from elis_gateway.wire.openai import Route, parse
from elis_gateway.wire.parameters import CARRIED, PARAMETERS, Kind, Way, alone_at_last, carried, unsliceable
from elis_gateway.wire.thoughts import Count, Thinking

STORED = orjson.loads((Path(__file__).parent / "vllm_0_32_parameters.json").read_bytes())
"""The fields of vLLM 0.32.0's ``ChatCompletionRequest`` and ``CompletionRequest``, read off a running one."""


def chat(way: Way = Way.IDS, **body: Any) -> str | None:
    return unsliceable({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | body, True, way)


def thoughtful(known: Thinking | None = None, **body: Any) -> str | None:
    whole = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | body
    return unsliceable(whole, True, Way.THOUGHTS, known)


def completion(way: Way = Way.IDS, **body: Any) -> str | None:
    return unsliceable({"model": "m", "prompt": "hi"} | body, False, way)


# -- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_every_parameter_of_vllm_has_its_row(route: str) -> None:
    assert not set(STORED[route]) - set(PARAMETERS)


@pytest.mark.parametrize(
    "reference", [chat_create_params.CompletionCreateParamsBase, completion_create_params.CompletionCreateParamsBase]
)
def test_every_parameter_of_the_openai_reference_has_its_row(reference: Any) -> None:
    assert not set(reference.__annotations__) - set(PARAMETERS)


def test_a_row_that_needs_a_reason_has_one() -> None:
    for row in PARAMETERS.values():
        assert row.why or row.kind in (Kind.CARRIED, Kind.PROMPT, Kind.OURS), row.name
        assert (row.idle is None) == (not row.idle_words), row.name
        assert row.idle is None or row.kind is Kind.ALONE, row.name


def test_only_what_acts_on_each_token_is_carried() -> None:
    body = {"model": "m", "temperature": 0.5, "top_p": None, "messages": [], "max_tokens": 3, "repeat_last_n": 64}
    assert carried(body, Way.IDS) == {"temperature": 0.5}
    assert carried(body, Way.LLAMA) == {"temperature": 0.5, "repeat_last_n": 64}
    assert "echo" not in CARRIED


# -- single requests --------------------------------------------------------------------------------------------------

HARMLESS: list[dict[str, Any]] = [
    {}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "logit_bias": {"5": 1}},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "best_of": 1, "seed": None, "echo": False},
    {"seed": 3, "temperature": 0}, {"repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 4},
    {"stop": ["a", "b"], "user": "me", "stop_token_ids": []}, {"stop_token_ids": [3]}, {"skip_special_tokens": False},
    {"response_format": {"type": "text"}, "bad_words": [], "suffix": None, "priority": 3, "return_token_ids": True},
    {"frequency_penalty": 2}, {"frequency_penalty": 1, "repetition_penalty": 1},
    {"stop": "x", "min_tokens": 3}, {"stop": "x", "stop_token_ids": [3]}, {"include_stop_str_in_output": True},
    {"stop": "x", "include_stop_str_in_output": True}, {"stream_interval": 5}, {"truncate_prompt_tokens": 5},
    {"frequency_penalty": 1, "logit_bias": {"7": -100}}, {"verbosity": "low", "prompt_cache_key": "k", "store": True},
]  # fmt: skip
HARMFUL: list[tuple[str, dict[str, Any]]] = [
    ("presence_penalty", {"presence_penalty": 0.1}), ("presence_penalty", {"presence_penalty": "1"}),
    ("negative frequency_penalty", {"frequency_penalty": -1}),
    ("frequency_penalty with repetition_penalty", {"frequency_penalty": 1, "repetition_penalty": 1.1}),
    ("logit_bias", {"frequency_penalty": 1, "logit_bias": {"7": 101}}),
    ("logit_bias", {"frequency_penalty": 1, "logit_bias": {"²": 1}}),
    ("logit_bias", {"frequency_penalty": 1, "logit_bias": {"seven": 1}}), ("prompt_logprobs", {"prompt_logprobs": 0}),
    ("seed", {"seed": 3}), ("seed", {"seed": 3, "temperature": 0.5}), ("n", {"n": 2}), ("best_of", {"best_of": 3}),
    ("bad_words", {"bad_words": ["x"]}), ("use_beam_search", {"use_beam_search": True}),
    ("response_format", {"response_format": {"type": "json_object"}}), ("suffix", {"suffix": "x"}),
    ("max_tokens", {"max_tokens": 0}), ("n", {"n": True}), ("watermarking", {"watermarking": True}),
    ("max_tokens", {"max_tokens": "5"}), ("max_tokens", {"max_tokens": True}), ("stop", {"stop": [3]}),
    ("stop with special tokens shown", {"stop": "x", "skip_special_tokens": False}),
    ("unknown parameter foo", {"foo": 1}), ("guided_json", {"guided_json": {}}),
]  # fmt: skip


@pytest.mark.parametrize("body", HARMLESS)
def test_harmless_parameters(body: dict[str, Any]) -> None:
    assert chat(**body) is None
    assert completion(**body) is None


@pytest.mark.parametrize(("reason", "body"), HARMFUL)
def test_parameters_whose_meaning_a_seam_would_change(reason: str, body: dict[str, Any]) -> None:
    assert chat(**body) == reason
    assert completion(**body) == reason


def test_parameters_of_one_route() -> None:
    assert chat(logprobs=False, top_logprobs=0, tools=[], tool_choice="none") is None
    assert chat(stream_options={"include_usage": True}) == "stream_options"
    assert chat(stream_options={"include_usage": True}, stream=True) is None
    assert chat(tools=[{"type": "function"}]) == "tools"
    assert chat(tools=[{"type": "function"}], tool_choice="none") is None
    assert chat(tool_choice="auto") == "tool_choice"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert chat(messages=image) == "multimodal content"
    assert chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]) is None
    assert chat(messages="hi") == "messages"
    assert chat(echo=True) == "echo"


def test_log_probabilities_where_they_keep_their_form() -> None:
    assert completion(logprobs=0) is None
    assert completion(logprobs=3, return_tokens_as_token_ids=True) is None
    assert chat(logprobs=True, top_logprobs=2) == "logprobs"
    assert chat(Way.CHAT_IDS, logprobs=True, top_logprobs=2) is None
    assert chat(Way.CHAT_IDS, top_logprobs=2) == "logprobs"  # the engine is to refuse it
    assert completion(logprobs=1, echo=True) == "logprobs"
    assert completion(logprob_token_ids=[3]) == "logprob_token_ids"
    for way in (Way.LLAMA, Way.TEXT):
        assert completion(way, logprobs=1) == "logprobs"
        assert chat(way, logprobs=True) == "logprobs"


def test_the_limit_of_chats_counts_for_completions_on_llama_cpp() -> None:
    assert completion(Way.LLAMA, max_tokens=12, max_completion_tokens=3) == "max_completion_tokens"
    assert completion(Way.TEXT, max_completion_tokens=3) == "max_completion_tokens"
    assert completion(max_tokens=12, max_completion_tokens=3) is None
    assert chat(max_tokens=12, max_completion_tokens=3) is None


def test_an_answer_begun_by_its_client_is_one_document_on_llama_cpp() -> None:
    """That document repeats the beginning; ours, made of a stream, would not."""
    begun = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2,"}]
    assert chat(Way.LLAMA, messages=begun) == "an answer that its client has begun"
    assert chat(Way.LLAMA, messages=begun, stream=True) is None
    assert chat(messages=begun) is None


def test_an_echo_is_ours_where_the_prompt_is_a_text() -> None:
    assert completion(echo=True) is None
    assert completion(echo=True, prompt=["hi"]) is None
    assert completion(echo=True, prompt=[1, 2]) == "echo"
    assert completion(Way.LLAMA, echo=True) == "echo"
    assert completion(echo=1) == "echo"


def test_what_only_some_ways_of_continuing_keep() -> None:
    assert completion(Way.LLAMA, frequency_penalty=0.5, presence_penalty=-1) is None
    assert completion(Way.TEXT, frequency_penalty=0.5) == "frequency_penalty"
    assert completion(Way.LLAMA, repeat_penalty=1.1) is None
    assert completion(repeat_penalty=1.1) == "unknown parameter repeat_penalty"
    for way in (Way.LLAMA, Way.TEXT):
        assert completion(way, stop="x", min_tokens=2) == "stop with min_tokens"
        assert completion(way, include_stop_str_in_output=True) == "include_stop_str_in_output"
    for name, value in (("truncate_prompt_tokens", 5), ("continue_final_message", True)):
        assert completion(Way.TEXT, **{name: value}) == name
        assert completion(**{name: value}) is None
    assert completion(Way.TEXT, stop="x", stop_token_ids=[1]) == "stop with stop_token_ids"


@pytest.mark.parametrize("prompt", ["x", [1, 2], ["x"], [[1, 2]]])
def test_one_prompt_in_any_shape(prompt: Any) -> None:
    assert completion(prompt=prompt) is None


@pytest.mark.parametrize("prompt", [["x", "y"], [[1], [2]]])
def test_several_prompts(prompt: Any) -> None:
    assert completion(prompt=prompt) == "list of prompts"


@pytest.mark.parametrize("prompt", [None, 3, [], [True], {"a": 1}, [None]])
def test_prompts_we_cannot_read(prompt: Any) -> None:
    assert completion(prompt=prompt) == "prompt"


def test_a_seed_that_json_cannot_carry_reaches_the_engine_as_it_was_written() -> None:
    raw = b'{"model":"served","prompt":"x","temperature":0,"stream":true,"seed":1180591620717411303424}'
    answer = Answer(parse(Route.COMPLETIONS, raw), Mode.IDS)
    assert (answer.reason, answer.call(None, model="served").body) == ("seed", raw)


# -- reasoning parsers ------------------------------------------------------------------------------------------------

KNOWN = Thinking(1, 2, streamed=Count.SUMMED, whole=Count.UNMARKED, waits=True)
USAGE = {"include_usage": True}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
LATER: list[dict[str, Any]] = [
    {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}, {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"choice": ["a"]}},
]  # fmt: skip


@pytest.mark.parametrize("body", LATER)
def test_what_has_no_say_in_thoughts_does_not_keep_them_in_one_call(body: dict[str, Any]) -> None:
    assert thoughtful(KNOWN, stream=True, **body) is None
    assert thoughtful(KNOWN._replace(waits=False), stream=True, **body) is not None
    assert thoughtful(None, stream=True, **body) is not None
    assert chat(Way.PARSED, **body) is not None
    assert alone_at_last({"stream": True} | body)


def test_what_is_known_of_the_parser_decides_over_documents_and_usage() -> None:
    assert thoughtful(KNOWN) is None
    assert thoughtful(KNOWN._replace(whole=None)) == "reasoning of a whole document"
    assert thoughtful(KNOWN, stream=True, stream_options=USAGE) is None
    assert thoughtful(KNOWN._replace(streamed=None), stream=True, stream_options=USAGE) == "usage of reasoning tokens"
    running = USAGE | {"continuous_usage_stats": True}
    assert thoughtful(KNOWN, stream=True, stream_options=running) == "running usage of reasoning tokens"
    assert thoughtful(KNOWN, include_reasoning=False) == "include_reasoning"


def test_a_stream_without_any_of_it_is_sliced_to_its_end() -> None:
    assert not alone_at_last(
        {"stream": True, "tools": TOOLS, "tool_choice": "none", "response_format": {"type": "text"}}
    )
    assert alone_at_last({})
