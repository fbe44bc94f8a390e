"""The embedded engine going wrong on request, clients that leave, and the server killed and restarted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import orjson
import pytest
from aiohttp import ClientConnectionError, ClientPayloadError, ClientSession

from elis_gateway.sim.engine import EngineModel
from elis_gateway.sim.faults import Fault
from elis_gateway.sim.server import ServerConfig, SimServer, serve
from elis_gateway.tasks import spawn
from tests.gateway.world import until

PATH = "/v1/completions"
STREAM = {"prompt": "x", "max_tokens": 12, "ignore_eos": True, "stream": True, "return_token_ids": True}
LONG = {**STREAM, "max_tokens": 8000}


@pytest.fixture
async def server() -> AsyncIterator[SimServer]:
    async with SimServer(ServerConfig(port=0, delay=False)) as made:
        yield made


@pytest.fixture
async def paced() -> AsyncIterator[SimServer]:
    model = EngineModel(slots=1, decode=((1, 500.0),))
    async with SimServer(
        ServerConfig(port=0, engine=model, max_model_len=10_000, priority="honour", stride=0.005)
    ) as made:
        yield made


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with ClientSession() as made:
        yield made


async def received(session: ClientSession, server: SimServer, body: object, **headers: str) -> tuple[bytes, str]:
    """What arrived, and how it ended."""
    got = b""
    try:
        async with session.post(server.url + PATH, json=body, headers=headers) as response:
            async for data in response.content.iter_any():
                got += data
        return got, "end"
    except ClientPayloadError:
        return got, "cut"
    except ClientConnectionError:
        return got, "reset"


def tokens(data: bytes) -> int:
    return sum(
        len(choice["token_ids"] or ())
        for event in data.split(b"\n\n")
        if event.startswith(b"data: {")
        for choice in orjson.loads(event[6:]).get("choices", ())
    )


def spawn_call(call: Coroutine[Any, Any, tuple[bytes, str]]) -> asyncio.Task[tuple[bytes, str]]:
    return spawn(call, name="client")


# Faults


@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("kind", ["reset", "close"])
async def test_the_connection_dies_after_n_tokens(
    server: SimServer, session: ClientSession, kind: Any, after: int
) -> None:
    server.faults.add(Fault(kind, after=after))
    got, how = await received(session, server, STREAM)
    assert how != "end"
    if kind == "close":
        assert tokens(got) == after
    assert tokens(got) <= after
    assert server.log[0].how == f"fault:{kind}"
    got, how = await received(session, server, STREAM)
    assert (tokens(got), how) == (12, "end"), "the rule was for one call"


async def test_the_stream_ends_early_and_politely(server: SimServer, session: ClientSession) -> None:
    server.faults.add(Fault("end", after=3))
    got, how = await received(session, server, STREAM)
    assert (tokens(got), how, b"[DONE]" in got) == (3, "end", False)


async def test_garbage_and_error_events(server: SimServer, session: ClientSession) -> None:
    server.faults.add(Fault("garbage", after=2))
    assert b"not json" in (await received(session, server, STREAM))[0]
    server.faults.add(Fault("error_event", after=2))
    got, _ = await received(session, server, STREAM)
    assert got.endswith(b"data: [DONE]\n\n")
    assert b'data: {"error":{"message":"the engine failed"' in got


async def test_statuses(server: SimServer, session: ClientSession) -> None:
    server.faults.add(Fault("status", status=429, retry_after=3, times=2))
    for _ in range(2):
        async with session.post(server.url + PATH, json=STREAM) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "3")
    async with session.post(server.url + PATH, json=STREAM, headers={"X-Sim-Fault": '{"kind": "status"}'}) as response:
        assert response.status == 500
        assert (await response.json())["error"]["code"] == 500
    async with session.post(server.url + PATH, json=STREAM) as response:
        assert response.status == 200


async def test_drip(server: SimServer, session: ClientSession) -> None:
    plain, _ = await received(session, server, STREAM)
    got, how = await received(session, server, {**STREAM, "sim_fault": {"kind": "drip", "seconds": 0}})
    assert (tokens(got), how, len(got)) == (12, "end", len(plain))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", [{"kind": "stall", "after": 4}, {"kind": "hang"}])
async def test_stall_and_hang_until_the_client_leaves(
    server: SimServer, session: ClientSession, fault: dict[str, Any], stream: bool
) -> None:
    body = {**STREAM, "stream": stream, "sim_fault": fault}
    waits = spawn_call(received(session, server, body))
    await until(lambda: len(server.log) == 1 and server.log[0].how == f"fault:{fault['kind']}")
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not waits.done()
    waits.cancel()
    await until(lambda: server.log[0].closed is not None)
    assert server.log[0].how == f"fault:{fault['kind']}"


async def test_a_stall_can_end(server: SimServer, session: ClientSession) -> None:
    for stream in (True, False):
        fault = {"kind": "stall", "after": 4, "seconds": 0.001}
        got, how = await received(session, server, {**STREAM, "stream": stream, "sim_fault": fault})
        assert how == "end"
        assert stream is (b"[DONE]" not in got and tokens(got) == 4)


@pytest.mark.parametrize("kind", ["garbage", "end", "error_event", "reset", "close"])
async def test_faults_of_whole_answers(server: SimServer, session: ClientSession, kind: str) -> None:
    got, how = await received(session, server, {**STREAM, "stream": False, "sim_fault": {"kind": kind, "after": 2}})
    if kind in ("reset", "close"):
        assert (got, how) == (b"", "reset")
    elif kind == "error_event":
        assert orjson.loads(got)["error"]["code"] == 500
    else:
        with pytest.raises(orjson.JSONDecodeError):
            orjson.loads(got)


async def test_fault_rules_over_http(server: SimServer, session: ClientSession) -> None:
    url = server.url + "/sim/faults"
    rule = {"kind": "status", "skip": 1, "times": 1, "path": PATH, "model": "sim"}
    async with session.post(url, json=rule) as response:
        assert [rule.items() <= listed.items() for listed in (await response.json())["faults"]] == [True]
    statuses = []
    for _ in range(3):
        async with session.post(server.url + PATH, json=STREAM) as response:
            statuses.append(response.status)
    assert statuses == [200, 500, 200]
    for wrong in ({"kind": "sulk"}, {"kind": "stall", "when": 1}, [1]):
        async with session.post(url, json=wrong) as response:
            assert response.status == 400
        async with session.post(server.url + PATH, json={**STREAM, "sim_fault": wrong}) as response:
            assert response.status == 400
    async with session.post(url, json=rule) as response, session.delete(url) as response:
        assert (await response.json()) == {"faults": []}


def test_a_rule_hits_only_what_it_names() -> None:
    assert Fault("hang").hits("/a", "m")
    assert not Fault("hang", path="/b").hits("/a", "m")
    assert not Fault("hang", model="n").hits("/a", "m")


# Clients that leave


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot_at_once(
    paced: SimServer, session: ClientSession, stream: bool
) -> None:
    """One slot, an endless call in it, one waiting: the first leaves, the second runs."""
    first = spawn_call(received(session, paced, {**LONG, "stream": stream}))
    await until(lambda: paced.sim.pacer.running == 1)
    second = spawn_call(received(session, paced, STREAM))
    await until(lambda: paced.sim.pacer.waiting == 1)
    first.cancel()
    assert await until(lambda: paced.log[0].closed is not None) < 0.1
    record = paced.log[0]
    assert record.closed is not None
    assert record.how == "aborted"
    assert 0 <= record.tokens <= 500 * (record.closed - record.arrival) + 1
    assert tokens((await second)[0]) == 12


async def test_a_waiting_client_that_leaves(paced: SimServer, session: ClientSession) -> None:
    first = spawn_call(received(session, paced, LONG))
    await until(lambda: paced.sim.pacer.running == 1)
    second = spawn_call(received(session, paced, STREAM))
    await until(lambda: paced.sim.pacer.waiting == 1)
    second.cancel()
    await until(lambda: paced.sim.pacer.waiting == 0)
    assert (paced.log[1].how, paced.log[1].tokens) == ("aborted", 0)
    first.cancel()
    await until(lambda: paced.sim.pacer.running == 0)


async def test_the_queue_is_ordered_by_priority(paced: SimServer, session: ClientSession) -> None:
    first = spawn_call(received(session, paced, LONG))
    await until(lambda: paced.sim.pacer.running == 1)
    calls = []
    for count, priority in enumerate((5, -2, 3), 1):
        calls.append(spawn_call(received(session, paced, {**STREAM, "priority": priority})))
        await until(lambda count=count: paced.sim.pacer.waiting == count)
    calls.append(spawn_call(received(session, paced, STREAM, **{"X-Vllm-Priority": "-9"})))
    await until(lambda: paced.sim.pacer.waiting == 4)
    first.cancel()
    await asyncio.gather(*calls)
    order = sorted(list(paced.log)[1:], key=lambda record: record.started or 0)
    assert [record.priority for record in order] == [-9, -2, 3, 5]


async def test_a_full_queue_is_refused(session: ClientSession) -> None:
    model = EngineModel(slots=1, decode=((1, 500.0),))
    async with SimServer(ServerConfig(port=0, engine=model, max_queued=1)) as server:
        first = spawn_call(received(session, server, LONG))
        await until(lambda: server.sim.pacer.running == 1)
        async with session.post(server.url + PATH, json=STREAM) as response:
            assert response.status == 503
            assert (await response.json())["error"]["type"] == "Service Unavailable"
        first.cancel()
        await until(lambda: server.sim.pacer.running == 0)
        assert tokens((await received(session, server, STREAM))[0]) == 12


# Killed


async def test_kill_resets_everyone_and_restart_serves_again(paced: SimServer, session: ClientSession) -> None:
    calls = [spawn_call(received(session, paced, LONG)) for _ in range(3)]
    await until(lambda: paced.sim.pacer.running == 1 and paced.sim.pacer.waiting == 2)
    port = paced.port
    await paced.kill()
    assert {how for _, how in await asyncio.gather(*calls)} <= {"cut", "reset"}
    assert {record.how for record in paced.log} <= {"killed", "aborted"}
    with pytest.raises(ClientConnectionError):
        await session.get(paced.url + "/health")
    await paced.kill()
    await paced.start()
    assert paced.port == port
    assert paced.sim.pacer.running == 0
    assert tokens((await received(session, paced, STREAM))[0]) == 12
    assert len(paced.log) == 4


async def test_a_taken_port_is_an_error(server: SimServer) -> None:
    with pytest.raises(OSError):
        await SimServer(ServerConfig(port=server.port)).start()


async def test_stop_lets_nothing_behind(session: ClientSession) -> None:
    async with SimServer(ServerConfig(port=0, delay=False)) as server:
        await received(session, server, STREAM)
    with pytest.raises(ClientConnectionError):
        await session.get(server.url + "/health")
    await server.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_until_a_signal(session: ClientSession, number: int) -> None:
    urls: asyncio.Queue[str] = asyncio.Queue()
    serving = spawn(serve(ServerConfig(port=0, delay=False), ready=urls.put_nowait), name="serve")
    async with session.get(await urls.get() + "/health") as response:
        assert response.status == 200
    os.kill(os.getpid(), number)
    await serving
