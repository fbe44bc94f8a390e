"""Measure a running engine and write it down as a model for the embedded engine and the simulator.

    python -m benchmarks.engine_model vllm-cpu http://127.0.0.1:8000 --model smollm2 --slots 4 --block 32

Rates come from forced lengths (``ignore_eos``). A seam is a pair: 200 tokens in one call, and the same in four calls
that continue by token ids, alone and as a backlog in all slots. Rounds interleave everything and the median round
counts; a seam is the median of the pairs. What a continuation computes again of its prompt (by the
engine's own ``cached_tokens``) is charged at the prefill rate; the rest is the seam. On a machine with other work, run
engine and script under ``chrt --rr 1``: figures of a disturbed engine are no figures.
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
from statistics import median
from typing import Any

import aiohttp
import click

from elis_gateway.sim.model import MODELS, EngineModel

WHOLE, SLICES = 200, 4
JOBS = 3
"""Jobs per slot of a backlog."""
SHORT, LONG = 64, 1088
"""Prompt lengths whose difference in time to first token gives the prefill rate."""


_WORDS = (
    "Once upon a time the baker of a small village walked down to the river with seven loaves of bread and found that "
    "somebody had painted the old wooden bridge in green while nobody was looking so she asked every neighbour in turn"
)
"""Plain words, so that answers are plain words too: one token, one delta."""


@dataclass
class Timing:
    """One call: seconds on the loop's clock."""

    start: float
    arrivals: list[float] = field(default_factory=list)
    """One entry per token."""
    done: float = 0.0
    """When the last event came, whether or not it had a token (llama.cpp keeps half characters to itself)."""
    ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached: int = 0


class Engine:
    """A server under measurement."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._model = model
        self._vocabulary: list[int] = []
        self._ids: dict[str, Any] = {}
        """What to ask for to get the answer's token ids."""

    async def learn(self) -> None:
        """Ask for the ids of some plain words (vLLM reads ``prompt``, llama.cpp ``content``)."""
        body = {"model": self._model, "prompt": _WORDS, "content": _WORDS, "add_special_tokens": False}
        async with self._session.post(f"{self._url}/tokenize", json=body) as response:
            response.raise_for_status()
            self._vocabulary = (await response.json())["tokens"]
        async with self._session.get(f"{self._url}/v1/models") as response:
            llama = (await response.json())["data"][0].get("owned_by") == "llamacpp"
        self._ids = {"logprobs": 1} if llama else {"return_token_ids": True}

    def prompt(self, length: int = 24) -> list[int]:
        """Tokens of plain words that no cache knows in this order."""
        return random.choices(self._vocabulary, k=length)

    async def call(self, prompt: Sequence[int], tokens: int) -> Timing:
        """One streamed completion of exactly this many tokens."""
        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
            **self._ids,
        }  # fmt: skip
        timing = Timing(time.monotonic())
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _read(json.loads(line[6:]), timing)
        return timing


def _read(chunk: dict[str, Any], timing: Timing) -> None:
    timing.done = time.monotonic()
    if usage := chunk.get("usage"):
        timing.prompt_tokens = usage["prompt_tokens"]
        timing.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in chunk["choices"]:
        scored = (choice.get("logprobs") or {}).get("content") or []
        ids = choice.get("token_ids") or [entry["id"] for entry in scored]
        timing.ids.extend(ids)
        timing.arrivals.extend([timing.done] * len(ids))


async def decode_rate(engine: Engine, batch: int) -> float:
    """Tokens per second of each sequence, while all of them decode."""
    calls = await asyncio.gather(*(engine.call(engine.prompt(), 96) for _ in range(batch)))
    begin = max(call.arrivals[0] for call in calls)
    end = min(call.arrivals[-1] for call in calls)
    made = sum(sum(begin < at <= end for at in call.arrivals) for call in calls)
    return made / (end - begin) / batch


async def first_token(engine: Engine, length: int) -> float:
    """Seconds to the first token."""
    call = await engine.call(engine.prompt(length), 1)
    return call.done - call.start


async def seams(engine: Engine, slices: int) -> tuple[float, int]:
    """Seconds for WHOLE tokens in so many calls, and prompt tokens computed by the continuations."""
    start, computed = time.monotonic(), 0
    known = engine.prompt()
    for number in range(slices):
        call = await engine.call(known, WHOLE // slices)
        known += call.ids
        if number:
            computed += call.prompt_tokens - call.cached
    return time.monotonic() - start, computed


async def backlog(engine: Engine, batch: int, slices: int) -> float:
    """Tokens per second while ``batch`` sequences, out of step with each other, always have work in so many calls."""
    ends: list[tuple[float, int]] = []
    begun: list[float] = []

    async def worker(number: int) -> None:
        await asyncio.sleep(0.37 * number)
        begun.append(time.monotonic())
        for _ in range(JOBS):
            known = engine.prompt()
            for _ in range(slices):
                call = await engine.call(known, WHOLE // slices)
                known += call.ids
                ends.extend((at, number) for at in call.arrivals)

    await asyncio.gather(*(worker(number) for number in range(batch)))
    begin = max(begun)
    end = min(max(at for at, of in ends if of == number) for number in range(batch))
    return sum(begin < at <= end for at, _ in ends) / (end - begin)


async def measure(url: str, model: str, slots: int, rounds: int) -> dict[str, Any]:
    """The median of every quantity, and all rounds."""
    batches = sorted({1, 2, slots} & set(range(1, slots + 1)))
    found: dict[str, list[Any]] = {f"decode-{batch}": [] for batch in batches}
    found |= {"short": [], "long": [], "alone": [], "backlog": []}
    timeout = aiohttp.ClientTimeout(total=None)
    # llama.cpp closes a connection after a streamed answer without saying so.
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        engine = Engine(session, url, model)
        await engine.learn()
        await engine.call(engine.prompt(), 8)
        for number in range(rounds):
            click.echo(f"  round {number + 1} of {rounds} ...")
            for batch in batches:
                found[f"decode-{batch}"].append(await decode_rate(engine, batch))
            found["short"].append(await first_token(engine, SHORT))
            found["long"].append(await first_token(engine, LONG))
            plain, (seconds, computed) = await seams(engine, 1), await seams(engine, SLICES)
            found["alone"].append((seconds - plain[0], computed))
            found["backlog"].append([await backlog(engine, slots, slices) for slices in (1, SLICES)])
    decode = [(batch, round(median(found[f"decode-{batch}"]), 2)) for batch in batches]
    prefill = (LONG - SHORT) / (median(found["long"]) - median(found["short"]))
    computed = median(tokens for _, tokens in found["alone"]) / (SLICES - 1)
    alone = median(seconds for seconds, _ in found["alone"]) / (SLICES - 1) * decode[0][1]
    lost = median(plain / cut - 1 for plain, cut in found["backlog"]) * WHOLE / (SLICES - 1)
    again = computed / prefill * decode[0][1]
    seam = {"alone": alone, "backlog": lost, "computed": computed, "without_prefill": alone - again}
    return {"decode": decode, "prefill": prefill, "seam": seam, "rounds": found}


@click.command()
@click.argument("name")
@click.argument("url")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--slots", default=4, show_default=True)
@click.option("--block", default=16, show_default=True, help="Tokens per block of the engine's prefix cache.")
@click.option("--kv-tokens", type=int, help="Tokens of key-value memory.")
@click.option("--stalls/--no-stalls", default=True, show_default=True, help="Others wait while a prompt is computed.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--about", default="", help="Engine and settings, in words.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: among the shipped models.")
def main(
    name: str, url: str, model: str, slots: int, block: int, kv_tokens: int | None, stalls: bool, rounds: int,
    about: str, output: Path | None,
) -> None:  # fmt: skip
    """Measure the engine at URL and save it as the engine model NAME."""
    found = asyncio.run(measure(url, model, slots, rounds))
    seam = found["seam"]
    about = (
        f"{about or name}. Measured {time.strftime('%Y-%m-%d')} on {platform.machine()} with {os.cpu_count()} cores by "
        f"benchmarks/engine_model.py, median of {rounds} rounds. A seam cost {seam['alone']:.1f} decoded tokens "
        f"alone, {seam['backlog']:.1f} of each sequence under backlog, and computed {seam['computed']:.0f} "
        "prompt tokens again."
    )
    result = EngineModel(
        slots=slots,
        decode=tuple((batch, rate) for batch, rate in found["decode"]),
        prefill_tokens_per_second=round(found["prefill"], 1),
        seam_tokens=round(max(0.0, seam["without_prefill"]), 2),
        kv_tokens=kv_tokens,
        block=block,
        prefill_stalls=stalls,
        about=about,
    )
    result.save(output or MODELS / f"{name}.json")
    click.echo(json.dumps({key: value for key, value in found.items() if key != "rounds"}, indent=2))
    for key, values in found["rounds"].items():
        click.echo(f"{key}: {values}")


if __name__ == "__main__":
    main()
