"""What engines' own pages say of their load, in the words of each engine."""

from __future__ import annotations

import pytest

from elis_gateway.config import MOST_SLOTS
from elis_gateway.upstream.gauges import Gauges, engines, most_at_once, read

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.97
vllm:num_preemptions_total{engine="0",model_name="m"} 0.0
vllm:num_preemptions_total{engine="1",model_name="m"} 4.0
vllm:num_preemptions_created{engine="1",model_name="m"} 1.76e+09
"""
SGLANG = b"""sglang:num_running_reqs{model_name="m",tp_rank="0"} 7.0
sglang:num_running_reqs{model_name="m",tp_rank="1"} 7.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 1.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.5
"""
LLAMA = b"""llamacpp:requests_processing 2
llamacpp:requests_deferred 1
"""


def test_vllm_as_a_whole_and_rank_by_rank() -> None:
    assert read(VLLM) == Gauges(8.0, 2.0, 0.97, 4.0)
    assert read(VLLM, 0) == Gauges(3.0, 0.0, 0.25, 0.0)
    assert read(VLLM, 1) == Gauges(5.0, 2.0, 0.97, 4.0)
    assert engines(VLLM) == 2


def test_sglang_whose_workers_say_the_same_twice() -> None:
    assert read(SGLANG) == Gauges(7.0, 1.0, 0.5)
    assert engines(SGLANG) == 1


def test_llama_cpp() -> None:
    assert read(LLAMA) == Gauges(2.0, 1.0)


@pytest.mark.parametrize(
    "page", [b"", b"<html>", b"vllm:num_requests_running{} many", b"vllm:num_requests_running 1\n", b"\xff\xfe 1\n"]
)
def test_pages_that_say_nothing(page: bytes) -> None:
    assert read(page) is None


class Telling:
    """An upstream that says how many slots it has."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    async def get(self, path: str) -> bytes:
        assert path == "/props"
        return b'{"total_slots": %d}' % self.slots


@pytest.mark.parametrize(("said", "believed"), [(4, 4), (10**12, MOST_SLOTS)])
async def test_what_an_engine_says_it_runs_at_once_is_believed_within_reason(said: int, believed: int) -> None:
    """Every slot is remembered somewhere: a number out of the air must not cost the gateway its memory."""
    assert await most_at_once(Telling(said)) == believed  # type: ignore[arg-type]
