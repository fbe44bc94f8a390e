"""One job's stream: in order, coalesced, ended or broken off, with a reader that may give up."""

from __future__ import annotations

import asyncio

import pytest

from elis_gateway.channel import Channel
from elis_gateway.errors import ShuttingDown
from elis_gateway.tasks import spawn
from tests.upstream.autojump import run


def test_everything_pending_comes_in_one_piece() -> None:
    async def story() -> None:
        channel = Channel()
        channel.put(b"a")
        channel.put(b"b")
        assert channel.pending == 2
        assert await channel.get() == b"ab"
        reading = spawn(channel.get(), name="get")
        await asyncio.sleep(0)
        channel.put(b"c")
        channel.put(b"d")
        assert await reading == b"cd"

    run(story())


def test_the_end_comes_after_the_last_byte_and_stays() -> None:
    async def story() -> None:
        channel = Channel()
        channel.put(b"a")
        assert not channel.exhausted
        channel.close()
        channel.put(b"late")
        assert await channel.get() == b"a"
        assert channel.exhausted
        assert await channel.get() == b""
        assert await channel.get() == b""

    run(story())


def test_an_error_comes_after_the_last_byte_and_the_first_close_counts() -> None:
    async def story() -> None:
        channel = Channel()
        channel.put(b"a")
        channel.close(ShuttingDown("now"))
        channel.close()
        assert await channel.get() == b"a"
        assert not channel.exhausted
        for _ in range(2):
            with pytest.raises(ShuttingDown):
                await channel.get()

    run(story())


def test_a_close_wakes_the_reader_and_a_cancelled_reader_leaves_no_trace() -> None:
    async def story() -> None:
        channel = Channel()
        reading = spawn(channel.get(), name="get")
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        channel.put(b"a")
        assert await channel.get() == b"a"
        reading = spawn(channel.get(), name="get")
        await asyncio.sleep(0)
        channel.close()
        assert await reading == b""

    run(story())


def test_a_sink_takes_bytes_while_nothing_is_pending() -> None:
    async def story() -> None:
        channel, taken, willing = Channel(), [], [True]

        def sink(data: bytes) -> bool:
            if willing[0]:
                taken.append(data)
            return willing[0]

        channel.put(b"1")
        channel.attach(sink)
        channel.put(b"2")
        assert await channel.get() == b"12"
        channel.put(b"3")
        willing[0] = False
        channel.put(b"4")
        willing[0] = True
        channel.put(b"5")
        assert taken == [b"3"]
        assert await channel.get() == b"45"
        channel.put(b"6")
        channel.close(last=b"7")
        assert taken == [b"3", b"6"]
        assert await channel.get() == b"7"
        assert channel.exhausted

    run(story())
