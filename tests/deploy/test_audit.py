"""What `make audit` makes of pip-audit's answers: a database that knows nothing is not a clean bill of health."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.audit import verdict

CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        ([CLEAN, CLEAN], 0, "2 distributions looked up, 0 not; 0 vulnerabilities"),
        ([CLEAN, BAD], 1, "b 2: PYSEC-1, fixed in 3"),
        ([CLEAN, UNKNOWN], 0, "1 distributions looked up, 1 not"),
        ([UNKNOWN, UNKNOWN], 0, "SKIPPED: the package index knows none of the 2"),
    ],
)
def test_what_was_found(found: list[dict[str, Any]], status: int, said: str) -> None:
    got, lines = verdict(int(any(e.get("vulns") for e in found)), json.dumps({"dependencies": found}), "")
    assert got == status
    assert said in "\n".join(lines)


def test_no_way_there_is_a_visible_skip_and_anything_else_an_error() -> None:
    assert verdict(1, "", "ConnectionError: Max retries exceeded")[0] == 0
    assert "SKIPPED" in verdict(1, "", "ConnectionError: Max retries exceeded")[1][-1]
    assert verdict(1, "", "no such option")[0] == 1
    assert verdict(0, "nonsense", "")[0] == 1
