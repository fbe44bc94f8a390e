"""Malformed input in small (benchmarks/hostile.py): refused or cut off, never a 5xx of ours, and nobody hangs."""

from __future__ import annotations

import logging
import random

import pytest

from benchmarks.hostile import ATTACKS, GOOD, attack, packed
from tests.gateway.world import CHAT, COMPLETIONS, world

LIMITS = {"head_timeout": 0.3, "body_timeout": 0.3, "idle_timeout": 1.0, "max_body": 1_000_000}


@pytest.mark.parametrize("kind", [a for a in ATTACKS if a is not packed], ids=lambda a: a.__name__)
async def test_what_comes_is_refused_or_cut_off(kind: object, caplog: pytest.LogCaptureFixture) -> None:
    assert callable(kind)
    pick = random.Random(kind.__name__)
    caplog.set_level(logging.WARNING)
    async with world(server=LIMITS) as w:
        for _ in range(12):
            data = kind(pick)
            outcome, answer = await attack(w.gateway.port, data, within=60.0)
            assert outcome != "silence", data[:300]
            assert outcome == "closed" or outcome < "500", (data[:300], answer)
        await w.check(COMPLETIONS, GOOD)
        assert {record.path for record in w.engine.log} <= {CHAT, COMPLETIONS}
        assert not w.gateway.flights
    assert not [record for record in caplog.records if record.exc_info]
