"""A model fitted to a run's own token times tells that run's completion times."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from benchmarks.fitting import fit
from elis_gateway.predictor.baselines import MaxTokens
from loadtest.records import Leg, Row
from loadtest.settings import setting
from loadtest.targets import simulated
from loadtest.workload import Request, Workload

SLOTS, BLOCK = 4, 32
ALONE, EACH, PER_PROMPT_TOKEN = 0.03, 0.004, 0.001
"""Seconds of a step: by itself, for each call in it, for each prompt token computed in it."""


def stepping(work: Workload, *, in_hand: bool) -> list[Row]:
    """First come, first served, as an engine that steps does it: a call that begins waits for the step to end, and its
    prompt makes the next one longer for everybody. ``in_hand``: the next call is sent before a slot is free for it."""
    rows = [Row(r.id, r.at, r.at, prompt_tokens=r.prompt_tokens, expected=r.tokens) for r in work.requests]
    waiting, batch, fresh = list(rows), [], []  # type: ignore[var-annotated]
    last: dict[str, float] = {}
    begun: dict[str, float] = {}
    free = [0.0] * SLOTS
    """When each slot came free."""
    before = 0.0
    """When the call before was admitted."""
    now = 0.0
    while waiting or batch:
        while waiting and free and waiting[0].sent <= now:
            row = waiting.pop(0)
            admitted = max(row.sent, free.pop(0))
            begun[row.id] = max(row.sent, before) if in_hand else admitted
            before = admitted
            fresh.append(row)
        if not batch and not fresh:
            now = waiting[0].sent
            continue
        batch += fresh
        now += ALONE + EACH * len(batch) + PER_PROMPT_TOKEN * sum(row.prompt_tokens for row in fresh)
        fresh = []
        for row in batch[:]:
            row.tokens += 1
            if row.first is None:
                row.first = now
            else:
                row.gaps.append(now - last[row.id])
            last[row.id] = now
            if row.tokens == row.expected:
                row.end = now
                row.legs = [Leg("u", begun[row.id], row.first, now, row.tokens, "finished")]
                batch.remove(row)
                free.append(now)
    return rows


def work(seed: int, count: int = 150) -> Workload:
    draw = random.Random(seed)
    now, requests = 0.0, []
    for number in range(count):
        now += draw.expovariate(0.65 * SLOTS / (ALONE + EACH * SLOTS) / 60)
        tokens = draw.randint(20, 100)
        requests.append(Request(f"r{number}", now, "", draw.randint(20, 60), "", tokens, "", tokens))
    return Workload(tuple(requests))


@pytest.mark.parametrize("in_hand", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_is_told_by_its_own_token_times(seed: int, in_hand: bool) -> None:
    asked = work(seed)
    rows = stepping(asked, in_hand=in_hand)
    found = fit(rows, slots=SLOTS, block=BLOCK)
    assert set(found.gaps) == {1, 2, 3, 4}
    for batch in found.gaps:
        assert found.model.rate(batch) == pytest.approx(1 / (ALONE + EACH * batch), rel=0.02)
    assert found.stall == pytest.approx(EACH + PER_PROMPT_TOKEN * 40, rel=0.05)
    told = simulated(asked, setting("fcfs"), found.model, MaxTokens()).rows
    assert fmean(row.jct for row in told) == pytest.approx(fmean(row.jct for row in rows), rel=0.04)


def test_a_run_without_tokens_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="gaps between tokens"):
        fit([Row("r", 0, 0, first=1, end=2, tokens=2, gaps=[0.1])], slots=SLOTS, block=BLOCK)
