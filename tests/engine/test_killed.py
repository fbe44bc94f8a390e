"""kill -9 of one of two vLLM processes in the middle of answers: what the clients get is what they would have got."""

from __future__ import annotations

import os

import pytest

from benchmarks import vllm_engine
from benchmarks.real_faults import killed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


async def test_answers_of_a_killed_engine_go_on_elsewhere_word_for_word() -> None:
    if (reason := vllm_engine.missing()) is not None:
        if os.environ.get("ELIS_ENGINE") == "require":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    found = await killed(60)
    assert found["on_the_killed_engine"] == found["went_on_elsewhere"] > 0
    assert found["texts_equal_the_undisturbed"] == found["answers"]
