"""The studies' script still runs on today's scheduler: one cell of each."""

from __future__ import annotations

import pytest

from benchmarks.studies.__main__ import STUDIES
from benchmarks.studies.harness import measure


@pytest.mark.parametrize("name", STUDIES)
def test_a_cell_of_a_study_can_be_measured(name: str) -> None:
    cells, show = STUDIES[name]()
    found = measure(cells[-1], seed=0)
    assert 0.0 < found["p50"] <= found["p99"] <= found["worst"]
    show({})  # nothing measured yet: tables without rows
