"""The table against the definition, summed out token by token."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.predictor.gittins import BINS, EDGES, LengthTable, bin_of, lognormal_hazards

LAST = 60  # bins used by the random distributions: up to EDGES[60] tokens


def hazards_of(shares: list[float]) -> list[float]:
    """Hazards of a distribution over the first bins, certain to end in the last of them."""
    left, total = 1.0, sum(shares)
    hazards = []
    for share in shares:
        hazards.append(min(1.0, share / total / left) if left > 1e-12 else 1.0)
        left -= share / total
    return hazards + [1.0] * (BINS - len(hazards))


def by_token(hazards: list[float]) -> list[float]:
    """P(X > t) for t = 0, 1, ...: lengths uniform over the tokens of a bin."""
    survival = [1.0]
    for hazard, (left, right) in zip(hazards, pairwise(EDGES), strict=True):
        start = survival[-1]
        if start < 1e-9:
            break
        hazard = min(hazard, 0.999999)
        survival += [start * (1 - hazard * (t - left) / (right - left)) for t in range(left + 1, right + 1)]
    return survival


def brute(survival: list[float], age: int, allowed: int | None) -> tuple[float, float]:
    """(mean, index) by their definitions."""
    alive = [s / survival[age] for s in survival[age:]]
    most = len(alive) - 1 if allowed is None else min(allowed, len(alive) - 1)
    spent, best = 0.0, float("inf")
    for d in range(1, most + 1):
        spent += alive[d - 1]
        ends = 1.0 if d == allowed else 1.0 - alive[d]
        if ends > 1e-12:
            best = min(best, spent / ends)
    return max(spent, 1.0), max(best, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.0, 1.0).filter(lambda x: x == 0.0 or x > 1e-3), min_size=5, max_size=LAST).filter(
        lambda xs: sum(xs) > 0.01
    ),
    st.integers(0, 10**6),
    st.none() | st.integers(1, 400),
)
def test_agrees_with_the_definition(shares: list[float], where: int, allowed: int | None) -> None:
    hazards = hazards_of(shares)
    survival = by_token(hazards)
    reachable = max(t for t, s in enumerate(survival) if s > 1e-4)
    age = where % (reachable + 1)
    mean, index = LengthTable(hazards)(age, allowed)
    true_mean, true_index = brute(survival, age, allowed)
    assert mean == pytest.approx(true_mean, rel=0.01, abs=0.02)
    # The table looks at bin edges only, the definition at every token; bins are 9 % wide.
    assert true_index * 0.98 - 0.02 <= index <= mean + 1e-9
    if allowed is None:
        assert index <= true_index * 1.1 + 0.1


def test_exact_knowledge_is_remaining_length() -> None:
    shares = [0.0] * 16
    shares[12] = 1.0  # always 13 tokens
    table = LengthTable(hazards_of(shares))
    for age in range(13):
        assert table(age) == pytest.approx((13 - age, 13 - age), rel=1e-3)


def test_even_odds_of_short_and_long() -> None:
    # The design's example: 50 or 1,000 tokens at even odds has index 100 although the mean is 525.
    hazards = [0.0] * BINS
    hazards[bin_of(49)], hazards[bin_of(999)] = 0.5, 1.0
    mean, index = LengthTable(hazards)(0)
    assert mean == pytest.approx(525, rel=0.05)
    assert index == pytest.approx(100, rel=0.08)  # bins are 9 % wide
    # Once the short one is ruled out, only the long one is left.
    mean, index = LengthTable(hazards)(60)
    assert mean == pytest.approx(940, rel=0.06)
    assert index == pytest.approx(940, rel=0.06)


def test_constant_hazard_has_no_memory() -> None:
    # A geometric length: mean and index are 1 / hazard at any age.
    per_token = 0.02
    hazards = [1 - (1 - per_token) ** (right - left) for left, right in pairwise(EDGES)]
    table = LengthTable(hazards)
    for age in (0, 1, 10, 50, 100, 200):
        mean, index = table(age)
        assert mean == pytest.approx(50, rel=0.02)
        assert index == pytest.approx(50, rel=0.06)


def test_beyond_the_last_edge_and_far_tails_stay_finite() -> None:
    table = LengthTable(lognormal_hazards(200, 1.0))
    rng = random.Random(3)
    for age in [0, EDGES[-1] - 1, EDGES[-1], 10**9] + [rng.randrange(EDGES[-1]) for _ in range(300)]:
        for allowed in (None, 1, 2, 77, 10**9):
            mean, index = table(age, allowed)
            assert 1.0 <= index <= mean + 1e-9
            assert mean <= max(allowed or 10**6, 1)
    assert table.survival(EDGES[-1]) == 0.0
    assert table.survival(0) == 1.0


def test_every_length_has_its_bin() -> None:
    for age in range(3000):
        i = bin_of(age)
        assert EDGES[i] <= age < EDGES[i + 1]
    assert bin_of(10**9) == BINS - 1
