"""Writing behind: whoever writes is never stopped, what is written is in order, what is lost is counted."""

from __future__ import annotations

import threading

from elis_gateway.behind import Behind


def test_what_finds_no_room_is_lost_and_counted_and_the_rest_is_in_order() -> None:
    begun, go_on = threading.Event(), threading.Event()
    written: list[tuple[list[int], int]] = []

    def write(batch: list[int], lost: int) -> None:
        begun.set()
        assert go_on.wait(30)
        written.append((batch, lost))

    behind = Behind("test", write, most=10)
    behind.put(0)
    assert begun.wait(30)
    for number in range(1, 16):
        behind.put(number)
    assert not behind.flush(0.0)
    go_on.set()
    assert behind.flush(30)
    assert written == [([0], 0), ([*range(1, 11)], 5)]
    assert behind.close(30)


def test_closing_does_not_wait_for_ever() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def write(batch: list[int], lost: int) -> None:
        begun.set()
        assert go_on.wait(30)

    behind = Behind("test", write, most=1)
    behind.put(0)
    assert begun.wait(30)
    behind.put(1)
    assert not behind.close(0.01)
    go_on.set()
    assert behind.flush(30)
    assert behind.close(30)
