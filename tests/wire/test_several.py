"""Several choices for one request: apart and together again."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from elis_gateway.wire.openai import Request, Route
from elis_gateway.wire.several import MOST, Several, split
from elis_gateway.wire.sse import EventDecoder
from tests.wire.fake_engine import FakeEngine, Script, make_request, serve


def parted(route: Route, **body: Any) -> list[dict[str, Any]]:
    return [part.body for part in split(make_request(route, **body))]


def test_what_falls_apart_and_how() -> None:
    assert parted(Route.CHAT) == parted(Route.CHAT, n=1) == parted(Route.COMPLETIONS, prompt=["x"]) == []
    assert parted(Route.COMPLETIONS, prompt=[1, 2, 3]) == []
    assert parted(Route.CHAT, n=2, temperature=0) == []
    two = parted(Route.CHAT, n=2, temperature=0.5)
    assert two == [make_request(Route.CHAT, temperature=0.5).body] * 2
    four = parted(Route.COMPLETIONS, prompt=["a", "b"], n=2, seed=5)
    assert [(part["prompt"], part["seed"], "n" in part) for part in four] == [
        ("a", 5, False), ("a", 6, False), ("b", 5, False), ("b", 6, False),
    ]  # fmt: skip
    assert [part["prompt"] for part in parted(Route.COMPLETIONS, prompt=[[1], [2, 3]])] == [[1], [2, 3]]


def test_what_would_not_fit_is_left_to_the_engine() -> None:
    assert parted(Route.CHAT, n=2, temperature=1, seed=2**64 - 1) == []
    assert parted(Route.CHAT, n=2, temperature=1, seed=2**63 - 1) == []
    long = [{"role": "user", "content": "x" * 2_000_000}]
    assert parted(Route.CHAT, n=64, temperature=1, messages=long) == []
    assert len(parted(Route.CHAT, n=16, temperature=1, messages=long)) == 16


@pytest.mark.parametrize("n", [0, -1, True, "2", 2.0, MOST + 1])
def test_what_is_left_to_the_engine(n: Any) -> None:
    assert parted(Route.CHAT, n=n) == []


def both(request: Request) -> tuple[list[bytes], Several]:
    """Each part's bytes."""
    parts = split(request)
    return [serve(FakeEngine(), part, Script(rest=5))[1] for part in parts], Several(request, len(parts))


def test_one_stream_of_many() -> None:
    options = {"include_usage": True, "continuous_usage_stats": False}
    request = make_request(Route.CHAT, n=3, stream=True, max_tokens=20, stream_options=options)
    answers, several = both(request)
    got = b""
    for begin in range(0, max(map(len, answers)), 97):  # interleaved, cut anywhere
        for part, answer in enumerate(answers):
            got += several.feed(part, answer[begin : begin + 97])
    got += several.close(b": note\n\n")
    assert got.endswith(b": note\n\ndata: [DONE]\n\n")
    assert got.count(b"[DONE]") == 1
    chunks = [orjson.loads(payload) for payload in EventDecoder().feed(got)[:-1]]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    alone, _ = serve(FakeEngine(), split(request)[0], Script())
    assert texts == [alone.text] * 3
    assert chunks[-1]["choices"] == []
    prompt = alone.prompt_tokens or 0
    assert chunks[-1]["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 3 * alone.attained, "total_tokens": prompt + 3 * alone.attained,
    }  # fmt: skip


def test_one_document_of_many() -> None:
    request = make_request(Route.COMPLETIONS, prompt=["ab", "c"], n=2, max_tokens=20)
    answers, several = both(request)
    whole = orjson.loads(several.document(answers))
    singles = [orjson.loads(answer) for answer in answers]
    assert [choice.pop("index") for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in whole["choices"]] == [single["choices"][0]["text"] for single in singles]
    assert whole["usage"]["prompt_tokens"] == 3  # each prompt once
    assert whole["usage"]["completion_tokens"] == sum(single["usage"]["completion_tokens"] for single in singles)
    assert (whole["id"], whole.keys()) == (singles[0]["id"], singles[0].keys())
