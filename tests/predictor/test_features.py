"""What the heads see: finite, in order, cheap, and about what its name says."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.predictor import features as f
from tests.predictor import plain_features

POOL = Path(__file__).parents[2] / "loadtest" / "data" / "pool.jsonl"


def of(prompt: str, answer: str = "", attained: int | None = None) -> dict[str, float]:
    values = f.features(prompt, answer, len(answer) // 4 if attained is None else attained)
    return dict(zip(f.FEATURES, values, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=400), st.text(max_size=400), st.integers(0, 100_000))
def test_every_text_gives_finite_small_numbers_in_the_same_order(prompt: str, answer: str, attained: int) -> None:
    values = f.features(prompt, answer, attained)
    assert len(values) == len(f.FEATURES) == len(set(f.FEATURES))
    assert all(math.isfinite(value) and abs(value) < 100 for value in values)
    assert values == f.features(prompt, answer, attained)


_PIECES = (
    "\n", "\n\n", "\n\n\n", " ", "**", "*", "```", "`", "{", "}", "1.", "2)", "3", "- ", "* ", "# ", "**Bold**:\n",
    "**B**\n", "word", "\t", "12.", "overall, ", "한",
    "Step 1", "Overall, ", "Thus, ", "I hope this", "요약", "따라서", "٣.",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(_PIECES), max_size=10).map("".join), max_size=10))
def test_a_growing_answer_is_read_as_one_that_was_there_at_once(grown: list[str]) -> None:
    reading, answer = f.Reading("five tips in 300 words"), ""
    for more in grown:
        answer += more
        seen = reading(answer, len(answer))
        assert seen == f.features("five tips in 300 words", answer, len(answer))
        assert seen == plain_features.features("five tips in 300 words", answer, len(answer))
    # Not what it was: counted from the beginning.
    other = "Some {other} answer.\n\n" * 30
    assert reading(other, 9) == f.features("five tips in 300 words", other, 9)


def test_real_answers_are_counted_to_the_last_bit_as_plainly() -> None:
    rows = [json.loads(line) for line in POOL.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 100
    for row in rows:
        reading = f.Reading(row["prompt"])
        # Windows of 50 tokens, nearly, and some that end in the middle of a line or of a run of newlines.
        for at in (*range(0, len(row["answer"]), 219), len(row["answer"])):
            seen = row["answer"][:at]
            assert reading(seen, at // 4) == plain_features.features(row["prompt"], seen, at // 4)


def test_another_text_is_noticed_where_a_line_does_not_end() -> None:
    reading = f.Reading("p")
    reading("*\n", 2)
    assert reading("*" * 60, 9) == f.features("p", "*" * 60, 9)


def test_of_a_very_long_answer_the_beginning_is_counted_and_the_end_looked_at() -> None:
    answer = "1. **x** {\n- y y\n\n" * 3000
    reading = f.Reading("p")
    for size in (10, 5000, 16_383, 16_384, 16_385, 30_000, len(answer)):
        seen = reading(answer[:size], size)
        assert seen == f.features("p", answer[:size], size) == plain_features.features("p", answer[:size], size)
    assert of("p", answer)["bullets"] < math.log1p(1000)


def test_lone_surrogates_are_text_too() -> None:
    assert of("\ud800", "\udfff")["chars"] > 0


@pytest.mark.parametrize(
    ("prompt", "name", "number"),
    [
        ("Give me ten creative ideas for a birthday.", "wants_items", 10),
        ("What are the top 5 rivers of France?", "wants_items", 5),
        ("List 12 synonyms of happy", "wants_items", 12),
        ("In 1969 people landed on the Moon", "wants_items", 0),
        ("봄에 피는 꽃을 세 가지 알려 주세요.", "wants_items", 3),
        ("请列出三种水果。", "wants_items", 3),
        ("Write a 500-word essay about bees", "wants_words", 500),
        ("Explain it in about 100 words or less", "wants_words", 100),
        ("커피에 대해 300자로 써 주세요", "wants_words", 300),
        ("Explain a glacier in two sentences.", "wants_sentences", 2),
        ("Write 3 short paragraphs about rain", "wants_paragraphs", 3),
        ("Tell me about rain", "wants_words", 0),
    ],
)
def test_lengths_stated_in_the_prompt(prompt: str, name: str, number: int) -> None:
    assert of(prompt)[name] == pytest.approx(math.log1p(number))


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("Write a Python function that reverses a string", "asks_code"),
        ("Tell me a story about a lost mitten", "asks_story"),
        ("Summarize the text below", "asks_shorten"),
        ("Can penguins fly? Answer yes or no.", "asks_short"),
        ("Describe it in depth", "asks_long"),
        ("Translate into French: the train leaves", "asks_translate"),
        ("2시간은 몇 분인가요?", "asks_count"),
    ],
)
def test_kinds_of_request(prompt: str, kind: str) -> None:
    assert of(prompt)[kind] == 1.0
    assert of("Hello")[kind] == 0.0


def test_a_list_counts_down() -> None:
    prompt = "Give me 10 tips for baking bread"
    items = [f"{n}. Knead it well and let it rest for a while.\n" for n in range(1, 11)]
    left = [of(prompt, "".join(items[:n]), 12 * n) for n in (1, 4, 9, 10)]
    assert [round(math.expm1(row["last_number"])) for row in left] == [1, 4, 9, 10]
    assert [row["items_share"] for row in left] == pytest.approx([0.1, 0.4, 0.9, 1.0])
    assert math.expm1(left[1]["items_left"]) == pytest.approx(6 * 12)
    assert left[3]["items_left"] == 0.0
    # Where the prompt names no number, the answer's first lines may.
    assert of("Tips for bread?", "Sure! Here are 5 tips:\n\n1. Knead.\n2. Rest.\n")["items_share"] == pytest.approx(0.4)
    assert of("Tips for bread?", "1. Knead.\n2. Rest.\n")["items_share"] == -1.0


def test_marks_of_an_answer_about_to_end_or_not() -> None:
    code = of("Write a function", "Sure, here it is:\n\n```python\ndef f():\n    return {", 20)
    assert (code["open_fence"], code["opening"], code["open_brackets"]) == (1.0, 1.0, pytest.approx(math.log(2)))
    closed = of("Write a function", "```python\nx = 1\n```\n", 20)
    assert (closed["open_fence"], closed["ends_fence"], closed["ends_line"]) == (0.0, 1.0, 1.0)
    ending = of("Tips?", "Do this. " * 40 + "Overall, practice. I hope this helps!", 90)
    assert ending["closing"] > 0
    assert ending["ends_sentence"] == 1.0
    assert of("Tips?", "Do this. " * 40, 90)["closing"] == 0.0
    assert of("Tips?", "Do this. " * 40, 90)["repetition"] > 0.5
    assert of("Order a pizza", "I'm sorry, but as an AI language model I cannot do that.", 14)["refusal"] == 1.0


def test_text_that_was_withheld_leaves_the_count_of_tokens() -> None:
    row = of("Tell me a story", "", 150)
    assert row["attained"] == pytest.approx(math.log1p(150))
    assert row["chars_per_token"] == 0.0


def test_a_long_answer_costs_little() -> None:
    """Bounded by CPU time, with room for a slow machine; a quadratic search would need seconds."""
    answer = "1. **Knead** the dough (ten minutes) and let it rest.\n\n- Then bake it.\n" * 60
    f.features("Give me 10 tips", answer, 1000)
    started = time.process_time()
    for _ in range(50):
        f.features("Give me 10 tips", answer, 1000)
    assert (time.process_time() - started) / 50 < 0.002
    started = time.process_time()
    f.features("word 1 " * 200_000, "1.\n" * 200_000, 10)
    f.features("\n \t" * 200_000, "\n \t" * 200_000, 10)
    assert time.process_time() - started < 2


def test_a_prompts_cut_keeps_both_ends() -> None:
    assert f.prompt_text("short") == "short"
    cut = f.prompt_text("a" * 10_000 + "b" * 10_000)
    assert cut.startswith("aaa")
    assert cut.endswith("bbb")
    assert len(cut) < 8300
    assert f.answer_text("a" * 10_000 + "b" * 10_000) == "b" * 8192
    assert f.prompt_ids([1, 2, 3], 8, prefix=[101], suffix=[102]) == [101, 1, 2, 3, 102]
    assert f.prompt_ids(range(100), 11, prefix=[101], suffix=[102]) == [101, 0, 1, 2, 3, 4, 5, 97, 98, 99, 102]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(8, 60))
def test_papers_cut_keeps_the_prompts_head_and_the_answers_tail(prompt: int, answer: int, limit: int) -> None:
    questions, words = list(range(1, prompt + 1)), list(range(1001, 1001 + answer))
    ids = f.paper_ids(questions, words, limit, prefix=[-1], separator=[-2], suffix=[-3])
    assert len(ids) == min(prompt + answer + 3, limit)
    middle = ids.index(-2)
    asked, said = ids[1:middle], ids[middle + 1 : -1]
    assert asked == questions[: len(asked)]
    assert said == words[answer - len(said) :]
    assert len(asked) >= min(prompt, (limit - 3) // 2)
    assert len(said) >= min(answer, (limit - 3) // 2)
