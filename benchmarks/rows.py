"""What a benchmark found: shown, and appended to the file of its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["save", "show"]


def save(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a file of JSON Lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def show(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a result, and keep it where ``output`` names a file."""
    print(json.dumps(result, indent=2))
    if output is not None:
        save(output, result)
