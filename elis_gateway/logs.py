"""The process's log: one line per record on standard error, for people (text) or machines (json), with the job's id.

Lines are made where they are said and written by a thread: who reads them slowly, or not at all, stops nobody.

Knows: log format and job-id context. Never: being imported by core; what is worth logging.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TextIO

import orjson

from elis_gateway.behind import Behind

__all__ = ["flush", "job_id", "setup"]

job_id: ContextVar[str] = ContextVar("elis_job_id", default="")
"""Id of the job this task works on; handlers set it, every record made in the task carries it as ``job``."""

_WAITING = 20_000
"""Lines that nobody has read yet; those after them are lost, and counted."""
_LAST_WORDS = 2.0
"""Seconds that the end of the process waits for a reader."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "job", "facts", "taskName"}


def setup(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Send every record of ``level`` and above to ``stream`` (default: standard error). Replaces earlier handlers."""
    handler = _Lines(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    handler.addFilter(_add_job)
    root = logging.getLogger()
    for earlier in root.handlers:
        if isinstance(earlier, _Lines):
            earlier.close()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)  # its debug lines are about selectors
    logging.captureWarnings(True)
    # Nobody reads them from the records, and finding them out costs as much as the rest of making one.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def flush() -> None:
    """Wait until what was said is written, if somebody reads it."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class _Lines(logging.Handler):
    """Formats a record at once, since what it tells of goes on changing, and has the line written."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._out = _writer(stream)
        self._behind: Behind[str] = Behind("log", self._write, most=_WAITING)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 as every handler of logging: a record that cannot be said stops nobody
            self.handleError(record)
        else:
            self._behind.put(line)

    def flush(self) -> None:
        self._behind.flush(_LAST_WORDS)

    def close(self) -> None:
        self._behind.close(_LAST_WORDS)
        super().close()

    def _write(self, lines: list[str], lost: int) -> None:
        if lost:
            lines.append(self.format(_lost(lost)))
        data = "\n".join(lines) + "\n"
        # Gone is who read them; there is nobody left to tell.
        with suppress(OSError, ValueError):
            self._out(data)


def _writer(stream: TextIO) -> Callable[[str], object]:
    """Past the stream's buffer where it is a file: a thread that waits in there holds a lock that the interpreter's
    end needs."""
    try:
        descriptor = stream.fileno()
    except OSError:
        return stream.write

    def write(text: str) -> None:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        while data:
            data = data[os.write(descriptor, data) :]

    return write


def _lost(lines: int) -> logging.LogRecord:
    about = f"{lines} lines of this log are lost: nobody read it"
    return logging.LogRecord(__name__, logging.WARNING, "", 0, about, None, None)


def _add_job(record: logging.LogRecord) -> bool:
    if not hasattr(record, "job"):
        record.job = job_id.get()
    return True


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as ``extra``."""
    fields = vars(record)
    if fields.keys() <= _STANDARD:
        return {}
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
