"""The process's log: one line per record on standard error, for people (text) or machines (json), with the job's id.

Knows: log format and job-id context. Never: being imported by core; what is worth logging.
"""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

import orjson

__all__ = ["job_id", "setup"]

job_id: ContextVar[str] = ContextVar("elis_job_id", default="")
"""Id of the job this task works on; handlers set it, every record made in the task carries it as ``job``."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "job", "facts", "taskName"}


def setup(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Send every record of ``level`` and above to ``stream`` (default: standard error). Replaces earlier handlers."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    handler.addFilter(_add_job)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)  # its debug lines are about selectors
    logging.captureWarnings(True)
    # Nobody reads them from the records, and finding them out costs as much as the rest of making one.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _add_job(record: logging.LogRecord) -> bool:
    if not hasattr(record, "job"):
        record.job = job_id.get()
    return True


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as ``extra``."""
    fields = vars(record)
    return {key: fields[key] for key in fields.keys() - _STANDARD}


class TextFormatter(logging.Formatter):
    """``2024-05-01 12:00:00.123 INFO jobs [id] message key=value``"""

    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self._stamp = ""

    def format(self, record: logging.LogRecord) -> str:
        if (second := int(record.created)) != self._second:
            self._second, self._stamp = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        stamp = self._stamp
        name = record.name.removeprefix("elis_gateway.")
        job = getattr(record, "job", "")
        head = f"{stamp}.{int(record.msecs):03d} {record.levelname} {name}{f' [{job}]' if job else ''}"
        more = _extra(record)
        extra = "".join([f" {key}={more[key]}" for key in sorted(more)]) if more else ""
        return f"{head} {record.getMessage()}{extra}{self._trace(record)}"

    def _trace(self, record: logging.LogRecord) -> str:
        return f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""


class JsonFormatter(logging.Formatter):
    """One object: ``time`` (Unix seconds), ``level``, ``logger``, ``message``, ``job``, and what came as ``extra``.

    ``extra={"facts": ...}``, a function, gives what the message says already, by name: only machines get it.
    """

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if job := getattr(record, "job", ""):
            row["job"] = job
        row |= _extra(record)
        if (facts := getattr(record, "facts", None)) is not None:
            row |= facts()
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(row, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
