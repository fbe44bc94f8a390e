"""The fluid engine against slower models that are obviously right, and the stories of its queue, memory and cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.cli import sim_engine
from elis_gateway.errors import ConfigError
from elis_gateway.sim.engine import Engine, EngineModel, Event, EventKind, PrefixCache

STARTED, MARK, ENDED = EventKind.STARTED, EventKind.MARK, EventKind.ENDED


def model(slots: int = 4, rate: float = 10.0, **more: object) -> EngineModel:
    return EngineModel(slots, ((1, rate),), **more)  # type: ignore[arg-type]


def drain(engine: Engine) -> list[Event]:
    """Every event until nothing runs."""
    events: list[Event] = []
    while (at := engine.next_event()) is not None:
        evictions = engine.totals.evictions
        found = engine.advance(at)
        assert found or engine.totals.evictions > evictions, "next_event promised something"
        events += found
    return events


def ends(events: list[Event]) -> dict[object, float]:
    return {event.call_id: event.at for event in events if event.kind is ENDED}


# ---- stories --------------------------------------------------------------------------------------------------------


def test_one_call() -> None:
    engine = Engine(model())
    engine.start("a", 5, 0, 12, 1.0, mark_every=5)
    events = drain(engine)
    assert [event[:3] for event in events] == [
        (STARTED, "a", 1),
        (MARK, "a", 5),
        (MARK, "a", 10),
        (ENDED, "a", 12),
    ]
    assert [event.at for event in events] == pytest.approx([1.1, 1.5, 2.0, 2.2])


def test_a_call_of_one_token_starts_and_ends_at_once() -> None:
    engine = Engine(model())
    engine.start("a", 5, 0, 1, 0.0, mark_every=1)
    assert [event.kind for event in drain(engine)] == [STARTED, ENDED]


def test_a_mark_per_token() -> None:
    engine = Engine(model())
    engine.start("a", 5, 0, 3, 0.0, mark_every=1)
    assert [(e.kind, e.tokens) for e in drain(engine)] == [(STARTED, 1), (MARK, 1), (MARK, 2), (ENDED, 3)]


def test_two_share_the_engine_and_slow_each_other_down() -> None:
    engine = Engine(EngineModel(2, ((1, 10.0), (2, 5.0))))
    engine.start("a", 0, 0, 10, 0.0)
    engine.start("b", 0, 0, 10, 0.5)  # a has made 5; both now run at 5/s
    assert ends(drain(engine)) == {"a": pytest.approx(1.5), "b": pytest.approx(2.0)}
    assert engine.totals.full == pytest.approx(1.0)
    assert engine.totals.busy == pytest.approx(2.0)
    assert engine.totals.full_tokens == pytest.approx(10.0)


def test_more_calls_than_slots_wait_first_come() -> None:
    engine = Engine(model(slots=1))
    for call, length in (("a", 10), ("b", 5), ("c", 1)):
        engine.start(call, 0, 0, length, 0.0, priority={"a": 3, "b": 2, "c": 1}[call])
    assert (engine.running, engine.waiting) == (1, 2)
    assert ends(drain(engine)) == pytest.approx({"a": 1.0, "b": 1.5, "c": 1.6})


def test_or_by_priority() -> None:
    engine = Engine(model(slots=1, orders=True))
    for call, priority in (("a", 5), ("b", 9), ("c", 1), ("d", 9)):
        engine.start(call, 0, 0, 10, 0.0, priority=priority)
    assert ends(drain(engine)) == pytest.approx({"a": 1.0, "c": 2.0, "b": 3.0, "d": 4.0})


def test_abort_keeps_what_was_made_and_frees_the_slot() -> None:
    engine = Engine(model(slots=1))
    engine.start("a", 0, 0, 100, 0.0)
    engine.start("b", 0, 0, 10, 0.0)
    assert engine.abort("a", 2.05) == 20
    assert not engine.holds("a")
    assert ends(drain(engine)) == {"b": pytest.approx(3.05)}
    assert engine.abort("a", 4.0) == 0
    assert engine.totals.tokens == 30


def test_abort_of_a_waiting_call() -> None:
    engine = Engine(model(slots=1))
    engine.start("a", 0, 0, 10, 0.0)
    engine.start("b", 0, 0, 10, 0.0)
    engine.start("c", 0, 0, 10, 0.0)
    assert engine.abort("b", 0.5) == 0
    assert ends(drain(engine)) == pytest.approx({"a": 1.0, "c": 2.0})


def test_an_event_that_was_due_before_an_abort_is_not_lost() -> None:
    engine = Engine(model(slots=2))
    engine.start("a", 0, 0, 10, 0.0)
    engine.start("b", 0, 0, 20, 0.0)
    assert engine.abort("b", 1.5) == 15  # nobody fetched the end of "a" yet
    assert engine.next_event() == pytest.approx(0.1)
    events = engine.advance(1.5)
    assert [event.call_id for event in events] == ["a", "a"]
    assert engine.abort("a", 1.6) == 0


def test_everything_dies() -> None:
    engine = Engine(model(slots=1))
    engine.start("a", 0, 0, 10, 0.0)
    engine.start("b", 0, 0, 10, 0.0)
    assert engine.abort_all(0.55) == {"a": 5, "b": 0}
    assert engine.next_event() is None
    engine.start("c", 0, 0, 10, 1.0)
    assert ends(drain(engine)) == {"c": pytest.approx(2.0)}


def test_starting_costs_seam_and_the_prompt_that_is_not_cached() -> None:
    engine = Engine(model(seam_tokens=2.0, prefill_tokens_per_second=100.0))
    engine.start("cold", 50, 0, 10, 0.0)
    engine.start("warm", 50, 48, 10, 0.0)
    found = ends(drain(engine))
    assert found["cold"] == pytest.approx(0.2 + 0.5 + 1.0)
    assert found["warm"] == pytest.approx(0.2 + 0.02 + 1.0)
    assert engine.totals.prefilled == 52


def test_a_stalling_prefill_holds_up_everyone() -> None:
    engine = Engine(model(prefill_tokens_per_second=100.0, prefill_stalls=True))
    engine.start("a", 0, 0, 10, 0.0)
    engine.start("b", 50, 0, 10, 0.5)
    assert ends(drain(engine)) == {"a": pytest.approx(1.5), "b": pytest.approx(2.0)}


def test_memory_admits_only_what_fits() -> None:
    engine = Engine(model(kv_tokens=100, block=1))
    engine.start("a", 60, 60, 10, 0.0)
    engine.start("b", 60, 60, 10, 0.0)
    engine.start("c", 5, 5, 10, 0.0)  # would fit, but the head of the queue goes first
    assert (engine.running, engine.waiting) == (1, 2)
    assert ends(drain(engine)) == pytest.approx({"a": 1.0, "b": 2.0, "c": 2.0})


def test_growing_sequences_evict_the_latest_which_starts_again_without_losing_tokens() -> None:
    engine = Engine(model(kv_tokens=100, block=1, prefill_tokens_per_second=100.0))
    engine.start("a", 40, 40, 50, 0.0, mark_every=10)
    engine.start("b", 40, 40, 30, 0.0, mark_every=10)
    events = drain(engine)
    assert engine.totals.evictions == 1
    # Full when both have made 10. "a" runs on to its end at 5.0; "b" is computed anew (50 tokens) and goes on.
    assert ends(events) == {"a": pytest.approx(5.0), "b": pytest.approx(5.0 + 0.5 + 2.0)}
    assert [(e.kind, e.tokens) for e in events if e.call_id == "b"] == [
        (STARTED, 1),
        (MARK, 10),
        (MARK, 20),
        (ENDED, 30),
    ]
    assert engine.totals.tokens == 80


def test_the_lowest_priority_is_evicted_first() -> None:
    engine = Engine(model(kv_tokens=100, block=1, orders=True))
    engine.start("a", 40, 40, 50, 0.0, priority=7)
    engine.start("b", 40, 40, 50, 0.0, priority=1)
    found = ends(drain(engine))
    assert found["b"] < found["a"]


def test_what_can_never_fit_is_refused() -> None:
    engine = Engine(model(kv_tokens=100))
    with pytest.raises(ValueError, match="do not fit"):
        engine.start("a", 60, 0, 50, 0.0)
    with pytest.raises(ValueError, match="at least one token"):
        engine.start("a", 60, 0, 0, 0.0)
    engine.start("a", 10, 0, 5, 0.0)
    with pytest.raises(ValueError, match="in progress"):
        engine.start("a", 10, 0, 5, 0.0)


# ---- agreement ------------------------------------------------------------------------------------------------------


class Naive:
    """The same fluid, every sequence on its own: slow and plain."""

    def __init__(self, engine: EngineModel) -> None:
        self.model, self.now = engine, 0.0
        self.running: dict[int, list[float]] = {}  # call -> [work left, length, priority]
        self.queue: list[tuple[int, int, float, float]] = []
        self.ended: dict[int, float] = {}

    def run_to(self, now: float) -> None:
        while self.running:
            rate = self.model.rate(len(self.running))
            left, call = min((left, call) for call, (left, _) in self.running.items())
            if self.now + left / rate > now:
                break
            self._pass(self.now + left / rate)
            self.ended[call] = self.now
            del self.running[call]
            self._fill()
        self._pass(now)

    def _pass(self, to: float) -> None:
        for entry in self.running.values():
            entry[0] -= (to - self.now) * self.model.rate(len(self.running))
        self.now = to

    def _fill(self) -> None:
        while self.queue and len(self.running) < self.model.slots:
            _, call, work, length = self.queue.pop(0)
            self.running[call] = [work, length]

    def start(self, call: int, length: int, priority: int, now: float) -> None:
        self.run_to(now)
        self.queue.append((priority if self.model.orders else 0, call, length + self.model.seam_tokens, length))
        self.queue.sort()
        self._fill()

    def abort(self, call: int, now: float) -> int:
        self.run_to(now)
        self.queue = [entry for entry in self.queue if entry[1] != call]
        left, length = self.running.pop(call, [0.0, 0.0])
        self._fill()
        return max(0, int(length - left + 1e-6))


steps = st.lists(
    st.tuples(st.floats(0.0, 3.0), st.integers(0, 5), st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(steps, st.booleans(), st.floats(0.0, 3.0))
def test_agrees_with_every_sequence_on_its_own(
    story: list[tuple[float, int, int, int]], orders: bool, seam: float
) -> None:
    numbers = EngineModel(3, ((1, 12.0), (3, 7.0)), seam_tokens=seam, orders=orders)
    engine, naive = Engine(numbers), Naive(numbers)
    now, call, events = 0.0, 0, []
    for pause, action, length, priority in story:
        now += pause
        if action == 0 and call:
            victim = 1 + (length % call)
            assert abs(engine.abort(victim, now) - naive.abort(victim, now)) <= (victim in naive.ended)
        else:
            call += 1
            engine.start(call, 0, 0, length, now, mark_every=7, priority=priority)
            naive.start(call, length, priority, now)
        if action % 2:
            events += engine.advance(now)
    events += engine.advance(now) + drain(engine)
    naive.run_to(float("inf"))
    assert ends(events) == pytest.approx(naive.ended)
    assert [event.at for event in events] == sorted(event.at for event in events)
    for number in range(1, call + 1):  # every call's events are in order: STARTED, marks of 7, ENDED
        mine = [event for event in events if event.call_id == number]
        kinds = [event.kind for event in mine]
        if kinds:
            assert kinds[0] is STARTED
            assert set(kinds[1:-1]) <= {MARK}
        marks = [event.tokens for event in mine if event.kind is MARK]
        assert marks == [7 * (k + 1) for k in range(len(marks))]


def per_token(calls: list[tuple[float, int]], numbers: EngineModel) -> list[float]:
    """A real engine's loop: a step takes 1/r(batch), gives everyone a token, and admits only between steps."""
    now, index, ended = 0.0, 0, [0.0] * len(calls)
    running: dict[int, int] = {}
    while index < len(calls) or running:
        if not running:
            now = max(now, calls[index][0])
        while index < len(calls) and calls[index][0] <= now and len(running) < numbers.slots:
            running[index] = calls[index][1]
            index += 1
        now += 1 / numbers.rate(len(running))
        for call in list(running):
            running[call] -= 1
            if not running[call]:
                ended[call] = now
                del running[call]
    return ended


def test_agrees_with_a_model_of_steps() -> None:
    numbers = EngineModel(4, ((1, 40.0), (4, 28.0)))
    rng = random.Random(5)
    calls, at = [], 0.0
    for _ in range(600):
        at += rng.expovariate(0.42)
        calls.append((at, rng.randrange(1, 500)))
    engine, events = Engine(numbers), []
    for number, (at, length) in enumerate(calls):
        engine.start(number, 0, 0, length, at)
        events += engine.advance(at)
    fluid = ends(events + drain(engine))
    stepped = per_token(calls, numbers)
    off = [stepped[number] - fluid[number] for number in range(len(calls))]
    # A call waits half a step on average for the step that takes it in, and so does the next one behind it.
    mean = sum(stepped[n] - calls[n][0] for n in range(len(calls))) / len(calls)
    assert 0 <= sum(off) / len(off) < 0.02 * mean
    assert max(off) < 1.0


def test_an_engine_remembers_nothing_when_idle_and_drops_stale_entries() -> None:
    engine = Engine(model(slots=2))
    for number in range(2000):
        engine.start(number, 0, 0, 10**6, float(number))
        engine.abort(number - 1, number + 0.5)
    assert len(engine._heap) < 200
    engine.abort(1999, 3000.0)
    assert engine.next_event() is None
    assert engine.kv_used == 0


# ---- the prefix cache -----------------------------------------------------------------------------------------------


def test_prefix_cache_counts_whole_blocks_and_never_the_last_token() -> None:
    cache = PrefixCache(model(block=16))
    assert cache.lookup("a", 100) == 0
    cache.store("a", 100)
    assert cache.lookup("a", 200) == 96
    assert cache.lookup("a", 96) == 80
    assert cache.lookup("a", 1) == 0
    cache.clear()
    assert cache.lookup("a", 200) == 0


def test_prefix_cache_forgets_the_least_recently_used() -> None:
    cache = PrefixCache(model(block=1), tokens=100)
    cache.store("a", 40)
    cache.store("b", 40)
    assert cache.lookup("a", 41) == 40
    cache.store("c", 40)
    assert cache.lookup("b", 41) == 0
    assert cache.lookup("a", 41) == 40


def test_no_prefix_cache() -> None:
    cache = PrefixCache(model(prefix_cache=False))
    cache.store("a", 40)
    assert cache.lookup("a", 41) == 0


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_rates_between_and_beyond_the_points() -> None:
    numbers = EngineModel(16, ((2, 100.0), (4, 50.0)))
    assert [numbers.rate(batch) for batch in (1, 2, 3, 4, 6)] == pytest.approx([100.0, 100.0, 200 / 3, 50.0, 100 / 3])
    assert numbers.capacity == pytest.approx(16 * numbers.rate(16))


def test_models_round_trip(tmp_path: Path) -> None:
    for name in EngineModel.shipped():
        numbers = EngineModel.load(name)
        assert numbers.about, f"{name}: say where the numbers come from"
        numbers.save(tmp_path / "copy.json")
        assert EngineModel.load(tmp_path / "copy.json") == numbers


def test_unless_it_is_told_otherwise_the_embedded_engine_is_one_that_was_measured() -> None:
    (engine,) = [option for option in sim_engine.params if option.name == "engine"]
    assert " Measured 20" in EngineModel.load(engine.default).about


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"slots": 4}', "missing key 'decode'"),
        ('{"slots": 4, "decode": [[1, 5]], "speed": 1}', "unknown key 'speed'; known: slots"),
        ('{"slots": 4, "decode": 5}', "decode"),
        ('{"slots": 4, "decode": []}', "decode"),
        ('{"slots": 4, "decode": [[4, 5], [1, 7]]}', "growing"),
        ('{"slots": 4, "decode": [[1, -5]]}', "above 0"),
        ('{"slots": 0, "decode": [[1, 5]]}', "slots"),
        ('{"slots": 4, "decode": [[1, 5]], "seam_tokens": -1}', "seam_tokens"),
        ('{"slots": 4, "decode": [[1, 5]], "prefill_tokens_per_second": 0}', "prefill"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        EngineModel.load(tmp_path / "engine.json")


def test_no_such_model() -> None:
    with pytest.raises(ConfigError, match=r"shipped models: .*default"):
        EngineModel.load("h100")
