"""Statistics against numpy, and the rules that keep them honest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.records import Row, Run
from loadtest.stats import compare, mean_of, percentile, summarise


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q, beyond=0) == pytest.approx(float(np.percentile(values, q)))


@pytest.mark.parametrize(
    ("n", "q", "given_out"), [(99, 90, False), (100, 90, True), (999, 99, False), (1000, 99, True)]
)
def test_no_percentile_without_ten_samples_beyond(n: int, q: float, given_out: bool) -> None:
    assert (percentile([1.0] * n, q) is not None) == given_out


def test_a_run_in_figures() -> None:
    rows = [Row(str(i), intended=i, sent=i + 0.5, first=i + 1, end=i + 2.0 + i, tokens=10, slices=2) for i in range(20)]
    rows.append(Row("bad", 20, 20, error="timeout", preemptions=1))
    summary = summarise(Run("x", "hash", rows))
    assert (summary.requests, summary.completed, summary.tokens, summary.preemptions, summary.calls) == (
        21,
        20,
        200,
        1,
        40,
    )
    assert summary.mean == pytest.approx(11.5)
    assert summary.p50 == pytest.approx(11.5)
    assert summary.p90 is None
    assert summary.ttft_mean == 1
    assert summary.throughput == pytest.approx(200 / 40)


def test_latency_counts_from_the_intended_time() -> None:
    row = Row("a", intended=1.0, sent=4.0, first=5.0, end=6.0)
    assert (row.jct, row.ttft, row.lag) == (5.0, 4.0, 3.0)
    assert Run("x", "h", [row]).lag == 3.0


def test_a_request_that_never_ended_has_no_completion_time() -> None:
    with pytest.raises(ValueError, match="never ended"):
        _ = Row("a", 0, 0).jct


def test_pairs_are_compared_by_seed() -> None:
    result = compare([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert (result.ratio, result.low, result.high, result.better, result.seeds) == (1.0, 0.5, 1.5, 1, 3)
    assert result.half_width == pytest.approx(4.30 * 0.5 / math.sqrt(3), rel=0.01)
    assert compare([1.0], [2.0]).half_width == math.inf


def test_a_mean_needs_every_seed() -> None:
    assert mean_of([1.0, None]) is None
    assert mean_of([]) is None
    assert mean_of([1.0, 3.0]) == 2.0
