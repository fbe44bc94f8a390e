"""/v1/responses and /v1/messages: one call each, their events relayed with their names."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from elis_gateway.core.slice import SliceEnd
from elis_gateway.errors import UpstreamRefused, UpstreamUnavailable
from elis_gateway.wire.continuation import Answer, Mode
from elis_gateway.wire.openai import Request, Route, parse
from elis_gateway.wire.sse import EventDecoder

RESPONSES = [
    {"type": "response.created", "response": {"id": "r", "model": "served", "usage": None}},
    {"type": "response.output_text.delta", "delta": "Hel"},
    {"type": "response.output_text.delta", "delta": "lo"},
    {"type": "response.completed", "response": {"id": "r", "model": "served", "output": [
        {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}
    ], "usage": {"input_tokens": 7, "output_tokens": 5}}},
]  # fmt: skip
MESSAGES = [
    {"type": "message_start", "message": {"id": "m", "model": "served", "usage": {"input_tokens": 7}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
    {"type": "message_stop"},
]
STREAMS = {Route.RESPONSES: RESPONSES, Route.MESSAGES: MESSAGES}


def request(route: Route, **body: Any) -> Request:
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    shape = {"input": turns, "instructions": "be brief", "max_output_tokens": 9}
    if route is Route.MESSAGES:
        shape = {"messages": turns, "system": [{"type": "text", "text": "be brief"}], "max_tokens": 9}
    return parse(route, orjson.dumps({"model": "served", **shape, **body}))


def events(route: Route) -> list[bytes]:
    return [b"event: %s\ndata: %s\n\n" % (str(e["type"]).encode(), orjson.dumps(e)) for e in STREAMS[route]]


@pytest.mark.parametrize("route", STREAMS)
def test_what_is_read_of_a_request(route: Route) -> None:
    asked = request(route)
    assert (asked.prompt_text, asked.max_tokens, asked.app_parts[1]) == ("hi", 9, "be brief")
    assert asked.next_conversation_key("x") is None
    assert parse(route, b'{"model": "m", "input": "plain", "messages": 3}').prompt_text in ("plain", "")


@pytest.mark.parametrize("route", STREAMS)
def test_a_stream_is_relayed_to_the_byte_and_counted(route: Route) -> None:
    asked = request(route, stream=True)
    answer = Answer(asked, Mode.WHOLE, reason=route.value)
    call = answer.call(50, model="served", priority=3)
    assert call.path == route.value
    assert orjson.loads(call.body).get("priority") == (3 if route is Route.RESPONSES else None)
    sent = b"".join(events(route))
    got = b"".join(answer.feed([payload]) for payload in EventDecoder().feed(sent))
    assert answer.end_slice("finished") is SliceEnd.FINISHED
    assert got + answer.close() == sent
    assert (answer.text, answer.attained, answer.prompt_tokens) == ("Hello", 5, 7)
    assert answer.limit == 9


@pytest.mark.parametrize("route", STREAMS)
def test_an_alias_stands_wherever_the_model_did(route: Route) -> None:
    asked = request(route, stream=True, model="alias")
    answer = Answer(asked, Mode.WHOLE)
    answer.call(None, model="served")
    got = answer.feed(EventDecoder().feed(b"".join(events(route))))
    assert b"served" not in got
    assert b'"model":"alias"' in got


@pytest.mark.parametrize("route", STREAMS)
def test_a_stream_that_breaks_off(route: Route) -> None:
    answer = Answer(request(route, stream=True), Mode.WHOLE)
    answer.call(None, model="served")
    answer.feed(EventDecoder().feed(b"".join(events(route)[:3])))
    assert answer.end_slice("finished") is SliceEnd.FAILED
    last = answer.error_event(UpstreamUnavailable("it broke off", cause="cut"))
    assert last.startswith(b"event: error\ndata: {")
    told = orjson.loads(EventDecoder().feed(last)[0])
    assert told["type"] == "error"
    assert (told["error"] if route is Route.MESSAGES else told)["message"] == "it broke off"


@pytest.mark.parametrize("route", STREAMS)
def test_an_error_inside_a_stream(route: Route) -> None:
    answer = Answer(request(route, stream=True), Mode.WHOLE)
    answer.call(None, model="served")
    assert answer.feed([b'{"type":"error","error":{"type":"overloaded_error","message":"busy","code":503}}']) == b""
    assert isinstance(answer.error, UpstreamRefused)
    assert answer.end_slice("finished") is SliceEnd.INTERRUPTED


def test_whole_documents() -> None:
    usage = {"input_tokens": 7, "output_tokens": 5}
    documents = {
        Route.RESPONSES: {**RESPONSES[-1]["response"], "usage": usage},  # type: ignore[dict-item]
        Route.MESSAGES: {"id": "m", "model": "served", "content": [{"type": "text", "text": "Hello"}], "usage": usage},
    }
    for route, document in documents.items():
        for model in ("served", "alias"):
            answer = Answer(request(route, model=model), Mode.WHOLE)
            assert not answer.call(50, model="served").stream
            answer.feed_whole(orjson.dumps(document))
            assert answer.end_slice("finished") is SliceEnd.FINISHED
            assert orjson.loads(answer.body()) == document | {"model": model}
            assert (answer.text, answer.attained) == ("Hello", 5)
    broken = Answer(request(Route.MESSAGES), Mode.WHOLE)
    broken.call(None, model="served")
    with pytest.raises(UpstreamUnavailable):
        broken.feed_whole(b"[3]")
