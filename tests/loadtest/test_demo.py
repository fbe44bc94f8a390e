"""The demo: what it prints, against the embedded engine in place of the small real model."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console

from elis_gateway import config
from elis_gateway.predictor.base import View
from elis_gateway.predictor.history import History
from loadtest import demo_model, demo_real
from loadtest.live import Screen, figure
from loadtest.records import Row, Run
from loadtest.workload import pool
from tests.gateway.world import COMPLETIONS, paced, until, world


def screen(terminal: bool = False, width: int = 110) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out, width=width, force_terminal=terminal, highlight=False)), out


def test_what_the_demo_serves_with_is_in_the_package() -> None:
    """`elis-gateway loadtest demo` is for those without a clone, too."""
    assert demo_real.CONFIG.is_relative_to(str(files("loadtest")))
    assert config.load(demo_real.CONFIG, {}).predictor.kind == "history"


def test_the_modelled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "SEEDS", 2)
    monkeypatch.setattr(demo_model, "SEAMS", (0.0, 4.0))
    ours, out = screen(terminal=True, width=84)
    first, *_ = demo_model.show(ours)
    assert set(first.runs) == set(demo_model.SHOWN)
    assert all(len(runs) == 2 for runs in first.runs.values())
    work = {name: [run.tokens for run in runs] for name, runs in first.runs.items()}
    assert all(tokens == work["fcfs"] for tokens in work.values())
    text = out.getvalue()
    for words in (
        *(label for label, _ in demo_model.SHOWN.values()),
        "perfect knowledge",
        "seam 4",
        "2 workload seeds",
    ):
        assert words in text
    assert "…" not in text


@pytest.mark.parametrize("terminal", [False, True])
async def test_the_real_part(terminal: bool) -> None:
    ours, out = screen(terminal)
    async with world(paced(2000.0, slots=2), slots=2, scheduler={"mode": "elastic"}) as w:
        gateway = demo_real.Gateway(w.url, w.admin, w.engine.url, "sim")
        # Until some answer is known, history has nothing to say, and the watched one may be over within a window.
        await w.ask(COMPLETIONS, {"model": "sim", "prompt": "the first", "max_tokens": 60})
        await until(lambda: len(w.gateway.journal.recent(1)) == 1)
        await demo_real.watch(gateway, w.session, ours)
        assert 0 < await demo_real.measure_speed(gateway, w.session) <= 2 * 2000
        (work,) = demo_real.bursts(6, seeds=1)
        runs = [await demo_real.burst(gateway, w.session, policy, work, ours) for policy in ("fcfs", "isrtf")]
        assert w.gateway.policy()["kind"] == "isrtf"
    assert not [row.error for run in runs for row in run.rows if row.error]
    assert [row.tokens for row in runs[0].rows] == [row.tokens for row in runs[1].rows]
    demo_real.print_table(ours, runs)
    text = out.getvalue()
    assert "queue wait" in text
    assert "remain by estimate" in text or terminal
    assert "ISRTF elastic" in text
    assert "read the figures with care" not in text


def test_unequal_work_is_marked() -> None:
    runs = [Run(name, "same", [Row("a", 0, 0, 1, 2, tokens)]) for name, tokens in (("fcfs", 5), ("isrtf", 6))]
    ours, out = screen()
    demo_real.print_table(ours, runs)
    assert "1 requests got answers of different length" in out.getvalue()


def test_the_history_knows_kinds_but_not_the_prompts_of_the_burst(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    hidden = {answered.prompt for answered in pool() if answered.kind == "essay"}
    assert demo_real.taught(path, hidden) == len(pool()) - len(hidden)
    history = History(path)
    short = history.instant(View("1", "smollm2", "word", "", "", 0, None))
    long = history.instant(View("2", "smollm2", "story", "", "", 0, None))
    assert short is not None
    assert long is not None
    assert short.remaining * 2 < long.remaining


def test_progress_without_a_terminal_is_a_line_per_quarter() -> None:
    ours, out = screen()
    with ours.progress("working", 8) as step:
        for _ in range(8):
            step()
    assert out.getvalue().splitlines() == ["  working ...", *(f"  working: {n}/8" for n in (2, 4, 6, 8))]


def test_a_missing_figure_is_a_dash() -> None:
    assert (figure(None), figure(1.234), figure(12.6, 0)) == ("–", "1.23", "13")
