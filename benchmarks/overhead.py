"""What the gateway costs: the same requests straight to a stub engine, through a bare aiohttp proxy, and through it.

    python benchmarks/overhead.py [--repeats 5] [--seconds 2] [--json FILE] [--with keys,limits,fair,tracing]

Stub, bare proxy, gateway and load generator are one process each, all on uvloop. The three ways are interleaved within
every repeat (A B C C B A), so that a machine that drifts drifts for all; figures are medians over repeats, with their
range. The gateway runs with elastic windows and as many slots as clients, so nobody waits, and the script asserts
``X-Elis-Sliced: ids``: every token is parsed and accounted for. The stub sends prepared bytes, one network write per
token (``stepped``, as an engine does) or an answer's tokens at once (``burst``, the worst case for whoever parses).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, cast

import aiohttp
import orjson
import uvloop
from aiohttp import web

from elis_gateway.access import hashed

WAYS = ("direct", "bare", "gateway")
PACED = (200, 50)
"""Clients at 20 ms a token. 200 are 10,000 chunks a second through stub, proxy and client: on two cores that is where
the bare proxy itself falls behind. 50 are a load that everybody keeps up with."""
MODEL = "stub"
KEY = "elis-a-key-of-the-overhead-benchmark"
FEATURES: dict[str, dict[str, Any]] = {
    "keys": {"auth": {"keys": [{"name": "bench", "hash": hashed(KEY)}]}},
    "limits": {
        "limits": {
            "per_key": {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "concurrent": 10**6},
            "classes": {"default": 10**6},
        }
    },
    "fair": {"scheduler": {"mode": "elastic", "fair": True}},
    # Nobody listens there: what leaves the process, and whether it arrives, is a thread's business.
    "tracing": {"tracing": {"enabled": True, "endpoint": "http://127.0.0.1:9"}},
}
"""What may be switched on: sections of the gateway's configuration. Metrics cannot be switched off."""

# --- the stub engine -------------------------------------------------------------------------------------------------

_HEAD_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_DONE = b"data: [DONE]\n\n"


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(event), event)


@lru_cache(maxsize=64)
def _events(count: int, ids: bool) -> list[bytes]:
    """An answer of ``count`` tokens as vLLM would stream it, each event framed as one chunk."""
    events = []
    for n in range(count):
        choice: dict[str, Any] = {
            "index": 0,
            "text": f" word{n % 10}",
            "logprobs": None,
            "finish_reason": "length" if n == count - 1 else None,
            "stop_reason": None,
            "prompt_token_ids": [1, 2, 3] if ids and n == 0 else None,
            "token_ids": [100 + n % 10] if ids else None,
        }
        chunk = {
            "id": "cmpl-stub", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice],
        }  # fmt: skip
        events.append(_framed(b"data: " + orjson.dumps(chunk) + b"\n\n"))
    return [*events, _framed(_DONE) + b"0\r\n\r\n"]


def _unary(count: int, prompt: Any, ids: bool) -> bytes:
    tokens = [100 + n % 10 for n in range(count)]
    prompt_ids = prompt if isinstance(prompt, list) else [1, 2, 3]
    choice = {
        "index": 0,
        "text": "".join(f" word{n % 10}" for n in range(count)),
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": tokens if ids else None,
        "prompt_token_ids": prompt_ids if ids else None,
    }
    usage = {"prompt_tokens": 3, "total_tokens": 3 + count, "completion_tokens": count}
    body = {
        "id": "cmpl-stub", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice],
        "usage": usage,
    }  # fmt: skip
    return orjson.dumps(body)


class Stub(asyncio.Protocol):
    """HTTP/1.1 by hand: it must cost next to nothing beside what is measured."""

    step: float | None = 0.0
    """Seconds per token; None: everything in one write."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.buffer = b""
        self.loop = asyncio.get_running_loop()
        self.timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            length = int(found[1]) if found else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head.split(b" ", 2)[1].decode(), body)

    def answer(self, path: str, body: bytes) -> None:
        if path == "/v1/completions":
            request = orjson.loads(body)
            count, ids = request.get("max_tokens", 16), bool(request.get("return_token_ids"))
            if not request.get("stream"):
                self.whole(_unary(count, request["prompt"], ids))
                return
            events = _events(count, ids)
            if Stub.step is None:
                self.transport.write(_HEAD_STREAM + b"".join(events))
                return
            self.transport.write(_HEAD_STREAM)
            # The engine's first step takes as long as the others.
            self.later(events, 0)
        elif path.startswith("/stub/step/"):
            value = path.rpartition("/")[2]
            Stub.step = None if value == "burst" else float(value)
            self.whole(b"{}")
        elif path == "/v1/models":
            self.whole(orjson.dumps({"object": "list", "data": [{"id": MODEL, "max_model_len": 4096}]}))
        else:
            self.whole(b"{}")

    def later(self, events: list[bytes], n: int) -> None:
        if Stub.step:
            self.timer = self.loop.call_later(Stub.step, self.send, events, n)
        else:
            self.timer = self.loop.call_soon(self.send, events, n)

    def send(self, events: list[bytes], n: int) -> None:
        if n == len(events) - 2:
            # The last token and the goodbye come together, as they do from an engine.
            self.transport.write(events[n] + events[n + 1])
            return
        self.transport.write(events[n])
        self.later(events, n + 1)

    def whole(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


async def run_stub(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


# --- the bare proxy --------------------------------------------------------------------------------------------------


async def run_bare(port: int, upstream: str) -> None:
    """As little as passing on takes with aiohttp: no router, no access log, no parsing."""
    client = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
    )
    dropped = {"host", "content-length", "transfer-encoding", "connection"}

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in dropped}
        async with client.request(request.method, upstream + request.path_qs, data=body, headers=headers) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in dropped}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    runner = web.ServerRunner(web.Server(handler, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


# --- the load generator ----------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection that sends a request, waits for the whole answer, and sends the next; nothing is decoded."""

    def __init__(self, request: bytes, wants: Callable[[Client], bool]) -> None:
        self.request = request
        self.wants = wants
        self.clock = time.perf_counter
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.chunks = 0
        self.transport: asyncio.Transport
        self.parts: list[bytes] = []
        self.sent = self.heard = 0.0
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.send()

    def send(self) -> None:
        self.tail = b""
        self.sent = self.clock()
        self.heard = 0.0
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = self.clock()
        events = data.count(b"data: {")
        if events:
            if self.heard:
                self.gaps.append(now - self.heard)
                # Tokens that came together were felt as one gap and then none.
                self.gaps.extend([0.0] * (events - 1))
            else:
                self.firsts.append(now - self.sent)
            self.heard = now
            self.chunks += events
        if self.ended(data):
            self.latencies.append(now - self.sent)
            if self.wants(self):
                self.send()
            else:
                self.transport.close()

    def ended(self, data: bytes) -> bool:
        window = self.tail + data
        if b"\r\nContent-Length: " in window or b"\r\ncontent-length: " in window:
            found = re.search(rb"\r\n[Cc]ontent-[Ll]ength: (\d+).*?\r\n\r\n", window, re.DOTALL)
            self.tail = window
            return found is not None and len(window) >= found.end() + int(found[1])
        # Only as much of the past as the end of the body could need.
        self.tail = window[-512:] if b"\r\n\r\n" not in self.tail[:64] else window[-8:]
        return window.endswith(b"0\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def request_bytes(tokens: int, *, stream: bool) -> bytes:
    body = orjson.dumps(
        {"model": MODEL, "prompt": "Say a few words.", "max_tokens": tokens, "temperature": 0, "stream": stream}
    )
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Load:
    """What ``clients`` connections got out of one way in about ``seconds``."""

    def __init__(self, clients: list[Client], elapsed: float) -> None:
        self.latencies = sorted(x for c in clients for x in c.latencies)
        self.firsts = sorted(x for c in clients for x in c.firsts)
        self.gaps = sorted(x for c in clients for x in c.gaps)
        self.requests = len(self.latencies) / elapsed
        self.chunks = sum(c.chunks for c in clients) / elapsed


async def load(port: int, clients: int, seconds: float, request: bytes, *, over: float = 0.0) -> Load:
    """``over``: seconds over which the clients' first requests are spread evenly."""
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    end = start + seconds

    def wants(client: Client) -> bool:
        return time.perf_counter() < end

    made = [Client(request, wants) for _ in range(clients)]
    for n, client in enumerate(made):
        if over:
            await asyncio.sleep(max(start + over * n / clients - time.perf_counter(), 0))
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.wait_for(asyncio.gather(*(c.done for c in made)), seconds * 4 + 60)
    return Load(made, time.perf_counter() - start)


def quantile(values: list[float], q: float) -> float:
    return values[min(int(q * len(values)), len(values) - 1)] if values else float("nan")


# --- one run ---------------------------------------------------------------------------------------------------------

Figures = dict[str, list[float]]


def get(port: int, path: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
        connection.settimeout(5)
        return connection.recv(65536)


def assert_sliced(port: int, tokens: int, *, stream: bool) -> None:
    """The gateway really slices these requests: by token ids."""
    request = request_bytes(tokens, stream=stream).replace(
        b"\r\n\r\n", b"\r\nX-Elis-Debug: 1\r\nConnection: close\r\n\r\n", 1
    )
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    found = re.search(rb"\r\nX-Elis-Sliced: ([^\r]*)", answer, re.IGNORECASE)
    if not answer.startswith(b"HTTP/1.1 200") or found is None or found[1] != b"ids":
        raise SystemExit(f"the gateway did not slice by ids: {answer[:500]!r}")


async def one_repeat(ports: dict[str, int], seconds: float, figures: dict[str, Figures]) -> None:
    there_and_back = [*WAYS, *reversed(WAYS)]

    def note(name: str, way: str, value: float) -> None:
        figures.setdefault(name, {}).setdefault(way, []).append(value)

    unary = request_bytes(16, stream=False)
    for way in there_and_back:
        got = await load(ports[way], 1, seconds, unary)
        note("p50 latency, 1 client, ms", way, quantile(got.latencies, 0.5) * 1e3)
    for way in there_and_back:
        note("requests/s, 64 clients", way, (await load(ports[way], 64, seconds, unary)).requests)
    streamed = request_bytes(128, stream=True)
    for step, name in (("0", "stepped"), ("burst", "burst")):
        get(ports["direct"], f"/stub/step/{step}")
        for way in there_and_back:
            note(f"chunks/s, 32 clients, {name}", way, (await load(ports[way], 32, seconds, streamed)).chunks)
    get(ports["direct"], "/stub/step/0.02")
    paced = request_bytes(64, stream=True)
    for clients in PACED:
        for way in there_and_back:
            # Spread over one answer's length, as clients are: 200 that begin in the same millisecond measure the burst.
            got = await load(ports[way], clients, max(seconds, 2.0) + 1.28, paced, over=1.28)
            note(f"TTFT p99, {clients} clients, ms", way, quantile(got.firsts, 0.99) * 1e3)
            note(f"ITL p50, {clients} clients, ms", way, quantile(got.gaps, 0.5) * 1e3)
            note(f"ITL p99, {clients} clients, ms", way, quantile(got.gaps, 0.99) * 1e3)
    get(ports["direct"], "/stub/step/0")


# --- processes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(port: int, path: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if b" 200 " in get(port, path)[:20]:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"nothing answers on port {port}")


@contextmanager
def processes(level: str, features: Sequence[str]) -> Iterator[dict[str, int]]:
    ports = {way: free_port() for way in WAYS}
    me = [sys.executable, __file__]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "server": {"host": "127.0.0.1", "port": ports["gateway"]},
            "admin": {"port": free_port()},
            "upstreams": [{"url": f"http://127.0.0.1:{ports['direct']}", "slots": 256}],
            "scheduler": {"mode": "elastic"},
            "logging": {"level": level},
        }
        for feature in features:
            settings |= FEATURES[feature]
        path = Path(folder) / "gateway.json"
        path.write_text(json.dumps(settings))
        commands = [
            [*me, "--role", "stub", "--port", str(ports["direct"])],
            [*me, "--role", "bare", "--port", str(ports["bare"]), "--upstream", f"http://127.0.0.1:{ports['direct']}"],
            [sys.executable, "-m", "elis_gateway", "serve", str(path)],
        ]
        log = (Path(folder) / "log").open("wb")
        running: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                running.append(subprocess.Popen(command, stderr=log))
                if len(running) == 1:
                    wait_for(ports["direct"], "/health")
            wait_for(ports["bare"], "/health")
            wait_for(ports["gateway"], "/ready")
            yield ports
        except SystemExit:
            sys.stderr.write((Path(folder) / "log").read_text(errors="replace"))
            raise
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(10)
            log.close()


# --- report ----------------------------------------------------------------------------------------------------------


def verdicts(figures: dict[str, Figures]) -> list[tuple[str, float, str, bool]]:
    def mid(name: str, way: str) -> float:
        return median(figures[name][way])

    latency = "p50 latency, 1 client, ms"
    added = {way: mid(latency, way) - mid(latency, "direct") for way in ("bare", "gateway")}
    rows = [("added p50 latency, gateway / bare", added["gateway"] / added["bare"], "<= 2.5")]
    for name, least in (
        ("requests/s, 64 clients", 0.5),
        ("chunks/s, 32 clients, stepped", 0.4),
        ("chunks/s, 32 clients, burst", 0.4),
    ):
        rows.append((f"{name}, gateway / bare", mid(name, "gateway") / mid(name, "bare"), f">= {least}"))
    for clients in PACED:
        itl = f"ITL p99, {clients} clients, ms"
        rows.append((f"{itl}, gateway - bare", mid(itl, "gateway") - mid(itl, "bare"), "<= 1.0"))
    found = []
    for name, value, target in rows:
        sign, limit = target.split()
        found.append((name, value, target, value <= float(limit) if sign == "<=" else value >= float(limit)))
    return found


def report(figures: dict[str, Figures]) -> None:
    print(f"\n{'':34}" + "".join(f"{way:>26}" for way in WAYS))
    for name, ways in figures.items():
        cells = [f"{median(v):,.3g}  ({min(v):,.3g} - {max(v):,.3g})" for v in (ways[w] for w in WAYS)]
        print(f"{name:34}" + "".join(f"{cell:>26}" for cell in cells))
    print()
    for name, value, target, met in verdicts(figures):
        print(f"{name:46} {value:8.3f}   target {target:7}  {'met' if met else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each single measurement")
    parser.add_argument("--json", type=Path, help="write figures and verdicts there")
    parser.add_argument("--log-level", default="info", help="the gateway's (its default writes a line per job)")
    parser.add_argument(
        "--with", dest="features", default="", help=f"switched on in the gateway: some of {', '.join(FEATURES)}"
    )
    parser.add_argument("--role", choices=("stub", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "stub":
        uvloop.run(run_stub(given.port))
        return
    if given.role == "bare":
        uvloop.run(run_bare(given.port, given.upstream))
        return
    figures: dict[str, Figures] = {}
    print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
          f"aiohttp {aiohttp.__version__}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    features = [name for name in given.features.split(",") if name]
    with processes(given.log_level, features) as ports:
        assert_sliced(ports["gateway"], 16, stream=False)
        assert_sliced(ports["gateway"], 128, stream=True)
        for n in range(given.repeats):
            uvloop.run(one_repeat(ports, given.seconds, figures))
            print(f"repeat {n + 1} of {given.repeats} done", flush=True)
    report(figures)
    if given.json is not None:
        rows = [{"name": n, "value": v, "target": t, "met": m} for n, v, t, m in verdicts(figures)]
        given.json.write_text(json.dumps({"figures": figures, "verdicts": rows, "with": features}, indent=1))


if __name__ == "__main__":
    main()
