"""Stop strings, searched in text that arrives in pieces.

Knows: how vLLM chooses among several matches (the one that completes earliest; ties by list order,
``v1/engine/detokenizer.check_stop_strings``). Never: tokens, calls.
"""

from __future__ import annotations

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

    ``tail`` is the text held back. It is plain state: a caller that takes text back restores it.
    """

    __slots__ = ("_inner", "_stops", "tail")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._inner = frozenset("".join(stop[:-1] for stop in stops))
        """Characters that can end an unfinished match."""
        self.tail = ""

    def push(self, text: str) -> Pushed:
        """Take the next piece of text."""
        if not text:
            return Pushed("", None, False)
        text = self.tail + text
        best: str | None = None
        best_end = 0
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or start + len(stop) < best_end):
                best, best_end = stop, start + len(stop)
        if best is not None:
            self.tail = ""
            return Pushed(text[: best_end - len(best)], best, best_end == len(text))
        held = self._held(text)
        self.tail = text[len(text) - held :]
        return Pushed(text[: len(text) - held], None, False)

    def flush(self) -> str:
        """The text held back, once the answer has ended without a match."""
        text, self.tail = self.tail, ""
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
