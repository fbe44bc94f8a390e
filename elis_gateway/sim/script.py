"""One call worked out beforehand: every token, the text its delta carries, and how the call ends.

Knows: hold-back of unfinished characters and of what may become a stop string, vLLM's order of checks. Never: pacing,
JSON, HTTP.

The rules are read from vLLM 0.32.0's ``v1/engine/detokenizer.py`` and were compared with a running one: ids are
reported at once while text lags behind them; a stop string is searched in this call's text only and not before
``min_tokens``; the tokens that complete it stay in ids and usage; end-of-sequence and stop tokens are reported as ids
without text; what is unfinished at the end of a call is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elis_gateway.sim.tokens import END, Detokenizer

__all__ = ["Script", "Stepper", "Stops", "write"]


class Stepper(Protocol):
    """Whatever says the next token."""

    def step(self, *, may_end: bool = True) -> int: ...


@dataclass(frozen=True)
class Stops:
    """When a call ends."""

    limit: int
    """Most tokens of this call."""
    strings: tuple[str, ...] = ()
    tokens: frozenset[int] = frozenset()
    include: bool = False
    """Keep the stop string in the text."""
    minimum: int = 0
    """No end before so many tokens of this call."""
    ignore_end: bool = False


@dataclass
class Script:
    """What a call says. ``ids`` and ``texts`` run in parallel: token i and the text of the delta that brings it."""

    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish: str = "length"
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class _HeldText:
    """Output text of which the last characters are held back while they may begin a stop string."""

    def __init__(self, stops: Stops) -> None:
        self._stops = stops
        longest = max(map(len, stops.strings), default=0)
        self._hold = longest - 1 if longest and not stops.include else 0
        self._text = ""
        self._given = 0

    def add(self, new: str, *, search: bool) -> tuple[str, str | None]:
        """The text to send now, and the stop string that was found."""
        if not self._stops.strings:
            return new, None
        self._text += new
        found = self._find(len(new)) if search and new else None
        if found is not None:
            stop, end = found
            self._text = self._text[:end]
            return self.flush(), stop
        upto = len(self._text) - self._hold
        if upto <= self._given:
            return "", None
        text, self._given = self._text[self._given : upto], upto
        return text, None

    def flush(self) -> str:
        text, self._given = self._text[self._given :], len(self._text)
        return text

    def _find(self, new: int) -> tuple[str, int] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops.strings:
            at = self._text.find(stop, max(len(self._text) + 1 - new - len(stop), 0))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = (at + len(stop), at, stop)
        if best is None:
            return None
        end, at, stop = best
        return stop, end if self._stops.include else at


def write(
    prompt: Sequence[int],
    model: Stepper,
    stops: Stops,
    *,
    flush_unfinished: bool = False,
    decoder: Callable[[Sequence[int]], Detokenizer] = Detokenizer,
    ends: Collection[int] = (END,),
) -> Script:
    """Run the model until the call ends.

    ``flush_unfinished``: a call cut inside a character sends what it has, U+FFFD included, as some engines do, instead
    of nothing.
    """
    script = Script()
    detokenizer = decoder(prompt)
    held = _HeldText(stops)
    ids, texts = script.ids, script.texts
    for made in range(1, stops.limit + 1):
        token = model.step(may_end=not stops.ignore_end and made > stops.minimum)
        ids.append(token)
        if token in ends or (token in stops.tokens and made > stops.minimum):
            last = detokenizer.feed(token) if stops.include else ""
            texts.append(held.flush() + last)
            script.finish = "stop"
            script.stop_reason = None if token in ends else token
            return script
        text, stop = held.add(detokenizer.feed(token), search=made > stops.minimum)
        texts.append(text)
        if stop is not None:
            script.finish, script.stop_reason = "stop", stop
            return script
    if texts:
        texts[-1] += held.flush() + (detokenizer.rest() if flush_unfinished else "")
    return script
