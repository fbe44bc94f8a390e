"""The frozen workload: same seeds, same file, same hash; what is drawn is what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from elis_gateway.errors import ConfigError
from loadtest import arrivals
from loadtest.workload import CAP, Seeds, Workload, azure, pool


def draw(n: int = 200, load: float = 0.9, seeds: Seeds | None = None, longest: int = CAP) -> Workload:
    return azure(n, load=load, capacity=300.0, seeds=seeds or Seeds(), longest=longest)


def test_same_seeds_same_hash() -> None:
    assert draw() == draw()
    assert draw().hash == draw().hash


def test_each_seed_varies_its_own_thing() -> None:
    base = draw()
    other = draw(seeds=Seeds(arrivals=1))
    assert [r.at for r in other.requests] != [r.at for r in base.requests]
    assert [r.prompt for r in other.requests] == [r.prompt for r in base.requests]
    other = draw(seeds=Seeds(lengths=1))
    assert [r.at for r in other.requests] == [r.at for r in base.requests]
    assert [r.tokens for r in other.requests] != [r.tokens for r in base.requests]
    other = draw(seeds=Seeds(prompts=1))
    assert [r.at for r in other.requests] == [r.at for r in base.requests]
    assert [r.prompt for r in other.requests] != [r.prompt for r in base.requests]
    assert fmean(r.tokens for r in other.requests) == pytest.approx(fmean(r.tokens for r in base.requests), rel=0.1)


def test_a_file_comes_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    work = draw(20)
    work.save(path)
    again = Workload.load(path)
    assert again == work
    data = json.loads(path.read_text())
    data["requests"][3]["at"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="it was changed"):
        Workload.load(path)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"version": 99}', '{"version": 1, "requests": [{}], "about": {}, "hash": ""}']
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        Workload.load(path)


def test_the_offered_load_is_what_was_asked_for() -> None:
    work = draw(20_000, load=0.8)
    assert work.tokens / work.requests[-1].at == pytest.approx(0.8 * 300, rel=0.05)


def test_longest_leaves_longer_answers_out() -> None:
    assert max(r.tokens for r in draw(longest=200).requests) <= 200


def test_the_pool_covers_the_lengths_and_repeats_no_prompt() -> None:
    answers = pool()
    assert len(answers) > 250
    assert answers[0].tokens <= 10
    assert answers[-1].tokens >= 900
    assert len({answered.prompt for answered in answers}) == len(answers)


def test_lengths_follow_the_trace() -> None:
    """The sample of the trace has mean 225; the pool's nearest answers keep it."""
    assert fmean(r.tokens for r in draw(5000).requests) == pytest.approx(225, rel=0.1)


def test_arrival_processes_keep_their_rate_and_shape() -> None:
    import random

    rng = random.Random(1)
    assert sum(arrivals.constant(10, 2.0)) == 5.0
    gaps = arrivals.poisson(20_000, 4.0, rng)
    assert fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(1.0, rel=0.05)
    gaps = arrivals.gamma(20_000, 4.0, 0.25, rng)
    assert fmean(gaps) == pytest.approx(0.25, rel=0.1)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(2.0, rel=0.1)


def test_a_replay_keeps_bursts_and_scales_the_rate() -> None:
    import random

    gaps = arrivals.replayed(8, 2.0, [[1.0, 3.0], [10.0, 30.0]], random.Random(0))
    assert sorted(set(gaps)) == [0.25, 0.75]
    assert arrivals.times([1.0, 0.5]) == [1.0, 1.5]
