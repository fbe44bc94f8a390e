"""What is read of a request."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elis_gateway.errors import ClientError
from elis_gateway.wire.continuation import Answer, Mode
from elis_gateway.wire.openai import Request, Route, parse
from elis_gateway.wire.parameters import Way, unsliceable


def chat(**body: Any) -> Request:
    return parse(Route.CHAT, orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | body))


def completion(**body: Any) -> Request:
    return parse(Route.COMPLETIONS, orjson.dumps({"model": "m", "prompt": "hi"} | body))


def test_a_mark_before_the_json_is_passed_over() -> None:
    """Files of Windows begin with it, and `curl -d @file` sends it."""
    request = parse(Route.COMPLETIONS, b'\xef\xbb\xbf{"model": "m", "prompt": "a"}')
    assert (request.model, request.raw) == ("m", b'{"model": "m", "prompt": "a"}')


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
    "echo", "presence_penalty", "logit_bias", "stop_token_ids", "include_stop_str_in_output", "return_token_ids",
])  # fmt: skip


@given(st.sampled_from(list(Route)), st.dictionaries(names, json, max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_body_breaks_the_parser(route: Route, body: dict[str, Any]) -> None:
    try:
        request = parse(route, orjson.dumps(body))
    except ClientError:
        return
    for way in Way if not route.foreign else ():
        why = unsliceable(request.body, request.chat, way)
        if why is None:  # then it can be continued
            assert Answer(request, Mode.IDS).call(5, model="m").body
    assert isinstance(request.prompt_text, str)
    assert isinstance(request.echo, str)
    assert all(isinstance(part, str) for part in request.app_parts)
    request.conversation_key()
    request.next_conversation_key("x")
