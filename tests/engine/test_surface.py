"""The OpenAI surface, a subset of ``benchmarks.conformance``: the fields of the engine, or its refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.engine.gateway import Gateway, gateway
from tests.engine.surface import CASES, ENDLESS, HALF, PARSED, Case, Reply, ask, bodies, differences

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SUBSET = [case for case in CASES if case.subset]
LLAMA_SUBSET = [case for case in SUBSET if case.name not in ENDLESS]
PARSED_SUBSET = [case for case in PARSED if case.subset]
LIMIT = 14
"""Answer tokens: some seams of three, few enough for the minutes that CI has."""


@pytest.fixture(scope="module")
def gate(vllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    scheduler = {"mode": "fixed", "window": 3, "seam_cost": 0, "aging": "none"}
    upstream = {"url": vllm_url, "slots": 4, "engine_priority": "off"}
    with gateway(tmp_path_factory.mktemp("surface"), [upstream], scheduler=scheduler) as running:
        yield running


async def both(case: Case, engine: str, ours: str, limit: int = LIMIT) -> dict[str, tuple[Reply, Reply]]:
    """Directly and through the gateway, one at a time: what else is in the batch can change ties."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        return {
            name: (await ask(session, engine, path, body), await ask(session, ours, path, body))
            for name, path, body in bodies(case, limit=limit)
        }


@pytest.mark.parametrize("case", SUBSET, ids=lambda case: case.name)
def test_the_gateway_answers_as_the_engine_does(case: Case, vllm_url: str, gate: Gateway) -> None:
    for name, (reference, reply) in asyncio.run(both(case, vllm_url, gate.url)).items():
        assert not differences(reference, reply, cached=False), name
        if case.sliced is None:
            assert reference.status >= 400, f"{name}: the engine takes it"
        elif reference.status == 200:
            assert reply.sliced.startswith("ids" if case.sliced else "no;"), f"{name}: {reply.sliced}"


@pytest.mark.parametrize("case", PARSED_SUBSET, ids=lambda case: case.name)
def test_so_it_does_behind_parsers(case: Case, parsing_vllm_url: str, tmp_path: Path) -> None:
    """Found by probing: nothing is configured. Elastic would do as well; fixed windows cut more."""
    scheduler = {"mode": "fixed", "window": 3, "seam_cost": 0, "aging": "none"}
    upstream = {"url": parsing_vllm_url, "slots": 4, "engine_priority": "off"}
    with gateway(tmp_path, [upstream], scheduler=scheduler) as running:
        replies = asyncio.run(both(case, parsing_vllm_url, running.url))
    for name, (reference, reply) in replies.items():
        assert not differences(reference, reply, cached=False), name
        if case.sliced is not None:
            assert reply.sliced.startswith("ids" if case.sliced else "no;"), f"{name}: {reply.sliced}"


def test_so_it_does_before_llama_cpp(llama_url: str, tmp_path: Path) -> None:
    """In one go, as it starts and answers in seconds. What is sliced there is in docs/compatibility.md."""
    scheduler = {"mode": "fixed", "window": 3, "seam_cost": 0, "aging": "none"}
    different = []
    with gateway(tmp_path, [{"url": llama_url, "slots": 4}], scheduler=scheduler) as running:
        for case in LLAMA_SUBSET:
            # Eight tokens: with a few more some streams end in what may begin a stop string, which it never sends.
            replies = asyncio.run(both(case, llama_url, running.url, 8))
            different += [
                f"{name}: {line}"
                for name, (reference, reply) in replies.items()
                for line in differences(reference, reply, cached=False)
                if name not in HALF
            ]
        assert running.metric("elis_slices_total") > 100
    assert not different
