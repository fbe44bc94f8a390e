"""What the metrics count, each from the story that makes it happen, and the log's line per job."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator

import pytest

from elis_gateway import logs
from elis_gateway.sim.faults import Fault
from elis_gateway.tasks import spawn
from tests.gateway.world import CHAT, COMPLETIONS, World, paced, until, world

BODY = {"model": "sim", "prompt": "Tell me", "max_tokens": 120, "ignore_eos": True}


async def samples(w: World) -> dict[str, float]:
    """Every sample of the metrics page."""
    async with w.session.get(w.admin + "/metrics") as response:
        lines = (await response.text()).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def over(w: World, jobs: int) -> None:
    """Until the books of so many jobs are done."""
    await until(lambda: len(w.gateway.journal.recent(jobs)) == jobs)


async def test_tokens_apart_windows_and_the_process() -> None:
    async with world(paced(2000)) as w:
        began = time.perf_counter()
        await w.check(COMPLETIONS, {**BODY, "stream": True})
        took = time.perf_counter() - began
        await over(w, 1)
        found = await samples(w)
        assert 2 <= found['elis_itl_seconds_count{model="sim"}'] < 120
        # 120 tokens, 2,000 a second; a machine that stands still makes both longer.
        assert 0.02 <= found['elis_itl_seconds_sum{model="sim"}'] <= took
        assert found['elis_windows_total{model="sim"}'] == 2
        assert found["process_resident_memory_bytes"] > 1e6


async def test_fixed_windows_are_counted_too() -> None:
    async with world(scheduler={"mode": "fixed"}) as w:
        await w.check(COMPLETIONS, BODY)
        await over(w, 1)
        assert (await samples(w))['elis_windows_total{model="sim"}'] == 2


async def test_a_call_that_breaks_is_a_failover_of_its_upstream() -> None:
    async with world() as w:
        w.engine.faults.add(Fault("end", after=30, times=2))
        await w.check(COMPLETIONS, BODY)
        await over(w, 1)
        (upstream,) = w.gateway.fleet.upstreams
        found = await samples(w)
        assert found[f'elis_failovers_total{{upstream="{upstream}"}}'] == 2
        assert found[f'elis_upstream_up{{upstream="{upstream}"}}'] in (0, 1)


async def test_refusals_by_reason() -> None:
    scheduler = {"queue": {"max_jobs": 1}, "overcommit": 0}
    async with world(paced(20, slots=1), slots=1, scheduler=scheduler) as w:
        asked: list[dict[str, object]] = [{**BODY, "model": "other"}, {**BODY, "max_tokens": -1}]
        for body in asked:
            async with w.post(COMPLETIONS, body) as response:
                assert response.status >= 400
        async with w.post("/elsewhere", {}) as response:
            assert response.status == 404
        asking = [spawn(w.ask(COMPLETIONS, BODY), name="ask") for _ in range(2)]
        await until(lambda: len(w.gateway.flights) == 2)
        found = await samples(w)
        assert found["elis_jobs_waiting"] == 1
        assert found["elis_longest_wait_seconds"] >= 0
        async with w.post(COMPLETIONS, BODY) as response:
            assert response.status == 429
        for task in asking:
            task.cancel()
        await until(lambda: not w.gateway.flights)
        found = await samples(w)
        assert found["elis_longest_wait_seconds"] == 0
        refused = {name: value for name, value in found.items() if name.startswith("elis_refusals_total{")}
        assert refused == {
            'elis_refusals_total{reason="model_not_found"}': 1,
            'elis_refusals_total{reason="not_found"}': 1,
            'elis_refusals_total{reason="queue_full"}': 1,
            'elis_refusals_total{reason="status_400"}': 1,
        }


async def test_a_late_loop_is_noticed() -> None:
    async with world() as w:
        await until(lambda: w.gateway.metrics._lag.total > 0)
        found = await samples(w)
        assert found["elis_event_loop_lag_seconds_count"] >= 1
        assert found["elis_event_loop_lag_seconds_sum"] > 0


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    logs.setup("debug", "json", out)
    yield out
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


async def test_one_line_per_job_with_its_id_and_nothing_a_client_said(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream-secret")
    prompt, key = "my grandmother's recipe", "Bearer sk-client-secret"
    async with world(paced(2000), upstream={"api_key_env": "UPSTREAM_KEY"}, predictor={"kind": "max_tokens"}) as w:
        w.engine.faults.add(Fault("reset", after=30))
        answer = await w.ask(COMPLETIONS, {**BODY, "prompt": prompt}, Authorization=key)
        chat = {"model": "sim", "messages": [{"role": "user", "content": prompt}], "max_tokens": 3}
        await w.ask(CHAT, chat, Authorization=key)
        async with w.post(COMPLETIONS, {**BODY, "prompt": prompt, "temperature": "hot"}, Authorization=key) as response:
            assert response.status == 400
        async with w.post(COMPLETIONS, f'{{"prompt": "{prompt}"'.encode(), Authorization=key) as response:
            assert response.status == 400
        await over(w, 2)
    logs.flush()
    text = log.getvalue()
    rows = [json.loads(line) for line in text.splitlines()]
    ends = [row for row in rows if row.get("event") == "job_end"]
    assert [row["outcome"] for row in ends].count("completed") == 2
    assert {row["level"] for row in ends} == {"info"}
    first = ends[0]
    assert (first["tokens"], first["slices"], len(first["upstreams"])) == (120, 2, 2)
    assert first["job"] in first["message"]
    assert any("initial prediction" in row["message"] and row["job"] == first["job"] for row in rows)
    for secret in ("grandmother", "sk-client-secret", "sk-upstream-secret", answer.text[:20]):
        assert secret not in text
