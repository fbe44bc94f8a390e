"""Sending by intended time, and the two targets: a live server and the model."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.sim.engine import EngineModel
from loadtest import runner
from loadtest.client import Client
from loadtest.experiment import Experiment
from loadtest.records import Row, Run
from loadtest.settings import SETTINGS, setting
from loadtest.stats import summarise
from loadtest.targets import HttpTarget, capacity, simulated
from loadtest.workload import Request, Seeds, Workload, azure
from tests.upstream.autojump import run


def request(i: int, at: float = 0.0) -> Request:
    return Request(f"r{i}", at, "hello", 3, "hi there", 2, app="greeting")


class Stub:
    """A server that answers with two deltas, or as it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, object], str | None]] = []
        self.status = 200
        self.end = b"data: [DONE]\n\n"

    async def chat(self, incoming: web.Request) -> web.StreamResponse:
        self.seen.append((await incoming.json(), incoming.headers.get("X-Elis-App")))
        if self.status != 200:
            return web.json_response({"error": {"message": "no\nroom"}}, status=self.status)
        reply = web.StreamResponse()
        await reply.prepare(incoming)
        await reply.write(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
        await reply.write(b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\ndata: {"choices":[{"delta":{"cont')
        await reply.write(b'ent":" there"}}]}\n\ndata: {"choices":[],"usage":{"completion_tokens":2}}\n\n')
        await reply.write(b': elis {"slices":3,"preemptions":1}\n\n' + self.end)
        return reply


async def replay(stub: Stub, requests: list[Request], **more: Any) -> tuple[list[Row], list[str]]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", stub.chat)
    texts: list[str] = []
    async with TestServer(app) as server, Client(str(server.make_url("/v1"))) as client:
        start = time.perf_counter()
        target = HttpTarget(
            client,
            "m",
            start=start,
            body={"temperature": 0},
            on_text=lambda _, text: texts.append(text),
            debug=True,
            **more,
        )
        done = await runner.run(Workload(tuple(requests)), target, start=start)
    return done.rows, texts


async def test_a_streamed_answer_becomes_a_row() -> None:
    stub = Stub()
    (row,), texts = await replay(stub, [request(0)])
    assert not row.error
    assert row.tokens == 2
    assert row.first is not None
    assert row.end is not None
    assert 0 <= row.sent <= row.first <= row.end
    assert texts == ["hi", " there"]
    assert (row.slices, row.preemptions) == (3, 1)
    ((body, app),) = stub.seen
    assert (body["model"], body["temperature"], body["stream"], app) == ("m", 0, True, "greeting")


async def test_thoughts_are_tokens_and_where_nobody_counts_them_deltas_are_counted() -> None:
    class Thinking(Stub):
        async def chat(self, incoming: web.Request) -> web.StreamResponse:
            reply = web.StreamResponse()
            await reply.prepare(incoming)
            for delta in (b'"role":"assistant"', b'"reasoning_content":"hm"', b'"reasoning":"so"', b'"content":"hi"'):
                await asyncio.sleep(0.02)
                await reply.write(b'data: {"choices":[{"delta":{' + delta + b"}}]}\n\n")
            await reply.write(b"data: [DONE]\n\n")
            return reply

    (row,), texts = await replay(Thinking(), [request(0)], gaps=True)
    assert (row.tokens, len(row.gaps), texts) == (3, 2, ["hi"])
    assert row.first is not None
    assert row.end is not None
    assert row.first + 0.03 < row.end
    run = Run("x", "hash", [row], about={"guessed": 1})
    (fault,) = Experiment({}, "live", ["x"], {0: Workload((request(0),))}, runs=[run]).faults()
    assert "did not count the tokens of 1 answers" in fault


async def test_failures_are_rows_too() -> None:
    stub = Stub()
    stub.status = 503
    told: list[tuple[int, str]] = []
    (row,), _ = await replay(stub, [request(0)], on_refusal=lambda status, words: told.append((status, words)))
    assert row.error == "status 503"
    assert told == [(503, "no room")]
    stub = Stub()
    stub.end = b'data: {"error":{"code":"gone"}}\n\n'
    (row,), _ = await replay(stub, [request(0)])
    assert row.error == "gone"
    stub.end = b""
    (row,), _ = await replay(stub, [request(0)])
    assert row.error == "cut off"


class Silent:
    """Never answers."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, request: Request, row: Row) -> None:
        self.sent.append(request.id)
        await asyncio.Event().wait()


@pytest.mark.usefixtures("on_the_loop_s_clock")
def test_a_stalled_server_does_not_slow_the_sending_and_shows_in_the_rows() -> None:
    async def story() -> None:
        target = Silent()
        ended: list[str] = []
        work = Workload(tuple(request(i, i * 0.01) for i in range(5)))
        start = asyncio.get_running_loop().time()
        done = await runner.run(work, target, start=start, patience=0.2, on_end=lambda asked, _: ended.append(asked.id))
        assert target.sent == [f"r{i}" for i in range(5)]
        assert [row.error for row in done.rows] == ["timeout"] * 5
        assert sorted(ended) == target.sent
        assert done.lag < 0.005

    run(story())


ENGINE = replace(EngineModel.load("default"), slots=4)


def work(seed: int) -> Workload:
    return azure(150, load=0.95, capacity=ENGINE.capacity, seeds=Seeds.all(seed))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_does_the_same_work(name: str) -> None:
    workload = work(0)
    lengths = {r.id: r.tokens for r in workload.requests}
    made = simulated(workload, setting(name), ENGINE, NoisyOracle(lengths, 0.0))
    assert {row.id: row.tokens for row in made.rows} == lengths
    assert not [row for row in made.rows if row.error]


def test_the_published_method_calls_by_windows() -> None:
    workload = work(0)
    oracle = NoisyOracle({r.id: r.tokens for r in workload.requests}, 0.0)
    made = simulated(workload, setting("isrtf-published"), ENGINE, oracle)
    assert [row.slices for row in made.rows] == [-(-request.tokens // 50) for request in workload.requests]


def test_the_gain_vanishes_when_the_estimates_are_dealt_out_at_random() -> None:
    """Break something on purpose: what perfect knowledge gains must come from the knowledge."""

    def mean(shuffled: bool, name: str) -> float:
        total = 0.0
        for seed in range(4):
            workload = work(seed)
            lengths = [r.tokens for r in workload.requests]
            told = lengths[75:] + lengths[:75] if shuffled else lengths
            oracle = NoisyOracle({r.id: t for r, t in zip(workload.requests, told, strict=True)}, 0.0)
            total += summarise(simulated(workload, setting(name), ENGINE, oracle)).mean
        return total

    first_come = mean(False, "fcfs")
    assert mean(False, "sjf") < 0.9 * first_come
    assert mean(True, "sjf") > 0.93 * first_come


def test_without_a_predictor_isrtf_is_first_come() -> None:
    workload = work(1)
    ours, theirs = (simulated(workload, setting(name), ENGINE, None) for name in ("isrtf", "fcfs"))
    assert [row.end for row in ours.rows] == [row.end for row in theirs.rows]


def test_capacity_is_what_full_slots_make() -> None:
    """Without prompts and seams it is slots times rate; with them it is less."""
    free = replace(ENGINE, prefill_tokens_per_second=None, seam_tokens=0.0)
    assert capacity(free, work(0)) == pytest.approx(free.capacity, rel=0.001)
    assert 0.9 * ENGINE.capacity < capacity(ENGINE, work(0)) < 0.999 * ENGINE.capacity
