"""How many calls an upstream gets: the circuit breaker, the slow start, and what is learned of its silences."""

from __future__ import annotations

from elis_gateway.config import Timeouts
from elis_gateway.upstream.breaker import Breaker
from elis_gateway.upstream.patience import Patience


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker(3, 5.0, 4.0)
    for _ in range(3):
        breaker.failed(at)
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker(3, 5.0, 0.0)
    breaker.failed(0.0)
    breaker.failed(0.0)
    assert not breaker.succeeded(0.0)
    breaker.failed(0.0)
    breaker.failed(0.0)
    assert (breaker.state(0.0), breaker.allowed(8, 0.0)) == ("closed", 8)
    breaker.failed(0.0)
    assert (breaker.state(0.0), breaker.allowed(8, 0.0)) == ("open", 0)
    assert breaker.next_change(8, 1.0) == 4.0


def test_half_open_one_call_finds_out() -> None:
    breaker = opened()
    assert (breaker.state(5.0), breaker.allowed(8, 5.0)) == ("half_open", 1)
    breaker.failed(6.0)
    assert breaker.state(6.0 + 9.9) == "open"
    assert breaker.state(16.0) == "half_open"
    assert breaker.succeeded(16.0, begun=True)
    assert breaker.state(16.0) == "closed"
    for _ in range(3):
        breaker.failed(20.0)
    assert breaker.state(25.0) == "half_open"  # the pause begins short again


def test_pauses_grow_to_a_minute_and_what_was_sent_before_counts_once() -> None:
    breaker, now = opened(), 0.0
    for _ in range(50):
        breaker.failed(now)
    for pause in (5.0, 10.0, 20.0, 40.0, 60.0, 60.0):
        assert breaker.next_change(4, now) == pause
        now += pause
        breaker.failed(now)


def test_slots_come_back_one_after_the_other() -> None:
    breaker = Breaker(3, 5.0, 4.0)
    breaker.begin_slowly(100.0)
    assert [breaker.allowed(4, 100.0 + t) for t in (0.0, 0.9, 1.1, 2.1, 3.1, 4.0)] == [1, 1, 2, 3, 4, 4]
    breaker.begin_slowly(100.0)
    now, seen = 100.0, []
    while (wait := breaker.next_change(4, now)) is not None:
        now += wait + 1e-6
        seen.append(breaker.allowed(4, now))
    assert seen == [2, 3, 4, 4]
    assert breaker.next_change(4, now) is None


def test_silence_is_judged_by_what_was_usual() -> None:
    patience = Patience(Timeouts(first_byte=300.0, inter_token=60.0))
    for _ in range(31):
        patience.heard(3.0, 0.8)
    assert (patience.first_byte(), patience.inter_token()) == (300.0, 60.0)
    patience.heard(3.0, 0.8)
    assert (patience.first_byte(), patience.inter_token()) == (30.0, 8.0)
    patience.heard(0.1, 2.0)
    assert patience.inter_token() == 20.0
    patience.gave_up(20.0, first=False)
    assert patience.inter_token() == 60.0  # never more than configured
    for _ in range(400):
        patience.heard(0.01, 0.001)
    assert (patience.first_byte(), patience.inter_token()) == (20.0, 5.0)


def test_nothing_is_learned_where_it_is_not_wanted() -> None:
    patience = Patience(Timeouts(learn=False))
    for _ in range(100):
        patience.heard(0.01, 0.01)
    assert (patience.first_byte(), patience.inter_token()) == (300.0, 60.0)


def test_what_was_only_answered_with_errors_can_be_acquitted() -> None:
    breaker = Breaker(3, 5.0, 4.0)
    for _ in range(3):
        breaker.failed(0.0, answered=True)
    assert (breaker.state(0.1), breaker.doubtful) == ("open", True)
    breaker.judged(0.2, well=True)
    assert (breaker.state(0.2), breaker.allowed(8, 0.2), breaker.doubtful) == ("closed", 8, False)
    for _ in range(10):
        breaker.failed(5.1, answered=True)
    assert breaker.state(5.1) == "closed"
    for _ in range(3):
        breaker.failed(5.3, answered=True)
    assert breaker.state(5.3) == "open"


def test_one_that_broke_off_is_not_the_requests_fault() -> None:
    breaker = Breaker(3, 5.0, 4.0)
    breaker.failed(0.0, answered=True)
    breaker.failed(0.0)
    breaker.failed(0.0, answered=True)
    assert (breaker.state(0.0), breaker.doubtful) == ("open", False)


def test_it_is_judged_once_for_each_time_it_opens() -> None:
    breaker = Breaker(3, 5.0, 4.0)
    for _ in range(3):
        breaker.failed(0.0, answered=True)
    breaker.judged(0.1, well=False)
    assert (breaker.state(0.1), breaker.doubtful) == ("open", False)
    breaker.failed(5.1, answered=True)
    assert (breaker.state(5.1), breaker.doubtful) == ("open", True)


def test_other_dials_count_from_now_on_whatever_it_is_at() -> None:
    breaker = Breaker(3, 5.0, 4.0)
    breaker.change(1, 7.0, 4.0)
    breaker.failed(0.0)
    assert breaker.next_change(4, 0.0) == 7.0
    breaker.change(1, 9.0, 4.0)
    assert breaker.next_change(4, 0.0) == 7.0, "a pause that has begun goes on"
    assert breaker.succeeded(7.0)
    assert breaker.allowed(4, 7.5) == 1
    breaker.change(1, 9.0, 0.0)
    assert (breaker.allowed(4, 7.5), breaker.next_change(4, 7.5)) == (4, None)
    breaker.failed(8.0)
    assert breaker.next_change(4, 8.0) == 9.0
