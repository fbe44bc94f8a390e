"""Workloads from a plan: every arrival process, length distribution and prompt format, mixes, and what is refused."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from elis_gateway.errors import ConfigError
from elis_gateway.predictor.base import View
from elis_gateway.predictor.baselines import Oracle
from elis_gateway.sim.replay import read as read_recording
from loadtest import arrivals, lengths, make, prompts
from loadtest.make import App, Plan
from loadtest.workload import Seeds, Workload

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.6805900,{100 + second},{10 * second + 1}\n" for second in range(0, 60, 2)
)


def draw(process: str, n: int = 4000, rate: float = 2.0, seed: int = 1) -> list[float]:
    return arrivals.draw(process, n, rate, random.Random(seed))


@pytest.mark.parametrize("process", ["constant", "poisson", "gamma:shape=0.5", "onoff:on=5,off=10,idle=0.2"])
def test_every_process_keeps_the_mean_rate(process: str) -> None:
    at = draw(process)
    assert len(at) == 4000
    assert at == sorted(at)
    assert len(at) / at[-1] == pytest.approx(2.0, rel=0.06)


def test_bursts_come_while_on_and_hardly_while_off() -> None:
    at = draw("onoff:on=5,off=10,idle=0.2")
    on = sum(moment % 15 < 5 for moment in at)
    assert on / len(at) == pytest.approx(1 - 0.2 * 10 / 15, abs=0.02)
    assert not [moment for moment in draw("onoff:on=5,off=10") if moment % 15 > 5]


def test_a_ramp_rises_and_stages_hold() -> None:
    at = draw("ramp:from=0.5,to=1.5")
    end = 4000 / 2.0
    quarters = [sum(end * q / 4 <= moment < end * (q + 1) / 4 for moment in at) / (end / 4) for q in range(4)]
    assert quarters == pytest.approx([1.25, 1.75, 2.25, 2.75], rel=0.12)
    at = draw("stages:100@0.5,100@2,100@1")
    rates = [sum(start <= moment < start + 100 for moment in at) / 100 for start in (0, 100, 200)]
    assert rates == pytest.approx([1, 4, 2], rel=0.25)
    assert draw("once", 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ("poison", "expected one of constant, gamma"),
        ("gamma:shap=1", "unknown option 'shap'"),
        ("gamma:shape=no", "shape: expected a number, got 'no'"),
        ("onoff:on=5", "expected off="),
        ("onoff:on=5,off=5,idle=1", "less than 1"),
        ("stages:60", "expected SECONDS@TIMES"),
        ("stages:60@1,60@0", "the last with a rate above 0"),
        ("stages", "expected stages such as"),
        ("constant:7", "'7' is not understood"),
    ],
)
def test_a_process_that_is_not_understood_is_refused(process: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        draw(process)


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("constant:tokens=7", 7),
        ("uniform:min=10,max=30", 20),
        ("exponential:mean=80", 80),
        ("lognormal:mean=100,sigma=0.5", 100),
        ("pareto:min=40,alpha=3", 60),
        ("two:short=10,long=110,share=0.5", 60),
    ],
)
def test_distributions_have_their_mean(text: str, mean: float) -> None:
    drawn = lengths.draw(text, 20_000, random.Random(3), longest=10**6)
    assert fmean(drawn) == pytest.approx(mean, rel=0.06)
    assert max(lengths.draw(text, 100, random.Random(3), longest=9)) <= 9


def test_heavy_tails_are_heavy() -> None:
    drawn = lengths.draw("pareto:min=40,alpha=1.2", 20_000, random.Random(1), longest=10**6)
    assert pstdev(drawn) / fmean(drawn) > 3


# ---- prompts --------------------------------------------------------------------------------------------------------

ROWS = {
    "plain.jsonl": '"hi"\n{"prompt": "hello", "answer": "there", "tokens": 3, "kind": "greet"}\n',
    "prompts.json": '{"prompts": ["hi", {"input_prompt": "hello", "output_prompt": "there"}]}',
    "rows.csv": "input_prompt,output_prompt,number_of_output_tokens,remaining_tokens\nhi,yes,9,9\nhello,there,3,3\n",
    "sharegpt.json": json.dumps(
        [
            {"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
            {"id": "b", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]},
        ]
    ),
    "lmsys.jsonl": "\n".join(
        json.dumps({"conversation": [{"role": "user", "content": asked}, {"role": "assistant", "content": "there"}]})
        for asked in ("hi", "hello")
    ),
    "openai.jsonl": "\n".join(
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": asked}]}]})
        for asked in ("hi", "hello")
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("packed", [False, True])
def test_prompt_files(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / (name + (".gz" if packed else ""))
    data = ROWS[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    found = prompts.read(str(path))
    assert [prompt.prompt for prompt in found] == ["hi", "hello"]
    if name not in ("openai.jsonl",):
        assert (found[1].answer, found[1].tokens > 0) == ("there", True)
    if name in ("plain.jsonl", "rows.csv"):
        assert found[1].tokens == 3


def test_a_conversation_by_first_turn_or_all(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    said = [("system", "be kind"), ("human", "a"), ("gpt", "A"), ("human", "b"), ("gpt", "B B")]
    path.write_text(json.dumps([{"conversations": [{"from": who, "value": what} for who, what in said]}]))
    (first,) = prompts.read(str(path))
    assert (first.prompt, first.turns, first.answer) == ("a", (("system", "be kind"),), "A")
    _, second = prompts.read(str(path), turns="all")
    assert (second.prompt, second.turns[-1], second.answer) == ("b", ("assistant", "A"), "B B")


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no prompt"), ("{", "not JSON"), ('{"a": 1}\n{"b": 2}', "expected one of the fields prompt"), ("[3]", "int")],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        prompts.read(str(path))


# ---- plans ----------------------------------------------------------------------------------------------------------


def made(seeds: Seeds | None = None, **plan: object) -> Workload:
    if "lengths" in plan:
        plan["apps"] = (App(lengths=str(plan.pop("lengths"))),)
    return make.make(Plan(**{"requests": 50, "rate": 2.0, **plan}), seeds or Seeds())  # type: ignore[arg-type]


def test_the_same_plan_and_seeds_give_the_same_file(tmp_path: Path) -> None:
    one, two = made(), made()
    assert one.hash == two.hash
    one.save(tmp_path / "1")
    two.save(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert Workload.load(tmp_path / "1") == one
    assert made(Seeds(lengths=1)).hash != one.hash
    assert [r.at for r in made(Seeds(lengths=1)).requests] == [r.at for r in one.requests]


def test_a_load_is_of_the_lengths_drawn() -> None:
    work = made(rate=None, load=0.8, capacity=300.0, arrivals="constant", lengths="pareto:min=50,alpha=1.3")
    assert work.tokens / work.requests[-1].at == pytest.approx(240, rel=1e-3)
    assert all(request.forced for request in work.requests)


def test_a_load_is_of_what_the_limits_leave_of_the_lengths() -> None:
    apps = (App("a", lengths="constant:tokens=900", max_tokens=100), App("b", lengths="constant:tokens=300"))
    work = made(rate=None, load=0.8, capacity=300.0, arrivals="constant", apps=apps)
    assert {(r.app, r.tokens) for r in work.requests} == {("a", 100), ("b", 300)}
    assert work.about["mean_tokens"] == 200
    assert work.tokens / work.requests[-1].at == pytest.approx(240, rel=1e-3)


def test_a_mix_keeps_its_applications_apart(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(
        "- {name: short, share: 3, system: Be brief., lengths: 'constant:tokens=5', max_tokens: 20}\n"
        "- {name: long, share: 1, lengths: 'constant:tokens=500', arrivals: 'onoff:on=1,off=9'}\n"
    )
    work = made(apps=make.read_mix(path), requests=400)
    short = [r for r in work.requests if r.app == "short"]
    assert len(short) == 300
    assert {(r.tokens, r.max_tokens, r.turns) for r in short} == {(5, 20, (("system", "Be brief."),))}
    assert not [r for r in work.requests if r.app == "long" and r.at % 10 > 1]
    # One application more changes nothing for the others but their rate.
    alone = made(apps=make.read_mix(path)[:1], requests=300, rate=1.5)
    assert [(r.at, r.prompt) for r in alone.requests] == [(r.at, r.prompt) for r in short]
    heads, rows = make.describe(work)
    assert [row[0] for row in rows] == ["long", "short", "all"]
    assert all(len(row) == len(heads) for row in rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "mix"),
        ("[]", "a list of applications"),
        ("[{shar: 1}]", "unknown key 'shar'"),
        ("[{share: 0}]", "above 0"),
        ("[{name: a}, {name: a}]", "the same name"),
        ("[{max_tokens: 0}]", "a whole number above 0"),
    ],
)
def test_a_mix_that_is_wrong_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        make.read_mix(path)


def test_a_trace_is_replayed_row_by_row_at_any_speed(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(TRACE)
    work = made(rate=None, requests=40, arrivals=f"trace:{path},speed=4")
    assert [r.at for r in work.requests[:3]] == [0, 0.5, 1]
    assert [r.tokens for r in work.requests[:3]] == [1, 21, 41]
    assert [r.prompt_tokens for r in work.requests[:3]] == [100, 102, 104]
    assert work.requests[30].at > work.requests[29].at  # it starts over
    scaled = made(rate=10.0, arrivals=f"trace:{path}")
    assert 49 / scaled.requests[-1].at == pytest.approx(10.0)
    with pytest.raises(ConfigError, match="leave it out"):
        made(rate=10.0, arrivals=f"trace:{path},speed=2")


def test_every_seed_replays_a_piece_of_a_trace_of_its_own(tmp_path: Path) -> None:
    """The same arrivals and lengths five times over would give an interval of nothing."""
    path = tmp_path / "azure.csv"
    path.write_text(TRACE)
    pieces = [made(Seeds.all(n), rate=None, requests=10, arrivals=f"trace:{path},start=3") for n in range(3)]
    assert [piece.requests[0].tokens for piece in pieces] == [61, 261, 461]
    assert len({request.tokens for piece in pieces for request in piece.requests}) == 30
    make.check_pieces(f"trace:{path},start=3", 10, 3)
    make.check_pieces(f"trace:{path}", 100, 1)  # one workload may start over
    make.check_pieces("poisson", 100, 10)
    with pytest.raises(ConfigError, match="30 rows are no 4 independent workloads of 10"):
        make.check_pieces(f"trace:{path}", 10, 4)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", TRACE.replace("101", "x", 1).replace("100", "x"), TRACE.split("\n")[0]])
def test_a_trace_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match="trace"):
        made(arrivals=f"trace:{path}")


def test_lengths_of_the_recorded_answers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "A", "tokens": 5}\n{"prompt": "b", "answer": "B", "tokens": 900}\n')
    work = made(apps=(App(prompts=str(path)),), longest=100)
    assert {(r.prompt, r.tokens, r.answer, r.forced) for r in work.requests} == {("a", 5, "A", False)}
    with pytest.raises(ConfigError, match="longer than 3"):
        made(apps=(App(prompts=str(path)),), longest=3)


def test_a_length_that_nobody_knows_is_no_length(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"prompts": ["one", "two"]}')
    ((*_, mean, p50, p90, p99, longest, forced),) = make.describe(made(apps=(App(prompts=str(path)),)))[1]
    assert {mean, p50, p90, p99, longest} == {"–"}
    assert forced == "0%"


def test_a_rate_is_needed_and_said_so() -> None:
    with pytest.raises(ConfigError, match="expected a rate"):
        made(rate=None)
    with pytest.raises(ConfigError, match="needs the capacity"):
        made(rate=None, load=0.5)
    with pytest.raises(ConfigError, match="at least one request"):
        made(requests=0)


def test_what_is_written_beside_it_can_be_read(tmp_path: Path) -> None:
    work = made()
    count = make.write_replay(work, tmp_path / "replay.jsonl")
    assert len(read_recording(tmp_path / "replay.jsonl")) == count > 10
    make.write_oracle(work, "m", tmp_path / "lengths.jsonl")
    oracle = Oracle(tmp_path / "lengths.jsonl")
    for request in work.requests:
        said = oracle.instant(View(request.id, "m", "", request.prompt, "", 0, None))
        assert said is not None
        assert said.remaining == request.tokens
    forced = made(lengths="uniform:min=5,max=900", requests=400)
    with pytest.raises(ConfigError, match="different length"):
        make.write_oracle(forced, "m", tmp_path / "no.jsonl")
