"""What a seam could break on a real vLLM beside plain answers: stop strings, the end of the context, hanging up."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.asking import MODEL, Shape, ask, client
from tests.engine.gateway import Gateway, gateway
from tests.engine.prompts import Prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

COUNT = Prompt("count", "1, 2, 3, 4, 5, 6,")
PLAN = Prompt("plan", "List five things to pack for a rainy weekend in the mountains.")


@pytest.fixture(scope="module")
def gate(vllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Windows of seven tokens, and calls beyond the slots where the engine orders its queue."""
    scheduler = {"mode": "fixed", "window": 7, "aging": "none", "overcommit": 2}
    upstream = {"url": vllm_url, "slots": 4}
    with gateway(tmp_path_factory.mktemp("gateway"), [upstream], scheduler=scheduler) as running:
        yield running


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        (COUNT, {"stop": ["10, 11"]}),
        (COUNT, {"stop": ["13, 14", "never said"], "extra_body": {"include_stop_str_in_output": True}}),
        (COUNT, {"extra_body": {"stop_token_ids": [41]}}),
        (PLAN, {"stop": "\n2."}),
        (PLAN, {"seed": 7, "extra_body": {"repetition_penalty": 1.2}}),
        (PLAN, {"presence_penalty": 1.5}),
        (PLAN, {"stop": ["umbrella", "Umbrella", "rain"], "max_tokens": 60}),
    ],
    ids=["stop", "stop-kept", "stop-token", "stop-newline", "repetition", "presence", "stop-words"],
)
async def test_parameters_mean_the_same(
    prompt: Prompt, fields: dict[str, Any], shape: Shape, vllm_url: str, gate: Gateway
) -> None:
    async with client(vllm_url) as engine, client(gate.url) as ours:
        await ask(engine, shape, prompt, 1)
        fields = {"max_tokens": 48, **fields}
        reference = await ask(engine, shape, prompt, None, **fields)
        answer = await ask(ours, shape, prompt, None, **fields)
    assert answer == reference


@pytest.mark.parametrize("shape", [Shape.COMPLETIONS, Shape.COMPLETIONS_STREAM])
async def test_an_answer_ends_where_the_context_does(shape: Shape, vllm_url: str, gate: Gateway) -> None:
    prompt = Prompt("long", "rain and snow " * 670)
    async with client(vllm_url) as engine, client(gate.url) as ours:
        await ask(engine, shape, prompt, 1)
        reference = await ask(engine, shape, prompt, 200, extra_body={"ignore_eos": True})
        answer = await ask(ours, shape, prompt, 200, extra_body={"ignore_eos": True})
    assert reference.usage is not None
    assert reference.usage["total_tokens"] == 2048, "not at the end of the context"
    assert answer == reference


def _refusal(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 4000}, {"max_tokens": 0}, {"temperature": -1}, {"prompt": "rain " * 3000}, {"top_p": 2}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_engines_refusals_come_through(wrong: dict[str, Any], stream: bool, vllm_url: str, gate: Gateway) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 20, "stream": stream, **wrong}
    status, reason = _refusal(vllm_url, body)
    assert status == 400
    assert _refusal(gate.url, body) == (status, reason)


def _running(url: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return sum(float(n) for n in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_stops_the_engine(stream: bool, vllm_url: str, gate: Gateway) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 1500, "stream": stream, "ignore_eos": True}
    payload = json.dumps(body).encode()
    host, _, port = gate.url.removeprefix("http://").partition(":")
    _, connection = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.write(head.encode() + payload)
    while not await asyncio.to_thread(_running, vllm_url):
        await asyncio.sleep(0.02)
    connection.close()
    await connection.wait_closed()
    start = time.monotonic()
    # A window may just have ended, so once is not enough.
    idle = 0
    while idle < 5:
        idle = idle + 1 if not await asyncio.to_thread(_running, vllm_url) else 0
        assert time.monotonic() - start < 5, "the engine still works for nobody"
        await asyncio.sleep(0.02)
    assert gate.metric("elis_jobs_live") == 0


def test_ordering_was_found_by_behaviour(gate: Gateway) -> None:
    """The engine of these tests runs with --scheduling-policy priority."""
    with urllib.request.urlopen(f"{gate.admin}/admin/upstreams") as answer:
        shown = json.load(answer)
    assert '"orders_by_priority": true' in json.dumps(shown)
