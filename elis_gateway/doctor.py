"""What an engine is and can do, how many sequences it really runs at once, what a seam costs, whether order can help.

Knows: which measurements tell that. Never: serving; of the gateway more than its metrics page.

Everything is asked of behaviour, in a bounded time: a few small calls, a ramp of at most ``_MOST`` calls at once, and a
few hundred tokens for the seam. An engine that serves others meanwhile is disturbed a little, and the figures with it;
that is said where it shows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import orjson

from elis_gateway import config
from elis_gateway.doctor_report import Findings, Load, load_of
from elis_gateway.errors import UpstreamError, UpstreamRefused, UpstreamUnavailable
from elis_gateway.tasks import spawn
from elis_gateway.upstream.base import Capabilities
from elis_gateway.upstream.http import HttpUpstream
from elis_gateway.upstream.probe import LLAMA_CPP, probe
from elis_gateway.wire.continuation import Call
from elis_gateway.wire.loose import document, entries, fields, first, objects
from elis_gateway.wire.sse import DONE

__all__ = ["examine", "examine_all", "kept_of"]

_MOST = 256
"""Calls at once at the top of the ramp."""
_RAMP_TIME = 60.0
"""Seconds the whole ramp may take."""
_ADMIN_KEY = "ELIS_ADMIN_KEY"
_FOUND_OUT = {"url", "slots", "overcommit", "data_parallel_size"}
"""Keys of an upstream that the YAML to use says anew."""
_WINDOW, _WINDOWS, _ATTEMPTS = 50, 4, 3
_PATIENCE = 60.0
"""Seconds that a small chat may take."""
_RUNG = 1.5
"""Seconds that one call of the ramp should take."""
_SAID = ("content", "reasoning", "reasoning_content", "tool_calls")
"""Fields of a chat's delta that hold tokens."""
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_HINTS = {
    401: "it wants a key: --api-key-env NAME, or api_key_env in a configuration",
    403: "it wants another key: --api-key-env NAME, or api_key_env in a configuration",
    404: "it lists no models at /v1/models: is this an OpenAI-compatible server, and the address before its /v1?",
}
"""What is probably meant by a refusal to list models."""
_REPEATS = 8
"""Times that one prompt is repeated to see whether it is cached everywhere."""


# ---- examining ----------------------------------------------------------------------------------------------------


async def examine(settings: config.Upstream, *, configured: bool, say: Callable[[str], None]) -> Findings:
    """Look at one engine. ``configured``: its ``slots`` were set by a person. ``say`` hears what is being done.

    Raises:
        UpstreamError: it does not answer.
    """
    fixed = settings.slots if configured and settings.slots != "auto" else None
    found = Findings(settings.url, configured=fixed, kept=kept_of(settings))
    async with _open(settings) as upstream:
        say("what it is and can do")
        found.capabilities = await probe(upstream, orders=False)
        found.model = min(found.capabilities.models, default=None)
        if found.model is None:
            found.notes.append("It lists no models at /v1/models; `models` in a configuration may name them.")
            return found
        found.load = await _engine_load(upstream)
        chats = await _parsers(upstream, found)
        say("how many sequences it runs at once")
        await _ramp(upstream, found, chats=chats)
        if not found.generates:
            return found
        if found.slots is not None and found.slots <= 64:
            say("whether it orders its own queue by priority")
            found.capabilities = await _ordering(settings, found)
        say("what a seam costs")
        await _seam(upstream, found)
        say("whether it is one engine")
        await _one_engine(upstream, found)
    return found


def kept_of(settings: config.Upstream) -> dict[str, Any]:
    """What was set for an upstream and belongs into the YAML to use, as it was."""
    plain = config.Upstream.model_validate({"url": settings.url, "slots": 1})
    given = settings.model_dump(mode="json", exclude_unset=True, exclude=_FOUND_OUT)
    return {name: value for name, value in given.items() if getattr(settings, name) != getattr(plain, name)}


async def examine_all(
    upstreams: Sequence[config.Upstream], effective: config.Config | None, *, say: Callable[[str], None]
) -> tuple[list[Findings], list[str]]:
    """Every engine in turn, and what is wrong with those that do not answer. ``effective``: the configuration they are
    from, whose gateway is asked for its load where it runs."""
    load = None if effective is None else await _gateway_load(effective.admin)
    found, failed = [], []
    for settings in upstreams:
        try:
            say(settings.url)
            one = await examine(settings, configured=effective is not None, say=say)
        except UpstreamError as error:
            failed.append(f"{settings.url}: {_told(error)}")
            continue
        one.load = load or one.load
        found.append(one)
    return found, failed


def _told(error: UpstreamError) -> str:
    """What went wrong, and what it probably means."""
    hint = _HINTS.get(error.status) if isinstance(error, UpstreamRefused) else None
    return f"{error} ({error.cause})" + (f"; {hint}" if hint else "")


@asynccontextmanager
async def _open(settings: config.Upstream) -> AsyncIterator[HttpUpstream]:
    upstream = HttpUpstream(settings)
    await upstream.start()
    try:
        yield upstream
    finally:
        await upstream.close()


async def _ordering(settings: config.Upstream, found: Findings) -> Capabilities:
    """The priority probe needs to know how many calls fill the engine."""
    exact = settings.model_copy(update={"slots": found.slots})
    async with _open(exact) as upstream:
        return await probe(upstream, orders=True)


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class _Streamed:
    """One streamed call, as it went."""

    started: float | None = None
    ended: float | None = None
    tokens: int = 0
    ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)


def _asked(found: Findings, prompt: str, **more: Any) -> dict[str, Any]:
    """A request in the shape of the route by which the engine is asked."""
    text = {"prompt": prompt} if found.route == _COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
    return {"model": found.model, **text, **more}


def _garbage(upstream: HttpUpstream) -> UpstreamUnavailable:
    return UpstreamUnavailable(f"{upstream.id}: what it answers is no answer of a model", cause="garbage")


def _document(upstream: HttpUpstream, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ``UpstreamUnavailable``: whatever listens there may say anything."""
    found = document(data)
    if not isinstance(found, dict):
        raise _garbage(upstream)
    return found


async def _stream(upstream: HttpUpstream, body: dict[str, Any], into: _Streamed, route: str = _COMPLETIONS) -> None:
    data = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "ignore_eos": True, **body}
    call = Call(route, orjson.dumps(data), True)
    async with upstream.open(call, request_id="doctor") as session:
        async for payloads in session:
            now = _now()
            for payload in payloads:
                if payload == DONE:
                    continue
                chunk = _document(upstream, payload)
                into.usage = fields(chunk, "usage") or into.usage
                for choice in objects(chunk, "choices"):
                    ids = entries(choice, "token_ids")
                    delta = fields(choice, "delta")
                    if ids or choice.get("text") or any(delta.get(name) for name in _SAID):
                        into.tokens += max(len(ids), 1)
                        into.ids += ids
                        if into.started is None:
                            into.started = now
                        into.ended = now


def _prompt(number: int) -> str:
    """Different from the first word on, so that no two calls share a prefix."""
    return f"{number} bottles, said number {number}. Tell me a very long story about it."


async def _ramp(upstream: HttpUpstream, found: Findings, *, chats: bool) -> None:
    """1, 2, 4, … calls at once, until fewer begin than were sent before the first of them is done. ``chats``: it serves
    them, so that those will do where it serves nothing else."""
    deadline = _now() + _RAMP_TIME
    at_once, serial = 1, 0
    doubted: int | None = None
    while True:
        length = 48 if found.pace is None else _length(found.pace)
        began = _now()
        calls = [_Streamed() for _ in range(at_once)]
        serial += at_once
        bodies = [_asked(found, _prompt(serial + n), max_tokens=length) for n in range(at_once)]
        try:
            running = await _while_all_run(upstream, bodies, calls, deadline, found.route)
        except (UpstreamError, TimeoutError) as error:
            if isinstance(error, UpstreamUnavailable) and not found.tried:
                # Not one call: what else would be said of it would be said of nothing.
                raise
            if isinstance(error, UpstreamRefused) and chats and not found.tried and found.route == _COMPLETIONS:
                found.notes.append(f"{_COMPLETIONS} is answered {error.status}: it was asked by chats alone.")
                found.route = _CHAT
                continue
            found.notes.append(f"The ramp ended at {at_once} calls at once: {str(error) or 'it took too long'}.")
            return
        found.tried = at_once
        done = [c for c in calls if c.started is not None and c.ended is not None and c.tokens > 1]
        if done:
            pace = sum((c.ended or 0.0) - (c.started or 0.0) for c in done) / sum(c.tokens - 1 for c in done)
            if not pace:
                found.notes.append(
                    "Whole answers come at once, not token by token: something in between keeps streams back (nginx:"
                    " proxy_buffering off). So its slots cannot be told."
                )
                return
            found.pace = pace if at_once == 1 else found.pace
            found.full_pace = pace
        if running < at_once:
            if doubted is None:
                # A machine that stood still for a moment looks like a full engine; twice it does not.
                doubted = running
                continue
            found.slots = max(running, doubted, 1)
            return
        doubted = None
        spent = _now() - began
        if at_once >= _MOST or _now() + 3 * spent > deadline:
            found.notes.append(f"All of {at_once} calls at once ran together: it has at least so many slots.")
            return
        at_once *= 2


def _length(pace: float) -> int:
    """Tokens that take long enough for all calls to have begun by then."""
    return min(max(round(_RUNG / pace), 24), 256)


async def _while_all_run(
    upstream: HttpUpstream, bodies: list[dict[str, Any]], calls: list[_Streamed], deadline: float, route: str
) -> int:
    """How many calls had begun when the first one ended. The rest is let go."""
    tasks = [spawn(_tried(upstream, b, c, route), name="doctor") for b, c in zip(bodies, calls, strict=True)]
    try:
        async with asyncio.timeout(max(deadline - _now(), 1.0)):
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if (error := task.result()) is not None:
                raise error
        ends = [c.ended for c, task in zip(calls, tasks, strict=True) if task in done and c.ended is not None]
        if not ends:
            raise _garbage(upstream)
        first = min(ends)
        return sum(call.started is not None and call.started < first for call in calls)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _tried(upstream: HttpUpstream, body: dict[str, Any], into: _Streamed, route: str) -> UpstreamError | None:
    """A streamed call; what went wrong is told once, not by every call of the ramp."""
    try:
        await _stream(upstream, body, into, route)
    except UpstreamError as error:
        return error
    return None


async def _seam(upstream: HttpUpstream, found: Findings) -> None:
    """As many tokens in one call as in four that each go on from the last, the ids handed back."""
    if not found.capabilities.ids or found.capabilities.kind == LLAMA_CPP:
        if found.capabilities.kind == LLAMA_CPP:
            found.notes.append(
                "The seam was not measured: llama.cpp's ids come another way. The gateway learns it while serving."
            )
        return
    total = _WINDOW * _WINDOWS
    costs = []
    try:
        for attempt in range(_ATTEMPTS):
            body = {"model": found.model, "return_token_ids": True, "max_tokens": total}
            whole = _Streamed()
            prompt = f"{attempt} and {time.time_ns()}: tell me a story."
            began = _now()
            await _stream(upstream, {**body, "prompt": prompt}, whole)
            alone = _now() - began
            ids = await _tokenized(upstream, found.model, f"Again {prompt}")
            began = _now()
            for _ in range(_WINDOWS):
                part = _Streamed()
                await _stream(upstream, {**body, "prompt": ids, "max_tokens": _WINDOW}, part)
                ids = ids + part.ids
                _note_cache(part, found)
            sliced = _now() - began
            costs.append((sliced - alone) / (_WINDOWS - 1) / (alone / total))
    except (UpstreamError, TimeoutError) as error:
        found.notes.append(f"The seam was not measured: {str(error) or 'no answer in time'}.")
        return
    found.seam = max(median(costs), 0.0)


async def _one_engine(upstream: HttpUpstream, found: Findings) -> None:
    """Is the same prompt cached wherever it lands? And what does the metrics page say?"""
    ranks = found.capabilities.engines
    if ranks > 1:
        found.engines = f"{ranks}: data-parallel ranks"
        return
    # Not a prompt that a cache of blocks could half know.
    prompt = f"{time.time_ns()}: " + " ".join(f"number {n}," for n in range(100))
    body = _asked(found, prompt, max_tokens=1, temperature=0)
    try:
        await _cached(upstream, body, found.route)
        if found.capabilities.kind == LLAMA_CPP:
            # Its slots have caches of their own: at the same time, others would be cold by right.
            shares = [await _cached(upstream, body, found.route) for _ in range(_REPEATS)]
        else:
            shares = list(await asyncio.gather(*(_cached(upstream, body, found.route) for _ in range(_REPEATS))))
    except (UpstreamError, TimeoutError) as error:
        found.notes.append(f"Whether it is one engine was not seen: {str(error) or 'no answer in time'}.")
        return
    known = [share for share in shares if share is not None]
    cold = sum(share < 0.5 for share in known)
    if cold < len(known) and found.cache == "not seen":
        found.cache = f"yes: {max(known):.0%} of a repeated prompt"
    if not known:
        found.engines = "not known: it does not tell cached tokens (vLLM: --enable-prompt-tokens-details)"
    elif cold > 0:
        found.engines = (
            f"SEVERAL, it seems: {cold} of {len(known)} repetitions of a prompt did not find it cached"
            if cold < len(known)
            else "not known: no repetition of a prompt found it cached"
        )


async def _cached(upstream: HttpUpstream, body: dict[str, Any], route: str) -> float | None:
    """The share of a prompt that was cached; None: it does not say."""
    call = Call(route, orjson.dumps(body), False)
    async with asyncio.timeout(_PATIENCE), upstream.open(call, request_id="doctor") as session:
        usage = fields(_document(upstream, await session.whole()), "usage")
    cached, prompt = fields(usage, "prompt_tokens_details").get("cached_tokens"), usage.get("prompt_tokens")
    return cached / max(prompt, 1) if isinstance(cached, int) and isinstance(prompt, int) else None


async def _tokenized(upstream: HttpUpstream, model: str | None, prompt: str) -> list[int]:
    """A prompt's ids, by asking for one token of an answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "return_token_ids": True}
    async with upstream.open(Call(_COMPLETIONS, orjson.dumps(body), False), request_id="doctor") as session:
        answer = _document(upstream, await session.whole())
    return entries(first(answer, "choices"), "prompt_token_ids") or entries(answer, "prompt_token_ids")


def _note_cache(part: _Streamed, found: Findings) -> None:
    details = fields(part.usage, "prompt_tokens_details")
    if details.get("cached_tokens"):
        found.cache = (
            f"yes: {details['cached_tokens']} of {part.usage.get('prompt_tokens')} prompt tokens of a continuation"
        )


async def _parsers(upstream: HttpUpstream, found: Findings) -> bool:
    """A chat with a tool to call: an engine without a tool parser refuses it or answers in plain text. Says whether
    chats are served at all."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    chat = {"model": found.model, "messages": [{"role": "user", "content": "What time is it?"}], "max_tokens": 16}
    try:
        message = await _chat(upstream, {**chat, "tools": [tool], "tool_choice": "auto"})
        found.tools = "yes: it answered with a tool call" if message.get("tool_calls") else "accepts tools"
    except UpstreamRefused as error:
        found.tools = f"no: a chat with tools is answered {error.status}"
    except (UpstreamError, TimeoutError) as error:
        found.notes.append(f"Chats with tools: {str(error) or 'no answer in time'}.")
    try:
        message = await _chat(upstream, chat)
    except (UpstreamError, TimeoutError) as error:
        found.notes.append(f"Chats are not served: {str(error) or 'no answer in time'}.")
        return False
    if message.get("reasoning") or message.get("reasoning_content"):
        found.reasoning = "yes: reasoning came in a field of its own"
    return True


async def _chat(upstream: HttpUpstream, body: dict[str, Any]) -> dict[str, Any]:
    call = Call(_CHAT, orjson.dumps(body), False)
    async with asyncio.timeout(_PATIENCE), upstream.open(call, request_id="doctor") as session:
        answer = _document(upstream, await session.whole())
    message = fields(first(answer, "choices"), "message")
    if not message:
        raise _garbage(upstream)
    return message


# ---- does anybody wait? --------------------------------------------------------------------------------------------


async def _gateway_load(admin: config.Admin) -> Load | None:
    """Of the gateway that runs with this configuration, if one does."""
    # Asked, not bound.
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(admin.host, admin.host)  # nosec B104
    scheme = "https" if admin.tls.cert is not None else "http"
    key = _ADMIN_KEY if os.environ.get(_ADMIN_KEY) else None
    settings = config.Upstream.model_validate(
        {"url": f"{scheme}://{host}:{admin.port}", "slots": 1, "api_key_env": key, "tls": {"verify": False}}
    )
    async with _open(settings) as upstream:
        try:
            text = (await upstream.get("/metrics")).decode("utf-8", "replace")
        except UpstreamError:
            return None
    return load_of(
        text, "the gateway", wait="elis_queue_wait_seconds", time="elis_jct_seconds", length="elis_answer_tokens"
    )


async def _engine_load(upstream: HttpUpstream) -> Load | None:
    """Of vLLM's own metrics: how long requests have waited in its queue, and how long answers were."""
    try:
        text = (await upstream.get("/metrics")).decode("utf-8", "replace")
    except UpstreamError:
        return None
    return load_of(
        text, "the engine", wait="vllm:request_queue_time_seconds", time="vllm:e2e_request_latency_seconds",
        length="vllm:request_generation_tokens",
    )  # fmt: skip
