"""What the load test's own tests share."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from loadtest import runner


@pytest.fixture
def on_the_loop_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner reads the running loop's clock: with one that jumps, nothing is late and no test waits.

    Every reading takes a nanosecond: what a sum of floats is short of a due time would be waited for without end.
    """
    readings = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: asyncio.get_running_loop().time() + next(readings) * 1e-9)
    monkeypatch.setattr(runner, "time", clock)
