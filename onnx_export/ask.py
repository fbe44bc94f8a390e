"""Asking a running OpenAI-compatible server for answers to a file of prompts: what ``collect --ask`` does.

Knows: HTTP, one request at a time per worker, what was answered before. Never: tokens, groups, models.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from elis_gateway.errors import ConfigError, UpstreamError
from onnx_export.records import open_text, read_prompts

__all__ = ["ask"]


def ask(
    url: str,
    prompts: Path,
    out: Path,
    *,
    model: str,
    api_key: str | None = None,
    max_tokens: int = 2048,
    temperature: float = 0.7,
    concurrency: int = 4,
    seed: int = 0,
    done: Callable[[int, int], None] = lambda _answered, _of: None,
) -> int:
    """Append an answer per prompt to ``out`` (JSON Lines); prompts answered there before are skipped.

    ``done`` is told how many are answered, of how many. Returns the answers in the file. A request that fails is tried
    three times; raises ``UpstreamError`` where it fails again, keeping what was answered."""
    wanted = read_prompts(prompts)
    if not wanted:
        raise ConfigError(f"{prompts}: no prompts")
    have = _answered(out, model)
    todo = [(at, row) for at, row in enumerate(wanted) if row["prompt"] not in have]
    total = len(wanted)
    done(total - len(todo), total)
    if todo:
        request = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        try:
            asyncio.run(_all(url.rstrip("/"), todo, out, request, api_key, concurrency, seed, total, done))
        except* UpstreamError as failed:
            first = failed.exceptions[0]
            raise first from None
    return total


def _answered(out: Path, model: str) -> set[str]:
    """What an earlier run left; a line cut off by its end is dropped, so that the next one starts on its own."""
    if not out.exists():
        return set()
    sound, have = 0, set()
    with out.open("rb+") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            if row.get("model") == model:
                have.add(str(row["prompt"]))
            sound += len(line)
        file.truncate(sound)
    return have


async def _all(
    url: str,
    todo: Sequence[tuple[int, dict[str, Any]]],
    out: Path,
    request: dict[str, Any],
    api_key: str | None,
    concurrency: int,
    seed: int,
    total: int,
    done: Callable[[int, int], None],
) -> None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    waiting = list(reversed(todo))
    answered = total - len(todo)
    # A long answer may take minutes; what must be quick is the connection.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        with open_text(out, "at") as file:

            async def work() -> None:
                nonlocal answered
                while waiting:
                    at, row = waiting.pop()
                    made = await _one(session, url, row, request | {"seed": seed + at})
                    file.write(json.dumps(made, ensure_ascii=False) + "\n")
                    file.flush()
                    answered += 1
                    done(answered, total)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(todo))):
                    group.create_task(work())


async def _one(
    session: aiohttp.ClientSession, url: str, row: dict[str, Any], request: dict[str, Any]
) -> dict[str, Any]:
    body = request | {"messages": [{"role": "user", "content": row["prompt"]}]}
    error = "no answer"
    for attempt in range(3):
        if attempt:
            await asyncio.sleep(attempt)
        try:
            async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
                if reply.status != 200:
                    error = f"status {reply.status}: {(await reply.text())[:200]}"
                    if reply.status < 500 and reply.status != 429:
                        break
                    continue
                answer = await reply.json()
            choice = answer["choices"][0]
            return {
                **row,
                "model": request["model"],
                "answer": choice["message"]["content"] or "",
                "completion_tokens": answer.get("usage", {}).get("completion_tokens"),
                "finish_reason": choice.get("finish_reason"),
            }
        except (aiohttp.ClientError, TimeoutError, KeyError, IndexError, TypeError, ValueError) as failed:
            error = f"{type(failed).__name__}: {failed}"
    raise UpstreamError(f"{url}: {error}", cause="collect", retryable=False)
