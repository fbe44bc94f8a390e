"""Prompt files in the formats people have: what is asked, and the recorded answer where there is one.

Knows: JSONL, JSON and CSV (each also ``.gz``) of plain prompts, prompt and answer, OpenAI messages, ShareGPT
conversations, LMSYS-Chat conversations, ``{"prompts": [...]}``, training rows with ``input_prompt``. Never: what
becomes of them.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from elis_gateway.errors import ConfigError

__all__ = ["Prompt", "guess_tokens", "read"]

Turn = tuple[str, str]
"""(role, text)"""

_PROMPT = ("prompt", "input_prompt", "instruction", "question", "text", "input")
_ANSWER = ("answer", "response", "output_prompt", "completion", "output")
_TOKENS = ("tokens", "n_tokens", "number_of_output_tokens", "completion_tokens", "output_tokens")
_TALK = ("messages", "conversations", "conversation")
_KIND = ("app", "kind", "domain", "category")
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to ask."""

    prompt: str
    """The last user message."""
    turns: tuple[Turn, ...] = ()
    """What was said before, a system message included."""
    answer: str = ""
    tokens: int = 0
    """Length of the recorded answer, as the file says or guessed from its text; 0: no answer is known."""
    prompt_tokens: int = 0
    app: str = ""


def guess_tokens(text: str) -> int:
    """About what a tokenizer would count: four characters of ASCII to a token, one and a half of anything else."""
    plain = sum(character < "\x80" for character in text)
    return max(1, round(plain / 4 + (len(text) - plain) / 1.5))


@lru_cache(maxsize=8)
def read(path: str, *, turns: str = "first") -> tuple[Prompt, ...]:
    """Every prompt of a file. Of a conversation the ``first`` user turn, or ``all``, each with what came before.

    Raises ConfigError naming the place.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
            file = file.with_suffix("")
    except (OSError, EOFError) as error:
        raise ConfigError(f"prompts {path}: cannot be read: {error}") from None
    found = [
        prompt for place, row in _rows(data, file.suffix, path) for prompt in _prompts(row, f"prompts {place}", turns)
    ]
    if not found:
        raise ConfigError(f"prompts {path}: no prompt in it")
    return tuple(found)


def _rows(data: bytes, suffix: str, path: str) -> Iterator[tuple[str, Any]]:
    if suffix == ".csv":
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"prompts {path}: not UTF-8: {error.reason}") from None
        yield from ((f"{path}:{number}", row) for number, row in enumerate(csv.DictReader(lines), 2))
        return
    try:
        whole = orjson.loads(data)
    except orjson.JSONDecodeError:
        yield from _lines(data, path)
        return
    if isinstance(whole, dict) and isinstance(whole.get("prompts"), list):
        whole = whole["prompts"]
    rows = whole if isinstance(whole, list) else [whole]
    yield from ((f"{path}: entry {number}", row) for number, row in enumerate(rows, 1))


def _lines(data: bytes, path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise ConfigError(f"prompts {path}:{number}: not JSON: {error}") from None


def _prompts(row: Any, where: str, turns: str) -> Iterator[Prompt]:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected a text or an object, got {type(row).__name__}")
    talk = next((row[name] for name in _TALK if isinstance(row.get(name), list)), None)
    if talk is not None:
        yield from _of_talk(row, talk, where, turns)
        return
    prompt = _text(row, _PROMPT)
    if prompt is None:
        known = ", ".join((*_PROMPT[:4], *_TALK))
        raise ConfigError(f"{where}: expected one of the fields {known}; got {', '.join(map(str, row)) or 'nothing'}")
    system = row.get("system")
    before = (("system", system),) if isinstance(system, str) and system else ()
    yield _made(row, prompt, before, _text(row, _ANSWER) or "", _number(row))


def _of_talk(row: Mapping[str, Any], talk: Sequence[Any], where: str, turns: str) -> Iterator[Prompt]:
    said: list[Turn] = []
    for message in talk:
        role, text = _message(message, where)
        said.append((role, text))
    for at, (role, text) in enumerate(said):
        if role != "user":
            continue
        answered = at + 1 < len(said) and said[at + 1][0] == "assistant"
        # A count in the row is that of its last answer.
        tokens = _number(row) if at + 2 >= len(said) else 0
        yield _made(row, text, tuple(said[:at]), said[at + 1][1] if answered else _text(row, _ANSWER) or "", tokens)
        if turns == "first":
            return


def _message(message: Any, where: str) -> Turn:
    """OpenAI's and LMSYS' ``role``/``content``, ShareGPT's ``from``/``value``."""
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value"))
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
        if isinstance(role, str) and isinstance(text, str):
            return _ROLES.get(role, role), text
    raise ConfigError(f"{where}: expected messages with role and content (or from and value), got {str(message)[:80]}")


def _made(row: Mapping[str, Any], prompt: str, before: tuple[Turn, ...], answer: str, tokens: int) -> Prompt:
    if not tokens and answer:
        tokens = guess_tokens(answer)
    given = row.get("prompt_tokens")
    size = given if isinstance(given, int) and given > 0 else guess_tokens(prompt + "".join(t for _, t in before))
    return Prompt(prompt, before, answer, tokens, size, _text(row, _KIND) or "")


def _text(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((row[name] for name in names if isinstance(row.get(name), str) and row[name]), None)


def _number(row: Mapping[str, Any]) -> int:
    for name in _TOKENS:
        try:
            return max(int(row[name]), 0)
        except (KeyError, TypeError, ValueError):
            continue
    return 0
