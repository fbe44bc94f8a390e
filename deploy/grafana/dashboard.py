"""Makes the dashboard: ``python deploy/grafana/dashboard.py`` writes elis-gateway.json beside it.

What differs from panel to panel is a line here; the JSON, which Grafana wants spelled out, is generated, and a test
compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("elis-gateway.json")
RATE = "$__rate_interval"
WHERE = 'job=~"$job", instance=~"$instance"'
WIDTH = 24


class Panel(NamedTuple):
    """One panel. ``queries``: PromQL and legend; ``{W}`` is the selection of job and instance, ``{R}`` the interval."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    about: str = ""


def quantiles(series: str, *by: str) -> tuple[tuple[str, str], ...]:
    """p50, p90 and p99 of a histogram."""
    group = ", ".join(("le", *by))
    name = " ".join("{{" + label + "}}" for label in by)
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({group}) (rate({series}_bucket{{{{{{W}}}}}}[{{R}}])))",
            f"p{q * 100:g} {name}",
        )
        for q in (0.5, 0.9, 0.99)
    )


def q(text: str, legend: str) -> tuple[tuple[str, str], ...]:
    return ((text, legend),)


GAIN = (
    'elis_order_jct_seconds{{{W}, order="actual", stat="%s"}} / ignoring(order)'
    ' elis_order_jct_seconds{{{W}, order="first_come", stat="%s"}}'
)

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            Panel("Waiting", q("sum(elis_jobs_waiting{{{W}}})", "waiting"), kind="stat", width=4),
            Panel("Longest wait", q("max(elis_longest_wait_seconds{{{W}}})", "wait"), "s", "stat", 4),
            Panel(
                "Slots busy",
                q("sum(elis_slices_running{{{W}}}) / clamp_min(sum(elis_slots{{{W}}}), 1)", "busy"),
                "percentunit",
                "stat",
                4,
            ),
            Panel("Upstreams up", q("sum(elis_upstream_up{{{W}}})", "up"), kind="stat", width=4),
            Panel("Tokens/s", q("sum(rate(elis_tokens_total{{{W}}}[{R}]))", "tokens"), kind="stat", width=4),
            Panel(
                "Mean completion against first-come",
                q(GAIN.replace("%s", "mean"), "{{{{model}}}}"),
                "percentunit",
                "stat",
                4,
                "Below 100 %: the order gains. The same jobs, as served and as first-come on paper.",
            ),
        ),
    ),
    (
        "What clients see",
        (
            Panel("Job completion time", quantiles("elis_jct_seconds"), "s"),
            Panel("Time to first token", quantiles("elis_ttft_seconds"), "s"),
            Panel("Inter-token latency", quantiles("elis_itl_seconds"), "s"),
            Panel("Queue wait", quantiles("elis_queue_wait_seconds"), "s"),
            Panel(
                "Jobs by outcome", q("sum by (outcome) (rate(elis_jobs_total{{{W}}}[{R}]))", "{{{{outcome}}}}"), "reqps"
            ),
            Panel(
                "Refusals by reason",
                q("sum by (reason) (rate(elis_refusals_total{{{W}}}[{R}]))", "{{{{reason}}}}"),
                "reqps",
            ),
        ),
    ),
    (
        "The order",
        (
            Panel(
                "Mean completion time: as served, and first-come on paper",
                q('elis_order_jct_seconds{{{W}, stat="mean"}}', "{{{{order}}}} {{{{model}}}}"),
                "s",
                width=12,
            ),
            Panel(
                "99th percentile: as served, and first-come on paper",
                q('elis_order_jct_seconds{{{W}, stat="p99"}}', "{{{{order}}}} {{{{model}}}}"),
                "s",
                width=12,
            ),
            Panel("Waiting jobs", q("elis_jobs_waiting{{{W}}}", "waiting") + q("elis_jobs_live{{{W}}}", "all live")),
            Panel(
                "Preemptions and windows",
                q('sum(rate(elis_slices_total{{{W}, end="preempted"}}[{R}]))', "preemptions")
                + q("sum(rate(elis_windows_total{{{W}}}[{R}]))", "windows"),
                "ops",
            ),
            Panel("Seam gap", quantiles("elis_seam_gap_seconds", "upstream"), "s"),
            Panel(
                "Slices per job",
                q(
                    "sum(rate(elis_slices_per_job_sum{{{W}}}[{R}])) / sum(rate(elis_slices_per_job_count{{{W}}}[{R}]))",
                    "mean",
                ),
            ),
            Panel("Seam cost", q("elis_seam_tokens{{{W}}}", "decoded tokens")),
            Panel("Pace of one job", q("elis_seconds_per_token{{{W}}}", "{{{{model}}}}"), "s"),
        ),
    ),
    (
        "Estimates",
        (
            Panel("First estimate against the answer, tokens off", quantiles("elis_estimate_error_tokens", "model")),
            Panel("Time an estimate takes", quantiles("elis_estimate_seconds"), "s"),
            Panel("Answer length, tokens", quantiles("elis_answer_tokens", "model")),
            Panel(
                "Estimates made, and missed",
                q("sum(rate(elis_estimates_total{{{W}}}[{R}]))", "made")
                + q("sum(rate(elis_estimates_missed_total{{{W}}}[{R}])) or vector(0)", "missed"),
                "ops",
            ),
        ),
    ),
    (
        "Upstreams",
        (
            Panel(
                "Slots and calls",
                q("elis_slices_running{{{W}}}", "{{{{upstream}}}} running")
                + q("elis_slots{{{W}}}", "{{{{upstream}}}} slots"),
            ),
            Panel("Up", q("elis_upstream_up{{{W}}}", "{{{{upstream}}}}")),
            Panel("Sending to first token", quantiles("elis_first_token_seconds", "upstream"), "s"),
            Panel(
                "Errors by cause",
                q(
                    "sum by (upstream, cause) (rate(elis_upstream_errors_total{{{W}}}[{R}]))",
                    "{{{{upstream}}}} {{{{cause}}}}",
                ),
                "ops",
            ),
            Panel(
                "Failovers", q("sum by (upstream) (rate(elis_failovers_total{{{W}}}[{R}]))", "{{{{upstream}}}}"), "ops"
            ),
            Panel(
                "Calls by how they ended", q("sum by (end) (rate(elis_slices_total{{{W}}}[{R}]))", "{{{{end}}}}"), "ops"
            ),
        ),
    ),
    (
        "The gateway itself",
        (
            Panel("Event-loop lag", quantiles("elis_event_loop_lag_seconds"), "s"),
            Panel("Memory", q("process_resident_memory_bytes{{{W}}}", "resident"), "bytes"),
            Panel("Processor", q("rate(process_cpu_seconds_total{{{W}}}[{R}])", "cores"), "percentunit"),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": _at(0, y, WIDTH, 1),
            }
        )
        y += 1
        x = tallest = 0
        for panel in row:
            height = 4 if panel.kind == "stat" else 8
            if x + panel.width > WIDTH:
                x, y = 0, y + tallest
            panels.append({"id": len(panels) + 1, **_panel(panel), "gridPos": _at(x, y, panel.width, height)})
            x += panel.width
            tallest = height
        y += tallest
    return {
        "title": "elis-gateway",
        "uid": "elis-gateway",
        "tags": ["llm", "elis"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                _datasource(),
                _variable("job", "label_values(elis_info, job)"),
                _variable("instance", 'label_values(elis_info{job=~"$job"}, instance)'),
            ]
        },
        "panels": panels,
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": source,
            "expr": query.format(W=WHERE, R=RATE),
            "legendFormat": legend.format() if "{{{{" in legend else legend,
        }
        for i, (query, legend) in enumerate(panel.queries)
    ]
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "datasource": source,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
    }
    if panel.about:
        made["description"] = panel.about
    return made


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
