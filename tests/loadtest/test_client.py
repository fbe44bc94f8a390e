"""The lean client: framing in any split, reuse, and what goes wrong on a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from elis_gateway.errors import ConfigError, UpstreamUnavailable
from elis_gateway.tasks import spawn
from loadtest.client import Client

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnope"
CLOSING = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    made = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with made:
        yield f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}"


def saying(reply: bytes, size: int, requests: list[bytes]) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            for at in range(0, len(reply), size):
                writer.write(reply[at : at + size])
                await writer.drain()
                await asyncio.sleep(0)
            if reply is CLOSING:
                return

    return answer


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("reply", "status", "body"),
    [
        (CHUNKED, 200, b"hello, world"),
        (SIZED, 404, b"nope"),
        (CLOSING, 200, b"to the end"),
        (CONTINUED, 200, b"hello, world"),
    ],
    ids=["chunked", "sized", "closing", "continued"],
)
async def test_any_split_gives_the_same_reply(reply: bytes, status: int, body: bytes, size: int) -> None:
    requests: list[bytes] = []
    async with server(saying(reply, size, requests)) as url, Client(url) as client:
        for _ in range(3):
            parts: list[bytes] = []
            got = await client.exchange(client.request("GET", "/x"), parts.append)
            assert (got.status, b"".join(parts) + got.body) == (status, body)
    assert len(requests) == 3


async def test_a_kept_connection_that_was_closed_is_no_failure() -> None:
    served = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        writer.write(CHUNKED)  # says nothing of closing, and closes

    async with server(answer) as url, Client(url) as client:
        for _ in range(3):
            assert (await client.get("/")).body == b"hello, world"
    assert served == 3


@pytest.mark.parametrize(
    ("reply", "cause"), [(b"", "closed"), (CHUNKED[:60], "closed"), (b"SSH-2.0-x\r\n\r\n", "garbage")]
)
async def test_what_breaks_off_is_said(reply: bytes, cause: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)

    async with server(answer) as url, Client(url) as client:
        with pytest.raises(UpstreamUnavailable) as caught:
            await client.get("/")
    assert caught.value.cause == cause


async def test_nobody_there() -> None:
    async with Client("http://127.0.0.1:9") as client:
        with pytest.raises(UpstreamUnavailable) as caught:
            await client.get("/")
    assert caught.value.cause == "connect"


async def test_a_request_given_up_closes_its_connection() -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()
        closed.set()

    async with server(answer) as url, Client(url) as client:
        asking = spawn(client.get("/"), name="asking")
        async with asyncio.timeout(60):
            await asked.wait()
            asking.cancel()
            await closed.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


def test_what_cannot_be_sent_is_refused() -> None:
    for url in ("localhost:8080", "ftp://x", "http://", "http://h:port"):
        with pytest.raises(ConfigError, match="expected a URL"):
            Client(url)
    client = Client("http://h/prefix/v1", {"A": "b"})
    assert client.request("POST", "/v1/x", b"{}").startswith(b"POST /prefix/v1/x HTTP/1.1\r\nHost: h\r\nA: b\r\n")
    for value in ("two\r\nlines", "ümlaut"):
        with pytest.raises(ConfigError, match="printable ASCII"):
            client.request("GET", "/", headers={"X": value})
