"""An engine's own clock, by which arrivals keep their load on a machine that changes its speed."""

from __future__ import annotations

import pytest

from benchmarks.capacity_probe import Pace


def metrics(steps: float, running: int = 0, waiting: int = 0) -> str:
    return (
        f'vllm:iteration_tokens_total_count{{model_name="m"}} {steps}\n'
        f'vllm:num_requests_running{{model_name="m"}} {running}\n'
        f'vllm:num_requests_waiting{{model_name="m"}} {waiting}\n'
    )


def test_steps_are_its_time_however_long_they_take() -> None:
    pace = Pace()
    for at, steps in ((0.0, 500.0), (1.0, 510.0), (9.0, 520.0)):
        pace.read(metrics(steps, running=4), at)
    assert pace.now == 20.0


def test_an_engine_with_nothing_to_do_lets_time_pass_at_its_last_pace() -> None:
    pace = Pace()
    pace.read(metrics(0.0, running=1), 0.0)
    for n in range(1, 101):
        pace.read(metrics(float(n), running=1), n * 0.05)
    before = pace.now
    pace.read(metrics(100.0), 6.0)
    assert pace.now - before == pytest.approx(20.0, rel=0.01)


def test_a_step_that_takes_long_is_no_idling() -> None:
    pace = Pace()
    pace.read(metrics(7.0, running=1), 0.0)
    pace.read(metrics(7.0, running=1), 30.0)
    pace.read(metrics(7.0, waiting=1), 60.0)
    assert pace.now == 0.0
