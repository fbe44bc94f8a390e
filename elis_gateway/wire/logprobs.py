"""Log-probabilities of an answer's tokens, call after call.

Chats list one entry per token. Completions have four parallel lists, of which ``text_offset`` counts characters from
the beginning of the call: a continuation's are moved to where its text stands in the answer.

Knows: both shapes. Never: which tokens are kept (told by ``commit`` and ``drop``).
"""

from __future__ import annotations

from typing import Any

__all__ = ["Logprobs"]

_LISTS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")


class Logprobs:
    """What the client asked to be told of every token."""

    __slots__ = ("_chat", "_kept", "_new", "_next")

    def __init__(self, chat: bool) -> None:
        self._chat = chat
        self._kept: list[Any] = []
        """Of completions, one tuple per token."""
        self._new: list[Any] = []
        self._next = 0
        """Offset of the next token."""

    def take(self, choice: dict[str, Any]) -> None:
        """A delta's or a document's own, corrected in place."""
        shown = choice.get("logprobs")
        if not shown:
            return
        if self._chat:
            self._new += shown.get("content") or ()
            return
        offsets = []
        for token in shown["tokens"]:
            offsets.append(self._next)
            self._next += len(token)
        shown["text_offset"] = offsets
        self._new += zip(*(shown[name] for name in _LISTS), strict=True)

    def commit(self) -> None:
        """What was taken is part of the answer."""
        self._kept += self._new
        self._new = []

    def drop(self) -> None:
        """What was taken since the last ``commit`` is not."""
        self._new = []
        self._next = self._end()

    def unkeep(self) -> None:
        """The last token is not part of the answer yet."""
        self._kept.pop()
        self._next = self._end()

    def reset(self) -> None:
        """Forget the answer: it is asked for again."""
        self._kept, self._new, self._next = [], [], 0

    def document(self) -> dict[str, Any]:
        """Of the whole answer."""
        if self._chat:
            return {"content": self._kept}
        columns = zip(*self._kept, strict=True) if self._kept else ((), (), (), ())
        return dict(zip(_LISTS, map(list, columns), strict=True))

    def _end(self) -> int:
        if self._chat or not self._kept:
            return 0
        offset, _, token, _ = self._kept[-1]
        return int(offset) + len(token)
