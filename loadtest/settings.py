"""The settings a comparison is about, by name: scheduler sections as an operator would write them.

``isrtf-published`` is what config/isrtf.yaml holds; ``isrtf`` is the gateway's default.
"""

from __future__ import annotations

from typing import Any

from elis_gateway.build import WINDOWS
from elis_gateway.config import Scheduler
from elis_gateway.errors import ConfigError

__all__ = ["LABELS", "PERFECT", "SETTINGS", "ordering", "setting"]

PERFECT = "perfect"
"""``isrtf`` with perfect knowledge of every length, whatever the other settings' predictor knows: the bound."""

_PUBLISHED = {"mode": "fixed", "rescore": "always", "aging": {"kind": "none"}}

SETTINGS: dict[str, dict[str, Any]] = {
    "fcfs": {"policy": "fcfs"},
    "round_robin": {"policy": "round_robin"},
    "las": {"policy": "las"},
    "sjf": {"policy": "sjf"},
    "isrtf-published": {"policy": {"kind": "isrtf", "order": "mean"}, **_PUBLISHED},
    "isrtf": {},
    "isrtf-no-aging": {"aging": {"kind": "none"}},
    "isrtf-tail": {"tail": 1.25},
    PERFECT: {"policy": {"kind": "isrtf", "order": "mean"}},
}
LABELS = {
    "fcfs": "first come, first served",
    "round_robin": "round robin, a window each",
    "las": "least attained service first",
    "sjf": "shortest predicted first, never interrupted",
    "isrtf-published": "shortest remaining first as published: fixed windows, re-scored after each",
    "isrtf": "shortest remaining first, elastic windows: the gateway's default",
    "isrtf-no-aging": "the same without aging",
    "isrtf-tail": "the same with the tail promise of 1.25",
    PERFECT: "isrtf, elastic, with perfect knowledge of every length",
}


def ordering(section: Scheduler) -> dict[str, Any]:
    """What to ask of a running gateway (``PUT /admin/policy``) so that it orders as this section says."""
    names = ("aging", *WINDOWS)
    whole = section.model_dump(mode="json")
    return {**whole["policy"], **{name: whole[name] for name in names}}


def setting(name: str, **changes: Any) -> Scheduler:
    """The scheduler section of a named setting, with ``changes`` on top. Raises ConfigError for an unknown name."""
    if name not in SETTINGS:
        raise ConfigError(f"setting {name!r}: expected one of {', '.join(SETTINGS)}")
    return Scheduler.model_validate({**SETTINGS[name], **changes})
