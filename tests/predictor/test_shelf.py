"""Who stays in a table that is full."""

from __future__ import annotations

from elis_gateway.predictor.shelf import Shelf


def used(shelf: Shelf[str, list[str]], key: str, times: int = 1) -> None:
    for _ in range(times):
        shelf.use(key, lambda: [key])


def test_strangers_push_out_strangers() -> None:
    shelf: Shelf[str, list[str]] = Shelf(16)
    for number in range(14):
        used(shelf, f"regular {number}", 8)
    for number in range(1000):
        used(shelf, f"stranger {number}")
    assert len(shelf) == 16
    assert all(shelf.get(f"regular {number}") == [f"regular {number}"] for number in range(14))
    assert shelf.get("stranger 999") is not None
    assert shelf.get("stranger 900") is None


def test_while_there_is_room_everybody_stays() -> None:
    shelf: Shelf[str, list[str]] = Shelf(100)
    for number in range(100):
        used(shelf, f"{number}")
    assert len(shelf) == 100
    assert all(shelf.stranger(f"{number}") for number in range(100))


def test_who_comes_back_stays_and_the_least_recently_used_goes() -> None:
    shelf: Shelf[str, list[str]] = Shelf(8)
    for number in range(20):
        used(shelf, f"{number}", 8)
        used(shelf, "0")
    assert len(shelf) == 8
    assert not shelf.stranger("0")
    assert shelf.get("1") is None
    assert shelf.get("19") is not None


def test_what_was_kept_before_a_restart_is_no_stranger() -> None:
    shelf: Shelf[str, list[str]] = Shelf(8)
    shelf.use("kept", list, 500)
    assert not shelf.stranger("kept")
    assert list(shelf) == ["kept"]
    shelf.clear()
    assert not list(shelf)
    assert not len(shelf)
