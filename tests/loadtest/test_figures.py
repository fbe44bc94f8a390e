"""Figures and comparisons: against numpy and scipy where they know them, by hand where only we do."""

from __future__ import annotations

import math
import random
from statistics import fmean

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from elis_gateway.errors import ConfigError
from loadtest.compare import Arm, contrast, unequal_work
from loadtest.figures import Alone, Objectives, alone_in, figures, flat, itl, seam_gaps
from loadtest.records import Leg, Row, Run
from loadtest.stats import deciles, interval, jain, kendall, percentile, t95, weighted_percentile

floats = st.floats(0, 1e6)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=60))
def test_kendalls_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    theirs = scipy.stats.kendalltau(xs, ys).statistic
    ours = kendall(xs, ys)
    assert (ours is None) == bool(np.isnan(theirs))
    if ours is not None:
        assert ours == pytest.approx(float(theirs))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17, 40, 500])
def test_students_t_is_scipys(n: int) -> None:
    assert t95(n) == pytest.approx(float(scipy.stats.t.ppf(0.975, n - 1)), rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_intervals_are_scipys(values: list[float]) -> None:
    mean, half = interval(values)
    assert mean == pytest.approx(float(np.mean(values)))
    if half > 1e-9:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high))


@given(st.lists(st.tuples(floats, st.integers(1, 4)), min_size=1, max_size=40), st.floats(0, 100))
def test_weighted_percentiles_are_those_of_every_sample(values: list[tuple[float, int]], q: float) -> None:
    every = [value for value, count in values for _ in range(count)]
    assert weighted_percentile(values, q, beyond=0) == pytest.approx(float(np.percentile(every, q)))


def test_what_never_ended_is_above_all_others() -> None:
    assert percentile([1.0] * 50, 50, lost=49) == 1.0
    assert percentile([1.0] * 50, 50, lost=51) is None
    assert percentile([1.0] * 500, 90, lost=40) == 1.0


def test_fairness_and_deciles() -> None:
    assert jain([2.0] * 7) == pytest.approx(1)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([]) is None
    assert sorted(deciles([5.0] * 20)) == [n for n in range(10) for _ in range(2)]
    assert deciles([30, 10, 20] * 10)[0] >= 6


def rows(count: int = 40, *, slow: float = 1.0) -> list[Row]:
    made = []
    for n in range(count):
        tokens = n + 1
        row = Row(
            f"r{n}", n / 10, n / 10, n / 10 + 0.5 * slow, n / 10 + slow * (0.5 + tokens / 10), tokens, expected=tokens
        )
        row.wait = 0.25
        row.predictions = [(0, tokens + 5.0)]
        made.append(row)
    return made


def test_a_run_in_figures() -> None:
    run = Run("x", "hash", rows())
    found = figures(run, objectives=Objectives(jct=2.55, ttft=1), alone=Alone(0.5, 0.1), interval=10)
    assert found["jct"]["mean"] == pytest.approx(fmean(row.jct for row in run.rows))
    assert found["slowdown"]["mean"] == pytest.approx(1)
    assert found["slowdown"]["jain"] == pytest.approx(1)
    assert found["goodput"]["met"] == 20
    assert found["goodput"]["share"] == 0.5
    assert found["windows"] == 10 * (1 + 2 + 3 + 4)
    assert found["predictions"]["mae"] == found["predictions"]["bias"] == 5
    assert found["predictions"]["kendall_tau"] == 1
    assert found["tpot"]["n"] == 39  # one token has none
    assert found["wait"]["mean"] == 0.25
    assert flat(found)["requests.offered"] == 40


def test_failures_count() -> None:
    run = Run("x", "hash", rows())
    for row in run.rows[:10]:
        row.error, row.end = "status 503", None
    found = figures(run, objectives=Objectives(jct=100))
    assert found["requests"] == {
        "offered": 40, "completed": 30, "failed": 10, "unsent": 0, "errors": {"status 503": 10},
    }  # fmt: skip
    assert found["goodput"]["share"] == 0.75
    assert found["jct"]["max"] is None
    # The median of all that was offered: ten of forty lie above everything.
    done = sorted(row.jct for row in run.rows[10:])
    assert found["jct"]["p50"] == pytest.approx(float(np.percentile([*done, *[1e9] * 10], 50)))


def test_nothing_at_all_is_no_crash() -> None:
    found = figures(
        Run("x", "hash", [Row("a", 0, 0, error="timeout")]), objectives=Objectives(jct=1), alone=Alone(0, 1)
    )
    assert found["jct"]["mean"] is None
    assert found["goodput"]["share"] == 0
    assert found["throughput"]["requests_per_second"] is None


def test_times_between_tokens_and_at_seams() -> None:
    row = Row("a", 0, 0, 1, 9, 7)
    row.legs = [
        Leg("e", 0, 1, 3, 3, "preempted"),
        Leg("e", 4, 4.5, 4.5, 0, "preempted"),
        Leg("e", 5, 6, 9, 4, "finished"),
    ]
    assert seam_gaps([row]) == [1.5, 3]
    assert sorted(itl([row])) == [(1, 2), (1, 3), (1.5, 1), (3, 1)]
    row.gaps = [0.1, 0.2]
    assert itl([row]) == [(0.1, 1), (0.2, 1)]


def test_the_ideal_of_a_live_server_is_its_best_moments() -> None:
    alone = alone_in([Run("x", "hash", rows()), Run("y", "hash", rows(slow=3.0))])
    assert alone is not None
    assert alone.first == pytest.approx(0.5)
    assert alone.per_token == pytest.approx(0.1, rel=0.15)
    assert alone_in([Run("x", "hash", [])]) is None


# ---- comparisons ----------------------------------------------------------------------------------------------------


def arm(name: str, slow: dict[int, float], work: str = "w") -> Arm:
    made = Arm(name)
    for seed, factor in slow.items():
        run = Run(name, f"{work}{seed}", rows(slow=factor), seed)
        made.runs[seed] = run
        made.figures[seed] = figures(run)
    return made


def test_arms_are_compared_seed_by_seed() -> None:
    found = contrast(arm("a", {0: 0.5, 1: 0.7, 2: 0.6}), arm("b", {0: 1.0, 1: 1.0, 2: 1.0}))
    mean = found.metrics["jct.mean"]
    assert mean.ratio == pytest.approx(0.6)
    assert mean.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-3)
    assert mean.differs
    assert found.wins == 1
    assert [part.ratio for part in found.by_decile] == pytest.approx([0.6] * 10)
    assert found.worst[0]["factor"] == pytest.approx(0.7)
    assert found.unequal == 0
    assert "jct.p99" not in found.metrics  # too few samples


def test_only_equal_work_is_compared() -> None:
    with pytest.raises(ConfigError, match="not the same work"):
        contrast(arm("a", {0: 1.0}), arm("b", {0: 1.0}, work="v"))
    with pytest.raises(ConfigError, match="no seed in common"):
        contrast(arm("a", {0: 1.0}), arm("b", {1: 1.0}))
    ours, theirs = arm("a", {0: 1.0}), arm("b", {0: 1.0})
    ours.runs[0].rows[3].tokens += 1
    assert contrast(ours, theirs).unequal == unequal_work([ours, theirs]) == 1
    # Who refuses the long ones is quicker with the rest.
    ours.runs[0].rows[39].error = "status 503"
    assert contrast(ours, theirs).unequal == unequal_work([ours, theirs]) == 2
    theirs.runs[0].rows[39].error = "timeout"
    assert contrast(ours, theirs).unequal == unequal_work([ours, theirs]) == 1


def test_a_run_that_was_stopped_is_compared_with_nothing() -> None:
    """Its long answers are missing, which flatters whoever serves the short ones first."""
    ours, theirs = arm("a", {0: 1.0, 1: 1.0}), arm("b", {0: 1.0, 1: 1.0})
    ours.runs[1].complete = False
    assert contrast(ours, theirs).seeds == (0,)
    ours.runs[0].complete = False
    with pytest.raises(ConfigError, match="ran to its end"):
        contrast(ours, theirs)
    assert unequal_work([ours, theirs]) == 0


def test_equal_arms_seldom_differ() -> None:
    """The interval keeps its word: of 400 pairs of equal arms about 5 % differ."""
    rng = random.Random(5)
    differ = 0
    for _ in range(400):
        pairs = [[rng.lognormvariate(0, 0.2) * rng.lognormvariate(0, 0.05) for _ in range(6)] for _ in range(2)]
        ratios = [ours / theirs for ours, theirs in zip(*pairs, strict=True)]
        mean, half = interval([math.log(ratio) for ratio in ratios])
        differ += abs(mean) > half
    assert 8 <= differ <= 36
