"""config/isrtf.yaml is the published method: every call at most 50 tokens, and a fresh estimate after each."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import yaml

from elis_gateway.tasks import spawn
from tests.gateway.world import CHAT, COMPLETIONS, paced, world
from tests.predictor import tiny

FILE = Path(__file__).parents[2] / "config" / "isrtf.yaml"


async def test_call_sizes_and_rescoring(tmp_path: Path) -> None:
    settings = yaml.safe_load(FILE.read_text())
    if settings["predictor"]["kind"] == "bge":
        # The same method with a model of a few kilobytes, which is always in time.
        settings["predictor"] |= {"path": str(tiny.build(tmp_path / "models", paper=True)), "deadline": 30.0}
    log = tmp_path / "traffic.jsonl"
    lengths = [130, 20, 75, 200, 50, 101]
    async with world(
        paced(2000, slots=2),
        slots=2,
        scheduler=settings["scheduler"],
        predictor=settings["predictor"],
        traffic_log={"path": str(log)},
    ) as w:
        # Until some answer is known, history has nothing to say.
        await w.check(*_request(99, 60))
        w.engine.log.clear()
        asking = [spawn(w.check(*_request(n, length)), name="ask") for n, length in enumerate(lengths)]
        await asyncio.gather(*asking)
        calls = [record.max_tokens for record in w.engine.log]
    assert all(asked is not None and asked <= 50 for asked in calls)
    first, *rest = map(orjson.loads, log.read_bytes().splitlines())
    assert first["completion_tokens"] == 60
    rows = {row["completion_tokens"]: row for row in rest}
    assert sorted(rows) == sorted(lengths)
    for length, row in rows.items():
        windows = -(-length // 50)
        # A window that ended inside a character is cut back by a token or two and takes another call.
        assert windows <= len(row["slices"]) <= windows + 2, row
        assert sum(piece["tokens"] for piece in row["slices"]) == length
        # One estimate at the start, one after every window but the last.
        scored = [at for at, _ in row["prediction_history"]]
        ends = [sum(piece["tokens"] for piece in row["slices"][:n]) for n in range(len(row["slices"]))]
        assert scored == ends


def _request(n: int, length: int) -> tuple[str, dict[str, Any]]:
    common = {"model": "sim", "max_tokens": length, "ignore_eos": True, "stream": n % 2 == 0}
    if n % 3 == 0:
        return CHAT, {**common, "messages": [{"role": "user", "content": f"question {n}"}]}
    return COMPLETIONS, {**common, "prompt": f"prompt {n}"}


async def test_a_short_job_overtakes_in_fixed_and_in_elastic_windows() -> None:
    """One slot, a long answer under way: a short one does not wait for its end, in elastic mode by preempting it."""
    for mode in ("fixed", "elastic"):
        async with world(
            paced(1500, slots=1),
            slots=1,
            scheduler={"mode": mode, "aging": "none", "seam_cost": 1},
            predictor={"kind": "max_tokens"},
        ) as w:
            order: list[str] = []

            async def ask(name: str, length: int, w: Any = w, order: list[str] = order) -> None:
                body = {"model": "sim", "prompt": name, "max_tokens": length, "ignore_eos": True, "stream": True}
                await w.check(COMPLETIONS, body)
                order.append(name)

            long = spawn(ask("long", 600), name="long")
            while not any(flight.answer.attained > 60 for flight in w.gateway.flights.values()):
                await asyncio.sleep(0.001)
            await ask("short", 10)
            await long
            assert order == ["short", "long"]
            ends = [leg["end"] for leg in w.gateway.journal.recent(1)[0]["slices"]]
            assert ("preempted" in ends) == (mode == "elastic")
            if mode == "elastic":
                assert len(ends) == 2


async def test_nobody_waits_nobody_is_interrupted() -> None:
    """Elastic windows without contention: one call, however long the answer."""
    async with world() as w:
        body = {"model": "sim", "prompt": "long", "max_tokens": 600, "ignore_eos": True}
        await w.check(COMPLETIONS, body)
        assert [record.max_tokens for record in w.engine.log] == [600]
