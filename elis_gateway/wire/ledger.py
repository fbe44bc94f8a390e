"""What of an answer is kept, what is still pending, and what its client may see.

Knows: boundaries, pending tokens, text held back for stop strings. Never: JSON, calls, why a call ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from elis_gateway.wire.logprobs import Logprobs
from elis_gateway.wire.stops import Pushed, Stops

__all__ = ["Ledger"]


class Ledger:
    """The answer so far: kept deltas, and those since the last boundary, which a cut takes back.

    ``tokens`` holds what a continuation's prompt needs: token ids, or text where an engine gives no id.
    """

    __slots__ = (
        "_held", "_new_count", "_new_text", "_new_tokens", "_tail", "count", "logprobs", "pieces", "stops", "tokens",
        "unsure",
    )  # fmt: skip

    def __init__(self, stops: tuple[str, ...], *, include: bool = False, logprobs: Logprobs | None = None) -> None:
        """``include``: stop strings stay in the text. ``logprobs``: of each token, where the client wants them."""
        self.tokens: list[int | str] = []
        self.pieces: list[str] = []
        self.count = 0
        """Kept tokens; more than ``tokens`` where text stands for several."""
        self.unsure = 0
        """The last so many kept tokens have given all the text there is, but may end in one that has more to come."""
        self.stops = Stops(stops, include=include) if stops else None
        self.logprobs = logprobs
        self._tail = ""
        self._new_tokens: list[int | str] = []
        self._new_text: list[str] = []
        self._new_count = 0
        self._held: list[bytes] = []

    @property
    def text(self) -> str:
        """The kept text."""
        if len(self.pieces) > 1:
            self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""

    @property
    def pending(self) -> int:
        """Tokens since the last boundary."""
        return self._new_count

    def search(self, text: str, *, search: bool = True) -> Pushed:
        """What of this text may be shown, and the stop string it completes. Call once per delta, then ``add``."""
        return Pushed(text, None, False) if self.stops is None else self.stops.push(text, search=search)

    def add(self, text: str, tokens: Sequence[int | str], count: int, event: bytes) -> None:
        """A delta and the client event made of it (empty: nothing to show)."""
        self._new_tokens.extend(tokens)
        self._new_text.append(text)
        self._new_count += count
        if event:
            self._held.append(event)

    def commit(self, out: list[bytes], sure: bool) -> None:
        """Keep everything, and release the events. ``sure``: the last token has no text to come."""
        self.tokens += self._new_tokens
        self.pieces += self._new_text
        self.count += self._new_count
        self.unsure = 0 if sure else self.unsure + self._new_count
        out += self._held
        self._clear()
        if self.stops is not None:
            self._tail = self.stops.tail
        if self.logprobs is not None:
            self.logprobs.commit()

    def drop(self) -> int:
        """Take back everything since the last boundary; returns how many tokens that were."""
        dropped = self._new_count
        self._clear()
        if self.stops is not None:
            self.stops.tail = self._tail
        if self.logprobs is not None:
            self.logprobs.drop()
        return dropped

    def unkeep(self) -> None:
        """The last token's text was still to come: it is not part of the answer yet."""
        self.tokens.pop()
        self.count -= 1
        self.unsure -= 1
        if self.logprobs is not None:
            self.logprobs.unkeep()

    def shorten(self, surplus: int) -> None:
        """Cut so many characters off the kept text: a stop string, and what came after it in the same delta."""
        if surplus:
            self.pieces[:] = [self.text[:-surplus]]

    def reset(self) -> None:
        """Forget the answer: it is asked for again."""
        self.drop()
        self.tokens, self.pieces, self.count, self.unsure, self._tail = [], [], 0, 0, ""
        if self.stops is not None:
            self.stops.tail = ""
        if self.logprobs is not None:
            self.logprobs.reset()

    def _clear(self) -> None:
        self._new_tokens = []
        self._new_text = []
        self._new_count = 0
        self._held = []
