"""llama.cpp's dialect, on chunks as its server sends them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from elis_gateway.core.slice import SliceEnd
from elis_gateway.wire.continuation import Answer, Mode
from elis_gateway.wire.openai import Request, Route
from elis_gateway.wire.sse import DONE, EventDecoder
from tests.wire.fake_engine import make_request

HEAD = {"created": 5, "model": "m", "system_fingerprint": "b0"}


def timings(count: int) -> dict[str, Any]:
    return {"timings": {"cache_n": 3, "prompt_n": 4, "predicted_n": count}}


def chat(text: str | None, ids: list[int], count: int) -> bytes:
    shown = {"content": [{"id": i, "token": "x"} for i in ids]}
    choice = {"finish_reason": None, "index": 0, "delta": {"content": text}, "logprobs": shown}
    return orjson.dumps(
        HEAD | {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]} | timings(count)
    )


def ending(finish: str, count: int) -> bytes:
    choice = {"finish_reason": finish, "index": 0, "delta": {}}
    return orjson.dumps(
        HEAD | {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]} | timings(count)
    )


def completion(text: str, ids: list[int], count: int, finish: str | None = None, **more: Any) -> bytes:
    shown = {"content": [{"id": i, "token": "x"} for i in ids]} if ids else None
    choice = {"text": text, "index": 0, "logprobs": shown, "finish_reason": finish}
    return orjson.dumps(
        HEAD | {"id": "chatcmpl-2", "object": "text_completion", "choices": [choice]} | timings(count) | more
    )


def begin(request: Request) -> Answer:
    return Answer(request, Mode.IDS, context=100, engine="llama.cpp")


def body(answer: Answer, limit: int | None) -> tuple[str, dict[str, Any]]:
    call = answer.call(limit, model="m")
    return call.path, orjson.loads(call.body)


def role() -> bytes:
    choice = {"finish_reason": None, "index": 0, "delta": {"role": "assistant", "content": None}}
    return orjson.dumps(HEAD | {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


def test_a_chat_goes_on_by_ids_and_by_text_where_ids_are_hidden() -> None:
    request = make_request(Route.CHAT, model="m", stream=True, max_tokens=9)
    answer = begin(request)
    path, first = body(answer, 5)
    assert path == Route.CHAT.value
    assert (first["logprobs"], first["top_logprobs"], first["timings_per_token"]) == (True, 1, True)
    got = answer.feed([role(), chat("a", [7], 1), chat("\U0001f9a3", [8], 4), b"null", ending("length", 5), DONE])
    assert (answer.end_slice("finished"), answer.attained, answer.prompt_tokens) == (SliceEnd.WINDOW, 4, 7)
    path, asked = body(answer, 5)
    assert (path, asked) == ("/apply-template", {"messages": request.body["messages"]})
    answer.feed_whole(b'{"prompt": "<user>hello<assistant>"}')
    assert answer.end_slice("finished") is SliceEnd.WINDOW
    path, more = body(answer, 5)
    assert path == Route.COMPLETIONS.value
    assert more == {
        "model": "m", "prompt": ["<user>hello<assistant>", 7, "\U0001f9a3"], "max_tokens": 5, "stream": True,
        "timings_per_token": True, "logprobs": 1,
    }  # fmt: skip
    usage = {"completion_tokens": 2, "prompt_tokens": 11, "total_tokens": 13}
    got += answer.feed([completion("b", [9], 1), completion("", [], 2, "stop", usage=usage), DONE])
    assert answer.end_slice("finished") is SliceEnd.FINISHED
    assert (answer.text, answer.attained, answer.finish_reason) == ("a\U0001f9a3b", 6, "stop")
    chunks = [orjson.loads(payload) for payload in EventDecoder().feed(got)]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-1"}
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == [None, "a", "\U0001f9a3", "b", ""]
    assert not any("logprobs" in chunk["choices"][0] for chunk in chunks)
    assert not any("timings" in chunk for chunk in chunks[:-1])


def test_texts_alone_are_one_prompt() -> None:
    answer = begin(make_request(Route.COMPLETIONS, model="m", stream=True, max_tokens=9))
    body(answer, 2)
    answer.feed([completion("é", [5], 2), completion("", [], 2, "length"), DONE])
    assert answer.end_slice("finished") is SliceEnd.WINDOW
    assert body(answer, 2)[1]["prompt"] == "helloé"


def test_a_window_that_shows_nothing_grows() -> None:
    answer = begin(make_request(Route.COMPLETIONS, model="m", stream=True, max_tokens=9))
    assert body(answer, 1)[1]["max_tokens"] == 1
    answer.feed([completion("", [], 1, "length"), b"null", DONE])
    assert (answer.end_slice("finished"), answer.attained) == (SliceEnd.WINDOW, 0)
    assert body(answer, 1)[1]["max_tokens"] == 2


def test_every_token_came_but_not_the_end() -> None:
    request = make_request(
        Route.COMPLETIONS, model="m", stream=True, max_tokens=2, stream_options={"include_usage": True}
    )
    answer = begin(request)
    body(answer, None)
    answer.feed([completion("a", [5], 1), completion("b", [6], 2)])
    assert answer.end_slice("aborted") is SliceEnd.FINISHED
    last, done = EventDecoder().feed(answer.close())
    assert done == DONE
    chunk = orjson.loads(last)
    assert chunk["choices"][0]["finish_reason"] == "length"
    assert chunk["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def test_stop_strings_are_ours() -> None:
    answer = begin(make_request(Route.COMPLETIONS, model="m", stream=True, max_tokens=9, stop=["bc"]))
    assert "stop" not in body(answer, 5)[1]
    got = answer.feed([completion("ab", [5], 1), completion("cd", [6], 2)])
    assert answer.over
    assert (answer.end_slice("finished"), answer.text, answer.attained) == (SliceEnd.FINISHED, "a", 2)
    texts = [orjson.loads(payload)["choices"][0] for payload in EventDecoder().feed(got)]
    assert [choice["text"] for choice in texts] == ["a", ""]
    assert texts[-1]["finish_reason"] == "stop"
    assert "stop_reason" not in texts[-1]


def test_the_rest_of_a_chat_is_a_stream_though_its_client_does_not_stream() -> None:
    """One document of /v1/completions would end in half a character, which a chat of this engine drops."""
    request = make_request(Route.CHAT, model="m", stream=False, max_tokens=9)
    answer = begin(request)
    assert body(answer, 5)[1]["stream"] is True
    answer.feed([role(), chat("a", [7], 1), ending("length", 5), DONE])
    assert answer.end_slice("finished") is SliceEnd.WINDOW
    body(answer, None)
    answer.feed_whole(b'{"prompt": "<user>hello<assistant>"}')
    answer.end_slice("finished")
    path, more = body(answer, None)
    assert (path, more["stream"]) == (Route.COMPLETIONS.value, True)


def test_what_we_ask_beside_is_never_the_clients_refusal() -> None:
    """llama.cpp refuses log-probabilities of streams with tools, which only we asked for."""
    tool = {"type": "function", "function": {"name": "f"}}
    request = make_request(Route.CHAT, stream=True, tools=[tool], tool_choice="none")
    answer = Answer(request, Mode.IDS, engine="llama.cpp")
    assert orjson.loads(answer.call(None, model="served").body)["logprobs"] is True
    assert answer.refused(400, b"{}")
    assert answer.mode is Mode.WHOLE
    assert "logprobs" not in orjson.loads(answer.call(None, model="served").body)


def _before_the_template(stream: bool) -> tuple[Answer, str]:
    """A chat that cannot go on before the engine has told its prompt, and what its client has of it."""
    answer = begin(make_request(Route.CHAT, model="m", stream=stream, max_tokens=9))
    body(answer, 5)
    answer.feed([role(), chat("a", [7], 1), chat("b", [8], 2), ending("length", 2), DONE])
    assert answer.end_slice("finished") is SliceEnd.WINDOW
    return answer, body(answer, 5)[0]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_engine_that_is_busy_is_asked_for_its_prompt_again(status: int, stream: bool) -> None:
    answer, path = _before_the_template(stream)
    assert path == "/apply-template"
    assert not answer.refused(status, b"{}")
    assert answer.end_slice("broken") is SliceEnd.INTERRUPTED
    assert (body(answer, 5)[0], answer.text, answer.attained) == ("/apply-template", "ab", 2)
    assert answer.refused(status, b"{}") is not stream, "asked for anew, where its client has seen nothing of it"
    if not stream:
        assert body(answer, 5)[0] == Route.CHAT.value
        return
    answer.end_slice("broken")
    body(answer, 5)
    answer.feed_whole(b'{"prompt": "<user>"}')
    assert answer.end_slice("finished") is SliceEnd.WINDOW
    assert body(answer, 5)[1]["prompt"] == ["<user>", 7, 8]


@pytest.mark.parametrize("status", [404, 501])
def test_without_its_prompt_an_answer_is_asked_for_again_or_ends_but_never_goes_on(status: int) -> None:
    """It would go on after its own words alone, and nobody would see that."""
    answer, _ = _before_the_template(False)
    assert answer.refused(status, b"{}")
    assert (answer.mode, body(answer, 5)[0]) == (Mode.WHOLE, Route.CHAT.value)
    answer, _ = _before_the_template(True)
    assert not answer.refused(status, b"{}")


@pytest.mark.parametrize(("stream", "end"), [(True, SliceEnd.INTERRUPTED), (False, SliceEnd.WINDOW)])
def test_a_prompt_that_cannot_be_read_is_none(stream: bool, end: SliceEnd) -> None:
    answer, _ = _before_the_template(stream)
    answer.feed_whole(b'{"error": "?"}')
    assert answer.end_slice("finished") is end
    assert body(answer, 5)[0] == ("/apply-template" if stream else Route.CHAT.value)
