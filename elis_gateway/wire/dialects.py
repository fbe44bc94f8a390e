"""How each kind of engine is asked to go on, and how its deltas tell tokens from text.

Knows: per engine, the calls to make and where a delta's tokens stand. Never: what is kept of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, StrEnum
from typing import Any, Protocol

from elis_gateway.wire import calls
from elis_gateway.wire.calls import Call
from elis_gateway.wire.ledger import Ledger
from elis_gateway.wire.openai import Request, Route
from elis_gateway.wire.parameters import Way
from elis_gateway.wire.shapes import PLAIN_CHAT, PLAIN_COMPLETION, VLLM_CHAT, VLLM_COMPLETION
from elis_gateway.wire.thoughts import Thinking

__all__ = ["Boundary", "ById", "ByText", "Delta", "Dialect", "Lore", "Mode"]

_REPLACEMENT = "�"
"""An incomplete character, decoded all the same."""
_TAILS = 4
"""Tokens of which a parser may hold back the text at once."""
_LONGEST = 8
"""Tokens that surely hold the bytes of one character (at most four), whatever begins before them."""

Delta = tuple[Sequence[int | str], int]
"""A delta's tokens as a continuation's prompt needs them, and how many tokens of the engine they are."""


class Mode(StrEnum):
    """How an answer is continued after a seam."""

    IDS = "ids"
    """By token ids: exact."""
    TEXT = "text"
    """By text, tokenised again: as good as the tokeniser's round trip."""
    WHOLE = "whole"
    """Not at all: one call, relayed as it comes."""


class Boundary(Enum):
    """May a call go on after a delta?"""

    SURE = "sure"
    UNSURE = "unsure"
    """All text there is has come, but the last of its tokens may have more to give."""
    NONE = "none"


class Lore:
    """What answers of one model teach the later ones. Shared by reference; grows to at most the vocabulary."""

    __slots__ = ("can_detokenize", "closed", "documents", "fingerprint", "texts")

    def __init__(self) -> None:
        self.closed: set[int] = set()
        """Token ids that are whole characters by themselves: text is complete after them."""
        self.texts: dict[int, str] = {}
        """What some tokens are by themselves, where an engine's parser shows less."""
        self.can_detokenize = True
        """Not refused yet."""
        self.documents: dict[Route, dict[str, Any]] = {}
        """The shape of a whole (not streamed) response, by route."""
        self.fingerprint: str | None = None
        """The engine's last ``system_fingerprint``: it comes at the end, which we may not wait for."""


class Dialect(Protocol):
    """One answer's conversation with one kind of engine."""

    @property
    def mode(self) -> Mode:
        """What it continues by."""

    @property
    def plain(self) -> bool:
        """Deltas carry ``token_ids``, and one token with text is a boundary without a closer look."""

    @property
    def way(self) -> Way:
        """The same, as parameters are concerned."""

    @property
    def known_prompt(self) -> bool:
        """The prompt is known as the engine sees it: the next call may be a continuation even of an empty answer."""

    @property
    def exact(self) -> bool:
        """Every token is seen, so that counts can tell whose limit ended a call."""

    @property
    def one_document(self) -> bool:
        """A completion fetched as one document ends as a chat of this engine would, half a character at its end too."""

    @property
    def recounts(self) -> bool:
        """Its usage at the end of a window is a better count than its deltas."""

    @property
    def names_stop(self) -> bool:
        """It says which stop string ended an answer."""

    @property
    def usage_rides(self) -> bool:
        """Usage comes with the chunk that ends the answer, asked for or not, and in no chunk of its own."""

    @property
    def document(self) -> dict[str, Any]:
        """The shape of a whole response, until one was seen."""

    @property
    def completions_default(self) -> int | None:
        """``max_tokens`` of a completion that names none."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt's ids where they are known, for clients that want them."""

    def first(self, model: str, priority: int | None, limit: int | None) -> Call:
        """The client's request; ``limit`` only where it is to be shortened."""

    def more(
        self, model: str, priority: int | None, limit: int | None, tokens: list[int | str], text: str, count: int,
        *, stream: bool,
    ) -> Call:  # fmt: skip
        """Go on after the answer so far."""

    def open(self, chunk: dict[str, Any], choice: dict[str, Any]) -> int | None:
        """The first event of the first call; returns the prompt's length in tokens where it tells."""

    def read(self, chunk: dict[str, Any], choice: dict[str, Any], text: str) -> Delta | None:
        """A delta's tokens. None: an answer of such deltas cannot be continued."""

    def boundary(self, text: str, tokens: Sequence[int | str], fresh: bool) -> Boundary:
        """What may be said of the end of this delta. ``fresh``: the delta before it ended at a sure boundary."""

    def inquire(self, model: str, ledger: Ledger) -> Call | None:
        """A small call whose answer the next call needs. None: nothing to ask."""

    def informed(self, document: dict[str, Any] | None, ledger: Ledger) -> bool:
        """The answer to ``inquire``; None where the engine does not know the question. False: then the answer cannot
        go on."""

    def undress(self, chunk: dict[str, Any], choice: dict[str, Any], last: bool) -> None:
        """Take what only we asked for out of a chunk; ``last``: the answer ends with it."""

    @property
    def owed(self) -> str:
        """The end of the kept tokens' text, where a parser held it back when its call was closed."""


class ById:
    """vLLM: ``return_token_ids``, and completions that take ids as a prompt."""

    mode = Mode.IDS
    plain = True
    exact = True
    one_document = True
    recounts = False
    names_stop = True
    usage_rides = False
    completions_default = calls.COMPLETIONS_DEFAULT

    __slots__ = (
        "_alone", "_asked", "_compared", "_lore", "_request", "_settled", "_summed", "_tails", "owed", "prompt_ids",
        "way",
    )  # fmt: skip

    def __init__(self, request: Request, lore: Lore, way: Way = Way.IDS, summed: Thinking | None = None) -> None:
        """``summed``: the calls' counts of reasoning tokens are added up."""
        self._request = request
        self._summed = summed
        self.way = way
        self._lore = lore
        self._alone = False
        self._asked: int | str | None = None
        self._compared = 0
        self._settled = True
        self._tails: list[str] = []
        self.owed = ""
        self.prompt_ids: list[int] = []

    @property
    def document(self) -> dict[str, Any]:
        return VLLM_CHAT if self._request.chat else VLLM_COMPLETION

    @property
    def known_prompt(self) -> bool:
        return bool(self.prompt_ids)

    def first(self, model: str, priority: int | None, limit: int | None) -> Call:
        counts = self._summed is not None
        return calls.first(self._request, model, priority, limit, ids=True, whole_stops=True, counts=counts)

    def more(
        self, model: str, priority: int | None, limit: int | None, tokens: list[int | str], text: str, count: int,
        *, stream: bool,
    ) -> Call:  # fmt: skip
        prompt = [*self.prompt_ids, *tokens]
        return calls.by_ids(
            self._request,
            model,
            priority,
            limit or calls.BLIND_LIMIT,
            prompt,
            count,
            stream=stream,
            whole_stops=True,
            way=self.way,
            said=tokens,
            counts=self._summed is not None and self._summed.closes not in tokens,
        )

    def open(self, chunk: dict[str, Any], choice: dict[str, Any]) -> int | None:
        # Chat: beside the choices of the role chunk. Completions: in the choice of the first delta.
        self.prompt_ids = chunk.get("prompt_token_ids") or choice.get("prompt_token_ids") or []
        return len(self.prompt_ids) or None

    def read(self, chunk: dict[str, Any], choice: dict[str, Any], text: str) -> Delta | None:
        ids = choice.get("token_ids") or ()
        if not self.prompt_ids or (text and not ids):
            return None
        if not all(type(token) is int for token in ids):
            raise TypeError("token ids that are no integers")
        return ids, len(ids)

    def boundary(self, text: str, tokens: Sequence[int | str], fresh: bool) -> Boundary:
        if not text or not tokens or text[-1] == _REPLACEMENT:
            return Boundary.NONE
        last = tokens[-1]
        if not fresh and self.way in (Way.PARSED, Way.THOUGHTS):
            return Boundary.UNSURE  # the text may be what a parser held back of the tokens before
        if len(tokens) > 1:
            return Boundary.SURE if last in self._lore.closed else Boundary.UNSURE
        if fresh and isinstance(last, int):
            self._lore.closed.add(last)
        return Boundary.SURE

    def inquire(self, model: str, ledger: Ledger) -> Call | None:
        """First the last token alone, which teaches something for good; then the end of the text as it stands."""
        tokens = ledger.tokens
        if not ledger.unsure:
            return self._compare(model, ledger) if self.way in (Way.PARSED, Way.THOUGHTS) and tokens else None
        if not self._lore.can_detokenize:
            ledger.unsure = 0  # as nearly all such deltas end
            return None
        self._alone = tokens[-1] != self._asked
        self._asked = tokens[-1]
        return calls.detokenize(model, tokens[-1:] if self._alone else tokens[-_LONGEST:])

    def informed(self, document: dict[str, Any] | None, ledger: Ledger) -> bool:
        if document is None:
            self._lore.can_detokenize = False
            return True
        text = str(document["prompt"])
        last = ledger.tokens[-1]
        if not ledger.unsure:
            self._tails.append(text)
            if len(self._tails) == 1 and isinstance(last, int):
                self._lore.texts[last] = text
        elif not self._alone:
            self._asked = None
            if text.endswith(_REPLACEMENT):
                ledger.unkeep()
            else:
                ledger.unsure = 0
        elif text and _REPLACEMENT not in text and isinstance(last, int):
            self._lore.closed.add(last)
            ledger.unsure = 0
        return True

    def _compare(self, model: str, ledger: Ledger) -> Call | None:
        """Has the engine's parser shown all of the last tokens, or does it hold their end back?

        Of as many as it takes to find one that was shown whole; ``_tails`` are the texts of the last one, two, three.
        """
        tokens = ledger.tokens
        if self._compared != len(tokens):
            self._compared, self.owed = len(tokens), ""
            known = self._lore.texts.get(tokens[-1])  # type: ignore[arg-type]
            self._tails = [] if known is None else [known]
            self._settled = False
        if self._settled:
            return None
        if tails := self._tails:
            whole = len(tails[-1]) - (len(tails[-2]) if len(tails) > 1 else 0)
            shown = _shown(tails[-1], ledger.text)
            self._settled = shown >= whole and _REPLACEMENT not in tails[-1]
            if self._settled:
                self.owed = tails[-1][shown:]
                return None
        if len(tails) < min(_TAILS, len(tokens)) and self._lore.can_detokenize:
            return calls.detokenize(model, tokens[-len(tails) - 1 :])
        self._settled = True
        if tails and (shown := _shown(tails[0], ledger.text)) and _REPLACEMENT not in tails[0]:
            self.owed = tails[0][shown:]  # marks stand before it, which are never shown
        return None

    def undress(self, chunk: dict[str, Any], choice: dict[str, Any], last: bool) -> None:
        """Nothing: ids are hidden where chunks are rendered."""


def _shown(raw: str, text: str) -> int:
    """Characters of ``raw`` with which ``text`` ends."""
    return next((n for n in range(len(raw), 0, -1) if text.endswith(raw[:n])), 0)


class ByText:
    """Any OpenAI-like server that can continue a text: completions, or chat with ``continue_final_message``."""

    mode = Mode.TEXT
    way = Way.TEXT
    plain = False
    exact = False
    one_document = True
    recounts = True
    names_stop = False
    usage_rides = False
    completions_default = calls.COMPLETIONS_DEFAULT
    prompt_ids: Sequence[int] = ()

    known_prompt = False
    owed = ""

    __slots__ = ("_counted", "_request")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._counted = 0

    @property
    def document(self) -> dict[str, Any]:
        return PLAIN_CHAT if self._request.chat else PLAIN_COMPLETION

    def first(self, model: str, priority: int | None, limit: int | None) -> Call:
        self._counted = 0
        return calls.first(self._request, model, priority, limit, ids=False, whole_stops=False)

    def more(
        self, model: str, priority: int | None, limit: int | None, tokens: list[int | str], text: str, count: int,
        *, stream: bool,
    ) -> Call:  # fmt: skip
        self._counted = 0
        return calls.by_text(self._request, model, priority, limit, text, count)

    def open(self, chunk: dict[str, Any], choice: dict[str, Any]) -> int | None:
        usage = chunk.get("usage") or {}
        prompt_tokens = usage.get("prompt_tokens")
        return prompt_tokens if type(prompt_tokens) is int else None

    def read(self, chunk: dict[str, Any], choice: dict[str, Any], text: str) -> Delta | None:
        """Tokens by running usage where the engine gives it, else one for every text."""
        usage = chunk.get("usage")
        if usage:
            new = max(int(usage.get("completion_tokens") or 0) - self._counted, 0)
            self._counted += new
        else:
            new = 1 if text else 0
        return (), new

    def boundary(self, text: str, tokens: Sequence[int | str], fresh: bool) -> Boundary:
        # Chat templates trim what they are given to continue, so a kept text must not end in white space.
        return Boundary.NONE if not text or text[-1] == _REPLACEMENT or text[-1].isspace() else Boundary.SURE

    def inquire(self, model: str, ledger: Ledger) -> Call | None:
        return None

    def informed(self, document: dict[str, Any] | None, ledger: Ledger) -> bool:
        """Never asked."""
        return True

    def undress(self, chunk: dict[str, Any], choice: dict[str, Any], last: bool) -> None:
        if not self._request.continuous_usage:
            chunk.pop("usage", None)
