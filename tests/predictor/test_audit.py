"""Scores, and who is trusted."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.predictor.audit import EVERYBODY, Audit, Moment, tau_difference


def feed(audit: Audit, count: int, *, good: float, history: float, model: str = "m", seed: int = 1) -> None:
    """``good``, ``history``: how much of each order is the truth's."""
    rng = random.Random(seed)
    for _ in range(count):
        tokens = rng.randint(20, 900)
        moments = []
        for at in range(0, tokens, 100):
            true = tokens - at
            said = good * true + (1 - good) * rng.randint(20, 900)
            old = history * true + (1 - history) * rng.randint(20, 900)
            moments.append(Moment(at, said, 0.5 * true, 2.0 * true, old))
        audit.learn(model, moments, tokens)


def test_scores() -> None:
    audit = Audit()
    for tokens in (100, 200, 400):
        audit.learn("m", [Moment(0, tokens + 30.0, tokens - 1.0, tokens + 1.0, 1.0)], tokens)
    audit.learn("m", [Moment(0, 10.0, 0.0, 1.0, 1.0)], 50)
    score = next(score for score in audit.scores() if score.model == "m")
    assert (score.jobs, score.mae, score.bias, score.coverage) == (4, 32.5, 12.5, 0.75)
    assert {score.model for score in audit.scores()} == {"m", EVERYBODY}


def test_history_takes_over_and_gives_back(caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit()
    assert audit.trusts("m")
    feed(audit, 200, good=0.7, history=0.3)
    assert audit.trusts("m")
    feed(audit, 200, good=0.0, history=0.5, seed=2)
    assert not audit.trusts("m")
    assert audit.trusts("another model")
    feed(audit, 220, good=0.7, history=0.4, seed=3)
    assert audit.trusts("m")
    assert ["using history" in record.message for record in caplog.records] == [True, False]


def test_noise_moves_nobody() -> None:
    """Two predictors of equal worth, forty times 200 jobs: hardly ever is one distrusted."""
    lost = 0
    for seed in range(40):
        audit = Audit()
        feed(audit, 64, good=0.4, history=0.4, seed=seed)
        lost += not audit.trusts("m")
    assert lost <= 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40))
def test_tau_is_kendalls(rows: list[tuple[int, int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    one, other, true = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    tau, tau_other, error = tau_difference(one, other, true, np.arange(len(rows)))
    for mine, said in ((tau, one), (tau_other, other)):
        theirs = 0.0 if len(set(said)) == 1 or len(set(true)) == 1 else stats.kendalltau(said, true).statistic
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert error >= 0.0


def test_jobs_without_moments_are_no_jobs() -> None:
    audit = Audit()
    audit.learn("m", [], 10)
    audit.learn("m", [Moment(50, 1.0, 0.0, 1.0, 1.0)], 10)
    assert not list(audit.scores())
