"""What the embedded engine was asked and when, so that tests can assert call sizes and closed sockets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Record", "RequestLog"]


@dataclass(slots=True)
class Record:
    """One call. Times are the event loop's (monotonic seconds)."""

    id: int
    path: str
    request_id: str | None
    """The header ``X-Request-Id``."""
    arrival: float
    traceparent: str | None = None
    """The header of that name: which trace and span the caller says this call belongs to."""
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    rank: str | None = None
    """The rank it was addressed to (`X-data-parallel-rank`); decides nothing."""
    max_tokens: int | None = None
    """As asked; None: the request did not say."""
    limit: int = 0
    """Tokens the call may make after defaults and context."""
    priority: int = 0
    stream: bool = False
    ids_prompt: bool = False
    """The prompt came as token ids."""
    begun: float | None = None
    """The engine got it."""
    started: float | None = None
    """First token."""
    tokens: int = 0
    """Tokens made."""
    due: float | None = None
    """The modelled engine made the last token; what lies between this and ``ended`` is this process being late."""
    ended: float | None = None
    how: str = "open"
    """``open``, ``stop``, ``length``, ``refused``, ``aborted`` (the client left), ``fault:<kind>`` or ``killed``."""
    status: int | None = None
    closed: float | None = None
    """When the connection was seen closed, where that ended the call."""


class RequestLog:
    """The last calls, oldest first."""

    def __init__(self, size: int) -> None:
        self._records: deque[Record] = deque(maxlen=size)
        self._count = 0

    def open(self, path: str, request_id: str | None, now: float) -> Record:
        self._count += 1
        record = Record(self._count, path, request_id, now)
        self._records.append(record)
        return record

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def clear(self) -> None:
        self._records.clear()

    def listed(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self._records]
