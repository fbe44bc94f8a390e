"""The log's two formats."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from elis_gateway import logs


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_json_carries_the_job_and_what_was_passed() -> None:
    out = io.StringIO()
    logs.setup("info", "json", out)
    token = logs.job_id.set("j1")
    logging.getLogger("elis_gateway.jobs").info("done in %d s", 3, extra={"tokens": 7})
    logs.job_id.reset(token)
    logs.flush()
    row = json.loads(out.getvalue())
    assert row.pop("time") > 0
    assert row == {"level": "info", "logger": "elis_gateway.jobs", "message": "done in 3 s", "job": "j1", "tokens": 7}


def test_text_is_one_line() -> None:
    out = io.StringIO()
    logs.setup("info", "text", out)
    logging.getLogger("elis_gateway.jobs").info("done", extra={"tokens": 7})
    logging.getLogger("elis_gateway.jobs").debug("not shown")
    logs.flush()
    (line,) = out.getvalue().splitlines()
    assert line.endswith(" INFO jobs done tokens=7")


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exception_comes_with_its_trace(format: str) -> None:
    out = io.StringIO()
    logs.setup("warning", format, out)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").warning("failed", exc_info=True)
    logs.flush()
    assert "ValueError: boom" in out.getvalue()


def test_who_does_not_read_the_log_stops_nobody_and_is_told_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe holds 64 KB. What comes after is kept as far as memory may go, and the rest is counted."""
    monkeypatch.setattr(logs, "_WAITING", 3000)
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as reader, open(writing, "w", encoding="utf-8") as writer:
        logs.setup("info", "json", writer)
        log = logging.getLogger("x")
        for number in range(10_000):
            log.info("line %d", number)
        numbers, lost = [], 0
        for line in reader:
            said = json.loads(line)
            number, _, rest = said["message"].removeprefix("line ").partition(" ")
            if said["level"] == "warning":  # more than one, where the writer was slow to begin
                assert rest == "lines of this log are lost: nobody read it"
                lost += int(number)
            else:
                numbers.append(int(number))
            if len(numbers) + lost == 10_000:
                break
        assert len(numbers) + lost == 10_000
        assert len(numbers) >= 3000
        assert numbers == sorted(set(numbers))
        assert lost > 0


def test_the_end_waits_for_a_reader_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_LAST_WORDS", 0.05)
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as reader, open(writing, "w", encoding="utf-8") as writer:
        logs.setup("info", "text", writer)
        for _ in range(10_000):
            logging.getLogger("x").info("much to read")
        logging.getLogger().handlers[0].close()
        reader.close()


def test_each_line_is_there_when_the_process_has_ended() -> None:
    program = (
        "import logging; from elis_gateway import logs; logs.setup()\nfor n in range(500): logging.info('n=%d', n)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert [line.split("n=")[1] for line in done.stderr.splitlines()] == [str(number) for number in range(500)]
