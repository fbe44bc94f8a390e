"""The studies' script runs on today's scheduler, one cell of each, stops at its budget and goes on from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies import harness, knowledge
from benchmarks.studies.__main__ import STUDIES
from benchmarks.studies.harness import Cell, measure
from elis_gateway.core.job import Estimate
from elis_gateway.predictor.base import Predictor, View
from elis_gateway.sim.simulator import SimJob


@pytest.mark.parametrize("name", STUDIES)
def test_a_cell_of_a_study_can_be_measured(name: str) -> None:
    cells, show = STUDIES[name]()
    found = measure(cells[-1], seed=0)
    assert 0.0 < found["p50"] <= found["p99"] <= found["worst"]
    show({})  # nothing measured yet: tables without rows


def test_a_study_stops_at_its_budget_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def measured(cell: Cell, seed: int) -> dict[str, float]:
        made.append((cell.setting, seed))
        return {"mean": 2.0 if cell.setting == "fcfs" else 1.0 + seed / 10}

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "measure", measured)
    cells = [Cell(setting="sjf:order=mean"), Cell(setting="isrtf:order=mean")]
    assert harness.run("x", cells, range(2), budget=-1.0) == {}
    assert made == []
    rows = harness.run("x", cells[:1], range(2), budget=60.0)
    assert len(made) == len(rows) == 4, "two seeds of the cell, and of first come"
    rows = harness.run("x", cells, range(2), budget=60.0)
    assert made[4:] == [("isrtf:order=mean", 0), ("isrtf:order=mean", 1)], "nothing is run twice"
    assert str(harness.ratios(rows, cells[0])) == "0.53 ± 0.32"
    stored = [json.loads(line) for line in (tmp_path / "study-x.jsonl").read_text().splitlines()]
    assert len(stored) == 6
    assert {"code", "commit", "machine", "date", "cell", "seed", "result"} == set(stored[0])


def test_the_code_trace_is_shown_where_it_was_measured() -> None:
    """Its file is not shipped: without it nothing of it is run, and what is stored is not left out of the table."""
    cells, _ = STUDIES["where"]()
    assert not [cell for cell in cells if cell.work == "code"]
    harness_lines = (harness.RESULTS / "study-where.jsonl").read_text().splitlines()
    assert any(json.loads(json.loads(line)["cell"])["work"] == "code" for line in harness_lines)


def test_a_calibrated_guess_is_what_such_guesses_meant() -> None:
    """Off by e^±1.5, an estimate of 1,000 where answers have 100 tokens, or one in ten 1,000, is most likely still 100;
    and what has outlived the short ones is a long one."""
    past = [100] * 900 + [1000] * 100
    jobs = [SimJob(f"{n}", 0.0, 0, tokens) for n, tokens in enumerate(past)]
    known = knowledge.predictor("noisy1.5+calibrated", jobs, 0, past)
    raw = knowledge.predictor("noisy1.5", jobs, 0)
    assert known is not None
    assert raw is not None

    def said(by: Predictor, job: int, attained: int) -> Estimate:
        found = by.instant(View(f"{job}", "model", "", "", "", attained, None))
        assert found is not None
        return found

    off = {
        by: sum(abs(said(by, n, 0).remaining - job.output_tokens) for n, job in enumerate(jobs)) for by in (known, raw)
    }
    assert off[known] < 0.5 * off[raw]
    one = next(n for n in range(900) if 500 < said(raw, n, 0).remaining < 1500)
    assert 100 <= (said(known, one, 0).gittins or 0) <= said(known, one, 0).remaining < 500
    assert said(known, one, 150).remaining == pytest.approx(850, rel=0.1)
    assert said(raw, 950, 990).remaining != said(known, 950, 990).remaining
