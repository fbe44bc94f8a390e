"""`slots: auto` as stories: what an engine says of itself, look by look, and what it is given."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from elis_gateway.upstream.auto_slots import AutoSlots, Look


class Engine:
    """Runs ``batch`` sequences at once and queues the rest, or as many as ``tokens`` of memory hold at ``each``.

    Everybody wants in: it always has as many calls of ours as there are slots."""

    def __init__(self, batch: int, *, tokens: float | None = None, each: float = 1.0, others: int = 0) -> None:
        self.batch, self.tokens, self.each, self.others = batch, tokens, each, others

    def look(self, ours: int) -> Look:
        here = ours + self.others
        room = self.batch if self.tokens is None else min(self.batch, int(self.tokens / self.each))
        running = min(here, room)
        kv = None if self.tokens is None else running * self.each / self.tokens
        return Look(running, here - running, kv, ours=ours)


def watched(auto: AutoSlots, engine: Engine, looks: int) -> list[int]:
    seen = []
    for _ in range(looks):
        auto.look(engine.look(auto.slots))
        seen.append(auto.slots)
    return seen


def test_up_in_doubles_while_the_engine_does_not_queue() -> None:
    assert watched(AutoSlots(), Engine(1000), 5) == [8, 16, 32, 64, 128]


def test_not_above_what_the_engine_says_it_runs() -> None:
    assert watched(AutoSlots(most=10), Engine(1000), 4) == [8, 10, 10, 10]
    assert AutoSlots(most=2).slots == 2


def test_down_to_what_it_runs_once_it_is_certain_that_it_queues() -> None:
    auto, engine = AutoSlots(), Engine(20)
    seen = watched(auto, engine, 8)
    assert seen[:3] == [8, 16, 32]
    assert seen[3:5] == [32, 32]  # a queue, but perhaps only of calls that have just arrived
    assert seen[5:] == [20, 20, 20]


def test_one_call_seen_waiting_moves_nothing() -> None:
    auto, engine = AutoSlots(), Engine(1000)
    watched(auto, engine, 3)
    before = auto.slots
    for _ in range(50):
        assert not auto.look(Look(before - 1, 1, ours=before))
        assert not auto.look(Look(before - 1, 1, ours=before))
        assert not auto.look(Look(before - 1, 0, ours=before - 1))
    assert auto.slots == before


def test_what_lies_beyond_a_limit_is_asked_ever_more_seldom() -> None:
    auto, engine = AutoSlots(), Engine(20)
    seen = watched(auto, engine, 2000)[8:]
    assert min(seen) >= 19
    assert max(seen) == 21
    tries = [n for n in range(1, len(seen)) if seen[n] == 21 and seen[n - 1] == 20]
    gaps = [b - a for a, b in pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 200
    assert sum(slots == 21 for slots in seen) < 0.05 * len(seen)


def test_a_limit_that_moves_is_followed() -> None:
    auto, engine = AutoSlots(), Engine(20)
    watched(auto, engine, 100)
    engine.batch = 200
    assert max(watched(auto, engine, 200)) >= 190
    engine.batch = 5
    assert watched(auto, engine, 4)[-1] == 5


def test_memory_that_fills_takes_slots_away_and_a_little_room_gives_none() -> None:
    auto = AutoSlots()
    engine = Engine(1000, tokens=40, each=1.0)
    seen = watched(auto, engine, 200)
    assert max(seen) == 64
    assert all(slots <= 38 for slots in seen[12:])
    before = auto.slots
    for _ in range(500):  # between the marks: neither more nor fewer
        auto.look(Look(before, 0, 0.9, ours=before))
    assert auto.slots == before


def test_whoever_evicts_has_been_given_too_much() -> None:
    auto = AutoSlots()
    watched(auto, Engine(1000), 3)
    assert auto.slots == 32
    assert auto.look(Look(32, 0, 0.8, evicted=1.0, ours=32))  # at once: it has happened, it does not only look like it
    assert auto.slots == 28
    auto.look(Look(20, 0, 0.5, evicted=0.0, ours=20))  # started anew, its counter too
    assert auto.slots == 28


def test_slots_that_nobody_uses_are_no_reason_for_more() -> None:
    auto = AutoSlots()
    for _ in range(100):
        assert not auto.look(Look(2, 0, 0.1, ours=2))


def test_never_below_one_and_others_get_their_part() -> None:
    auto = AutoSlots()
    watched(auto, Engine(10, others=100), 10)
    assert auto.slots == 1
    shared = AutoSlots()
    watched(shared, Engine(100), 6)
    watched(shared, Engine(100, others=100), 8)
    assert 20 <= shared.slots <= 60


def test_a_cut_is_given_time_to_take_effect() -> None:
    """What was sent before it still runs, and still queues: that is no reason for another."""
    auto = AutoSlots()
    watched(auto, Engine(1000), 3)
    for _ in range(3):
        auto.look(Look(16, 16, ours=32))
    assert auto.slots == 16
    for _ in range(20):
        assert not auto.look(Look(16, 8, ours=24))
    assert not auto.look(Look(4, 12, ours=16))  # all ended at once, and the next ones begin one by one
    assert not auto.look(Look(16, 0, ours=16))


def test_without_gauges_the_bound_is_all_there_is() -> None:
    told = AutoSlots(most=12)
    told.settle()
    assert told.slots == 12
    silent = AutoSlots()
    silent.settle()
    assert silent.slots == 4


looks = st.builds(
    Look,
    st.floats(0, 1e4), st.floats(0, 1e4), st.none() | st.floats(0, 1), st.floats(0, 1e6), st.integers(0, 10_000),
)  # fmt: skip


@given(st.lists(looks, max_size=200), st.none() | st.integers(1, 500))
def test_always_between_one_and_the_bound(seen: list[Look], most: int | None) -> None:
    auto = AutoSlots(most)
    for look in seen:
        before = auto.slots
        assert auto.look(look) == (auto.slots != before)
        assert 1 <= auto.slots <= (most or 10**9)
