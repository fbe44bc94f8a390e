"""What can this upstream do? Asked of its behaviour, never of its documentation or its version.

Knows: which small calls tell what. Never: when to ask (that is the fleet's), what to do with the answer.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import orjson

from elis_gateway.errors import UpstreamError, UpstreamRefused, UpstreamUnavailable
from elis_gateway.upstream.base import Capabilities
from elis_gateway.upstream.gauges import engines_behind, most_at_once
from elis_gateway.upstream.http import HttpUpstream
from elis_gateway.upstream.session import HttpSession
from elis_gateway.wire.continuation import Call
from elis_gateway.wire.loose import document, entries, fields, first, objects
from elis_gateway.wire.thoughts import Count, Thinking, between

__all__ = ["LLAMA_CPP", "generates", "probe"]

_log = logging.getLogger("elis_gateway.upstream")
LLAMA_CPP = "llama.cpp"
VLLM = "vllm"
_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
_PATIENCE = 30.0
"""Longest wait for one probing call: the engine may be full of other people's work."""
_MARKS = (
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<mm:think>", "</mm:think>"),
)  # fmt: skip
"""How models mark their thoughts."""
_QUEUED = 0.1
"""Seconds after which a call surely stands in the engine's queue."""


async def probe(upstream: HttpUpstream, *, orders: bool = False) -> Capabilities:
    """Everything that can be found out. ``orders``: whether it is worth finding out if the engine orders its queue,
    which takes a few seconds of all its slots.

    Raises:
        UpstreamError: it does not answer, or refuses to list its models.
    """
    settings = upstream.settings
    listed = await _listed(upstream)
    models = frozenset(settings.models) or frozenset(listed)
    context = {name: length for name in models if (length := settings.context or listed.get(name))}
    model = min(models, default=None)
    kind = await _kind(upstream)
    ids, chat_ids, settled = settings.continuation == "ids", False, True
    thinks = calls = False
    thinking = None
    fingerprint = None
    if settings.continuation == "auto" and model is not None:
        try:
            ids = await (_shows_ids if kind == LLAMA_CPP else _returns_ids)(upstream, model)
            fingerprint = await _fingerprint(upstream, model) if ids else None
            chat_ids = ids and kind == VLLM and await _takes_ids_in_chats(upstream, model)
            if ids and kind == VLLM and settings.chat_parser == "auto":
                thinks, calls = await _parses(upstream, model)
                thinking = await _thinking(upstream, model) if thinks and chat_ids else None
        except (UpstreamError, TimeoutError) as error:
            # Not a no: an engine that was busy for a moment must not go unsliced until it is restarted.
            _log.info("upstream %s: whether it returns token ids is not known yet: %s", upstream.id, error)
            settled = False
    ordering = settings.engine_priority == "on"
    most = await most_at_once(upstream) if settings.slots == "auto" else None
    slots = most if settings.slots == "auto" else settings.slots
    if settings.engine_priority == "auto" and orders and model is not None and settled and slots is not None:
        ordering = await _orders(upstream, model, slots)
    return Capabilities(
        models=models,
        context=context,
        ids=ids,
        chat_ids=chat_ids,
        text=settings.continuation == "text",
        orders=ordering,
        chat_parser=settings.chat_parser is True,
        reasoning_parser=thinks,
        thinking=thinking,
        tool_parser=calls,
        fingerprint=fingerprint,
        kind=kind,
        most=most,
        engines=await engines_behind(upstream) if settings.data_parallel_rank is None else 1,
        settled=settled,
    )


async def _listed(upstream: HttpUpstream) -> dict[str, int | None]:
    """What it lists; where it has no such route, nothing, if the operator said what it serves."""
    try:
        return _models(await upstream.get("/v1/models"))
    except UpstreamRefused as error:
        if error.status in (404, 405) and upstream.settings.models:
            return {}
        raise


def _models(body: bytes) -> dict[str, int | None]:
    """Names, and context lengths where the engine says so (vLLM: max_model_len; llama.cpp: meta.n_ctx)."""
    found: dict[str, int | None] = {}
    for entry in objects(document(body), "data"):
        if isinstance(name := entry.get("id"), str):
            length = entry.get("max_model_len")
            if length is None:
                length = fields(entry, "meta").get("n_ctx")
            found[name] = length if type(length) is int and length > 0 else None
    return found


async def _kind(upstream: HttpUpstream) -> str:
    for path, sign, kind in (("/version", b'"version"', VLLM), ("/props", b'"total_slots"', LLAMA_CPP)):
        try:
            if sign in await upstream.get(path):
                return kind
        except UpstreamError:
            continue
    return "other"


async def _returns_ids(upstream: HttpUpstream, model: str) -> bool:
    """One token, twice: once to see that ids come back, once to see that ids are taken as they are."""
    first = await _complete(upstream, model, "Hello", return_token_ids=True)
    prompt, answer = _ids(first)
    if not prompt or not answer:
        return False
    again, _ = _ids(await _complete(upstream, model, prompt + answer, return_token_ids=True))
    return again == prompt + answer


async def _takes_ids_in_chats(upstream: HttpUpstream, model: str) -> bool:
    """Ids given beside a chat's messages, as the stages of disaggregated serving do, become its prompt."""
    given = _ids(await _complete(upstream, model, "Hello", return_token_ids=True))[0]
    body = {
        "model": model, "messages": [{"role": "user", "content": ""}], "max_tokens": 1, "temperature": 0,
        "return_token_ids": True, "kv_transfer_params": {"prompt_token_ids": given},
    }  # fmt: skip
    answer = await _ask(upstream, Call(_CHAT, orjson.dumps(body), False))
    return bool(given) and isinstance(answer, dict) and answer.get("prompt_token_ids") == given


async def _parses(upstream: HttpUpstream, model: str) -> tuple[bool, bool]:
    """Are chats' answers parsed into thoughts, and into tool calls?

    vLLM refuses tools it could not parse, and counts reasoning tokens only where a parser finds them.
    """
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = await _ask(upstream, Call(_CHAT, orjson.dumps(body | {"tools": [tool]}), False))
    calls = answer is not None
    if not calls:
        answer = await _ask(upstream, Call(_CHAT, orjson.dumps(body), False))
    return fields(fields(answer, "usage"), "completion_tokens_details").get("reasoning_tokens") is not None, calls


async def _fingerprint(upstream: HttpUpstream, model: str) -> str | None:
    answer = await _complete(upstream, model, "Hello")
    found = answer.get("system_fingerprint") if isinstance(answer, dict) else None
    return found if isinstance(found, str) else None


async def _thinking(upstream: HttpUpstream, model: str) -> Thinking | None:
    """Prompts that end inside a thought, and after one: is what follows shown as more of it, and as content?

    With marks that the model's tokenizer knows as tokens. A parser that does not look at the prompt, or that looks for
    marks in the text alone, takes one for the other.
    """
    prompt = _ids(await _complete(upstream, model, "Hello", return_token_ids=True))[0]
    for opening, closing in _MARKS:
        marks = [await _tokens(upstream, model, mark) for mark in (opening, closing)]
        if any(len(mark) != 1 for mark in marks):
            continue
        thought = await _tokens(upstream, model, "\nOkay, so the")
        if len(thought) < 3:
            return None  # what is forced are two of its tokens
        inside = [*prompt, *marks[0], *thought]
        after = [*inside, *marks[1], *thought]
        if await _fields(upstream, model, inside) != {"reasoning"} or await _fields(upstream, model, after) != {
            "content"
        }:
            return None
        found = Thinking(marks[0][0], marks[1][0], waits=await _grammar_waits(upstream, model, inside))
        return await _counts(upstream, model, prompt, thought, found)
    return None


async def _counts(
    upstream: HttpUpstream, model: str, prompt: list[int], thought: list[int], found: Thinking
) -> Thinking:
    """How reasoning tokens are counted in a thought that is cut: the same forced answer, whole and its second half."""
    one, two = thought[1:3]
    forced, cut = [found.opens, one, two, found.closes], 2
    asked = ((prompt, forced), (prompt + forced[:cut], forced[cut:]))
    whole, rest = [await _forced(upstream, model, *halves) for halves in asked]
    if whole is not None and rest is not None:
        told, later = whole.counts, rest.counts
        marked = [between(whole.tokens[: n + 1], found) for n in range(len(whole.tokens))]
        if told == marked and not any(later):
            found = found._replace(streamed=Count.MARKED)
        elif told[cut - 1] + later[-1] == told[-1]:
            found = found._replace(streamed=Count.SUMMED)
    document, half = [await _forced_document(upstream, model, *halves) for halves in asked]
    if whole is None or document is None or half is None:
        return found
    return found._replace(whole=_whole(found, whole, document, half, cut))


def _whole(found: Thinking, streamed: _Forced, one: _Forced, two: _Forced, cut: int) -> Count | None:
    """How documents count. None: one of the second half alone is not the second half of one."""
    if one.thoughts != "".join(streamed.texts[:cut]) + two.thoughts or one.content != two.content:
        return None
    if one.counts == [between(one.tokens, found)] and two.counts == [0]:
        return Count.MARKED
    before = one.counts[0] - two.counts[0]
    ways = {cut: Count.EVERY, cut - 1: Count.UNMARKED, 0: Count.NOTHING}
    return ways.get(before) if before or not one.counts[0] else None


class _Forced(NamedTuple):
    """What became of a forced answer; of a stream a text and a count for each token, of a document one count."""

    tokens: list[int]
    counts: list[int]
    texts: list[str]
    thoughts: str
    content: str


def _forcing(model: str, prompt: list[int], tokens: list[int]) -> dict[str, Any]:
    """A chat whose answer begins with these tokens: each is likelier than all later ones, until it has been said."""
    return {
        "model": model, "messages": [{"role": "user", "content": ""}], "max_tokens": len(tokens) + 3, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "repetition_penalty": 1e6,
        "logit_bias": {str(token): 100 - 18 * n for n, token in enumerate(tokens)},
        "kv_transfer_params": {"prompt_token_ids": prompt},
    }  # fmt: skip


async def _forced(upstream: HttpUpstream, model: str, prompt: list[int], tokens: list[int]) -> _Forced | None:
    """As a stream. None: something else was said, or not token by token."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = _forcing(model, prompt, tokens) | {"stream": True, "stream_options": options}
    seen = _Forced([], [], [], "", "")
    for chunk in await _chunks(upstream, body):
        for choice in objects(chunk, "choices"):
            ids = choice.get("token_ids") or []
            if len(ids) == 1:
                seen.tokens.append(ids[0])
                seen.counts.append(_reasoning_tokens(chunk))
                seen.texts.append(fields(choice, "delta").get("reasoning") or "")
            elif ids:
                return None
    return seen if seen.tokens[: len(tokens)] == tokens else None


async def _forced_document(upstream: HttpUpstream, model: str, prompt: list[int], tokens: list[int]) -> _Forced | None:
    answer = await _ask(upstream, Call(_CHAT, orjson.dumps(_forcing(model, prompt, tokens)), False))
    choice = first(answer, "choices")
    message, said = fields(choice, "message"), entries(choice, "token_ids")
    if not message or said[: len(tokens)] != tokens:
        return None
    thoughts, content = message.get("reasoning") or "", message.get("content") or ""
    return _Forced(said, [_reasoning_tokens(answer)], [], thoughts, content)


def _reasoning_tokens(answer: Any) -> int:
    count = fields(fields(answer, "usage"), "completion_tokens_details").get("reasoning_tokens")
    return count if isinstance(count, int) else -1


async def _grammar_waits(upstream: HttpUpstream, model: str, inside: list[int]) -> bool:
    """Inside a thought, is anything said that a grammar would not have let pass?"""
    body = {
        "model": model, "messages": [{"role": "user", "content": ""}], "max_tokens": 3, "temperature": 0,
        "ignore_eos": True, "structured_outputs": {"choice": ["zq"]},
        "kv_transfer_params": {"prompt_token_ids": inside},
    }  # fmt: skip
    answer = await _ask(upstream, Call(_CHAT, orjson.dumps(body), False))
    said = fields(first(answer, "choices"), "message").get("reasoning") or ""
    return bool(said) and not said.strip().startswith("z")


async def _tokens(upstream: HttpUpstream, model: str, text: str) -> list[int]:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    async with asyncio.timeout(_PATIENCE), upstream.open(_tokenize(body), request_id="probe") as session:
        return entries(document(await session.whole()), "tokens")


def _tokenize(body: dict[str, Any]) -> Call:
    return Call("/tokenize", orjson.dumps(body), False)


async def _fields(upstream: HttpUpstream, model: str, prompt: list[int]) -> set[str]:
    """Where the text of a few tokens after these comes."""
    body = {
        "model": model, "messages": [{"role": "user", "content": ""}], "max_tokens": 4, "temperature": 0,
        "ignore_eos": True, "stream": True, "kv_transfer_params": {"prompt_token_ids": prompt},
    }  # fmt: skip
    seen: set[str] = set()
    for chunk in await _chunks(upstream, body):
        for choice in objects(chunk, "choices"):
            seen |= {name for name in ("reasoning", "content") if fields(choice, "delta").get(name)}
    return seen


async def _chunks(upstream: HttpUpstream, body: dict[str, Any]) -> list[Any]:
    """All events of a chat."""
    found = []
    async with (
        asyncio.timeout(_PATIENCE),
        upstream.open(Call(_CHAT, orjson.dumps(body), True), request_id="probe") as session,
    ):
        async for payloads in session:
            found += [document(payload) for payload in payloads]
    return found


async def _shows_ids(upstream: HttpUpstream, model: str) -> bool:
    """llama.cpp: ids come beside log-probabilities, and a prompt may mix texts and ids."""
    first = _shown(await _complete(upstream, model, "Hello", logprobs=1))
    return first is not None and _shown(await _complete(upstream, model, ["Hello", first], logprobs=1)) is not None


def _shown(answer: Any) -> int | None:
    found = first(fields(first(answer, "choices"), "logprobs"), "content").get("id")
    return found if isinstance(found, int) else None


async def generates(upstream: HttpUpstream, model: str) -> bool:
    """Does it answer a short request of ours, as a completion or a chat?"""
    chat = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        return (
            await _complete(upstream, model, "Hello") is not None
            or await _ask(upstream, Call(_CHAT, orjson.dumps(chat), False)) is not None
        )
    except (UpstreamError, TimeoutError):
        return False


async def _complete(upstream: HttpUpstream, model: str, prompt: str | list[Any], **more: Any) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    return await _ask(upstream, _call(body, stream=False))


async def _ask(upstream: HttpUpstream, call: Call) -> Any:
    try:
        async with asyncio.timeout(_PATIENCE), upstream.open(call, request_id="probe") as session:
            answer = document(await session.whole())
    except UpstreamError as error:
        if error.retryable:
            raise
        _log.debug("upstream %s: probe for token ids: %s", upstream.id, error)
        return None
    if not entries(answer, "choices"):
        # Not an answer without ids but no answer: taken for a no, one bad moment would unslice a model for long.
        raise UpstreamUnavailable(f"{upstream.id}: the probe's answer cannot be read", cause="garbage")
    return answer


def _ids(answer: Any) -> tuple[list[int], list[int]]:
    choice = first(answer, "choices")
    return entries(choice, "prompt_token_ids"), entries(choice, "token_ids")


async def _orders(upstream: HttpUpstream, model: str, slots: int) -> bool:
    """Fill every slot, let an unimportant call wait, then an important one: who starts first?

    An engine may accept ``priority`` and ignore it, so only this order of events counts, seen twice. An engine that
    others use meanwhile may start both at once: that counts as no.
    """
    try:
        async with asyncio.timeout(_PATIENCE * 2):
            return await _overtakes(upstream, model, slots) and await _overtakes(upstream, model, slots)
    except (UpstreamError, TimeoutError) as error:
        _log.debug("upstream %s: probe for priorities: %s", upstream.id, error)
        return False


async def _overtakes(upstream: HttpUpstream, model: str, slots: int) -> bool:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(AsyncExitStack())
        blockers = [
            await (stack if n else one).enter_async_context(
                upstream.open(_long(model, priority=0), request_id=f"probe-block-{n}")
            )
            for n in range(slots)
        ]
        await asyncio.gather(*(_first_token(session) for session in blockers))
        started: list[str] = []
        begun = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(_start(upstream, model, 1000, "late", started, begun))
            await asyncio.sleep(_QUEUED)
            group.create_task(_start(upstream, model, -1000, "early", started, begun))
            await asyncio.sleep(_QUEUED)
            if started:
                # A slot was free after all.
                return False
            # One slot, for one of the two: were all freed at once, both would start in the same step.
            await one.aclose()
            await begun.wait()
            await stack.aclose()
        return started == ["early", "late"]


def _long(model: str, *, priority: int) -> Call:
    body = {
        "model": model, "prompt": "Count.", "max_tokens": 512, "ignore_eos": True, "stream": True, "priority": priority,
    }  # fmt: skip
    return _call(body, stream=True)


async def _start(
    upstream: HttpUpstream, model: str, priority: int, name: str, started: list[str], begun: asyncio.Event
) -> None:
    try:
        async with upstream.open(_long(model, priority=priority), request_id=f"probe-{name}") as session:
            await _first_token(session)
            started.append(name)
    except UpstreamError:
        started.append("refused")
    begun.set()


async def _first_token(session: HttpSession) -> None:
    async for _ in session:
        return


def _call(body: dict[str, Any], *, stream: bool) -> Call:
    return Call(_COMPLETIONS, orjson.dumps(body), stream)
