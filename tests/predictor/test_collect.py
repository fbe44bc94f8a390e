"""What is collected, from what, how it is split, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

pytest.importorskip("sklearn", reason="needs the extra [train]")

from elis_gateway.errors import ConfigError, UpstreamError
from onnx_export import records
from onnx_export.ask import ask
from onnx_export.collect import Tokens, collect, grouped, split_of
from onnx_export.records import Raw


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def raw(prompt: str, answer: str = "word " * 30, **more: Any) -> Raw:
    return Raw(**{"model": "m", "app": "a", "group": None, "where": "here:1", "tokens": 120, **more, "prompt": prompt,
                  "answer": answer})  # fmt: skip


SUBJECTS = ("a glacier", "the tax office", "my sister's violin", "sourdough", "Python lists", "the Moon", "rain",
            "old trains", "a black hole", "good coffee", "chess openings", "small boats", "sleep", "bees", "elections",
            "a broken radio", "green paint", "marathon shoes", "a haiku", "tomatoes")  # fmt: skip


def log_row(**change: Any) -> dict[str, Any]:
    return {
        "schema": 1, "job_id": "j", "model": "served", "app": "k", "class": "default", "route": "/v1/chat/completions",
        "stream": True, "prompt": "What is rain?", "prompt_hash": "x", "answer": "Water that falls. " * 10,
        "answer_hash": None, "prompt_tokens": 5, "completion_tokens": 70, "max_tokens": None, "arrival": 1.0,
        "first_token": 1.1, "end": 2.0, "queue_wait": 0.0, "slices": [], "preemptions": 0, "prediction_history": [],
        "outcome": "completed", "cause": "", "finish_reason": "stop", **change,
    }  # fmt: skip


def test_the_traffic_log_is_read_as_its_writer_wrote_it(tmp_path: Path) -> None:
    rows = [
        log_row(),
        log_row(outcome="cancelled", finish_reason=None, completion_tokens=30),
        log_row(finish_reason="length"),
        log_row(completion_tokens=0, answer=""),
    ]
    read = list(records.read(write(tmp_path / "traffic.jsonl", rows)))
    assert [(r.tokens, r.complete) for r in read] == [(70, True), (30, False), (70, False)]
    assert (read[0].model, read[0].app, read[0].prompt) == ("served", "k", "What is rain?")
    with pytest.raises(ConfigError, match=r"logging\.prompts: full"):
        list(records.read(write(tmp_path / "hashed.jsonl", [log_row(prompt=None, answer=None)])))
    with pytest.raises(ConfigError, match="schema 9"):
        list(records.read(write(tmp_path / "new.jsonl", [log_row(schema=9)])))


def test_the_log_s_real_writer_and_this_reader_share_their_fields() -> None:
    from elis_gateway.traffic_log import Row

    assert set(log_row()) <= set(Row.__annotations__)


def test_the_public_rows_become_answers_again(tmp_path: Path) -> None:
    text = "abcdefghij" * 20
    rows = [
        {"input_prompt": "p", "output_prompt": text[:cut], "number_of_output_tokens": n, "remaining_tokens": 130 - n}
        for n, cut in ((50, 60), (0, 0), (100, 140))
    ] + [{"input_prompt": "q", "output_prompt": "", "number_of_output_tokens": 0, "remaining_tokens": 7}]
    first, second = records.read(write(tmp_path / "rows.jsonl", rows))
    assert (first.tokens, first.cuts) == (130, ((0, 0), (50, 60), (100, 140)))
    assert (second.tokens, second.cuts) == (7, ((0, 0),))


def test_conversations_are_one_group_and_of_written_out_turns_the_last_counts(tmp_path: Path) -> None:
    said = [("human", "hi"), ("gpt", "hello"), ("human", "more"), ("gpt", "no")]
    messages = [("system", "s"), ("user", "u"), ("assistant", "a")]
    rows = [
        {"id": "c1", "conversations": [{"from": speaker, "value": text} for speaker, text in said]},
        {"messages": [{"role": role, "content": text} for role, text in messages]},
        {
            "prompt": "User: one\n\nAssistant: x\n\nUser: two",
            "response": "y",
            "turn": 2,
            "group_id": "g",
            "n_tokens": 1,
        },
    ]
    read = list(records.read(write(tmp_path / "chats.jsonl", rows)))
    assert [(r.prompt, r.answer) for r in read] == [("hi", "hello"), ("more", "no"), ("u", "a"), ("two", "y")]
    assert read[0].group == read[1].group == "c1"
    assert read[3].group == "g"


@pytest.mark.parametrize("content", ["[1]\n", "{\n", '{"question": 1}\n', '{"prompt": "p"}\n'])
def test_what_is_no_record_is_named_with_its_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.jsonl"):
        list(records.read(path))


def test_near_duplicates_templates_and_equal_prompts_stay_together() -> None:
    preamble = (
        "I like to host guests at my home from time to time, and I am gathering recipes. Can you give me one for "
    )
    prompts = [
        "Explain how a refrigerator works, in simple words please",
        "explain  how a refrigerator works, in simple words please!",
        "How do penguins sleep?",
        preamble + "pie",
        preamble + "fish soup",
    ]
    groups = grouped([raw(prompt) for prompt in prompts])
    assert groups[0] == groups[1]
    assert groups[3] == groups[4]
    assert len(set(groups)) == 3
    assert grouped([raw(prompt) for prompt in reversed(prompts)]) == list(reversed(groups))


def test_splits_are_by_group_stable_and_about_the_shares() -> None:
    rows = [raw(f"Tell me about {subject}, {word}") for subject in SUBJECTS for word in ("please", "now")]
    made = collect(rows, Tokens())
    splits: dict[str, set[str]] = {}
    for answer in made:
        splits.setdefault(answer.group, set()).add(answer.split)
    assert all(len(found) == 1 for found in splits.values())
    assert made == collect(rows, Tokens())
    shares = [split_of(f"group {number}", (0.1, 0.1)) for number in range(3000)]
    assert shares.count("test") == pytest.approx(300, abs=60)
    assert shares.count("validation") == pytest.approx(300, abs=60)


def test_without_a_usable_group_nothing_is_collected() -> None:
    rows = [raw(f"Tell me about {subject}") for subject in SUBJECTS]
    with pytest.raises(ConfigError, match="here:1: no group"):
        collect(rows, Tokens(), group_by="source")
    with pytest.raises(ConfigError, match="1 groups"):
        collect([raw("You are a helpful assistant of a large shop that sells everything. Answer this question: " + s)
                 for s in SUBJECTS], Tokens())  # fmt: skip
    with pytest.raises(ConfigError, match="another split"):
        collect([raw("same", split="train"), raw("same", split="test")], Tokens())
    with pytest.raises(ConfigError, match="no prompt"):
        collect([], Tokens())
    with pytest.raises(ConfigError, match="no count of tokens"):
        collect([raw(f"about {s}", tokens=None) for s in SUBJECTS], Tokens())


def test_windows_are_cut_where_the_tokens_are(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "bb": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    answer = " ".join(["a", "bb"] * 6)
    ((total, cuts),) = Tokens(tmp_path / "tokenizer.json").cut([raw("p", answer)], 5)
    assert total == 12
    assert [answer[:end].split()[-1:] for _, end in cuts] == [[], ["a"], ["bb"]]
    assert [at for at, _ in cuts] == [0, 5, 10]


def test_a_data_set_is_read_back_and_a_parted_group_refused(tmp_path: Path) -> None:
    made = collect([raw(f"Tell me about {subject}") for subject in SUBJECTS], Tokens())
    path = tmp_path / "set.jsonl.gz"
    records.save(path, made, unit="words", window=50)
    whole = records.load([path])
    assert (whole.answers, whole.unit, whole.window) == (made, "words", 50)
    made[0].split, made[1].split, made[1].group = "train", "test", made[0].group
    records.save(path, made, unit="words", window=50)
    with pytest.raises(ConfigError, match="in two splits"):
        records.load([path])
    with pytest.raises(ConfigError, match="not a data set"):
        records.load([write(tmp_path / "other.jsonl", [{"prompt": "p", "answer": "a"}])])


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An OpenAI-compatible server of one line; told "fail", it does."""
    asked: list[str] = []

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        asked.append(prompt)
        if prompt == "fail":
            return web.json_response({"error": {"message": "no"}}, status=400)
        choice = {"message": {"content": f"answer to {prompt}"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 3}})

    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    port = runner.addresses[0][1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{port}", asked
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_asking_a_server_goes_on_where_it_was_stopped(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"p{n}", "group": "g"} for n in range(4)])
    out = tmp_path / "answers.jsonl"
    out.write_text('{"prompt": "p0", "model": "m", "answer": "x"}\n{"prompt": "p1", "mo', encoding="utf-8")
    told: list[tuple[int, int]] = []
    assert ask(url, prompts, out, model="m", done=lambda done, of: told.append((done, of))) == 4
    assert sorted(asked) == ["p1", "p2", "p3"]
    assert told[0] == (1, 4)
    assert told[-1] == (4, 4)
    read = list(records.read(out))
    assert sorted(r.prompt for r in read) == ["p0", "p1", "p2", "p3"]
    assert {r.group for r in read if r.prompt != "p0"} == {"g"}


def test_a_server_that_refuses_is_said_and_what_was_answered_stays(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, _ = server
    prompts = write(tmp_path / "prompts.jsonl", ["fine", "fail"])
    out = tmp_path / "answers.jsonl"
    with pytest.raises(UpstreamError, match="status 400"):
        ask(url, prompts, out, model="m", concurrency=1)
    assert [r.prompt for r in records.read(out)] == ["fine"]
