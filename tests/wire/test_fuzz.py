"""Whatever an upstream sends, an answer ends in an orderly way: bytes, or an error of the upstream's."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from elis_gateway.core.slice import SliceEnd
from elis_gateway.errors import UpstreamUnavailable
from elis_gateway.wire.continuation import Answer, Call, Mode
from elis_gateway.wire.openai import Route
from elis_gateway.wire.sse import EventDecoder
from tests.wire.fake_engine import FakeEngine, make_request

EXAMPLES = int(os.environ.get("ELIS_FUZZ_EXAMPLES", "200"))

PHASES = [Phase.explicit, Phase.generate]

values = st.none() | st.booleans() | st.integers(-2, 2**33) | st.floats(allow_nan=False) | st.text(max_size=4)
junk = st.recursive(
    values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["index", "text", "x"]), inner),
    max_leaves=4,
)
FIELDS = [
    ("choices",), ("choices", 0), ("choices", 0, "delta"), ("choices", 0, "delta", "content"), ("choices", 0, "text"),
    ("choices", 0, "token_ids"), ("choices", 0, "finish_reason"), ("choices", 0, "stop_reason"),
    ("choices", 0, "logprobs"), ("usage",), ("prompt_token_ids",), ("id",), ("created",), ("error",), (),
]  # fmt: skip
changes = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(FIELDS), junk), min_size=1, max_size=4)


def changed(chunk: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    if isinstance(path[0], int) != isinstance(chunk, list):
        return chunk
    with suppress(KeyError, IndexError, TypeError):
        chunk[path[0]] = changed(chunk[path[0]] if len(path) > 1 else None, path[1:], value)
    return chunk


@given(
    st.sampled_from([Route.CHAT, Route.COMPLETIONS]),
    st.sampled_from([Mode.IDS, Mode.TEXT, Mode.WHOLE]),
    st.sampled_from(["vllm", "llama.cpp"]),
    changes,
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=PHASES)
def test_no_event_breaks_an_answer(
    route: Route, mode: Mode, engine: str, edits: list[Any], stream: bool, rich: bool
) -> None:
    more: dict[str, Any] = {"stop": ["AB"], "min_tokens": 3} if rich else {}
    request = make_request(route, stream=stream, temperature=0, max_tokens=30, **more)
    ask = {**request.body, "stream": True, "return_token_ids": True, "include_stop_str_in_output": True}
    payloads = FakeEngine().run(Call(route.value, orjson.dumps(ask), True))
    for at, path, value in edits:
        if at < len(payloads) - 1:
            payloads[at] = orjson.dumps(changed(orjson.loads(payloads[at]), path, value))
    answer = Answer(request, mode, engine=engine, context=400)
    answer.call(20, model="served")
    how: Any = "finished"
    for payload in payloads:
        try:
            answer.feed([payload])
        except UpstreamUnavailable:
            how = "broken"
            break
        if answer.over:
            break
    assert answer.end_slice(how) in SliceEnd
    assert isinstance(answer.text, str)
    if answer.finished:
        assert isinstance(answer.close() if stream else b"" if mode is Mode.WHOLE else answer.body(), bytes)
    elif answer.mode is not Mode.WHOLE:
        assert answer.call(20, model="served").body


@given(st.sampled_from(list(Route)), junk, st.booleans())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=PHASES)
def test_no_document_breaks_an_answer(route: Route, document: Any, plain: bool) -> None:
    answer = Answer(make_request(route, max_tokens=5), Mode.WHOLE if route.foreign or plain else Mode.IDS)
    answer.call(None, model="other")
    body = orjson.dumps(document)
    try:
        answer.feed_whole(body)
    except UpstreamUnavailable:
        assert answer.end_slice("broken") is not SliceEnd.FINISHED
        return
    assert answer.end_slice("finished") is SliceEnd.FINISHED
    assert isinstance(answer.body(), bytes)


@given(st.lists(st.binary(max_size=60) | st.sampled_from([b"data: ", b"\n\n", b"data: [DONE]\n\n", b"event: x\r\n"])))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_decoder_keeps_no_more_than_its_limit(pieces: list[bytes]) -> None:
    decoder = EventDecoder(limit=200)
    with suppress(UpstreamUnavailable):
        for piece in pieces:
            decoder.feed(piece)
            assert len(decoder._buffer) + sum(map(len, decoder._data)) + sum(map(len, decoder._held)) <= 200


@pytest.mark.parametrize("ids", [["x"], [None], [[1]], [True, "y"]])
def test_ids_that_are_no_numbers_are_garbage_or_refused_later(ids: list[Any]) -> None:
    request = make_request(Route.COMPLETIONS, stream=True, frequency_penalty=1, max_tokens=9)
    answer = Answer(request, Mode.IDS, context=400)
    answer.call(3, model="served")
    choice = {"index": 0, "text": "a", "finish_reason": "length", "token_ids": ids, "prompt_token_ids": [1]}
    try:
        answer.feed([orjson.dumps({"id": "i", "model": "served", "choices": [choice]})])
    except UpstreamUnavailable:
        return
    answer.end_slice("finished")
    assert answer.call(3, model="served").body
