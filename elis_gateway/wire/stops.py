"""Stop strings, searched in text that arrives in pieces.

Knows: how vLLM chooses among several matches (the one that completes earliest; ties by list order,
``v1/engine/detokenizer.check_stop_strings``). Never: tokens, calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Pushed", "Stops"]


class Pushed(NamedTuple):
    """What one piece of text released."""

    shown: str
    """Text that can no longer be part of a match; up to the match where there is one."""
    stop: str | None
    """The stop string that matched."""
    at_end: bool
    """The match completes with the last character of the piece."""


class Stops:
    """Holds back only what may still become a stop string, and finds one across any split of the text.

    ``tail`` is the end of the text that may be the beginning of one: held back, or, where the client wants stop strings
    in its text (``include``), shown all the same. It is plain state: a caller that takes text back restores it.
    """

    __slots__ = ("_include", "_inner", "_stops", "clear", "tail")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._inner = frozenset("".join(stop[:-1] for stop in stops))
        """Characters that can end an unfinished match."""
        self.clear: Callable[[str], bool] = frozenset(stop[0] for stop in stops).isdisjoint
        """With no tail, is this text of no interest at all? One quick test for nearly all text."""
        self.tail = ""

    def push(self, text: str, *, search: bool = True) -> Pushed:
        """Take the next piece of text. Without ``search`` no match may end in it, though one may begin."""
        if not text:
            return Pushed("", None, False)
        known = len(self.tail)
        text = self.tail + text
        best: str | None = None
        best_end = 0
        for stop in self._stops if search else ():
            start = text.find(stop, max(known - len(stop) + 1, 0))
            if start >= 0 and (best is None or start + len(stop) < best_end):
                best, best_end = stop, start + len(stop)
        if best is not None:
            self.tail = ""
            shown = text[known:best_end] if self._include else text[: best_end - len(best)]
            return Pushed(shown, best, best_end == len(text))
        held = self._held(text)
        self.tail = text[len(text) - held :]
        return Pushed(text[known:] if self._include else text[: len(text) - held], None, False)

    @property
    def held(self) -> str:
        """The text that is held back now."""
        return "" if self._include else self.tail

    def flush(self) -> str:
        """The text held back, once the answer has ended without a match."""
        text, self.tail = self.held, ""
        return text

    def _held(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        if text[-1] not in self._inner:
            return 0
        held = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        return held
