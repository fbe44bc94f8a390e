"""The event stream: every split of the bytes gives the same payloads."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.errors import UpstreamUnavailable
from elis_gateway.wire.sse import DONE, DONE_EVENT, EventDecoder, comment, encode

STREAM = (
    b"\xef\xbb\xbf: a comment\n\n"
    b'data: {"text": "caf\xc3\xa9"}\n\n'
    b"data:no space\r\n\r\n"
    b"event: x\nid: 7\nretry: 5\ndata: first\ndata: second\n\n"
    b"data:  two spaces\r\r"
    b"data\n\n"
    b"\n\n: only a comment\n\n"
    b"data: [DONE]\n\n"
    b"data: cut off"
)
PAYLOADS = ['{"text": "café"}'.encode(), b"no space", b"first\nsecond", b" two spaces", b"", DONE]


def feed(pieces: list[bytes]) -> list[bytes]:
    decoder = EventDecoder()
    return [payload for piece in pieces for payload in decoder.feed(piece)]


def test_the_whole_at_once() -> None:
    assert feed([STREAM]) == PAYLOADS


def test_every_split_in_two_and_byte_by_byte() -> None:
    for at in range(len(STREAM) + 1):
        assert feed([STREAM[:at], STREAM[at:]]) == PAYLOADS, at
    assert feed([STREAM[i : i + 1] for i in range(len(STREAM))]) == PAYLOADS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8).map(sorted))
def test_any_split(cuts: list[int]) -> None:
    edges = [0, *cuts, len(STREAM)]
    assert feed([STREAM[a:b] for a, b in pairwise(edges)]) == PAYLOADS


@given(
    st.lists(st.sampled_from([b"data: a\n\n", b"data: a\r\n\r\n", b"\n", b"\r", b": c\n\n", b"data:b\n", b"x: y\n"]))
)
def test_the_short_way_agrees_with_the_long_one(pieces: list[bytes]) -> None:
    stream = b"".join(pieces)
    assert feed(pieces) == feed([stream]) == feed([stream[i : i + 1] for i in range(len(stream))])


@given(st.lists(st.binary(max_size=40), max_size=10))
@settings(max_examples=300)
def test_no_bytes_break_it(pieces: list[bytes]) -> None:
    for payload in feed(pieces):
        assert b"\r" not in payload


@pytest.mark.parametrize("piece", [b"data: 0123456789", b"data: 0123456789\n"])
def test_an_endless_event_is_garbage(piece: bytes) -> None:
    decoder = EventDecoder(limit=100)
    with pytest.raises(UpstreamUnavailable) as caught:
        feed_forever(decoder, piece)
    assert caught.value.cause == "garbage"


def feed_forever(decoder: EventDecoder, piece: bytes) -> None:
    for _ in range(20):
        decoder.feed(piece)


def test_encoding() -> None:
    assert encode(b"{}") == b"data: {}\n\n"
    assert feed([encode(b"{}") + DONE_EVENT]) == [b"{}", DONE]
    assert comment("queued 3 s\nand more") == b": queued 3 s\n: and more\n\n"
    assert feed([comment("nothing to see"), comment("")]) == []


@pytest.mark.timeout(60)
def test_an_event_in_very_many_pieces_costs_no_more_than_its_length() -> None:
    """Copying what is kept with every piece would be a hundred gigabytes."""
    event = b"data: " + b"x" * (2 << 20) + b"\n\n"
    decoder = EventDecoder()
    got = [payload for at in range(0, len(event), 16) for payload in decoder.feed(event[at : at + 16])]
    assert [len(payload) for payload in got] == [2 << 20]
    assert decoder.feed(b"data: y\n\n") == [b"y"]


@pytest.mark.timeout(60)
def test_an_endless_stream_of_nothing_is_not_kept() -> None:
    decoder = EventDecoder(limit=1000)
    for _ in range(10_000):
        assert decoder.feed(b": comment\n\nid: 3\n") == []
