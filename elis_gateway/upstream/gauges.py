"""What an engine says of its own load: running, waiting, KV memory. Read from its metrics page, or its slots.

Knows: the names that engines give these figures. Never: what follows from them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import orjson

from elis_gateway.config import MOST_SLOTS
from elis_gateway.errors import UpstreamError
from elis_gateway.upstream.http import HttpUpstream

__all__ = ["Gauges", "engines", "engines_behind", "gauges", "most_at_once", "read"]

_PAGE = "/metrics"
_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")
_KV = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage", "llamacpp:kv_cache_usage_ratio")
_EVICTED = ("vllm:num_preemptions_total", "sglang:num_retracted_reqs_total")
_SAMPLE = re.compile(rb"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?[ \t]+(\S+)", re.MULTILINE)
_RANK = re.compile(rb'\b(?:engine|dp_rank)="(\d+)"')


class Gauges(NamedTuple):
    """One engine's load in one moment."""

    running: float
    """Sequences in its batch."""
    waiting: float
    """Calls in its queue."""
    kv: float | None = None
    """Share of the KV memory in use."""
    evicted: float = 0.0
    """Sequences thrown out of the batch for want of memory, ever."""


def read(page: bytes, rank: int | None = None) -> Gauges | None:
    """What a metrics page (vLLM, SGLang, llama.cpp) says; None: nothing of this kind. ``rank``: of a data-parallel
    engine this one alone, otherwise all together."""
    wanted = {name.encode() for name in (*_RUNNING, *_WAITING, *_KV, *_EVICTED)}
    found: dict[str, dict[int, float]] = {}
    for name, labels, value in _SAMPLE.findall(page):
        if name not in wanted:
            continue
        named = _RANK.search(labels)
        at = int(named[1]) if named else 0
        if rank is not None and named is not None and at != rank:
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        of_rank = found.setdefault(name.decode(), {})
        # Several rows of one rank are several views of the same (its tensor-parallel workers).
        of_rank[at] = max(of_rank.get(at, 0.0), number)
    running, waiting = _first(found, _RUNNING), _first(found, _WAITING)
    if running is None or waiting is None:
        return None
    kv, evicted = _first(found, _KV), _first(found, _EVICTED)
    return Gauges(
        sum(running.values()),
        sum(waiting.values()),
        None if kv is None else max(kv.values()),
        0.0 if evicted is None else sum(evicted.values()),
    )


def engines(page: bytes) -> int:
    """How many engines a metrics page speaks of: more than one are data-parallel ranks behind one address."""
    ranks = {
        named[1]
        for name, labels, _ in _SAMPLE.findall(page)
        if name.decode() in _RUNNING and (named := _RANK.search(labels))
    }
    return max(len(ranks), 1)


async def engines_behind(upstream: HttpUpstream) -> int:
    """How many engines this upstream shows behind its address."""
    page = await _page(upstream, _PAGE)
    return 1 if page is None else engines(page)


def _first(found: dict[str, dict[int, float]], names: tuple[str, ...]) -> dict[int, float] | None:
    return next((found[name] for name in names if name in found), None)


async def gauges(upstream: HttpUpstream) -> Gauges | None:
    """What this engine says now; None: nothing. Raises ``UpstreamError`` where it does not answer at all."""
    page = await _page(upstream, _PAGE)
    seen = None if page is None else read(page, upstream.settings.data_parallel_rank)
    if seen is None and (page := await _page(upstream, "/slots")) is not None:
        seen = _of_slots(page)
    return seen


def _of_slots(page: bytes) -> Gauges | None:
    """llama.cpp's /slots: who is at work. Its queue it does not show there."""
    slots = _json(page)
    if not isinstance(slots, list) or not all(isinstance(s, dict) and "is_processing" in s for s in slots) or not slots:
        return None
    return Gauges(float(sum(bool(s["is_processing"]) for s in slots)), 0.0)


async def most_at_once(upstream: HttpUpstream) -> int | None:
    """Sequences the engine says it runs at once, where it says so: llama.cpp its slots, SGLang its limit. vLLM does
    not tell --max-num-seqs."""
    for path, names in (
        ("/props", ("total_slots",)),
        ("/get_server_info", ("effective_max_running_requests_per_dp", "max_running_requests")),
    ):
        page = await _page(upstream, path)
        told = _json(page) if page is not None else None
        for place in _places(told):
            for name in names:
                if isinstance(most := place.get(name), int) and most > 0:
                    return min(most, MOST_SLOTS)
    return None


def _places(told: object) -> list[dict[str, object]]:
    """The document itself, and what SGLang says of its schedulers."""
    if not isinstance(told, dict):
        return []
    inside = told.get("internal_states")
    return [*(s for s in (inside if isinstance(inside, list) else []) if isinstance(s, dict)), told]


async def _page(upstream: HttpUpstream, path: str) -> bytes | None:
    try:
        return await upstream.get(path)
    except UpstreamError:
        return None


def _json(page: bytes) -> object:
    try:
        found: object = orjson.loads(page)
    except orjson.JSONDecodeError:
        return None
    return found
