"""One request for several choices: jobs of their own, one answer."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from elis_gateway.sim.checker import of_whole
from elis_gateway.sim.faults import Fault
from tests.gateway.world import CHAT, COMPLETIONS, paced, payloads, until, world

BODY: dict[str, Any] = {"model": "sim", "max_tokens": 70, "ignore_eos": True}


async def test_choices_are_jobs_and_their_answers_one_document() -> None:
    body = {**BODY, "prompt": ["one", "two"], "n": 2}
    async with world(scheduler={"mode": "fixed"}) as w:
        async with w.post(COMPLETIONS, body, **{"X-Elis-Debug": "1"}) as response:
            assert response.headers["X-Elis-Sliced"] == "ids"
            document = orjson.loads(await response.read())
        assert [choice["index"] for choice in document["choices"]] == [0, 1, 2, 3]
        for prompt, choice in zip(["one", "one", "two", "two"], document["choices"], strict=True):
            single = {**document, "choices": [choice | {"index": 0}]}
            single["usage"] = single["usage"] | {"completion_tokens": 70, "prompt_tokens": 0, "total_tokens": 70}
            assert choice["text"] == (await w.ask(COMPLETIONS, {**BODY, "prompt": prompt})).text
            assert of_whole(orjson.dumps(single)).text == choice["text"]
        assert document["usage"]["completion_tokens"] == 280


async def test_choices_are_streamed_side_by_side() -> None:
    body = {**BODY, "messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with world(scheduler={"mode": "fixed"}) as w:
        async with w.post(CHAT, body) as response:
            events = payloads(await response.read())
        single = await w.ask(CHAT, {**body, "n": 1})
        assert events.pop() == b"[DONE]"
        chunks = [orjson.loads(event) for event in events]
        texts = {0: "", 1: ""}
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"]["content"]
        assert texts == {0: single.text, 1: single.text}
        assert chunks[-1]["usage"]["completion_tokens"] == 140
        assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_one_choice_that_fails_ends_all(stream: bool) -> None:
    async with world() as w:
        w.engine.faults.add(Fault("status", status=400, skip=1, times=9))
        async with w.post(COMPLETIONS, {**BODY, "prompt": ["one", "two"], "stream": stream}) as response:
            data = await response.read()
            assert response.status == 400 or b'"error"' in data
        await until(lambda: not w.gateway.flights)


async def test_a_client_that_leaves_takes_all_its_choices_along() -> None:
    async with world(paced(), slots=4) as w:
        async with w.post(COMPLETIONS, {**BODY, "prompt": "x", "n": 3, "max_tokens": 1500, "stream": True}) as response:
            await response.content.readany()
            assert len(w.gateway.flights) == 3
        await until(lambda: not w.gateway.flights)
        assert not w.gateway.core.jobs
