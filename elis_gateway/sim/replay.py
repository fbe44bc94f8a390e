"""Recorded answers spoken again, token by token, so that predictors read real text.

Knows: the recording's rows, which ids stand for which place in which answer. Never: HTTP, pacing.

Every recorded row has an id for each of its pieces, so a continuation by ids says by itself where it stands, and one
id lost, doubled or out of place is noticed: what follows then is another answer, loudly wrong. A prompt is found by its
text: the whole prompt of a completion, the last user message of a chat, or the conversation written out as the
recordings do (``User: ...``). A prompt nobody recorded is answered by the synthetic language.

Continuing by *text* works here as on a real engine with plain text: what follows a recorded prompt, or the open last
message of a chat, is taken as the answer so far.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from elis_gateway.errors import ConfigError
from elis_gateway.sim.language import Language, Sampling
from elis_gateway.sim.script import Stepper
from elis_gateway.sim.tokens import END, LENGTH, VOCABULARY, Detokenizer, encode, piece
from elis_gateway.sim.voice import Message, Spoken, render

__all__ = ["Pair", "Recorded", "read", "split"]

_WORD = re.compile(r" ?[A-Za-z]{1,6}|[A-Za-z]{1,4}| ?[0-9]{1,3}|\s{1,8}|.", re.DOTALL)


class Pair(NamedTuple):
    """One recorded exchange."""

    prompt: str
    answer: str


def split(text: str) -> list[str]:
    """Whole-character pieces, about as many as a real tokenizer makes of English; their join is the text."""
    return _WORD.findall(text)


def read(path: str | Path) -> list[Pair]:
    """Rows with ``prompt`` and ``answer`` (or ``response``), one JSON object per line, gzip where named ``.gz``.

    Raises ConfigError naming the line that is not such a row.
    """
    name = Path(path)
    try:
        data = name.read_bytes()
        lines = (gzip.decompress(data) if name.suffix == ".gz" else data).split(b"\n")
    except OSError as exc:
        raise ConfigError(f"recording {str(name)!r}: {exc.strerror or exc}") from None
    return [_pair(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _pair(line: bytes, where: str) -> Pair:
    try:
        row: Any = orjson.loads(line)
        answer = row["answer"] if "answer" in row else row["response"]
        if isinstance(row["prompt"], str) and isinstance(answer, str):
            return Pair(row["prompt"], answer)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pass
    raise ConfigError(f"recording {where}: expected an object with the texts 'prompt' and 'answer' or 'response'")


_ROW = 1 << 21
"""``_ROW + k``: "an answer of row k starts here". Special, no text."""
_WORDS = 1 << 24
_STRIDE = 1 << 16
"""``_WORDS + k * _STRIDE + j``: piece j of row k's answer."""


class _Reader:
    """A recorded answer from some place on. The answer starts over where a forced length asks for more."""

    def __init__(self, base: int, size: int, at: int, length: int) -> None:
        self._base = base
        self._size = size
        self._at = at
        self._length = length

    def step(self, *, may_end: bool = True) -> int:
        self._at += 1
        if may_end and self._at >= self._length:
            return END
        return self._base + (self._at - 1) % self._size


class Recorded:
    """A voice (``sim.voice.Voice``) that speaks recorded answers."""

    def __init__(self, pairs: Iterable[Pair], *, fallback: Language) -> None:
        self.pairs = list(pairs)
        self._pieces: dict[int, list[str]] = {}
        self._rows: dict[str, int] = {}
        self._by_start: dict[str, list[int]] = {}
        for row, pair in enumerate(self.pairs):
            if self._rows.setdefault(pair.prompt, row) == row:
                self._by_start.setdefault(pair.prompt[:24], []).append(row)
        self._short = sorted({len(start) for start in self._by_start if len(start) < 24}, reverse=True)
        self._spoken = Spoken(fallback)

    @classmethod
    def load(cls, path: str | Path, *, fallback: Language) -> Recorded:
        """From a file. Raises ConfigError."""
        return cls(read(path), fallback=fallback)

    def pieces(self, row: int) -> list[str]:
        """A row's answer as it is streamed; one empty piece for an empty answer."""
        found = self._pieces.get(row)
        if found is None:
            found = self._pieces[row] = split(self.pairs[row].answer)[:_STRIDE] or [""]
        return found

    def length(self, prompt: str) -> int | None:
        """Tokens of a recorded prompt's answer, end-of-sequence included; None: not recorded."""
        row = self._rows.get(prompt)
        return None if row is None else len(self.pieces(row)) + 1

    def prompt(self, text: str, *, length: int | None) -> list[int]:
        found = self._find(text)
        answer = None if found is None else self._answer(found, text[len(self.pairs[found].prompt) :], length)
        if found is None or answer is None:
            return self._spoken.prompt(text, length=length)
        return [*encode(self.pairs[found].prompt), *answer]

    def chat(
        self, messages: Sequence[Message], *, open_turn: bool, continue_last: bool, length: int | None
    ) -> list[int]:
        asked = messages[:-1] if continue_last else messages
        so_far = messages[-1][1] if continue_last else ""
        row = self._of_chat(asked)
        answer = None if row is None else self._answer(row, so_far, length)
        if answer is None:
            return self._spoken.chat(messages, open_turn=open_turn, continue_last=continue_last, length=length)
        return [*render(asked), *answer]

    def stepper(self, ids: Sequence[int], sampling: Sampling) -> Stepper:
        for position in range(len(ids) - 1, -1, -1):
            if _ROW <= ids[position] < _ROW + len(self.pairs):
                return self._reader(ids, position) or self._broken(ids, sampling)
        return self._broken(ids, sampling)

    def decoder(self, ids: Sequence[int]) -> Detokenizer:
        return Detokenizer(ids, self._piece)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._piece, ids)).decode("utf-8", "replace")

    def _find(self, text: str) -> int | None:
        """The row whose prompt this text is, or starts with (the longest)."""
        row = self._rows.get(text)
        if row is not None:
            return row
        for size in (24, *self._short):
            rows = [row for row in self._by_start.get(text[:size], ()) if text.startswith(self.pairs[row].prompt)]
            if rows:
                return max(rows, key=lambda row: len(self.pairs[row].prompt))
        return None

    def _of_chat(self, messages: Sequence[Message]) -> int | None:
        turns = [(role, text) for role, text in messages if role in ("user", "assistant")]
        written = "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)
        last = turns[-1][1] if turns and turns[-1][0] == "user" else ""
        return self._rows.get(written, self._rows.get(written.replace("\n\n", "\n"), self._rows.get(last)))

    def _answer(self, row: int, so_far: str, length: int | None) -> list[int] | None:
        """The special tokens that open an answer, and the ids of what was said already; None: it is another answer."""
        pieces = self.pieces(row)
        ids = [_ROW + row, LENGTH + (length or len(pieces) + 1)]
        at = 0
        while so_far:
            said = pieces[at % len(pieces)]
            if not said or not so_far.startswith(said):
                return None
            ids.append(_WORDS + row * _STRIDE + at % len(pieces))
            so_far = so_far[len(said) :]
            at += 1
        return ids

    def _reader(self, ids: Sequence[int], position: int) -> _Reader | None:
        row = ids[position] - _ROW
        base, size = _WORDS + row * _STRIDE, len(self.pieces(row))
        said = ids[position + 2 :]
        marker = ids[position + 1] if position + 1 < len(ids) else 0
        if not LENGTH < marker < VOCABULARY or any(token != base + at % size for at, token in enumerate(said)):
            return None
        return _Reader(base, size, len(said), marker - LENGTH)

    def _broken(self, ids: Sequence[int], sampling: Sampling) -> Stepper:
        for token in ids:
            self._piece(token)
        known = [token if token < VOCABULARY else 3 + token % 256 for token in ids]
        return self._spoken.stepper(known, sampling)

    def _piece(self, token: int) -> bytes:
        if token < VOCABULARY:
            return piece(token)
        row, place = divmod(token - _WORDS, _STRIDE)
        if 0 <= row < len(self.pairs) and place < len(self.pieces(row)):
            return self.pieces(row)[place].encode()
        if _ROW <= token < _ROW + len(self.pairs):
            return b""
        raise ValueError(f"Token id {token} is out of vocabulary")
