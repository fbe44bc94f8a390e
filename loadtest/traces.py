"""Recorded arrivals and lengths in the format of Azure's public traces. Never: text, who uses them.

A CSV file (gzip where named ``.gz``) with the columns TIMESTAMP, ContextTokens, GeneratedTokens, one row per request,
sorted by time.
"""

from __future__ import annotations

import csv
import gzip
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from elis_gateway.errors import ConfigError

__all__ = ["Arrival", "read"]

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Arrival(NamedTuple):
    at: float
    """Seconds after the first row."""
    prompt_tokens: int
    tokens: int


@lru_cache(maxsize=4)
def read(path: str) -> tuple[Arrival, ...]:
    """Every row. Raises ConfigError naming the line that is wrong."""
    file = Path(path)
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path}: cannot be read: {error}") from None
    rows = csv.DictReader(text.splitlines())
    if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
        raise ConfigError(f"trace {path}: expected the columns {', '.join(_COLUMNS)}; {', '.join(missing)} not found")
    found: list[Arrival] = []
    first = 0.0
    for number, row in enumerate(rows, 2):
        try:
            at = _seconds(row["TIMESTAMP"])
            first = at if not found else first
            arrival = Arrival(at - first, max(int(row["ContextTokens"]), 1), max(int(row["GeneratedTokens"]), 1))
        except (ValueError, TypeError):
            raise ConfigError(f"trace {path}:{number}: expected a time and two whole numbers, got {row}") from None
        if found and arrival.at < found[-1].at:
            raise ConfigError(f"trace {path}:{number}: earlier than the row before")
        found.append(arrival)
    if not found:
        raise ConfigError(f"trace {path}: no rows")
    return tuple(found)


def _seconds(text: str) -> float:
    """``2023-11-16 18:15:46.6805900`` (seven digits, zone optional), or plain seconds."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
