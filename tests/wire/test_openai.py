"""What is read of a request, and which requests may be sliced."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elis_gateway.errors import ClientError
from elis_gateway.wire.openai import Request, Route, parse


def chat(**body: Any) -> Request:
    return parse(Route.CHAT, orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | body))


def completion(**body: Any) -> Request:
    return parse(Route.COMPLETIONS, orjson.dumps({"model": "m", "prompt": "hi"} | body))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'"x"', b'{"model": 3}', b'{"model": "m", "stream": "yes"}'])
def test_what_cannot_be_read_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(ClientError):
        parse(Route.CHAT, body)


def test_fields() -> None:
    request = chat(stream=True, stream_options={"include_usage": True}, max_tokens=5, max_completion_tokens=7, stop="x")
    assert (request.model, request.stream, request.include_usage, request.max_tokens) == ("m", True, True, 7)
    assert request.stop == ("x",)
    assert completion(max_tokens=5, max_completion_tokens=7).max_tokens == 5
    assert completion(stop=["a", "", "b"]).stop == ("a", "b")
    assert not chat(stream_options={"include_usage": True}).include_usage  # says nothing without a stream
    assert parse(Route.CHAT, b"{}").model == ""


HARMLESS: list[dict[str, Any]] = [
    {}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "logit_bias": {"5": 1}},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "best_of": 1, "seed": None, "echo": False},
    {"seed": 3, "temperature": 0}, {"repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 4},
    {"stop": ["a", "b"], "user": "me", "stop_token_ids": []}, {"stop_token_ids": [3]}, {"skip_special_tokens": False},
    {"response_format": {"type": "text"}, "bad_words": [], "suffix": None, "priority": 3, "return_token_ids": True},
]  # fmt: skip
HARMFUL: list[tuple[str, dict[str, Any]]] = [
    ("presence_penalty", {"presence_penalty": 0.1}), ("frequency_penalty", {"frequency_penalty": -1}),
    ("seed", {"seed": 3}), ("seed", {"seed": 3, "temperature": 0.5}), ("n", {"n": 2}), ("best_of", {"best_of": 3}),
    ("echo", {"echo": True}), ("bad_words", {"bad_words": ["x"]}), ("use_beam_search", {"use_beam_search": True}),
    ("response_format", {"response_format": {"type": "json_object"}}), ("suffix", {"suffix": "x"}),
    ("include_stop_str_in_output", {"include_stop_str_in_output": True}), ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "5"}), ("max_tokens", {"max_tokens": True}), ("stop", {"stop": [3]}),
    ("stop with min_tokens", {"stop": "x", "min_tokens": 3}),
    ("stop with visible stop tokens", {"stop": "x", "stop_token_ids": [3]}),
    ("unknown parameter foo", {"foo": 1}), ("unknown parameter guided_json", {"guided_json": {}}),
]  # fmt: skip


@pytest.mark.parametrize("body", HARMLESS)
def test_harmless_parameters(body: dict[str, Any]) -> None:
    assert chat(**body).unsliceable is None
    assert completion(**body).unsliceable is None


@pytest.mark.parametrize(("reason", "body"), HARMFUL)
def test_parameters_whose_meaning_a_seam_would_change(reason: str, body: dict[str, Any]) -> None:
    assert chat(**body).unsliceable == reason
    assert completion(**body).unsliceable == reason


def test_parameters_of_one_route() -> None:
    assert chat(logprobs=False, top_logprobs=0, tools=[], tool_choice="none").unsliceable is None
    assert chat(logprobs=True).unsliceable == "logprobs"
    assert completion(logprobs=0).unsliceable == "logprobs"
    assert chat(tools=[{"type": "function"}]).unsliceable == "tools"
    assert chat(tool_choice="auto").unsliceable == "tool_choice"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert chat(messages=image).unsliceable == "multimodal content"
    assert chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]).unsliceable is None
    assert chat(messages="hi").unsliceable == "messages"


@pytest.mark.parametrize("prompt", ["x", [1, 2], ["x"], [[1, 2]]])
def test_one_prompt_in_any_shape(prompt: Any) -> None:
    assert completion(prompt=prompt).unsliceable is None


@pytest.mark.parametrize("prompt", [["x", "y"], [[1], [2]]])
def test_several_prompts(prompt: Any) -> None:
    assert completion(prompt=prompt).unsliceable == "list of prompts"


@pytest.mark.parametrize("prompt", [None, 3, [], [True], {"a": 1}, [None]])
def test_prompts_we_cannot_read(prompt: Any) -> None:
    assert completion(prompt=prompt).unsliceable == "prompt"


def test_conversations_chain() -> None:
    first = chat(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "a"}])
    assert first.conversation_key() is None
    second = chat(messages=[
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ])  # fmt: skip
    assert second.conversation_key() == first.next_conversation_key("b") != first.next_conversation_key("x")
    assert completion().conversation_key() is None
    assert completion().next_conversation_key("x") is None


def test_what_a_predictor_reads() -> None:
    request = chat(messages=[
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ], max_tokens=9)  # fmt: skip
    assert request.prompt_text == "c"
    assert request.app_parts == ("/v1/chat/completions", "be brief", "", "9")
    assert completion(prompt=["x"]).prompt_text == "x"
    assert completion(prompt=[1, 2]).prompt_text == ""


json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-1, 1) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
names = st.sampled_from([
    "model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "seed",
    "temperature", "n", "tools", "response_format", "min_tokens", "logprobs", "skip_special_tokens", "bad_words",
])  # fmt: skip


@given(st.sampled_from(list(Route)), st.dictionaries(names, json, max_size=8))
def test_no_body_breaks_the_parser(route: Route, body: dict[str, Any]) -> None:
    try:
        request = parse(route, orjson.dumps(body))
    except ClientError:
        return
    assert isinstance(request.prompt_text, str)
    assert all(isinstance(part, str) for part in request.app_parts)
    request.conversation_key()
    request.next_conversation_key("x")
