"""Does a sliced answer have the distribution of an unsliced one? Sampled on a real vLLM, directly and in windows.

    python -m benchmarks.sampling --answers 900 --output benchmarks/results/sampling-vllm.json

Temperature 1, no seed, plain text. Of every answer the token right after the seam of windows of two tokens is counted;
two-sample chi-square over the commonest tokens and the rest (Bonferroni where positions are several). Direct, sliced
and control answers are drawn in turns, until there are enough of each or the time is up.
Power: the probability that the test finds a shift of effect size w = 0.2 (Cohen's small to medium) at the level used.
As a control the same test compares the engine with itself at temperature 1.3, and has to find that.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import click

from benchmarks import vllm_engine
from tests.engine.asking import MODEL
from tests.engine.gateway import gateway

PROMPT = "The best thing about travelling by train is"
POSITIONS = (2,)
TOKENS = 3
SLOTS = 16
"""Answers at once: their draws are their own, whatever the batch."""
CATEGORIES = 4
BLOCK = 80
ALPHA = 0.05


async def sample(url: str, answers: int, temperature: float = 1.0) -> list[list[int]]:
    """Token ids of so many answers."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": temperature}
    body |= {"return_token_ids": True, "ignore_eos": True}
    gate = asyncio.Semaphore(SLOTS)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one() -> list[int]:
            async with gate, session.post(f"{url}/v1/completions", json=body) as response:
                document: dict[str, Any] = await response.json()
                ids: list[int] = document["choices"][0]["token_ids"]
                return ids

        return await asyncio.gather(*(one() for _ in range(answers)))


def chi_square(one: list[int], other: list[int]) -> tuple[float, int]:
    """Statistic and degrees of freedom of the test that two samples have one distribution."""
    common = [token for token, _ in Counter(one + other).most_common(CATEGORIES)]
    statistic, used = 0.0, 0
    for category in [*common, None]:
        seen = [sum(t == category if category is not None else t not in common for t in s) for s in (one, other)]
        if not sum(seen):
            continue
        used += 1
        for count, size in zip(seen, (len(one), len(other)), strict=True):
            expected = sum(seen) * size / (len(one) + len(other))
            statistic += (count - expected) ** 2 / expected
    return statistic, used - 1


def tail(statistic: float, freedom: int) -> float:
    """Probability of a chi-square variable above ``statistic`` (series of the incomplete gamma function)."""
    a, x = freedom / 2, statistic / 2
    term = total = 1 / a
    for n in range(1, 2000):
        term *= x / (a + n)
        total += term
        if term < total * 1e-15:
            break
    return max(0.0, 1 - total * math.exp(-x + a * math.log(x) - math.lgamma(a))) if x > 0 else 1.0


def power(freedom: int, size: int, effect: float, alpha: float, rounds: int = 20000) -> float:
    """Probability to find a shift of ``effect`` (Cohen's w) between two samples of ``size``, by simulation."""
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > alpha else (low, middle)
    shift = math.sqrt(size / 2) * effect
    draw = random.Random(1)
    found = 0
    for _ in range(rounds):
        value = (draw.gauss(shift, 1)) ** 2 + sum(draw.gauss(0, 1) ** 2 for _ in range(freedom - 1))
        found += value > high
    return found / rounds


def compare(one: list[list[int]], other: list[list[int]]) -> list[dict[str, Any]]:
    rows = []
    for position in POSITIONS:
        statistic, freedom = chi_square([ids[position] for ids in one], [ids[position] for ids in other])
        rows.append(
            {
                "position": position,
                "chi_square": round(statistic, 2),
                "degrees_of_freedom": freedom,
                "p": round(tail(statistic, freedom), 5),
                "power_at_0.2": round(power(freedom, len(one), 0.2, ALPHA / len(POSITIONS)), 3),
            }
        )
    return rows


@click.command()
@click.option("--answers", default=900, show_default=True)
@click.option("--budget", default=400.0, show_default=True, help="Seconds after which no further block is begun.")
@click.option("--url", help="An engine that runs already.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path))
def main(answers: int, budget: float, url: str | None, output: Path | None) -> None:
    """Sample, test, store."""
    with ExitStack() as stack:
        if url is None:
            url = stack.enter_context(vllm_engine.vllm(slots=SLOTS, say=click.echo))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scheduler = {"mode": "fixed", "window": 2, "seam_cost": 0, "aging": "none"}
        upstream = {"url": url, "slots": SLOTS, "engine_priority": "off"}
        gate = stack.enter_context(gateway(folder, [upstream], scheduler=scheduler))
        start = time.monotonic()
        sliced, direct, warm = [], [], []
        while len(warm) < answers and time.monotonic() - start < budget:
            direct += asyncio.run(sample(url, BLOCK))
            sliced += asyncio.run(sample(gate.url, BLOCK))
            warm += asyncio.run(sample(url, BLOCK, 1.3))
            click.echo(f"{len(warm)} answers of each after {time.monotonic() - start:.0f} s")
        slices = gate.metric("elis_slices_total")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "engine": f"vLLM {vllm_engine.VERSION}, CPU, float32, SmolLM2-135M",
        "answers of each": len(warm),
        "slices": slices,
        "level": f"{ALPHA} over {len(POSITIONS)} positions",
        "sliced_against_direct": compare(sliced, direct),
        "control_temperature_1.3_against_direct": compare(warm, direct),
    }
    click.echo(json.dumps(result, indent=2))
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
