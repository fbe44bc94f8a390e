"""Measure a running engine and write it down as a model for the embedded engine and the simulator.

Rates come from forced lengths (``ignore_eos``). A seam is a pair: 200 tokens in one call, and the same in four calls
that continue by token ids (by text where the engine returns none), alone and as a backlog in all slots. Rounds
interleave everything and the median round counts; a seam is the median of the pairs. What a continuation computes again
of its prompt (by the engine's own ``cached_tokens``) is charged at the prefill rate; the rest is the seam.

Figures of a disturbed engine are no figures: nobody else may use it meanwhile, and on a machine with other work engine
and tool should run at a higher priority.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import orjson

from elis_gateway.errors import GatewayError, UpstreamUnavailable
from elis_gateway.sim.model import EngineModel
from elis_gateway.tasks import spawn
from elis_gateway.wire.sse import DONE, EventDecoder
from loadtest.client import Client

__all__ = ["Calibration", "Server", "Timing", "find_slots", "fitted", "measure"]

WHOLE, SLICES = 200, 4
JOBS = 3
"""Jobs per slot of a backlog."""
SHORT, LONG = 64, 1088
"""Prompt lengths whose difference in time to first token gives the prefill rate."""
MOST_SLOTS = 512

_WORDS = (
    "Once upon a time the baker of a small village walked down to the river with seven loaves of bread and found that "
    "somebody had painted the old wooden bridge in green while nobody was looking so she asked every neighbour in turn"
)
"""Plain words, so that answers are plain words too: one token, one delta."""

Prompt = list[int] | str


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Timing:
    """One call: seconds on the loop's clock."""

    start: float
    arrivals: list[float] = field(default_factory=list)
    """One entry per token."""
    done: float = 0.0
    """When the last event came, whether or not it had a token (llama.cpp keeps half characters to itself)."""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached: int = 0


class Server:
    """An engine under measurement. It must obey ``ignore_eos``: vLLM, llama.cpp and the embedded engine do."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model
        self._vocabulary: list[int] = []
        self._more: dict[str, Any] = {}
        """What to ask for to get the answer's token ids."""

    @property
    def by_ids(self) -> bool:
        """Prompts and continuations are token ids."""
        return bool(self._vocabulary)

    async def learn(self) -> None:
        """Find out how to speak of tokens: ids of some plain words (vLLM reads ``prompt``, llama.cpp ``content``)."""
        body = {"model": self._model, "prompt": _WORDS, "content": _WORDS, "add_special_tokens": False}
        llama = False
        with suppress(UpstreamUnavailable, orjson.JSONDecodeError, KeyError, IndexError):
            listed = orjson.loads((await self._client.get("/v1/models")).body)
            llama = listed["data"][0].get("owned_by") == "llamacpp"
            reply = await self._client.send_json("POST", "/tokenize", orjson.dumps(body))
            if reply.status == 200:
                self._vocabulary = [int(token) for token in orjson.loads(reply.body)["tokens"]]
        self._more = {"logprobs": 1} if llama else {"return_token_ids": True}
        probe = await self.call(self.prompt(), 4)
        if len(probe.ids) != 4:
            self._vocabulary, self._more = [], {}
            probe = await self.call(self.prompt(), 4)
        if not probe.done or (not probe.ids and not probe.text):
            raise GatewayError(f"{self._client.url}: no text came back of /v1/completions")

    def prompt(self, length: int = 24) -> Prompt:
        """Plain words that no cache knows in this order."""
        if self._vocabulary:
            return random.choices(self._vocabulary, k=length)
        # A word may be more than one token where the vocabulary is not ours to ask: fewer words, so that they fit.
        return " ".join(random.choices(_WORDS.split(), k=max(length // 2, 8)))

    async def call(self, prompt: Prompt, tokens: int) -> Timing:
        """One streamed completion of exactly this many tokens. Raises GatewayError where that is refused."""
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}, **self._more,
        }  # fmt: skip
        decoder = EventDecoder()
        timing = Timing(_now())

        def heard(data: bytes) -> None:
            for payload in decoder.feed(data):
                if payload != DONE:
                    _read(orjson.loads(payload), timing)

        reply = await self._client.exchange(self._client.request("POST", "/v1/completions", orjson.dumps(body)), heard)
        if reply.status != 200:
            raise GatewayError(f"{self._client.url}/v1/completions answered {reply.status}: {reply.body[:300]!r}")
        return timing

    def longer(self, prompt: Prompt, timing: Timing) -> Prompt:
        """The prompt with its answer: what a continuation sends."""
        if isinstance(prompt, list):
            return prompt + timing.ids
        return prompt + timing.text


def _read(chunk: dict[str, Any], timing: Timing) -> None:
    timing.done = _now()
    if "error" in chunk:
        raise GatewayError(f"the engine failed: {chunk['error']}")
    if usage := chunk.get("usage"):
        timing.prompt_tokens = usage["prompt_tokens"]
        timing.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in chunk["choices"]:
        scored = (choice.get("logprobs") or {}).get("content") or []
        ids = choice.get("token_ids") or [entry["id"] for entry in scored if "id" in entry]
        timing.ids.extend(ids)
        timing.text += choice.get("text") or ""
        # Without ids a delta with text is taken for one token.
        timing.arrivals.extend([timing.done] * (len(ids) or bool(choice.get("text"))))


async def find_slots(server: Server, *, first: int = 4) -> int:
    """Sequences that the engine decodes at once: of more and more calls, how many stream at the same time."""
    count = first
    while True:
        calls = await asyncio.gather(*(server.call(server.prompt(), 48) for _ in range(count)))
        begun = [call.arrivals[0] for call in calls]
        # Streaming when the first one ended; the rest waited for a slot.
        over = min(call.arrivals[-1] for call in calls)
        at_once = sum(begin < over for begin in begun)
        if at_once < count or count >= MOST_SLOTS:
            return at_once
        count = min(2 * count, MOST_SLOTS)


async def decode_rate(server: Server, batch: int) -> float:
    """Tokens per second of each sequence, while all of them decode."""
    calls = await asyncio.gather(*(server.call(server.prompt(), 96) for _ in range(batch)))
    begin = max(call.arrivals[0] for call in calls)
    end = min(call.arrivals[-1] for call in calls)
    if end <= begin:
        raise GatewayError(f"{batch} calls never ran at the same time: are there as many slots?")
    made = sum(sum(begin < at <= end for at in call.arrivals) for call in calls)
    return made / (end - begin) / batch


async def first_token(server: Server, length: int) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens the prompt had."""
    call = await server.call(server.prompt(length), 1)
    return call.done - call.start, call.prompt_tokens or length


async def stall(server: Server) -> float:
    """Longest gap of a stream while a long prompt is computed beside it, over what that prompt takes alone."""
    alone, _ = await first_token(server, LONG)
    stream = spawn(server.call(server.prompt(), WHOLE), name="stream")
    await asyncio.sleep(0.3 * alone)
    call = await server.call(server.prompt(LONG), 1)
    at = (await stream).arrivals
    gaps = [b - a for a, b in pairwise(at) if call.start <= b and a <= call.done]
    return max(gaps, default=0.0) / alone


async def seams(server: Server, slices: int) -> tuple[float, int]:
    """Seconds for WHOLE tokens in so many calls, and prompt tokens computed by the continuations."""
    start, computed = _now(), 0
    known = server.prompt()
    for number in range(slices):
        call = await server.call(known, WHOLE // slices)
        known = server.longer(known, call)
        if number:
            computed += call.prompt_tokens - call.cached
    return _now() - start, computed


async def backlog(server: Server, batch: int, slices: int, pace: float) -> float:
    """Tokens per second while ``batch`` sequences, out of step with each other, always have work in so many calls.
    ``pace``: tokens per second of one of them, about."""
    ends: list[tuple[float, int]] = []
    begun: list[float] = []

    async def worker(number: int) -> None:
        await asyncio.sleep(number * WHOLE / pace / batch)
        begun.append(_now())
        for _ in range(JOBS):
            known = server.prompt()
            for _ in range(slices):
                call = await server.call(known, WHOLE // slices)
                known = server.longer(known, call)
                ends.extend((at, number) for at in call.arrivals)

    await asyncio.gather(*(worker(number) for number in range(batch)))
    begin = max(begun)
    end = min(max(at for at, of in ends if of == number) for number in range(batch))
    if end <= begin:
        raise GatewayError(f"{batch} sequences never had work at the same time: are there as many slots?")
    return sum(begin < at <= end for at, _ in ends) / (end - begin)


@dataclass
class Calibration:
    """What was measured: the median of every quantity, and all rounds."""

    slots: int
    decode: list[tuple[int, float]]
    prefill: float
    """Prompt tokens per second."""
    stalls: bool
    capacity: float
    """Tokens per second with every slot at work, whole answers."""
    seam: dict[str, float]
    """Decoded tokens: ``alone``, ``backlog`` (of each sequence), ``without_prefill``; ``computed``: prompt tokens."""
    by_ids: bool
    rounds: dict[str, list[Any]]


async def measure(
    server: Server, *, slots: int | None, rounds: int, said: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Measure everything, in ``rounds`` interleaved rounds. ``said`` hears how it goes. Raises GatewayError."""
    await server.learn()
    if slots is None:
        slots = await find_slots(server)
        said(f"{slots} sequences are decoded at once")
    batches = sorted({size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, slots) if size <= slots})
    found: dict[str, list[Any]] = {f"decode-{batch}": [] for batch in batches}
    found |= {"short": [], "long": [], "stall": [], "alone": [], "backlog": []}
    for number in range(rounds):
        said(f"round {number + 1} of {rounds} ...")
        for batch in batches:
            found[f"decode-{batch}"].append(await decode_rate(server, batch))
        found["short"].append(await first_token(server, SHORT))
        found["long"].append(await first_token(server, LONG))
        found["stall"].append(await stall(server))
        plain, (seconds, computed) = await seams(server, 1), await seams(server, SLICES)
        found["alone"].append((seconds - plain[0], computed))
        pace = found[f"decode-{slots}"][-1]
        found["backlog"].append([await backlog(server, slots, slices, pace) for slices in (1, SLICES)])
    return _medians(found, slots, batches, server.by_ids)


def _medians(found: dict[str, list[Any]], slots: int, batches: Sequence[int], by_ids: bool) -> Calibration:
    decode = [(batch, round(median(found[f"decode-{batch}"]), 2)) for batch in batches]
    (short, few), (long, many) = (
        (median(t for t, _ in found[k]), median(n for _, n in found[k])) for k in ("short", "long")
    )
    prefill = (many - few) / (long - short) if long > short else float("inf")
    computed = median(tokens for _, tokens in found["alone"]) / (SLICES - 1)
    alone = median(seconds for seconds, _ in found["alone"]) / (SLICES - 1) * decode[0][1]
    lost = median(plain / cut - 1 for plain, cut in found["backlog"]) * WHOLE / (SLICES - 1)
    seam = {
        "alone": alone,
        "backlog": lost,
        "computed": computed,
        "without_prefill": alone - computed / prefill * decode[0][1],
    }
    capacity = median(plain for plain, _ in found["backlog"])
    return Calibration(slots, decode, prefill, median(found["stall"]) > 0.5, capacity, seam, by_ids, found)


def fitted(found: Calibration, *, block: int, kv_tokens: int | None, about: str) -> EngineModel:
    """The engine model of what was measured."""
    return EngineModel(
        slots=found.slots,
        decode=tuple(found.decode),
        prefill_tokens_per_second=round(found.prefill, 1) if found.prefill < float("inf") else None,
        seam_tokens=round(max(0.0, found.seam["without_prefill"]), 2),
        kv_tokens=kv_tokens,
        block=block,
        prefill_stalls=found.stalls,
        about=about,
    )
