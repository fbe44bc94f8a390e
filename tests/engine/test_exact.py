"""The same request straight to the engine and through the gateway: the client must not be able to tell.

float32 at temperature 0, four requests at once. Usage is compared whole, cached tokens included: every prompt is asked
once beforehand, so that its blocks are in the engine's prefix cache for both.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.asking import Answer, Shape, ask_all
from tests.engine.gateway import Gateway, gateway
from tests.engine.prompts import PROMPTS, chosen

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

FIXED = {"mode": "fixed", "seam_cost": 0, "aging": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "window-1": FIXED | {"window": 1},
    "window-7": FIXED | {"window": 7},
    "window-50": FIXED | {"window": 50},
    # Two slots, many jobs, and nobody keeps a slot longer than a window while another waits.
    "elastic": {"mode": "elastic", "seam_cost": 0, "window": 7, "policy": "round_robin"},
}
LIMITS = {"window-1": 12, "window-7": 40, "window-50": 70, "elastic": 40}
"""Answer tokens asked for: enough for some seams, few enough for the minutes that CI has."""
SLOTS = {"elastic": 2}


def _git(*argv: str) -> str:
    return subprocess.run(["git", *argv], capture_output=True, text=True, check=False).stdout.strip()


class Record:
    """Every comparison made, for the file named by ``ELIS_ENGINE_RESULTS``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        # Now, not at the end: half an hour later the tree may be another.
        self.commit = _git("rev-parse", "--short", "HEAD") + (
            "+changes" if _git("status", "--porcelain", "-uno") else ""
        )

    def add(self, engine: str, setting: str, shape: Shape, reference: Answer, answer: Answer, prompt: str) -> None:
        self.rows.append(
            {
                "engine": engine,
                "setting": setting,
                "shape": shape.value,
                "prompt": prompt,
                "tokens": (reference.usage or {}).get("completion_tokens"),
                "finish_reason": reference.finish_reason,
                "sliced": answer.sliced,
                "equal": answer == reference,
                "equal_but_cached_tokens": _counted(answer) == _counted(reference),
            }
        )

    def save(self, file: Path) -> None:
        about = {
            "commit": self.commit,
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "comparisons": len(self.rows),
            "equal": sum(row["equal"] for row in self.rows),
            "equal_but_cached_tokens": sum(row["equal_but_cached_tokens"] for row in self.rows),
            "prompts": len({row["prompt"] for row in self.rows}),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n    ".join(json.dumps(row) for row in self.rows)
        head = json.dumps(about, indent=2).rstrip("}\n")
        file.write_text(f'{head},\n  "rows": [\n    {rows}\n  ]\n}}\n')


def differences(reference: dict[str, Answer], answers: dict[str, Answer]) -> list[str]:
    """One line per field that differs: prompt, field, the engine's value, the gateway's."""
    return [
        f"{name}.{field.name}: {getattr(reference[name], field.name)!r} != {getattr(answers[name], field.name)!r}"
        for name in reference
        for field in fields(Answer)
        if field.compare and getattr(reference[name], field.name) != getattr(answers[name], field.name)
    ]


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    rows = Record()
    yield rows
    if (file := os.environ.get("ELIS_ENGINE_RESULTS")) and rows.rows:
        rows.save(Path(file))


@pytest.fixture(scope="module")
def gateways(vllm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Gateway]]:
    with ExitStack() as stack:
        running = {}
        for name, scheduler in SETTINGS.items():
            upstream = {"url": vllm_url, "slots": SLOTS.get(name, 4), "engine_priority": "off"}
            folder = tmp_path_factory.mktemp(name)
            running[name] = stack.enter_context(gateway(folder, [upstream], scheduler=scheduler))
        yield running


@pytest.fixture(scope="module")
def references() -> dict[tuple[Shape, int], dict[str, Answer]]:
    """The engine's own answers, by how they were asked for and their limit; asked for once."""
    return {}


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("setting", SETTINGS)
async def test_answers_are_the_engines_own(
    setting: str,
    shape: Shape,
    vllm_url: str,
    gateways: dict[str, Gateway],
    references: dict[tuple[Shape, int], dict[str, Answer]],
    record: Record,
) -> None:
    prompts, limit, gate = chosen(), LIMITS[setting], gateways[setting]
    if (shape, limit) not in references:
        await ask_all(vllm_url, shape, prompts, 1)
        references[shape, limit] = await ask_all(vllm_url, shape, prompts, limit)
    reference = references[shape, limit]
    before = gate.metric("elis_slices_total"), gate.metric("elis_preemptions_total")
    at_once = len(prompts) if setting == "elastic" else 4
    answers = await ask_all(gate.url, shape, prompts, limit, at_once=at_once)
    slices = gate.metric("elis_slices_total") - before[0]
    preempted = gate.metric("elis_preemptions_total") - before[1]

    for name in reference:
        record.add("vllm", setting, shape, reference[name], answers[name], name)
    if setting == "elastic":
        # An interrupted call never says what it found in the cache.
        reference, answers = _without_cache(reference), _without_cache(answers)
    different = differences(reference, answers)
    assert not different
    assert {answer.sliced for answer in answers.values()} == {"ids"}
    assert slices > len(prompts), "nothing was sliced, so nothing was shown"
    if setting == "elastic":
        assert preempted > len(prompts) / 2, f"only {preempted:.0f} preemptions"


def _counted(answer: Answer) -> Answer:
    """Without what the engine found in its cache."""
    usage = {key: value for key, value in (answer.usage or {}).items() if key != "prompt_tokens_details"}
    return replace(answer, usage=usage)


def _without_cache(answers: dict[str, Answer]) -> dict[str, Answer]:
    return {name: _counted(answer) for name, answer in answers.items()}


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize(("continuation", "sliced"), [("auto", "ids"), ("text", "text")])
async def test_answers_are_llama_cpps_own(
    continuation: str, sliced: str, shape: Shape, llama_url: str, tmp_path: Path, record: Record
) -> None:
    """By ids everything is exact, by text what text and tokens have one to one.

    One at a time: batching changes its arithmetic. Which slot's cache a call finds is its own affair.
    """
    kinds = ("english", "code") if continuation == "text" else ("english", "korean", "chinese", "emoji", "code")
    prompts, limit = [prompt for prompt in PROMPTS[:12] if prompt.name.startswith(kinds)][:6], 60
    upstream = {"url": llama_url, "slots": 4, "continuation": continuation}
    reference = await ask_all(llama_url, shape, prompts, limit, at_once=1)
    with gateway(tmp_path, [upstream], scheduler=FIXED | {"window": 20}) as gate:
        answers = await ask_all(gate.url, shape, prompts, limit, at_once=1)
    for name in reference:
        record.add("llama.cpp", continuation, shape, reference[name], answers[name], name)
    reference, answers = _without_cache(reference), _without_cache(answers)
    different = differences(reference, answers)
    assert not different
    assert {answer.sliced for answer in answers.values()} == {sliced}
