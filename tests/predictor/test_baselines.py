"""The predictors that need no learning."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from pathlib import Path

import pytest

from elis_gateway.errors import ConfigError
from elis_gateway.predictor.base import Estimate, View
from elis_gateway.predictor.baselines import Constant, MaxTokens, NoisyOracle, Oracle, prompt_hash, write_lengths


def view(
    attained: int = 0, *, job: str = "j", prompt: str = "hi", model: str = "m", allowed: int | None = None
) -> View:
    return View(job, model, "", prompt, "", attained, allowed)


def test_constant_counts_down() -> None:
    constant = Constant(100)
    assert constant.instant(view()) == Estimate(100, None, "constant")
    assert constant.instant(view(60)) == Estimate(40, None, "constant")
    assert constant.instant(view(300)) == Estimate(1, None, "constant")
    assert constant.instant(view(0, allowed=30)) == Estimate(30, None, "constant")
    with pytest.raises(ValueError, match="tokens"):
        Constant(0)


def test_max_tokens_is_what_is_allowed() -> None:
    assert MaxTokens().instant(view(10, allowed=90)) == Estimate(90, None, "max_tokens")
    assert MaxTokens().instant(view(10)) is None


def test_prompt_hash_is_the_recordings() -> None:
    assert prompt_hash("abc") == "ba7816bf8f01cfea"
    assert len(prompt_hash("\ud800 broken")) == 16


def test_oracle_reads_lines(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    write_lengths(path, [("m", "hi", 120), ("n", "hi", 7), ("m", "안녕", 33), ("m", "안녕", 34)])
    oracle = Oracle(path)
    assert oracle.instant(view()) == Estimate(120, None, "oracle")
    assert oracle.instant(view(100)) == Estimate(20, None, "oracle")
    assert oracle.instant(view(job="k", model="n")) == Estimate(7, None, "oracle")
    assert oracle.instant(view(job="l", prompt="안녕")) == Estimate(34, None, "oracle")
    assert oracle.instant(view(job="o", prompt="other")) is None
    assert asyncio.run(oracle.refine([view(), view(job="o", prompt="other")])) == [Estimate(120, None, "oracle"), None]


def test_oracle_reads_one_object(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps({"m": {prompt_hash("hi"): 5}}))
    assert Oracle(path).instant(view()) == Estimate(5, None, "oracle")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("nonsense\n", ":1: expected"),
        ('{"model": "m", "prompt_hash": "x", "tokens": 3}\n{"model": "m"}\n', ":2: expected"),
        ('{"model": "m", "prompt_hash": "x", "tokens": 0}\n', "at least 1, got 0"),
        ('{"model": "m", "prompt_hash": "x", "tokens": true}\n', "whole number"),
        ('{"m": 5}', "expected an object"),
        ('{"m": {"x": "long"}}', "got 'long'"),
    ],
)
def test_oracle_says_where_its_file_is_wrong(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        Oracle(path)


def test_oracle_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl.*No such file"):
        Oracle(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        Oracle(tmp_path / "binary")


def test_noise_is_fixed_per_job_and_of_the_size_asked_for() -> None:
    lengths = {f"job-{number}": 1000 for number in range(4000)}
    oracle = NoisyOracle(lengths, 0.6, seed=3)
    again = NoisyOracle(dict(reversed(lengths.items())), 0.6, seed=3)
    other = NoisyOracle(lengths, 0.6, seed=4)
    logs = []
    for job in lengths:
        estimate = oracle.instant(view(job=job))
        assert estimate is not None
        assert estimate == again.instant(view(job=job)) != other.instant(view(job=job))
        logs.append(math.log(estimate.remaining / 1000))
        later = oracle.instant(view(200, job=job))
        assert later is not None
        assert later.remaining == pytest.approx(max(estimate.remaining - 200, 1.0))
    assert statistics.fmean(logs) == pytest.approx(0.0, abs=0.03)
    assert statistics.stdev(logs) == pytest.approx(0.6, rel=0.04)


def test_no_noise_is_perfect_knowledge() -> None:
    oracle = NoisyOracle({"j": 77}, 0.0)
    assert oracle.instant(view(7)) == Estimate(70, None, "noisy_oracle")
    with pytest.raises(ValueError, match="sigma"):
        NoisyOracle({}, -1)
