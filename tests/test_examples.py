"""What examples/ shows works: the core as a library, and a policy from outside, in the simulator and live."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elis_gateway import build
from elis_gateway.config import from_mapping
from elis_gateway.errors import ConfigError
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.sim.engine import EngineModel
from loadtest.settings import setting
from loadtest.stats import summarise
from loadtest.targets import simulated
from loadtest.workload import Seeds, azure
from tests.gateway.world import COMPLETIONS, paced, read_until, until, world

EXAMPLES = Path(__file__).parent.parent / "examples"
LONGEST_FIRST = "policy_longest_first:LongestFirst"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("library", "policy_longest_first"):
        sys.modules.pop(name, None)


def test_the_core_as_a_library() -> None:
    from library import main  # type: ignore[import-not-found]

    assert [line.split("s  ", 1)[1] for line in main()] == [
        "run long on engine from token 0",
        "preempt",
        "run short on engine from token 0",
        "short is completed after 0.5 s",
        "run long on engine from token 50",
        "long is completed after 9.0 s",
    ]


def test_an_outside_policy_in_the_simulator() -> None:
    engine = EngineModel.load("default")
    work = azure(500, load=0.95, capacity=engine.capacity, seeds=Seeds())
    oracle = NoisyOracle({request.id: request.tokens for request in work.requests}, sigma=0.0)
    ours, first_come = (
        summarise(simulated(work, setting("fcfs", policy=policy), engine, oracle)).mean
        for policy in (LONGEST_FIRST, "fcfs")
    )
    assert ours > 1.1 * first_come


def test_a_policy_of_an_installed_package_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point in its group, as another distribution would bring it."""
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        f"[elis_gateway.policies]\nlongest = {LONGEST_FIRST}\ngone = no_such:Thing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    section = setting("fcfs", policy="longest")
    assert type(build.policy(section.policy, section.aging)).__name__ == "LongestFirst"
    with pytest.raises(ConfigError, match=r"scheduler\.policy\.kind: 'gone': No module named 'no_such'"):
        build.policy(setting("fcfs", policy="gone").policy, section.aging)


def test_what_is_no_policy_is_told_what_it_lacks() -> None:
    section = setting("fcfs", policy="collections:OrderedDict")
    with pytest.raises(ConfigError, match="OrderedDict is not a policy: it lacks key, needs_estimates, preempts"):
        build.policy(section.policy, section.aging)


async def test_an_outside_policy_is_taken_up_while_serving_as_its_file_says() -> None:
    async with world() as w:
        given = w.gateway.config.model_dump(mode="json", exclude_defaults=True)
        w.gateway._reload = lambda: from_mapping({**given, "scheduler": {"policy": LONGEST_FIRST}})

        async def put(kind: str) -> int:
            async with w.session.put(w.admin + "/admin/policy", json={"kind": kind}) as response:
                return int(response.status)

        assert await put(LONGEST_FIRST) == 400, "code is not named over the network"
        assert "scheduler.policy" in (await w.gateway.reload())["applied"]
        assert w.gateway.policy()["kind"] == LONGEST_FIRST
        assert [await put(kind) for kind in ("fcfs", LONGEST_FIRST)] == [200, 200]
        await w.check(COMPLETIONS, {"model": "sim", "prompt": "any", "max_tokens": 20})


async def test_an_outside_policy_live() -> None:
    """One slot, taken; of those that wait, the one that may be longest goes first."""
    scheduler = {"policy": LONGEST_FIRST, "overcommit": 0}
    async with world(paced(500.0, slots=1), slots=1, scheduler=scheduler, predictor={"kind": "max_tokens"}) as w:

        async def ask(tokens: int) -> None:
            body = {"model": "sim", "prompt": f"{tokens} please", "max_tokens": tokens, "ignore_eos": True}
            await w.ask(COMPLETIONS, body)

        body = {"model": "sim", "prompt": "first", "max_tokens": 60, "ignore_eos": True, "stream": True}
        async with w.post(COMPLETIONS, body) as first, asyncio.TaskGroup() as group:
            await read_until(first, 1)
            for number, tokens in enumerate((10, 30, 20)):
                group.create_task(ask(tokens))
                await until(lambda waiting=number + 1: w.gateway.core.waiting() == waiting)  # type: ignore[misc]
        asked = [call.max_tokens for call in w.engine.log]
        assert asked[1:] == [30, 20, 10]
