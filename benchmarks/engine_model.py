"""Measure a running engine and write it down as a model for the embedded engine and the simulator.

    python -m benchmarks.engine_model vllm-cpu http://127.0.0.1:8000 --model smollm2 --slots 4 --block 32

Rates come from forced lengths (``ignore_eos``). A seam is a pair: 200 tokens in one call, and the same in four calls
that continue by token ids, alone and in step with the other slots. Rounds interleave everything; of each quantity the
best round counts, because on a shared machine disturbance only ever adds time. What a continuation computes again of
its prompt (the engine's own ``cached_tokens``) is charged at the prefill rate; the rest is the seam.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click

from elis_gateway.sim.model import MODELS, EngineModel

WHOLE, SLICES = 200, 4
SHORT, LONG = 64, 1088
"""Prompt lengths whose difference in time to first token gives the prefill rate."""


@dataclass
class Timing:
    """One call: seconds on the loop's clock."""

    start: float
    arrivals: list[float] = field(default_factory=list)
    """One entry per token."""
    ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached: int = 0


class Engine:
    """A server under measurement."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._model = model

    async def call(self, prompt: Sequence[int], tokens: int) -> Timing:
        """One streamed completion of exactly this many tokens."""
        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
            # vLLM's way of giving ids, and llama.cpp's.
            "return_token_ids": True, "logprobs": 1,
        }  # fmt: skip
        timing = Timing(time.monotonic())
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _read(json.loads(line[6:]), timing)
        return timing


def _read(chunk: dict[str, Any], timing: Timing) -> None:
    if usage := chunk.get("usage"):
        timing.prompt_tokens = usage["prompt_tokens"]
        timing.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in chunk["choices"]:
        scored = (choice.get("logprobs") or {}).get("content") or []
        ids = choice.get("token_ids") or [entry["id"] for entry in scored]
        timing.ids.extend(ids)
        timing.arrivals.extend([time.monotonic()] * len(ids))


def _prompt(length: int = 24) -> list[int]:
    """Tokens that no cache knows."""
    return [random.randrange(1000, 30000) for _ in range(length)]


async def decode_rate(engine: Engine, batch: int) -> float:
    """Tokens per second of each sequence, while all of them decode."""
    calls = await asyncio.gather(*(engine.call(_prompt(), 96) for _ in range(batch)))
    begin = max(call.arrivals[0] for call in calls)
    end = min(call.arrivals[-1] for call in calls)
    made = sum(sum(begin < at <= end for at in call.arrivals) for call in calls)
    return made / (end - begin) / batch


async def first_token(engine: Engine, length: int) -> float:
    """Seconds to the first token."""
    call = await engine.call(_prompt(length), 1)
    return call.arrivals[-1] - call.start


async def seams(engine: Engine, prompt: list[int], slices: int) -> tuple[float, int]:
    """Seconds for WHOLE tokens in so many calls, and prompt tokens computed by the continuations."""
    start, computed = time.monotonic(), 0
    known = list(prompt)
    for number in range(slices):
        call = await engine.call(known, WHOLE // slices)
        known += call.ids
        if number:
            computed += call.prompt_tokens - call.cached
    return time.monotonic() - start, computed


async def in_step(engine: Engine, batch: int, slices: int) -> tuple[float, float]:
    """The same in ``batch`` sequences at once; mean seconds and mean prompt tokens computed again."""
    done = await asyncio.gather(*(seams(engine, _prompt(), slices) for _ in range(batch)))
    return sum(seconds for seconds, _ in done) / batch, sum(tokens for _, tokens in done) / batch


async def measure(url: str, model: str, slots: int, rounds: int) -> dict[str, Any]:
    """The best round of every quantity, and all rounds."""
    batches = sorted({1, 2, slots} & set(range(1, slots + 1)))
    found: dict[str, list[Any]] = {f"decode-{batch}": [] for batch in batches}
    found |= {f"{what}-{batch}": [] for batch in (1, slots) for what in ("whole", "sliced")}
    found |= {"short": [], "long": []}
    timeout = aiohttp.ClientTimeout(total=None)
    # llama.cpp closes a connection after a streamed answer without saying so.
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        engine = Engine(session, url, model)
        await engine.call(_prompt(), 8)
        for number in range(rounds):
            click.echo(f"  round {number + 1} of {rounds} ...")
            for batch in batches:
                found[f"decode-{batch}"].append(await decode_rate(engine, batch))
            found["short"].append(await first_token(engine, SHORT))
            found["long"].append(await first_token(engine, LONG))
            for batch in (1, slots):
                for what, slices in (("whole", 1), ("sliced", SLICES)):
                    found[f"{what}-{batch}"].append(await in_step(engine, batch, slices))
    decode = [(batch, round(max(found[f"decode-{batch}"]), 2)) for batch in batches]
    prefill = (LONG - SHORT) / (min(found["long"]) - min(found["short"]))
    cost = {}
    for batch, rate in ((1, decode[0][1]), (slots, decode[-1][1])):
        seconds, computed = min(found[f"sliced-{batch}"])
        extra = seconds - min(found[f"whole-{batch}"])[0]
        gross = extra / (SLICES - 1) * rate
        # In step, everybody waits for everybody's prefill.
        net = gross - computed * batch / (SLICES - 1) / prefill * rate
        cost[batch] = {"gross": round(gross, 2), "net": round(net, 2), "computed": round(computed / (SLICES - 1), 1)}
    return {"decode": decode, "prefill": round(prefill, 1), "seam": cost, "rounds": found}


@click.command()
@click.argument("name")
@click.argument("url")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--slots", default=4, show_default=True)
@click.option("--block", default=16, show_default=True, help="Tokens per block of the engine's prefix cache.")
@click.option("--kv-tokens", type=int, help="Tokens of key-value memory.")
@click.option("--stalls/--no-stalls", default=True, show_default=True, help="Others wait while a prompt is computed.")
@click.option("--rounds", default=8, show_default=True)
@click.option("--about", default="", help="Engine and settings, in words.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: among the shipped models.")
def main(
    name: str, url: str, model: str, slots: int, block: int, kv_tokens: int | None, stalls: bool, rounds: int,
    about: str, output: Path | None,
) -> None:  # fmt: skip
    """Measure the engine at URL and save it as the engine model NAME."""
    found = asyncio.run(measure(url, model, slots, rounds))
    gross = {batch: cost["gross"] for batch, cost in found["seam"].items()}
    about = (
        f"{about or name}. Measured {time.strftime('%Y-%m-%d')} on {platform.machine()} with {os.cpu_count()} cores by "
        f"benchmarks/engine_model.py, best of {rounds} rounds. A seam cost {gross[1]} decoded tokens alone and "
        f"{gross[slots]} with {slots} sequences in step, computing {found['seam'][1]['computed']} prompt tokens again."
    )
    result = EngineModel(
        slots=slots,
        decode=tuple((batch, rate) for batch, rate in found["decode"]),
        prefill_tokens_per_second=found["prefill"],
        seam_tokens=max(0.0, found["seam"][1]["net"]),
        kv_tokens=kv_tokens,
        block=block,
        prefill_stalls=stalls,
        about=about,
    )
    result.save(output or MODELS / f"{name}.json")
    click.echo(json.dumps({key: value for key, value in found.items() if key != "rounds"}, indent=2))
    for key, values in found["rounds"].items():
        click.echo(f"{key}: " + ", ".join(f"{v if isinstance(v, float) else v[0]:.3g}" for v in values))


if __name__ == "__main__":
    main()
