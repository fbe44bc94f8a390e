"""Input that means harm: malformed HTTP by the thousand, half-open connections, bodies that explode.

    python -m benchmarks.hostile [--count 3000] [--seed 1] [--output benchmarks/results/hostile.jsonl]

Every attack goes to the gateway as raw bytes. Allowed are a 4xx, a closed connection, or (where the seeded damage left
a request whole) a proper answer; a 5xx of our own, a hang or a crash is a failure, and so is memory that does not come
back. In between ordinary requests are answered, and the engine never sees a path it was not to see.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import random
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks.chaos import CHAT, COMPLETIONS, Process, engine_config, free_port
from benchmarks.rows import show
from elis_gateway.sim.server import SimServer

GOOD = {"model": "sim", "prompt": "hello", "max_tokens": 3}
HEAD_TIMEOUT = 2.0


def post(body: bytes, *lines: str, path: str = COMPLETIONS, length: bool = True) -> bytes:
    """A request with these header lines beside the usual."""
    fields = ["Host: x", "Content-Type: application/json", *lines]
    if length:
        fields.append(f"Content-Length: {len(body)}")
    return (f"POST {path} HTTP/1.1\r\n" + "\r\n".join(fields) + "\r\n\r\n").encode("utf-8", "surrogateescape") + body


def chunked(body: bytes, *lines: str) -> bytes:
    return post(body, "Transfer-Encoding: chunked", *lines, length=False)


good = orjson.dumps(GOOD)
SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def bad_chunks(pick: random.Random) -> bytes:
    sizes = [b"zz", b"-1", b"0x5", b"5;" + b"a" * 5000, b"ffffffffffffffff", b"1\n", b" 5", b"5\x00", b"", b"+5"]
    return chunked(pick.choice(sizes) + b"\r\nhello\r\n0\r\n\r\n")


def smuggling(pick: random.Random) -> bytes:
    both = f"Content-Length: {pick.choice((0, 3, 400))}"
    encodings = [
        "Transfer-Encoding: chunked", "Transfer-Encoding : chunked", "Transfer-Encoding: xchunked",
        "Transfer-Encoding:\tchunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: identity, chunked", "X: y\r\n Transfer-Encoding: chunked",
        "X: y\rTransfer-Encoding: chunked",
        "Transfer-Encoding\x00: chunked", "Content-Length: 7\r\nContent-Length: 90", "Content-Length: +5",
        "Content-Length: 5, 5", "Content-Length: 0x10", "Content-Length: -1", "Content-Length: 99999999999999999999999",
    ]  # fmt: skip
    return post(b"0\r\n\r\n" + SMUGGLED, both, pick.choice(encodings), length=False)


def odd_heads(pick: random.Random) -> bytes:
    name = bytes(pick.randrange(1, 256) for _ in range(pick.randrange(1, 20)))
    value = bytes(pick.randrange(0, 256) for _ in range(pick.randrange(0, 40)))
    line = name + b": " + value
    return b"POST " + COMPLETIONS.encode() + b" HTTP/1.1\r\nHost: x\r\n" + line + b"\r\nContent-Length: 0\r\n\r\n"


def huge_heads(pick: random.Random) -> bytes:
    kind = pick.randrange(3)
    if kind == 0:
        return b"GET /" + b"a" * pick.randrange(70_000, 300_000) + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    if kind == 1:
        return post(good, "X-Big: " + "a" * pick.randrange(70_000, 300_000))
    return post(good, *(f"X-{n}: {n}" for n in range(pick.randrange(200, 3000))))


def odd_lines(pick: random.Random) -> bytes:
    method = pick.choice(["GET", "get", "G\x00T", "PRI", "CONNECT", "TRACE", "", "A" * 5000, "POST\t", "OPTIONS"])
    target = pick.choice(
        ["*", "/", "//", "/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/..;/metrics", "http://evil/v1/models", "/v1/%00",
         "/v1/%ff%fe", "\\v1\\models", "/v1/models?" + "a=b&" * 3000, "/%76%31/completions", "v1/models", "/v1/x#y"]
    )  # fmt: skip
    version = pick.choice(["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "ICY", "HTTP/1.1 extra", ""])
    return f"{method} {target} {version}\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()


def deep_json(pick: random.Random) -> bytes:
    depth = pick.choice((200, 300, 1000, 1100, 100_000))
    opening, closing = pick.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inside = opening * depth + b"1" + closing * depth
    where = pick.choice((b'{"model": "sim", "prompt": "a", "x": ' + inside + b"}", inside))
    return post(where, path=pick.choice((COMPLETIONS, CHAT, "/v1/embeddings")))


def odd_json(pick: random.Random) -> bytes:
    values: list[Any] = [
        None, True, -1, 0, 1e308, 2**63, 10**30, "", "x", [], {}, [None], {"a": 1}, "\x00", "\ud800", [[1]],
        float("nan"),
    ]  # fmt: skip
    names = [
        "model", "prompt", "messages", "max_tokens", "stream", "stop", "n", "seed", "logprobs", "stream_options",
        "temperature", "tools", "response_format", "logit_bias", "echo", "max_completion_tokens", "best_of", "priority",
    ]  # fmt: skip
    path = pick.choice((COMPLETIONS, CHAT))
    body: dict[str, Any] = dict(GOOD) if path == COMPLETIONS else {"model": "sim", "messages": [], "max_tokens": 3}
    for _ in range(pick.randrange(1, 4)):
        body[pick.choice(names)] = pick.choice(values)
    if path == CHAT and pick.random() < 0.5:
        body["messages"] = pick.choice([[{"role": "user", "content": v}] for v in values] + [[{}], [3], [{"role": 1}]])
    return post(json.dumps(body).encode("utf-8", "surrogatepass"), path=path)


def broken_utf8(pick: random.Random) -> bytes:
    junk = pick.choice((b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\xf5\x80\x80\x80", b"\xe2\x82"))
    return post(b'{"model": "sim", "max_tokens": 3, "prompt": "' + junk + b'"}')


def damaged(pick: random.Random) -> bytes:
    """A good request with bytes flipped, taken out or doubled."""
    data = bytearray(post(good, f"X-Elis-Deadline: {pick.choice(('nan', 'inf', '-1', '1e999', '5'))}"))
    for _ in range(pick.randrange(1, 6)):
        at = pick.randrange(len(data))
        kind = pick.randrange(3)
        if kind == 0:
            data[at] = pick.randrange(256)
        elif kind == 1:
            del data[at]
        else:
            data[at:at] = data[max(at - 8, 0) : at]
    return bytes(data)


def packed(pick: random.Random) -> bytes:
    bomb = b'{"model": "sim", "prompt": "' + b"a" * 200_000_000 + b'"}'
    kind = pick.randrange(4)
    if kind == 0 and "bomb" not in _made:
        _made["bomb"] = gzip.compress(bomb, 9)
    if kind == 0:
        return post(_made["bomb"], "Content-Encoding: gzip")
    if kind == 1:
        return post(gzip.compress(good)[:-6], "Content-Encoding: gzip")
    if kind == 2:
        return post(zlib.compress(good), "Content-Encoding: gzip")
    return post(good, pick.choice(("Content-Encoding: br", "Content-Encoding: nonsense", "Content-Encoding: deflate")))


_made: dict[str, bytes] = {}


def truncated(pick: random.Random) -> bytes:
    whole = post(good)
    return whole[: pick.randrange(1, len(whole))]


def odd_classes(pick: random.Random) -> bytes:
    lines = ["X-Elis-Class: \x01", "X-Elis-Class: none", "X-Elis-App: " + "a" * 30_000, "X-Request-Id: " + "b" * 30_000,
             "Authorization: Bearer \udcff\udcfe", "Authorization: " + "c" * 20_000, "Expect: 100-continue",
             "Expect: x",
             "Connection: close, Content-Length", "Upgrade: websocket\r\nConnection: Upgrade", "X-Elis-Debug: 1",
    ]  # fmt: skip
    return post(good, pick.choice(lines))


ATTACKS: tuple[Callable[[random.Random], bytes], ...] = (
    bad_chunks, smuggling, odd_heads, huge_heads, odd_lines, deep_json, odd_json, broken_utf8, damaged, truncated,
    odd_classes, packed,
)  # fmt: skip


async def attack(port: int, data: bytes, *, within: float = 15.0) -> tuple[str, bytes]:
    """What came back: ``closed``, ``silence`` (nobody ended it), or the status, with the first bytes of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(data)
        with suppress(OSError):
            await asyncio.wait_for(writer.drain(), within)
        while piece := await asyncio.wait_for(reader.read(65536), 0.5 if answer else within):
            answer += piece
    except TimeoutError:
        # A connection that stays open after an answer waits for the next request.
        if not answer:
            return "silence", b""
    except OSError:
        pass
    finally:
        writer.transport.abort()
    if not answer:
        return "closed", b""
    # The last of several: what follows a request that was taken must be refused as well.
    statuses = [line.split(b" ")[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.")]
    worst = max((status.decode() for status in statuses if status != b"100"), default="closed")
    return worst, answer[:600]


async def slow_heads(port: int, count: int) -> tuple[float, int]:
    """So many connections that send their head byte by byte: seconds until all are closed, and how many were not."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def one() -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(HEAD_TIMEOUT * 4 + 10):
                for byte in b"POST /v1/completions HTTP/1.1\r\nX-Slow: " + b"a" * 1000:
                    writer.write(bytes([byte]))
                    try:
                        async with asyncio.timeout(0.2):
                            if not await reader.read(100):
                                return True
                    except TimeoutError:
                        pass
        except (OSError, TimeoutError) as error:
            return isinstance(error, OSError)
        finally:
            writer.transport.abort()
        return False

    closed = await asyncio.gather(*(one() for _ in range(count)))
    return loop.time() - start, count - sum(closed)


async def run(count: int, seed: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = await stack.enter_async_context(SimServer(engine_config(2000.0)))
        settings: dict[str, Any] = {
            "server": {
                "host": "127.0.0.1", "port": free_port(), "head_timeout": HEAD_TIMEOUT, "body_timeout": 3.0,
                "max_body": 4 * 1024 * 1024, "idle_timeout": 5.0,
            },
            "admin": {"port": free_port()},
            "upstreams": [{"name": "engine", "url": engine.url, "slots": 8}],
            "logging": {"level": "warning"},
        }  # fmt: skip
        session = await stack.enter_async_context(aiohttp.ClientSession())
        gateway = Process(settings, folder)
        stack.callback(lambda: gateway.process and gateway.process.kill())
        await gateway.start(session)
        port = settings["server"]["port"]
        pick = random.Random(seed)
        outcomes: dict[str, Counter[str]] = {}
        bad: list[str] = []
        work = [ATTACKS[n % len(ATTACKS)] for n in range(count)]
        held = [gateway.held()]

        async def attacker() -> None:
            while work:
                kind = work.pop()
                data = kind(pick)
                outcome, answer = await attack(port, data)
                outcomes.setdefault(kind.__name__, Counter())[outcome] += 1
                if (outcome.startswith("5") and b"no upstream of this model" not in answer) or outcome == "silence":
                    bad.append(f"{kind.__name__}: {outcome} to {data[:200]!r}: {answer!r}")

        for _ in range(4):
            await asyncio.gather(*(attacker() for _ in range(8)))
        for _ in range(20):
            async with session.post(gateway.url + COMPLETIONS, json=GOOD) as response:
                if response.status != 200:
                    bad.append(f"afterwards an ordinary request got {response.status}")
        seconds, open_still = await slow_heads(port, 300)
        await asyncio.sleep(10.0)
        held.append(gateway.held())
        paths = Counter(record.path for record in engine.log if record.path not in (CHAT, COMPLETIONS))
        log = gateway.log.read_text()
        await gateway.stop()
    return {
        "seed": seed,
        "attacks": count,
        "outcomes": {name: dict(sorted(found.items())) for name, found in sorted(outcomes.items())},
        "bad": bad,
        "slow_heads": {"connections": 300, "seconds_until_closed": round(seconds, 1), "left_open": open_still},
        "paths_the_engine_should_not_have_seen": dict(paths),
        "held_before_and_after": held,
        "bugs_in_the_log": log.count("Traceback"),
        "log_tail": log[-2000:] if "Traceback" in log else "",
        "machine": f"{os.cpu_count()} cores, shared",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append the result to this file of JSON lines")
    given = parser.parse_args()
    result = asyncio.run(run(given.count, given.seed))
    show(result, given.output)
    wrong = result["bad"] or result["bugs_in_the_log"] or result["slow_heads"]["left_open"]
    if wrong or result["paths_the_engine_should_not_have_seen"]:
        sys.exit("not as it should be: see above")


if __name__ == "__main__":
    main()
