"""The answer's edges: refusals, whole calls, errors inside streams, upstreams that are not what we took them for."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from elis_gateway.core.slice import SliceEnd
from elis_gateway.errors import UpstreamRefused, UpstreamUnavailable
from elis_gateway.wire.continuation import Answer, Call, Lore, Mode
from elis_gateway.wire.openai import Route
from elis_gateway.wire.sse import DONE, EventDecoder, encode
from tests.wire.fake_engine import FakeEngine, Refused, Script, direct, joined, make_request, serve


def begin(answer: Answer, limit: int | None = None, **options: Any) -> dict[str, Any]:
    call = answer.call(limit, model="served", **options)
    body: dict[str, Any] = orjson.loads(call.body)
    return body


def chunk(text: str = "", ids: list[int] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    choice |= {"prompt_token_ids": more.pop("prompt", None), "token_ids": ids}
    base = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "served"}
    return orjson.dumps(base | {"choices": [choice]} | more)


# -- golden bytes -----------------------------------------------------------------------------------------------------


def test_golden_stream_over_a_seam() -> None:
    request = make_request(Route.CHAT, stream=True, max_tokens=3)
    answer = Answer(request, Mode.IDS, context=100)
    assert begin(answer, 2) == {
        "model": "served", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 2,
        "return_token_ids": True,
    }  # fmt: skip
    head = b'{"id":"chatcmpl-9","object":"chat.completion.chunk","created":7,"model":"served","choices":[{"index":0,'
    role = head + b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
    assert answer.feed([role + b'"prompt_token_ids":[1,2],"prompt_text":null}']) == b""
    got = answer.feed([
        head + b'"delta":{"content":"a"},"logprobs":null,"finish_reason":null,"token_ids":[10]}]}',
        head + b'"delta":{"content":"b"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":[11]}]'
        b',"system_fingerprint":"fp"}',
        DONE,
    ])  # fmt: skip
    plain = b'"logprobs":null,"finish_reason":null,"token_ids":null}]}'
    assert got == (
        encode(role + b'"prompt_token_ids":null,"prompt_text":null}')
        + encode(head + b'"delta":{"content":"a"},' + plain)
        + encode(head + b'"delta":{"content":"b"},' + plain)
    )
    assert answer.end_slice("finished") is SliceEnd.WINDOW
    assert begin(answer, 2, priority=4) == {
        "model": "served", "priority": 4, "prompt": [1, 2, 10, 11], "max_tokens": 1, "stream": True,
        "return_token_ids": True,
    }  # fmt: skip
    got = answer.feed([chunk("c", [12], "length", prompt=[1, 2, 10, 11], system_fingerprint="fp"), DONE])
    assert got == encode(
        head + b'"delta":{"content":"c"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]'
        b',"system_fingerprint":"fp"}'
    )
    assert answer.end_slice("finished") is SliceEnd.FINISHED
    assert answer.close("2 windows") == b": 2 windows\n\ndata: [DONE]\n\n"
    assert (answer.text, answer.attained, answer.limit, answer.prompt_tokens) == ("abc", 3, 3, 2)


# -- what a call asks for ---------------------------------------------------------------------------------------------


def test_the_limit_goes_where_the_client_put_its_own() -> None:
    both = make_request(Route.CHAT, max_tokens=5, max_completion_tokens=80, stream=True)
    body = begin(Answer(both, Mode.IDS, context=100), 50)
    assert (body["max_completion_tokens"], body["max_tokens"]) == (50, 5)
    text = make_request(Route.COMPLETIONS, max_tokens=80, max_completion_tokens=9, stream=True)  # vLLM does not read it
    assert begin(Answer(text, Mode.IDS, context=100), 50)["max_tokens"] == 50
    assert begin(Answer(make_request(Route.CHAT, stream=True), Mode.IDS, context=100), 50)["max_tokens"] == 50
    assert "max_tokens" not in begin(Answer(make_request(Route.COMPLETIONS, stream=True), Mode.IDS), 50)  # 16 anyway
    assert begin(Answer(make_request(Route.CHAT, stream=True, max_tokens=30), Mode.IDS), 50)["max_tokens"] == 30
    assert "max_tokens" not in begin(Answer(make_request(Route.CHAT, stream=True), Mode.IDS, context=100))


def test_sampling_parameters_are_carried_and_prompt_parameters_are_not() -> None:
    options = {"temperature": 0.5, "top_k": 3, "stop": ["x"], "logit_bias": {"5": 1}, "min_tokens": None, "user": "u"}
    request = make_request(Route.CHAT, stream=True, max_tokens=60, add_generation_prompt=True, **options)
    answer = Answer(request, Mode.IDS, context=100)
    first = begin(answer, 2)
    assert first["include_stop_str_in_output"] is True
    assert first["add_generation_prompt"] is True
    head = {"id": "c", "created": 1, "model": "served"}
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    text = {"index": 0, "delta": {"content": "a"}, "finish_reason": None, "token_ids": [9]}
    answer.feed([orjson.dumps(head | {"choices": [role], "prompt_token_ids": [1]})])
    answer.feed([orjson.dumps(head | {"choices": [text]})])
    assert answer.end_slice("aborted") is SliceEnd.PREEMPTED
    assert begin(answer, 50) == {
        "model": "served", "prompt": [1, 9], "max_tokens": 50, "temperature": 0.5, "top_k": 3, "stop": ["x"],
        "logit_bias": {"5": 1}, "user": "u", "stream": True, "return_token_ids": True,
        "include_stop_str_in_output": True,
    }  # fmt: skip


def test_min_tokens_counts_the_whole_answer() -> None:
    engine = FakeEngine(eos=6)
    request = make_request(Route.COMPLETIONS, stream=True, temperature=0, max_tokens=60, min_tokens=20)
    answer, got = serve(engine, request, Script(rest=8))
    assert joined(got, request) == joined(direct(FakeEngine(eos=6), request), request)
    assert answer.attained > 20
    assert [call.get("min_tokens") for call in engine.calls[:4]] == [8, 8, 4, None] or engine.calls[2][
        "min_tokens"
    ] >= 4


def test_clients_do_not_set_the_engines_priority() -> None:
    request = make_request(Route.CHAT, n=2, priority=-5)
    assert "priority" not in begin(Answer(request, Mode.IDS))
    assert begin(Answer(request, Mode.IDS), priority=7)["priority"] == 7
    request = make_request(Route.CHAT, n=2)
    assert Answer(request, Mode.IDS).call(None, model="served").body is request.raw


def test_one_json_document_only_where_no_seam_of_ours_can_fall() -> None:
    def streams(limit: int | None, window: int | None, **body: Any) -> bool:
        return Answer(make_request(Route.CHAT, **body), Mode.IDS).call(limit, model="served", window=window).stream

    assert not streams(None, 50, max_tokens=50)
    assert not streams(50, 50, max_tokens=50)
    assert not streams(None, None, max_tokens=64)
    assert streams(None, 50, max_tokens=51)
    assert streams(49, 50, max_tokens=50)
    assert streams(None, None, max_tokens=65)
    assert streams(None, 50)
    assert streams(None, 50, max_tokens=5, stream=True)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refused_window_is_repeated_as_the_clients_own() -> None:
    request = make_request(Route.CHAT, stream=True, seed_text="x" * 60)
    engine = FakeEngine(context=100)
    answer, got = serve(engine, request, Script(rest=101))  # more than the engine takes, and not the client's doing
    assert answer.mode is Mode.WHOLE
    assert joined(got, request) == joined(direct(FakeEngine(context=100), request), request)


def test_what_the_client_asked_for_itself_is_refused_in_the_engines_words() -> None:
    request = make_request(Route.CHAT, stream=True, max_tokens=101)
    answer = Answer(request, Mode.IDS, context=100)
    assert answer.mode is Mode.WHOLE
    with pytest.raises(Refused) as refused:
        FakeEngine(context=100).run(answer.call(50, model="served"))
    assert not answer.refused(refused.value.status, refused.value.body)
    plain = Answer(make_request(Route.CHAT, stream=True), Mode.IDS)
    plain.call(None, model="served")
    assert not plain.refused(400, b"{}")
    windowed = Answer(make_request(Route.CHAT, stream=True), Mode.IDS)
    windowed.call(50, model="served")
    assert not windowed.refused(404, b"{}")
    assert not windowed.refused(503, b"{}")
    assert windowed.refused(400, b"{}")


# -- upstreams that are not what we took them for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "delta", [{"content": "x"}, {"reasoning": "x"}, {"reasoning_content": "x"}, {"tool_calls": [{"index": 0}]}]
)
def test_an_answer_that_cannot_be_continued_is_asked_for_whole(delta: dict[str, Any]) -> None:
    answer = Answer(make_request(Route.CHAT, stream=True), Mode.IDS)
    begin(answer, 50)
    head = {"id": "c", "created": 1, "model": "served"}
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    ids = {"token_ids": [3]} if "content" not in delta else {}
    assert answer.feed([orjson.dumps(head | {"choices": [role], "prompt_token_ids": [1, 2]})]) == b""
    got = answer.feed([orjson.dumps(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None} | ids]})])
    assert (got, answer.over, answer.committed) == (b"", True, False)
    assert answer.end_slice("finished") is SliceEnd.WINDOW
    assert answer.mode is Mode.WHOLE
    assert begin(answer, 50) == answer.request.body


def test_garbage() -> None:
    for mode in (Mode.IDS, Mode.WHOLE):
        for payload in (b"<html>", b"[]", b"3", b'{"choices": 3}', b'{"choices": [3]}', b'{"choices": [{}]}'):
            answer = Answer(make_request(Route.CHAT, stream=True), mode)
            begin(answer)
            if mode is Mode.IDS or payload[:1] in b"<[3":
                with pytest.raises(UpstreamUnavailable) as caught:
                    answer.feed([payload])
                assert caught.value.cause == "garbage"
                assert answer.end_slice("broken") is SliceEnd.INTERRUPTED
    answer = Answer(make_request(Route.CHAT, max_tokens=5), Mode.IDS)
    begin(answer)
    with pytest.raises(UpstreamUnavailable):
        answer.feed_whole(b"no json")
    assert answer.end_slice("broken") is SliceEnd.INTERRUPTED


def test_what_came_before_garbage_is_not_lost() -> None:
    for mode, end in ((Mode.IDS, SliceEnd.INTERRUPTED), (Mode.WHOLE, SliceEnd.FAILED)):
        answer = Answer(make_request(Route.COMPLETIONS, stream=True), mode)
        begin(answer)
        got = answer.feed([chunk("a", [3], prompt=[1]), chunk("b", [4]), b"<html>"])
        assert got.count(b"data: ") == 2
        assert (answer.text, answer.attained, answer.over) == ("ab", 2, True)
        assert isinstance(answer.error, UpstreamUnavailable)
        assert answer.end_slice("broken") is end


def test_an_error_inside_a_stream() -> None:
    error = {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 500}}
    for code, end in ((500, SliceEnd.INTERRUPTED), (429, SliceEnd.INTERRUPTED), (400, SliceEnd.FAILED)):
        for mode in (Mode.IDS, Mode.WHOLE):
            answer = Answer(make_request(Route.COMPLETIONS, stream=True), mode)
            begin(answer)
            error["error"]["code"] = code
            assert answer.feed([orjson.dumps(error), DONE]) == b""
            assert answer.over
            assert answer.end_slice("finished") is end
            assert isinstance(answer.error, UpstreamRefused)
            assert answer.error.status == code
            assert answer.error_event(answer.error) == encode(orjson.dumps(error))


def test_an_engine_that_aborts_a_call_has_not_finished_it() -> None:
    answer = Answer(make_request(Route.COMPLETIONS, stream=True), Mode.IDS)
    begin(answer)
    answer.feed([chunk("a", [3], prompt=[1]), chunk("", [], "abort"), DONE])
    assert answer.end_slice("finished") is SliceEnd.INTERRUPTED
    assert answer.attained == 1


def test_a_stream_that_just_ends_has_not_finished() -> None:
    for mode in (Mode.IDS, Mode.TEXT):
        answer = Answer(make_request(Route.COMPLETIONS, stream=True), mode)
        begin(answer)
        answer.feed([chunk("a", [3], prompt=[1])])
        assert answer.end_slice("finished") is SliceEnd.INTERRUPTED
        assert answer.text == "a"


def test_an_echo_survives_a_first_call_of_which_nothing_is_kept() -> None:
    """Its tokens are half a character: they are taken back, and the prompt in front of them must not be."""
    answer = Answer(make_request(Route.COMPLETIONS, stream=True, max_tokens=9, echo=True), Mode.IDS, context=100)
    begin(answer, 1)
    assert answer.feed([chunk("", [7], prompt=[1, 2]), chunk("", [], "length"), DONE]) == b""
    assert (answer.end_slice("finished"), answer.attained) == (SliceEnd.WINDOW, 0)
    assert begin(answer, 1)["prompt"] == [1, 2]
    got = answer.feed([chunk("\u6f22", [7, 8], prompt=[1, 2]), chunk("!", [9])])
    texts = [orjson.loads(payload)["choices"][0]["text"] for payload in EventDecoder().feed(got)]
    assert texts == ["hello\u6f22", "!"]


def test_detokenize_is_not_there() -> None:
    """Then a delta of several tokens is taken to end at a boundary, as nearly all do."""
    lore = Lore()
    request = make_request(Route.COMPLETIONS, stream=True, temperature=0, max_tokens=60)
    engine = FakeEngine(merge=(2,), detokenizes=False)
    try:
        serve(engine, request, Script(aborts=[3, 4, 5]), lore=lore)
    finally:
        assert not lore.can_detokenize


# -- whole ------------------------------------------------------------------------------------------------------------


def test_a_whole_stream_is_relayed_to_the_byte() -> None:
    request = make_request(Route.CHAT, stream=True, bad_words=["x"], stream_options={"include_usage": True})
    answer, got = serve(FakeEngine(), request, Script(rest=3))
    assert got == direct(FakeEngine(), request)
    assert (answer.mode, answer.reason) == (Mode.WHOLE, "bad_words")
    assert answer.attained == joined(got, request)["usage"][0]["completion_tokens"]
    assert answer.text == joined(got, request)["text"]


def test_a_whole_document_is_relayed_to_the_byte() -> None:
    request = make_request(Route.CHAT, bad_words=["x"])
    answer, got = serve(FakeEngine(), request, Script(rest=3))
    assert got == direct(FakeEngine(), request)
    assert answer.text == orjson.loads(got)["choices"][0]["message"]["content"]


def test_a_whole_stream_under_an_alias() -> None:
    request = make_request(Route.CHAT, stream=True, bad_words=["x"], model="alias")
    _, got = serve(FakeEngine(), request, Script())
    assert b'"model":"alias"' in got
    assert b'"served"' not in got


def test_a_broken_whole_call_is_sent_again_unless_something_was_handed_out() -> None:
    request = make_request(Route.CHAT, stream=True, bad_words=["x"])
    payloads = FakeEngine().run(Call(request.route.value, request.raw, True))
    answer = Answer(request, Mode.IDS)
    begin(answer)
    assert answer.end_slice("broken") is SliceEnd.INTERRUPTED
    begin(answer)
    answer.feed(payloads[:2])
    assert answer.end_slice("broken") is SliceEnd.FAILED
    again = Answer(request, Mode.IDS)
    begin(again)
    again.feed(payloads)
    assert again.end_slice("broken") is SliceEnd.FINISHED


def test_several_choices_end_with_the_last_of_them() -> None:
    request = make_request(Route.COMPLETIONS, stream=True, n=2)
    answer = Answer(request, Mode.IDS)
    begin(answer)
    answer.feed([chunk("a", finish="stop")])
    assert answer.end_slice("finished") is SliceEnd.FAILED


def test_a_document_of_one_call_is_relayed_whatever_its_log_probabilities_look_like() -> None:
    """llama.cpp's completions have the chat's form of them, under the completions' name."""
    answer = Answer(make_request(Route.COMPLETIONS, logprobs=2), Mode.IDS, engine="llama.cpp")
    answer.call(None, model="served")
    assert (answer.mode, answer.reason) == (Mode.WHOLE, "logprobs")
    choice = {"text": "a", "index": 0, "logprobs": {"content": [{"id": 198, "token": "a"}]}, "finish_reason": "length"}
    document = orjson.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
    answer.feed_whole(document)
    assert answer.end_slice("finished") is SliceEnd.FINISHED
    assert answer.body() == document


def test_a_document_that_cannot_be_read_is_no_answer() -> None:
    answer = Answer(make_request(Route.COMPLETIONS, logprobs=2, max_tokens=4), Mode.IDS, context=100)
    answer.call(None, model="served", window=50)
    with pytest.raises(UpstreamUnavailable):
        answer.feed_whole(orjson.dumps({"choices": [{"text": "a", "logprobs": {"content": []}}]}))
    assert answer.end_slice("broken") is SliceEnd.INTERRUPTED
