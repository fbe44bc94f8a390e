"""JSON from a stranger: whatever is not of the shape that is looked for reads as empty, and nothing is raised.

For questions to an upstream that may be anything, and for the parts of usage that are optional: what answers to clients
consist of is read strictly, elsewhere.
"""

from __future__ import annotations

from typing import Any

import orjson

__all__ = ["document", "entries", "fields", "first", "objects"]


def document(data: bytes) -> Any:
    """The value that ``data`` spells; None where it is no JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def fields(value: Any, key: str) -> dict[str, Any]:
    """The object at ``key``."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def entries(value: Any, key: str) -> list[Any]:
    """The array at ``key``."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def objects(value: Any, key: str) -> list[dict[str, Any]]:
    """Those entries of the array at ``key`` that are objects."""
    return [entry for entry in entries(value, key) if isinstance(entry, dict)]


def first(value: Any, key: str) -> dict[str, Any]:
    """The first of ``objects``; an empty one where there is none."""
    return next(iter(objects(value, key)), {})
