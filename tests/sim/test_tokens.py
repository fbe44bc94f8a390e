"""The synthetic tokenizer and language: exact under continuation by ids, unforgiving under anything else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.sim.checker import Answer, Checker
from elis_gateway.sim.language import GREEDY, Language, Lengths, Sampling
from elis_gateway.sim.script import Script, Stops, write
from elis_gateway.sim.server_config import ServerConfig
from elis_gateway.sim.tokens import (
    CHARACTERS,
    END,
    LENGTH,
    PIECES,
    VOCABULARY,
    Detokenizer,
    decode,
    encode,
    incomplete,
    piece,
    tail,
)

LANGUAGE = Language()
HELLO = LANGUAGE.prompt("Hello 세계 😀, how are you?", length=400)
ANSWER = LANGUAGE.answer(HELLO, 400)


def call(
    prompt: list[int], limit: int, *, sampling: Sampling = GREEDY, language: Language = LANGUAGE, **stops: object
) -> Script:
    return write(prompt, language.walker(prompt, sampling), Stops(limit, **stops))  # type: ignore[arg-type]


def complete(ids: list[int]) -> str:
    """Text up to the last place where no character is unfinished."""
    return decode(next(ids[:size] for size in range(len(ids), -1, -1) if not tail(ids[:size])))


# The tokenizer


@given(st.text())
def test_encoding_keeps_the_text(text: str) -> None:
    assert decode(encode(text)) == text.encode("utf-8", "replace").decode()


@given(st.binary(max_size=12))
def test_incomplete_is_what_the_decoder_holds_back(data: bytes) -> None:
    rest = incomplete(data)
    assert data.endswith(rest)
    if rest:
        with pytest.raises(UnicodeDecodeError):
            rest.decode()
        assert len(rest) < 4


def test_every_character_is_split_in_several_ways() -> None:
    ids = {text: token for token, text in enumerate(PIECES)}
    for character in CHARACTERS:
        raw = character.encode()
        assert all(raw[:cut] in ids and raw[cut:] in ids for cut in range(1, len(raw)))


def test_ids_that_are_no_token() -> None:
    for token in (-1, len(PIECES), LENGTH - 1, VOCABULARY):
        with pytest.raises(ValueError, match="out of vocabulary"):
            piece(token)
        with pytest.raises(ValueError, match="out of vocabulary"):
            LANGUAGE.walker([token])


@given(st.lists(st.integers(3, len(PIECES) - 1), max_size=12))
def test_tail_looks_back_far_enough(ids: list[int]) -> None:
    assert tail(ids) == incomplete(b"".join(map(piece, ids)))


@given(st.text(), st.integers(0, 12))
def test_streamed_text_is_the_text(text: str, cut: int) -> None:
    ids = encode(text)
    stream = Detokenizer()
    assert "".join(map(stream.feed, ids)) + stream.rest() == decode(ids)
    stream = Detokenizer()
    assert decode(ids).startswith("".join(map(stream.feed, ids[:cut])))


LAPTOP, EUN = "💻".encode(), "은".encode()
THE = b" the"


@pytest.mark.parametrize(
    ("prompt", "pieces", "deltas"),
    [
        ([THE], [THE, LAPTOP[:3], LAPTOP[3:] + EUN[:2], EUN[2:], THE], [" the", "", "", "💻은", " the"]),
        ([THE], [LAPTOP[:3], LAPTOP[3:] + THE, THE], ["", "💻 the", " the"]),
        ([THE], [b"\x98", THE, b"\xf0", b"\xf0", THE, THE], ["", "� the", "", "", "�� the", " the"]),
        ([THE, LAPTOP[:3]], [LAPTOP[3:] + EUN[:2], EUN[2:], THE], ["", " the💻은", " the"]),
        ([THE, LAPTOP[:3], LAPTOP[3:] + EUN[:2]], [EUN[2:], THE], [" the💻은", " the"]),
    ],
)
def test_detokenizing_as_recorded(prompt: list[bytes], pieces: list[bytes], deltas: list[str]) -> None:
    """Recorded from the decode stream of ``tokenizers`` that vLLM 0.32.0 uses, with the same pieces."""
    table = list(dict.fromkeys([*prompt, *pieces]))
    stream = Detokenizer([table.index(text) for text in prompt], table.__getitem__)
    assert [stream.feed(table.index(text)) for text in pieces] == deltas


# The language


def test_answers_are_valid_text_with_split_characters() -> None:
    text = decode(ANSWER)
    assert "�" not in text
    assert any(character in text for character in CHARACTERS)
    assert sum(1 for cut in range(1, len(ANSWER)) if tail(ANSWER[:cut])) > 50


def test_retokenising_is_not_the_identity() -> None:
    assert encode(decode(ANSWER)) != ANSWER[:-1]
    assert len(encode(decode(ANSWER))) < len(ANSWER)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40), st.integers(1, 60), st.integers(0, 3))
def test_any_window_gives_the_unsliced_answer(prompt: str, window: int, seed: int) -> None:
    language = Language(seed=seed, lengths=Lengths(mean=70))
    ids = language.prompt(prompt)
    whole = language.answer(ids, 300)
    sliced: list[int] = []
    while len(sliced) < 300 and (not sliced or sliced[-1] != END):
        sliced += language.answer(ids + sliced, min(window, 300 - len(sliced)))
    assert sliced == whole


@pytest.mark.parametrize("lengths", [Lengths(), Lengths("hazard", mean=50)])
def test_bare_ids_end_by_themselves_too(lengths: Lengths) -> None:
    language = Language(lengths=lengths)
    whole = language.answer([500, 501, 502], 5000)
    assert whole[-1] == END
    half = whole[: len(whole) // 2]
    assert half + language.answer([500, 501, 502, *half], 5000) == whole


@pytest.mark.parametrize("at", [1, 7, 49, 120])
def test_one_wrong_token_changes_everything_after(at: int) -> None:
    prefix = ANSWER[:150]
    dropped = prefix[: at - 1] + prefix[at:]
    doubled = [*prefix[:at], prefix[at - 1], *prefix[at:]]
    right = LANGUAGE.answer(HELLO + prefix, 60)
    for wrong in (dropped, doubled, encode(decode(prefix))):
        other = LANGUAGE.answer(HELLO + wrong, 60)
        assert sum(a == b for a, b in zip(right, other, strict=False)) < 12
        assert right[0:3] != other[0:3]


def test_continuing_by_text_changes_the_answer() -> None:
    cut = next(cut for cut in range(50, 60) if not tail(ANSWER[:cut]))
    again = LANGUAGE.prompt("Hello 세계 😀, how are you?" + decode(ANSWER[:cut]), length=400 - cut)
    assert LANGUAGE.answer(again, 30) != ANSWER[cut : cut + 30]


@pytest.mark.parametrize("length", [1, 2, 57])
def test_forced_length_counts_the_end(length: int) -> None:
    answer = LANGUAGE.answer(LANGUAGE.prompt("x", length=length), 1000)
    assert len(answer) == length
    assert answer[-1] == END


def test_length_distributions() -> None:
    def drawn(lengths: Lengths) -> list[int]:
        language = Language(lengths=lengths)
        return [language.prompt(f"prompt {number}")[-1] - LENGTH for number in range(2000)]

    assert set(drawn(Lengths("constant", mean=33))) == {33}
    uniform = drawn(Lengths("uniform", minimum=5, maximum=8))
    assert set(uniform) == {5, 6, 7, 8}
    normal = drawn(Lengths(mean=100, sigma=0.5))
    assert 95 < sum(normal) / len(normal) < 105


def test_seeded_sampling_restarts_with_every_call() -> None:
    sampled = Sampling(temperature=0.8, seed=11)
    whole = LANGUAGE.answer(HELLO, 40, sampled)
    assert whole == LANGUAGE.answer(HELLO, 40, sampled)
    assert whole != LANGUAGE.answer(HELLO, 40, Sampling(temperature=0.8, seed=12))
    assert whole != ANSWER[:40]
    assert whole[:20] + LANGUAGE.answer(HELLO + whole[:20], 20, sampled) != whole


def test_penalties_count_this_call_only() -> None:
    """Except the repetition penalty, which counts the prompt too and so survives slicing."""
    for penalised in (Sampling(presence_penalty=2.0), Sampling(frequency_penalty=1.5)):
        whole = LANGUAGE.answer(HELLO, 300, penalised)
        assert whole != ANSWER[:300]
        assert whole[:200] + LANGUAGE.answer(HELLO + whole[:200], 100, penalised) != whole
    repetition = Sampling(repetition_penalty=3.0)
    whole = LANGUAGE.answer(HELLO, 300, repetition)
    assert whole != ANSWER[:300]
    assert whole[:200] + LANGUAGE.answer(HELLO + whole[:200], 100, repetition) == whole


# One call: hold-back, stops, minimum


def test_text_lags_behind_its_ids() -> None:
    script = call(HELLO, 200)
    assert script.ids == ANSWER[:200]
    assert decode(script.ids).startswith(script.text)
    assert "" in script.texts
    assert "�" not in script.text


def test_a_call_cut_inside_a_character_drops_it_or_flushes_it() -> None:
    cut = next(cut for cut in range(1, 200) if tail(ANSWER[:cut]))
    assert call(HELLO, cut).text == complete(ANSWER[:cut]) != decode(ANSWER[:cut])
    flushed = write(HELLO, LANGUAGE.walker(HELLO), Stops(cut), flush_unfinished=True)
    assert flushed.text == decode(ANSWER[:cut])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(1, 9), st.booleans())
def test_stop_strings_cut_the_text(start: int, size: int, include: bool) -> None:
    text = decode(ANSWER)
    stop = text[start : start + size]
    script = call(HELLO, 399, strings=(stop,), include=include)
    at = text.index(stop)
    assert (script.finish, script.stop_reason) == ("stop", stop)
    assert script.text == text[: at + size if include else at]
    assert script.ids == ANSWER[: len(script.ids)]
    assert len(complete(script.ids[:-1])) < at + size <= len(complete(script.ids))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 3), st.integers(0, 60), st.booleans())
def test_the_checker_cuts_where_the_server_does(start: int, size: int, minimum: int, include: bool) -> None:
    """Two ways to the same answer: token by token with hold-back, and searching the whole text."""
    text = decode(ANSWER)
    body = {
        "prompt": HELLO,
        "max_tokens": 300,
        "min_tokens": minimum,
        "stop": [text[start : start + size], text[start + 5 : start + 6]],
        "include_stop_str_in_output": include,
    }
    script = call(HELLO, 300, strings=tuple(body["stop"]), minimum=minimum, include=include)  # type: ignore[arg-type]
    expected = Checker(ServerConfig(language=LANGUAGE)).expected("/v1/completions", body)
    assert expected == Answer(script.text, script.finish, len(HELLO), len(script.ids), script.stop_reason)


def test_a_stop_string_across_a_seam_is_missed() -> None:
    whole = call(HELLO, 100)
    seam = next(cut for cut in range(20, 80) if not tail(ANSWER[:cut]) and not tail(ANSWER[: cut + 1]))
    stop = decode(ANSWER[:seam])[-1] + decode(ANSWER[seam : seam + 1])[0]
    assert stop in whole.text
    assert call(HELLO + ANSWER[:seam], 100, strings=(stop + "never",)).finish == "length"
    second = call(HELLO + ANSWER[:seam], 1, strings=(stop,))
    assert second.finish == "length"


def test_the_stop_that_completes_first_wins() -> None:
    text = decode(ANSWER)
    early, late = text[30:32], text[30:36]
    assert call(HELLO, 399, strings=(late, early)).stop_reason == early


def test_end_and_stop_tokens_are_ids_without_text() -> None:
    done = call(HELLO, 1000)
    assert (done.finish, done.stop_reason, done.ids[-1]) == ("stop", None, END)
    assert done.text == decode(ANSWER)
    token = ANSWER[60]
    stopped = call(HELLO, 1000, tokens=frozenset({token}))
    first = ANSWER.index(token)
    assert (stopped.finish, stopped.stop_reason, len(stopped.ids)) == ("stop", token, first + 1)
    assert stopped.text == complete(ANSWER[:first])


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8), st.integers(1, 30), st.integers(0, 40))
def test_no_answer_ends_inside_a_character(prompt: str, length: int, minimum: int) -> None:
    ids = LANGUAGE.prompt(prompt, length=length)
    script = call(ids, 100, minimum=minimum)
    assert script.finish == "stop"
    assert not tail(script.ids)
    assert "�" not in decode(script.ids)


def test_min_tokens_and_ignore_eos() -> None:
    short = LANGUAGE.prompt("short", length=5)
    assert len(call(short, 50, minimum=20).ids) == 21
    ignored = call(short, 50, ignore_end=True)
    assert (len(ignored.ids), ignored.finish) == (50, "length")
    assert END not in ignored.ids


# Recorded from vLLM 0.32.0 (SmolLM2-135M, float32): "The capital of France is" continued, one token per delta
TOLD = [(7042, " Paris"), (30, "."), (198, "\n"), (198, "\n"), (504, "The"), (2988, " answer"), (314, " is")]
TOLD += [(42, ":"), (216, " "), (34, "2"), (32, "0"), (33, "1"), (40, "8"), (29, "-")]
RECORDED: list[tuple[dict[str, object], list[str], object]] = [
    ({}, [text for _, text in TOLD], None),
    (
        {"strings": ("zzzzzzzzzz",)},
        ["", "", "", "", " Pa", "ris.\n\nT", "he ", "a", "n", "s", "w", "e", "r", " is: 2018-"],
        None,
    ),
    ({"strings": ("Paris.\n\nThe",)}, ["", "", "", "", " "], "Paris.\n\nThe"),
    (
        {"strings": ("capital", "cap")},
        ["", " ", "P", "a", "ris", ".\n\nThe ", "ans", "w", "e", "r", " ", "i", "s", ": 2018-"],
        None,
    ),
    (
        {"strings": ("Paris",), "minimum": 5},
        [" P", "a", "r", "i", "s.\n", "\nThe an", "swe", "r", " ", "i", "s", ":", " ", "2018-"],
        None,
    ),
    ({"strings": ("is",), "include": True}, [" Paris"], "is"),
    ({"tokens": frozenset({198})}, [" Paris", ".", ""], 198),
    ({"tokens": frozenset({198}), "include": True}, [" Paris", ".", "\n"], 198),
    ({"strings": (" ",), "minimum": 3}, [" Paris", ".", "\n", "\n", "The", ""], " "),
]


class Told:
    """Says what the engine said."""

    def __init__(self) -> None:
        self._at = 0

    def step(self, *, may_end: bool = True) -> int:
        self._at += 1
        return TOLD[self._at - 1][0]


@pytest.mark.parametrize(("stops", "deltas", "reason"), RECORDED)
def test_deltas_as_recorded_from_vllm(stops: dict[str, object], deltas: list[str], reason: object) -> None:
    texts = {token: text.encode() for token, text in TOLD}
    limits = Stops(14, **stops)  # type: ignore[arg-type]
    script = write((), Told(), limits, decoder=lambda ids: Detokenizer(ids, texts.__getitem__))
    assert script.texts == deltas
    assert script.ids == [token for token, _ in TOLD[: len(deltas)]]
    assert (script.finish, script.stop_reason) == ("length" if reason is None else "stop", reason)
