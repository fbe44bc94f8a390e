"""The dashboard and the alert rules, against a real Prometheus where there is one."""

from __future__ import annotations

import re
import subprocess

import pytest

from deploy.grafana import dashboard
from deploy.prometheus import check
from elis_gateway.metrics import SERIES

needs_prometheus = pytest.mark.skipif(
    check.PROMETHEUS is None or check.PROMTOOL is None,
    reason="prometheus is not installed (Debian: apt install prometheus)",
)


def test_the_stored_dashboard_is_the_generated_one() -> None:
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.text(), "run python deploy/grafana/dashboard.py"


def test_panels_and_alerts_speak_of_series_that_there_are() -> None:
    known = {series.name for series in SERIES}
    known |= {f"{s.name}{end}" for s in SERIES if s.kind == "histogram" for end in ("_bucket", "_sum", "_count")}
    used = {name for _, query in [*check.queries(), *check.rules()] for name in re.findall(r"elis_\w+", query)}
    assert used <= known


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard.dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


@needs_prometheus
def test_promtool_accepts_rules_and_configuration_and_they_fire_when_they_should() -> None:
    for args in (
        ["check", "rules", "rules.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "rules_test.yml"],
    ):
        done = subprocess.run(
            [str(check.PROMTOOL), *args], cwd=check.HERE, capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
async def test_every_panel_returns_series_of_a_real_run() -> None:
    answers = await check.check()
    assert len(answers) > 50
    assert not check.wrong(answers)
