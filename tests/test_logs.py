"""The log's two formats."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from elis_gateway import logs


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_json_carries_the_job_and_what_was_passed() -> None:
    out = io.StringIO()
    logs.setup("info", "json", out)
    token = logs.job_id.set("j1")
    logging.getLogger("elis_gateway.jobs").info("done in %d s", 3, extra={"tokens": 7})
    logs.job_id.reset(token)
    row = json.loads(out.getvalue())
    assert row.pop("time") > 0
    assert row == {"level": "info", "logger": "elis_gateway.jobs", "message": "done in 3 s", "job": "j1", "tokens": 7}


def test_text_is_one_line() -> None:
    out = io.StringIO()
    logs.setup("info", "text", out)
    logging.getLogger("elis_gateway.jobs").info("done", extra={"tokens": 7})
    logging.getLogger("elis_gateway.jobs").debug("not shown")
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
    assert "ValueError: boom" in out.getvalue()
