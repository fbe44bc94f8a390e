"""The opt-in record of every job: rotated JSON Lines, one row per job. Knows schema and rotation; never who reads it.

Rows are made on the event loop and written by one thread, in batches, so that a slow disk delays nobody.
``SCHEMA`` and ``Row`` are what readers (``predictor collect``) share with the writer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, TypedDict

import orjson

from elis_gateway.behind import Behind
from elis_gateway.core.job import Outcome
from elis_gateway.flight import Flight, Observer

__all__ = ["SCHEMA", "Row", "TrafficLog", "row"]

SCHEMA = 1
"""Raised when a field changes its meaning or goes; new fields do not raise it."""

_log = logging.getLogger("elis_gateway.traffic_log")
_WAITING = 5_000
"""Rows that are not written yet; those after them are lost, and counted."""
_LAST_ROWS = 10.0
"""Seconds that the end of the gateway waits for the disk."""

Prompts = Literal["full", "hash", "none"]


class SliceRow(TypedDict):
    """One upstream call of a job."""

    upstream: str
    start: float
    tokens: int
    end: str
    cause: str


# Written as a call because ``class`` is a field.
Row = TypedDict(
    "Row",
    {
        "schema": int,
        "job_id": str,
        "model": str,
        "app": str,
        "class": str,
        "route": str,
        "stream": bool,
        "prompt": str | None,
        "prompt_hash": str | None,
        "answer": str | None,
        "answer_hash": str | None,
        "prompt_tokens": int | None,
        "completion_tokens": int,
        "max_tokens": int | None,
        "arrival": float,
        "first_token": float | None,
        "end": float,
        "queue_wait": float,
        "slices": list[SliceRow],
        "preemptions": int,
        "prediction_history": list[tuple[int, float]],
        "outcome": str,
        "cause": str,
        "finish_reason": str | None,
    },
)
"""One job. Times are seconds since the epoch, durations seconds, lengths tokens; null where it never came to that."""


def row(flight: Flight, *, prompts: Prompts, epoch: float) -> Row:
    """A job as a row. ``epoch``: what to add to the loop's time to get the time of day."""
    job, answer = flight.job, flight.answer
    assert job is not None
    full, hashed = prompts == "full", prompts == "hash"
    prompt = flight.request.prompt_text if prompts != "none" else ""
    text = answer.text if prompts != "none" else ""
    return {
        "schema": SCHEMA,
        "job_id": job.id,
        "model": job.spec.model,
        "app": job.spec.app,
        "class": flight.class_name,
        "route": flight.request.route,
        "stream": flight.request.stream,
        "prompt": prompt if full else None,
        "prompt_hash": text_hash(prompt) if hashed or full else None,
        "answer": text if full else None,
        "answer_hash": text_hash(text) if hashed else None,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": job.attained,
        "max_tokens": flight.request.max_tokens,
        "arrival": job.arrival + epoch,
        "first_token": None if job.first_token is None else job.first_token + epoch,
        "end": (job.finished or job.arrival) + epoch,
        "queue_wait": job.waited,
        "slices": [
            {
                "upstream": leg.upstream,
                "start": leg.sent + epoch,
                "tokens": leg.tokens,
                "end": leg.end,
                "cause": leg.cause,
            }
            for leg in flight.legs
        ],
        "preemptions": job.preemptions,
        "prediction_history": flight.estimates,
        "outcome": job.outcome or Outcome.FAILED,
        "cause": job.cause,
        "finish_reason": answer.finish_reason,
    }


def text_hash(text: str) -> str:
    """How a text is named where it must not be shown."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class TrafficLog(Observer):
    """Writes rows to ``path``, renaming it to ``path.1`` … ``path.<keep>`` when it has grown to ``max_bytes``."""

    def __init__(self, path: Path, *, max_bytes: int, keep: int, prompts: Prompts, epoch: Callable[[], float]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._prompts = prompts
        self._epoch = epoch
        self._file: IO[bytes] | None = None
        self._behind: Behind[Row] | None = None

    def start(self) -> None:
        """Open the file (appending) and begin to write. Raises OSError if it cannot be opened."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        self._behind = Behind("traffic-log", self._write, most=_WAITING)

    def finished(self, flight: Flight) -> None:
        """A job is over."""
        if self._behind is not None:
            self._behind.put(row(flight, prompts=self._prompts, epoch=self._epoch()))

    def close(self) -> None:
        """Write what is pending and close the file."""
        if self._behind is not None:
            behind, self._behind = self._behind, None
            # A disk that hangs must not keep the process from ending.
            if behind.close(_LAST_ROWS) and self._file is not None:
                self._file.close()

    def _write(self, rows: list[Row], lost: int) -> None:
        if lost:
            _log.error("%s: %d rows lost: the disk is too slow", self._path, lost)
        # Serving goes on without its record; the log says so.
        lines = []
        for made in rows:
            try:
                lines.append(orjson.dumps(made, option=orjson.OPT_APPEND_NEWLINE))
            except orjson.JSONEncodeError as error:
                _log.error("%s: a row lost: %s", self._path, error)
        try:
            for line in lines:
                self._append(line)
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            _log.error("%s: %d rows lost: %s", self._path, len(lines), error)

    def _append(self, line: bytes) -> None:
        if self._file is None:
            return
        if self._file.closed:
            # The last rotation failed half-way.
            self._file = self._path.open("ab")
        size = self._file.tell()
        if size and size + len(line) > self._max_bytes:
            self._file.close()
            self._rotate()
            self._file = self._path.open("ab")
        self._file.write(line)

    def _rotate(self) -> None:
        numbered = [self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._keep + 1)]
        for older, newer in zip(reversed(numbered), [*reversed(numbered[:-1]), self._path], strict=True):
            if newer.exists():
                newer.replace(older)
