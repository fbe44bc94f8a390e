"""Tokens of one tokenizer in terms of another's."""

from __future__ import annotations

import pytest

from elis_gateway.predictor.units import Units, script_of, training_tokens

ENGLISH = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while in the afternoon sun. "
KOREAN = "안녕하세요. 오늘은 날씨가 아주 좋아서 친구와 함께 공원에 갔습니다. 그리고 점심을 먹었습니다. "


def test_training_tokens_are_about_right() -> None:
    # SmolLM2 makes 22 tokens of the one; a Korean syllable is nearly three.
    assert training_tokens(ENGLISH) == pytest.approx(22, rel=0.2)
    assert training_tokens(KOREAN) / len(KOREAN) == pytest.approx(2.1, rel=0.2)
    assert training_tokens("") == 0.0


@pytest.mark.parametrize(
    ("answer", "prompt", "script"),
    [
        (ENGLISH, KOREAN, "latin"),
        (KOREAN, ENGLISH, "hangul"),
        ("", KOREAN, "hangul"),
        ("今天天气很好,我们去公园散步,然后吃午饭。", "", "han"),
        ("今日はとてもいい天気なので、こうえんにいきました。", "", "kana"),
        ("Сегодня очень хорошая погода, и мы пошли гулять.", "", "other"),
        ("Voilà, ça s'est passé très vite à la gare du Nord.", "", "latin"),
        ("", "", "latin"),
    ],
)
def test_scripts(answer: str, prompt: str, script: str) -> None:
    assert script_of(answer, prompt) == script


def test_learns_the_ratio_by_model_and_script() -> None:
    units = Units()
    for _ in range(20):
        units.learn("m", ENGLISH * 5, round(1.2 * training_tokens(ENGLISH * 5)))
        units.learn("m", KOREAN * 5, round(0.4 * training_tokens(KOREAN * 5)))
    assert units.ratio("m", "latin") == pytest.approx(1.2, rel=0.05)
    assert units.ratio("m", "hangul") == pytest.approx(0.4, rel=0.05)
    assert units.ratio("other", "latin") == 1.0


def test_one_absurd_answer_decides_nothing() -> None:
    units = Units()
    for _ in range(20):
        units.learn("m", ENGLISH * 5, round(training_tokens(ENGLISH * 5)))
    units.learn("m", ENGLISH, 10**6)  # a usage that the text does not show
    units.learn("m", ENGLISH * 10_000, 4 * round(training_tokens(ENGLISH * 10_000)))
    assert units.ratio("m", "latin") < 2.3


def test_is_kept() -> None:
    units, again = Units(), Units()
    units.learn("m", KOREAN * 9, 300)
    again.restore(units.dump())
    assert again.ratio("m", "hangul") == pytest.approx(units.ratio("m", "hangul"), rel=1e-3)
    with pytest.raises(ValueError, match="token units"):
        again.restore([["m", "klingon", 1.0, 1.0]])
