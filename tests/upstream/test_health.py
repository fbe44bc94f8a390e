"""In service or not: hysteresis, passive failures, pauses; and what the fleet publishes of it."""

from __future__ import annotations

from elis_gateway.config import Health as Settings
from elis_gateway.errors import UpstreamRefused, UpstreamUnavailable
from elis_gateway.upstream.health import Health

RESET = UpstreamUnavailable("reset", cause="reset")
STALL = UpstreamUnavailable("stall", cause="stall")


def up(**settings: float) -> Health:
    health = Health(Settings.model_validate({"down_after": 3, "up_after": 2, **settings}))
    health.probed(True)
    return health


def test_the_first_good_probe_is_enough_and_nothing_less() -> None:
    health = Health(Settings())
    assert not health.in_service(0.0)
    health.probed(False, "connect")
    assert not health.known
    health.probed(True)
    assert health.in_service(0.0)


def test_one_lost_probe_moves_nothing_three_do() -> None:
    health = up()
    health.probed(False, "timeout")
    health.probed(False, "timeout")
    health.probed(True)
    health.probed(False, "timeout")
    health.probed(False, "timeout")
    assert health.in_service(0.0)
    health.probed(False, "timeout")
    assert not health.in_service(0.0)
    assert health.cause == "timeout"


def test_a_reset_takes_it_out_at_once_and_two_good_probes_bring_it_back() -> None:
    health = up()
    health.failed(RESET, 1.0)
    assert not health.in_service(1.0)
    health.probed(True)
    assert not health.in_service(1.0)
    health.probed(False)
    health.probed(True)
    health.probed(True)
    assert health.in_service(1.0)


def test_a_stall_or_a_refusal_of_one_call_is_not_the_upstream_s_death() -> None:
    health = up()
    health.failed(STALL, 1.0)
    health.failed(UpstreamRefused(400, b""), 1.0)
    health.failed(UpstreamRefused(500, b""), 1.0)
    assert health.in_service(1.0)


def test_who_asks_for_a_pause_gets_it() -> None:
    health = up()
    health.failed(UpstreamRefused(429, b"", retry_after=7.0), 10.0)
    assert not health.in_service(16.9)
    assert health.in_service(17.0)
    health.failed(UpstreamRefused(503, b"", retry_after=1e6), 20.0)
    assert health.in_service(80.0)
    health.failed(UpstreamRefused(503, b""), 100.0)
    assert not health.in_service(100.1)
    assert health.in_service(101.0)


def test_it_is_looked_at_soon_after_it_went_down_and_then_less_often() -> None:
    health = up(interval=2.0)
    assert health.next_look(0.0) == 2.0
    health.failed(RESET, 0.0)
    assert [health.next_look(0.0) for _ in range(5)] == [0.25, 0.5, 1.0, 2.0, 2.0]
    health.probed(True)
    health.probed(True)
    health.failed(UpstreamRefused(429, b"", retry_after=0.3), 5.0)
    assert health.next_look(5.0) == 0.3 or abs(health.next_look(5.0) - 0.3) < 1e-9


def test_several_failures_in_a_row_earn_a_pause_though_the_health_page_is_fine() -> None:
    for error in (UpstreamRefused(500, b""), STALL):
        health = up(break_after=3, break_for=5.0, slow_start=0.0)
        for _ in range(2):
            health.failed(error, 10.0)
            assert health.in_service(10.0)
        health.failed(error, 10.0)
        assert not health.in_service(14.9)
        assert health.next_look(14.0) == 1.0
        assert health.allowed(8, 15.1) == 1
        assert health.succeeded(15.2)
        assert health.allowed(8, 15.2) == 8


def test_after_an_absence_it_gets_its_slots_back_slowly() -> None:
    health = up(slow_start=4.0)
    assert health.allowed(4, 0.0) == 4
    health.failed(RESET, 1.0)
    for _ in range(2):
        health.probed(True, now=12.0)
    assert [health.allowed(4, now) for now in (12.0, 13.5, 15.5, 16.0)] == [1, 2, 4, 4]


def test_one_torn_connection_costs_no_slow_start_and_many_count_once() -> None:
    health = up(slow_start=4.0, break_after=3)
    for _ in range(8):
        health.failed(RESET, 1.0)
    for _ in range(2):
        health.probed(True, now=1.5)
    assert health.allowed(4, 1.5) == 4
