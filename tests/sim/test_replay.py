"""Recorded answers, streamed token by token and continued."""

from __future__ import annotations

import gzip
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elis_gateway.errors import ConfigError
from elis_gateway.sim.checker import Checker
from elis_gateway.sim.language import GREEDY, Language
from elis_gateway.sim.replay import Pair, Recorded, read, split
from elis_gateway.sim.script import Script, Stops, write
from elis_gateway.sim.server import Sim
from elis_gateway.sim.server_config import ServerConfig

PAIRS = [
    Pair("Why?", "Because 42 is the answer, 그리고 😀.\n\n- one\n- two"),
    Pair("Why? Really", "No."),
    Pair("Nothing", ""),
    Pair("User: a\n\nAssistant: b\n\nUser: c", "the third turn"),
    Pair("Why?", "a second answer to the same prompt is not used"),
]
VOICE = Recorded(PAIRS, fallback=Language())


def say(ids: list[int], limit: int = 500, *, voice: Recorded = VOICE, ignore_end: bool = False) -> Script:
    stops = Stops(limit, ignore_end=ignore_end)
    return write(ids, voice.stepper(ids, GREEDY), stops, decoder=voice.decoder)


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(split(text)) == text


@pytest.mark.parametrize("pair", PAIRS[:4])
def test_a_recorded_prompt_gets_its_answer(pair: Pair) -> None:
    script = say(VOICE.prompt(pair.prompt, length=None))
    assert (script.text, script.finish) == (pair.answer, "stop")
    assert len(script.ids) == VOICE.length(pair.prompt)


def chat(*messages: tuple[str, str], continue_last: bool = False) -> list[int]:
    return VOICE.chat(messages, open_turn=not continue_last, continue_last=continue_last, length=None)


def test_chats_find_their_answer() -> None:
    assert say(chat(("system", "be brief"), ("user", "Why?"))).text == PAIRS[0].answer
    assert say(chat(("user", "a"), ("assistant", "b"), ("user", "c"))).text == "the third turn"


@pytest.mark.parametrize("window", [1, 3, 50])
def test_continued_by_ids(window: int) -> None:
    ids = chat(("user", "Why?"))
    whole = say(ids)
    said: list[int] = []
    while len(said) < len(whole.ids):
        said += say(ids + said, window).ids
    assert said == whole.ids


def test_one_wrong_id_is_another_answer() -> None:
    ids = chat(("user", "Why?"))
    whole = say(ids).ids
    for wrong in (whole[:4] + whole[5:8], [*whole[:4], whole[3]], whole[1:4]):
        after = say(ids + wrong, 5)
        assert after.ids[:2] != whole[len(wrong) : len(wrong) + 2]
        assert after.text not in PAIRS[0].answer


def test_continued_by_text() -> None:
    """As on a real engine with plain text: the words said so far are part of the prompt."""
    whole = say(VOICE.prompt("Why?", length=None))
    so_far = "".join(whole.texts[:6])
    rest = PAIRS[0].answer[len(so_far) :]
    assert say(VOICE.prompt("Why?" + so_far, length=None)).text == rest
    assert say(chat(("user", "Why?"), ("assistant", so_far), continue_last=True)).text == rest
    assert say(VOICE.prompt("Why?" + so_far + "oops", length=None)).text != rest


@pytest.mark.parametrize("length", [1, 5, 100])
def test_forced_lengths(length: int) -> None:
    ids = VOICE.prompt("Why?", length=length)
    script = say(ids)
    assert (len(script.ids), script.finish) == (length, "stop")
    assert (PAIRS[0].answer * 9).startswith(script.text)
    half = script.ids[: length // 2]
    assert half + say(ids + half).ids == script.ids


def test_ignore_eos_goes_on_and_an_unknown_prompt_is_answered() -> None:
    assert say(VOICE.prompt("Why? Really", length=None), 9, ignore_end=True).text == "No." * 4 + "No"
    assert say(VOICE.prompt("never recorded", length=7)).finish == "stop"


def test_ids_that_are_no_token() -> None:
    for token in (-1, 1 << 22, (1 << 24) + (1 << 16) * 99):
        with pytest.raises(ValueError, match="out of vocabulary"):
            say([token])


def test_files(tmp_path: Path) -> None:
    rows = b"\n".join(orjson.dumps({"prompt": p.prompt, "response": p.answer, "source": "x"}) for p in PAIRS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows + b"\n\n"))
    assert read(tmp_path / "a.jsonl.gz") == PAIRS
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "p", "answer": "a"}\n{"prompt": "p"}')
    with pytest.raises(ConfigError, match=r"b\.jsonl:2"):
        read(tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "c.jsonl")
    config = ServerConfig(replay=str(tmp_path / "a.jsonl.gz"))
    checker = Checker(config, Sim(config).voice)
    expected = checker.expected("/v1/chat/completions", {"messages": [{"role": "user", "content": "Why?"}]})
    assert (expected.text, expected.finish) == (PAIRS[0].answer, "stop")
    with pytest.raises(ConfigError, match="voice"):
        Checker(config)
