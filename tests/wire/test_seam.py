"""The property of the seam: however an answer is cut, its client gets what one call would have given."""

from __future__ import annotations

import os
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elis_gateway.core.slice import SliceEnd
from elis_gateway.wire.continuation import Answer, Lore, Mode
from elis_gateway.wire.openai import Request, Route
from elis_gateway.wire.parameters import Way, unsliceable
from tests.wire.fake_engine import CLOSE, THINKING, FakeEngine, Script, direct, joined, make_request, serve

EXAMPLES = int(os.environ.get("ELIS_SEAM_EXAMPLES", "300"))
"""More of them is a longer night: 300 take seconds."""

SLICED = (Route.CHAT, Route.COMPLETIONS)
routes = st.sampled_from(SLICED)
scripts = st.builds(
    Script,
    limits=st.lists(st.one_of(st.none(), st.integers(1, 9)), max_size=20),
    aborts=st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=20),
    broken=st.booleans(),
    reads=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    window=st.sampled_from([None, 5, 1000]),
    rest=st.sampled_from([None, 1, 2, 7, 50]),
)
bodies = st.fixed_dictionaries(
    {"seed_text": st.text("abc", min_size=1, max_size=4), "temperature": st.just(0), "max_tokens": st.integers(1, 120)},
    optional={
        "stream": st.booleans(),
        "return_token_ids": st.just(True),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 8),
    },
).map(lambda body: body | {"min_tokens": min(body.get("min_tokens", 0), body["max_tokens"])})


def without_identity(data: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line]
    return [orjson.loads(line) | {"id": 0, "created": 0} if line != b"[DONE]" else {} for line in lines]


def check(engine: FakeEngine, request: Request, script: Script, lore: Lore | None = None) -> None:
    expected = direct(FakeEngine(engine.merge, engine.context, engine.eos, details=engine.details), request)
    if request.stop:  # an answer that we end has not heard the engine's fingerprint, unless one before it has
        lore = lore if lore is not None else Lore()
        lore.fingerprint = "fp"
    answer, got = serve(engine, request, script, lore=lore)
    assert joined(got, request) == joined(expected, request)
    if request.stream and engine.merge == (1,) and not request.stop:
        assert without_identity(got) == without_identity(expected)  # chunk by chunk, key by key
    if not request.stream:
        assert orjson.loads(got)["usage"]["completion_tokens"] == answer.attained


@given(routes, bodies, scripts)
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_any_cut_gives_the_bytes_of_one_call(route: Route, body: dict[str, Any], script: Script) -> None:
    check(FakeEngine(), make_request(route, **body), script)


@given(routes, bodies, scripts, st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple), st.booleans())
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_several_tokens_to_a_delta(
    route: Route, body: dict[str, Any], script: Script, merge: tuple[int, ...], learned: bool
) -> None:
    lore = Lore()
    if learned:
        serve(FakeEngine(eos=10**9), make_request(route, max_tokens=300, stream=True), Script(), lore=lore)
        assert lore.closed
    check(FakeEngine(merge), make_request(route, **body), script, lore)


stops = st.sampled_from(["A", "AB", "BA", " the", "e", "🙂", " a\n", "the!", "b b", "ABAB", "漢 글"])


@given(routes, bodies, scripts, st.lists(stops, min_size=1, max_size=3), st.sampled_from([(1,), (2,), (1, 3)]))
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_stop_strings(
    route: Route, body: dict[str, Any], script: Script, stop: list[str], merge: tuple[int, ...]
) -> None:
    check(FakeEngine(merge, eos=200), make_request(route, **body | {"stop": stop}), script)


everything = st.fixed_dictionaries(
    {},
    optional={
        "stop": st.lists(stops, min_size=1, max_size=3),
        "stop_token_ids": st.lists(st.sampled_from([3, 6, 10, 13]), min_size=1, max_size=2),
        "include_stop_str_in_output": st.booleans(),
        "frequency_penalty": st.sampled_from([0.5, 2]),
        "logit_bias": st.dictionaries(st.sampled_from(["3", "4", "14"]), st.sampled_from([-100, 1.5]), max_size=2),
        "asked": st.sampled_from([None, 0, 2]),
        "echo": st.booleans(),
        "stream_options": st.sampled_from([{"include_usage": True, "continuous_usage_stats": True}]),
    },
)


@given(routes, bodies, scripts, everything, st.sampled_from([(1,), (1,), (1, 2, 1)]), st.booleans())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_all_parameters_mixed(
    route: Route,
    body: dict[str, Any],
    script: Script,
    more: dict[str, Any],
    merge: tuple[int, ...],
    small: bool,
) -> None:
    more = dict(more)
    asked = more.pop("asked", None)
    if asked is not None:
        more |= {"logprobs": True, "top_logprobs": asked} if route is Route.CHAT else {"logprobs": asked}
    if route is Route.CHAT or asked is not None:
        more.pop("echo", None)
    body = {**body, **more}
    if not body.get("stream"):
        body.pop("stream_options", None)
    engine = FakeEngine(merge, eos=60, context=130 if small else 400)
    request = make_request(route, **body)
    assert unsliceable(request.body, request.chat, Way.CHAT_IDS) is None
    check(engine, request, script)


@given(routes, bodies, scripts, st.booleans())
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_usage_is_that_of_one_call(route: Route, body: dict[str, Any], script: Script, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    request = make_request(route, **body | {"stream": True, "stream_options": options})
    check(FakeEngine(details=True), request, script)


@pytest.mark.parametrize("route", SLICED)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_fixed_windows_to_the_end_of_the_context(route: Route, stream: bool, window: int) -> None:
    engine = FakeEngine(context=150, eos=10**9)
    request = make_request(route, stream=stream, temperature=0, max_tokens=150)
    check(engine, request, Script(rest=window, window=window))
    if window == 50:
        assert {call["max_tokens"] for call in engine.calls} <= {*range(1, 51)}


@pytest.mark.parametrize("route", SLICED)
def test_a_client_that_names_no_limit(route: Route) -> None:
    request = make_request(route, stream=True)
    check(FakeEngine(eos=60), request, Script(rest=10))
    check(FakeEngine(eos=10**9), request, Script(rest=10))


def test_the_engines_own_default_limit() -> None:
    request = make_request(Route.CHAT, stream=True, temperature=0)
    answer, _ = serve(FakeEngine(eos=10**9), request, Script(rest=10), default_limit=25)
    assert answer.attained == 25
    assert answer.finish_reason == "length"


def test_an_alias_is_kept_over_every_seam() -> None:
    for stream in (True, False):
        for window in (5, None):
            request = make_request(Route.CHAT, stream=stream, model="alias", max_tokens=40)
            _, got = serve(FakeEngine(eos=10**9), request, Script(rest=window), model="served")
            assert b'"model":"alias"' in got
            assert b'"served"' not in got


def _mutants() -> dict[str, Any]:
    """Ways to get a seam wrong, as changes to the prompt of a continuation or to what is cut back."""
    return {
        "drops the last token": lambda ids: ids[:-1],
        "doubles the last token": lambda ids: [*ids, ids[-1]],
        "drops the first token": lambda ids: ids[1:],
        "swaps two tokens": lambda ids: [*ids[:-2], ids[-1], ids[-2]] if len(ids) > 1 else ids,
    }


def _survives(script: Script) -> bool:
    """Do the answers of a few requests still equal those of one call each?"""
    try:
        for seed in ("a", "b", "c", "ab"):
            for route in SLICED:
                request = make_request(
                    route, seed_text=seed, stream=True, temperature=0, max_tokens=60, ignore_eos=True
                )
                check(FakeEngine(), request, Script(rest=script.rest))
    except AssertionError:
        return False
    return True


def test_the_unmutated_seam_survives() -> None:
    assert _survives(Script(rest=7))


@pytest.mark.parametrize("mutant", _mutants())
def test_a_mutant_continuation_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from elis_gateway.wire import dialects

    change = _mutants()[mutant]
    original = dialects.ById.more

    def more(self: Any, model: Any, priority: Any, limit: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, model, priority, limit, change(tokens) if tokens else tokens, *args, **kwargs)

    monkeypatch.setattr(dialects.ById, "more", more)
    assert not _survives(Script(rest=7))


def test_a_seam_inside_a_character_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from elis_gateway.wire import dialects

    monkeypatch.setattr(dialects.ById, "boundary", lambda *_: dialects.Boundary.SURE)
    assert not _survives(Script(rest=7))


@pytest.mark.patches
def test_text_handed_out_before_its_boundary_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from elis_gateway.wire import ledger

    monkeypatch.setattr(ledger.Ledger, "drop", lambda self: 0)
    assert not _survives(Script(rest=7))


@pytest.mark.parametrize("route", SLICED)
def test_one_json_call_where_nothing_of_ours_can_end_it(route: Route) -> None:
    engine = FakeEngine()
    request = make_request(route, max_tokens=16)
    _, got = serve(engine, request, Script(window=50))
    assert [orjson.dumps(call) for call in engine.calls] == [request.raw]
    assert got == direct(FakeEngine(), request)


def test_by_text_gives_the_same_text_where_the_tokeniser_round_trips() -> None:
    request = make_request(Route.COMPLETIONS, stream=True, max_tokens=30)
    answer, got = serve(FakeEngine(eos=10**9), request, Script(rest=7), mode=Mode.TEXT)
    assert joined(got, request)["text"] == answer.text
    assert joined(got, request)["finish"] == [("length", None)]
    assert answer.attained >= 30


@given(bodies, scripts)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_thoughts_go_on_as_thoughts(body: dict[str, Any], script: Script) -> None:
    """A parser reads from the prompt whether the answer still thinks; what it holds back at a seam is not lost."""
    body = {**body, "stream": True}
    body.pop("return_token_ids", None)
    request = make_request(Route.CHAT, **body)
    expected = joined(direct(FakeEngine(thinks=True), request), request)
    answer, got = serve(FakeEngine(thinks=True), request, script, way=Way.THOUGHTS)
    assert answer.mode is Mode.IDS
    assert _without_order(joined(got, request)) == _without_order(expected)
    if joined(got, request)["fields"] == ["reasoning", "content"]:
        assert answer.content == expected["text"]


def test_what_follows_the_thoughts_is_not_interrupted() -> None:
    request = make_request(Route.CHAT, seed_text="s0", temperature=0, max_tokens=80, stream=True, tools=[{"x": 1}])
    answer = Answer(request, Mode.IDS, context=400, way=Way.THOUGHTS, thinking=THINKING)
    payloads = FakeEngine(thinks=True).run(answer.call(None, model="served"))
    seen = []
    for payload in payloads:
        seen.append((answer.divisible, CLOSE in ((orjson.loads(payload)["choices"][0].get("token_ids")) or ())))
        answer.feed([payload])
        if seen[-1][1]:
            break
    assert len(seen) > 5
    assert all(divisible for divisible, _ in seen)
    assert not answer.divisible
    assert answer.end_slice("broken") is SliceEnd.FAILED  # its client has seen what nobody could go on from


@given(bodies, scripts, st.booleans(), st.booleans(), st.booleans())
# What the parser holds back belongs to the thoughts, though nothing that is seen comes between a seam and their end.
@example(
    body={"seed_text": "acac", "temperature": 0, "max_tokens": 8, "stream": True, "ignore_eos": True},
    script=Script(rest=1),
    tools=True,
    usage=False,
    marked=False,
)
# Tokens that are given back, because nobody knows their text, are not counted either.
@example(
    body={"seed_text": "acac", "temperature": 0, "max_tokens": 8, "stream": True, "ignore_eos": True},
    script=Script(aborts=[8]),
    tools=False,
    usage=True,
    marked=False,
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_after_the_thoughts_comes_one_call(
    body: dict[str, Any], script: Script, tools: bool, usage: bool, marked: bool
) -> None:
    """Documents, and streams whose tools or grammar nobody could take over: their thoughts are cut, the rest is not."""
    body = {"stream": False, **body}
    body.pop("return_token_ids", None)
    if usage and body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if tools:
        body["tools"] = [{"type": "function", "function": {"name": "f"}}]
    request = make_request(Route.CHAT, **body)
    engine = FakeEngine(thinks=True, marked=marked)
    expected = joined(direct(FakeEngine(thinks=True, marked=marked), request), request)
    _, got = serve(engine, request, script, way=Way.THOUGHTS)
    assert _without_order(joined(got, request)) == _without_order(expected)


def _without_order(result: dict[str, Any]) -> dict[str, Any]:
    """Fields of one chunk have no order, and a chunk may hold what the engine sends as two."""
    return {name: value for name, value in result.items() if name not in ("keys", "fields")}
