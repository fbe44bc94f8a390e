"""The settings a comparison is about, by name: scheduler sections as an operator would write them.

``isrtf-published`` is what config/isrtf.yaml holds; ``isrtf`` is the gateway's default.
"""

from __future__ import annotations

from typing import Any

from elis_gateway.config import Scheduler

__all__ = ["SETTINGS", "setting"]

_PUBLISHED = {"mode": "fixed", "rescore": "always", "aging": {"kind": "none"}}

SETTINGS: dict[str, dict[str, Any]] = {
    "fcfs": {"policy": "fcfs"},
    "round_robin": {"policy": "round_robin"},
    "las": {"policy": "las"},
    "sjf": {"policy": "sjf"},
    "isrtf-published": {"policy": {"kind": "isrtf", "order": "mean"}, **_PUBLISHED},
    "isrtf": {},
    "isrtf-no-aging": {"aging": {"kind": "none"}},
}


def setting(name: str, **changes: Any) -> Scheduler:
    """The scheduler section of a named setting, with ``changes`` on top. Raises KeyError for an unknown name."""
    return Scheduler.model_validate({**SETTINGS[name], **changes})
