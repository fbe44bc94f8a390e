"""What the modelled LLM says: each token is a function of all ids before it.

Knows: the running hash, which tokens may follow, sampling, penalties, the end of an answer. Never: HTTP, time, text
searching (``sim.script``).

*The next token* is chosen by a 64-bit rolling hash over every id so far, prompt included, among the tokens that leave
the bytes valid. It costs O(1) per token and needs nothing but the ids, so an answer continued by its ids is exactly the
unsliced one, and after one lost, doubled or re-tokenised token everything is different.

*The end* must be visible in the ids as well, or a continuation would end elsewhere. Where an answer's length is drawn
or forced, the prompt as tokenised here ends with a special token ``LENGTH + n`` that has no text (a real chat template
puts special tokens there too). Without one (a prompt given as bare ids) every token ends the answer with the same
hazard, decided by the hash. The end-of-sequence token counts as one of the n.

*Sampling* (temperature above 0) draws by (seed, position in this call), *presence and frequency penalties* count this
call's tokens only, *repetition penalty* the whole context: what vLLM's engine does, so that slicing a seeded or
penalised request shows. ``logit_bias`` moves a token's score as far as the penalties do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import NormalDist
from typing import Literal

from elis_gateway.sim.tokens import CHARACTERS, END, LENGTH, LENGTHS, PIECES, VOCABULARY, encode, incomplete, tail

__all__ = ["GREEDY", "Language", "Lengths", "Sampling", "Walker"]

_MASK = (1 << 64) - 1
_MULTIPLY = 0xD1342543DE82EF95
_MIX = 0xBF58476D1CE4E5B9
_STEP = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX) & _MASK
    return value ^ (value >> 29)


@dataclass(frozen=True)
class Lengths:
    """How many tokens an answer has, end-of-sequence included: a function of the prompt's ids and the language's seed.

    ``kind``: ``constant`` (mean), ``lognormal`` (mean and sigma), ``uniform`` (minimum to maximum) or ``hazard``
    (no length is drawn; every token ends the answer with probability 1/mean).
    """

    kind: Literal["constant", "lognormal", "uniform", "hazard"] = "lognormal"
    mean: float = 120.0
    sigma: float = 0.9
    minimum: int = 1
    maximum: int = 4096

    def draw(self, share: float) -> int | None:
        """The quantile ``share`` (0 to 1) of the distribution, in tokens; None: not drawn beforehand."""
        if self.kind == "hazard":
            return None
        if self.kind == "constant":
            value = self.mean
        elif self.kind == "uniform":
            value = self.minimum + share * (self.maximum - self.minimum + 1)
        else:
            normal = NormalDist(log(self.mean) - self.sigma**2 / 2, self.sigma)
            value = exp(normal.inv_cdf(min(max(share, 1e-9), 1 - 1e-9)))
        return int(min(max(value, self.minimum, 1), self.maximum, LENGTHS - 1))


@dataclass(frozen=True)
class Sampling:
    """The sampling fields of a request that this model understands."""

    temperature: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their scores (``logit_bias``)."""

    @property
    def plain(self) -> bool:
        """Whether the first choice is always taken."""
        return not (
            self.temperature
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.bias
        )


GREEDY = Sampling()


class _Follow:
    """Which tokens may follow an unfinished character (or nothing unfinished), and where each leads."""

    __slots__ = ("closing", "nexts", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.nexts: list[_Follow] = []
        self.closing: list[int] = []
        """Positions of the tokens after which nothing is unfinished."""


def _follows() -> dict[bytes, _Follow]:
    states: dict[bytes, _Follow] = {b"": _Follow()}
    ids = {text: token for token, text in enumerate(PIECES) if text}
    characters = [character.encode() for character in CHARACTERS]
    for raw in characters:
        for cut in range(1, len(raw)):
            states.setdefault(raw[:cut], _Follow())

    def may(state: bytes, text: bytes) -> None:
        rest = incomplete(state + text)
        if text in ids and rest in states:
            states[state].tokens.append(ids[text])
            states[state].nexts.append(states[rest])

    for text in ids:
        if text.isascii():
            if len(text) > 1:
                may(b"", text)
        elif text[0] == 0x20:
            may(b"", text)
    for position, raw in enumerate(characters):
        follower = characters[(position * 7 + 3) % len(characters)]
        may(b"", raw)
        may(b"", raw + follower)
        for cut in range(1, len(raw)):
            may(b"", raw[:cut])
            may(b"", raw[:cut])
            state = raw[:cut]
            may(state, raw[cut:])
            may(state, raw[cut : cut + 1])
            if cut == len(raw) - 1:
                may(state, raw[-1:] + follower[:2])
                may(state, raw[-1:] + b" the")
    for follow in states.values():
        follow.closing = [place for place, after in enumerate(follow.nexts) if after is states[b""]]
    return states


_FOLLOWS = _follows()
_FREE = _FOLLOWS[b""]


class Walker:
    """The model's state after some ids. ``step`` says the next token and moves on.

    Cost: O(len(ids)) to make, O(1) per step.
    """

    __slots__ = ("_bias", "_counts", "_follow", "_hash", "_hazard", "_seen", "left", "made", "sampling")

    def __init__(self, ids: Sequence[int], *, start: int, hazard: int, sampling: Sampling = GREEDY) -> None:
        value = start
        marker = -1
        for position, token in enumerate(ids):
            value = (value * _MULTIPLY + token + 1) & _MASK
            if token >= LENGTH:
                marker = position
        self._hash = value
        self._hazard = hazard
        self.left: int | None = None
        """Tokens until the end of the answer, itself included; None: the hazard decides."""
        if marker >= 0:
            self.left = ids[marker] - LENGTH - (len(ids) - 1 - marker)
        self._follow = _FOLLOWS.get(tail(ids), _FREE)
        self.sampling = sampling
        self.made = 0
        self._counts: dict[int, int] = {}
        self._bias = dict(sampling.bias)
        self._seen = set(ids) if sampling.repetition_penalty != 1.0 else set()

    def ends(self) -> bool:
        """Whether the next token is the end of the sequence: never inside a character."""
        if self._follow is not _FREE:
            return False
        if self.left is not None:
            return self.left <= 1
        return _mix(self._hash ^ _STEP) < self._hazard

    def step(self, *, may_end: bool = True) -> int:
        """The next token. ``may_end`` False: end-of-sequence is not to be chosen (ignore_eos, min_tokens)."""
        if may_end and self.ends():
            token = END
        else:
            follow = self._follow
            plain = self.sampling.plain
            if self.left is not None and self.left <= 2:
                closing = follow.closing
                choice = closing[_mix(self._hash) % len(closing) if plain else self._choose(follow, closing)]
            else:
                choice = _mix(self._hash) % len(follow.tokens) if plain else self._choose(follow, None)
            token = follow.tokens[choice]
            self._follow = follow.nexts[choice]
        self.push(token)
        return token

    def push(self, token: int) -> None:
        """Move past a token that was said."""
        self._hash = (self._hash * _MULTIPLY + token + 1) & _MASK
        self.made += 1
        if self.left is not None:
            self.left -= 1

    def _choose(self, follow: _Follow, places: Sequence[int] | None) -> int:
        """Four candidates by the hash, each less likely than the one before; noise and penalties reorder them.

        Returns a position in ``places`` where those are given, else in ``follow.tokens``.
        """
        sampling = self.sampling
        count = len(follow.tokens if places is None else places)
        noise = _mix((sampling.seed * _STEP + self.made * _MULTIPLY) & _MASK) if sampling.temperature else 0
        best, best_score, said = 0, float("-inf"), 0
        for rank in range(4):
            choice = _mix((self._hash + rank * _STEP) & _MASK) % count
            token = follow.tokens[choice if places is None else places[choice]]
            score = -0.7 * rank
            if noise:
                draw = (_mix((noise + rank * _STEP) & _MASK) + 1) / (_MASK + 2)
                score -= sampling.temperature * log(-log(draw))  # the Gumbel trick: sampling as an arg max
            times = self._counts.get(token, 0)
            if times:
                score -= sampling.presence_penalty + sampling.frequency_penalty * times
            score += self._bias.get(token, 0.0)
            if token in self._seen:
                score -= log(sampling.repetition_penalty)
            if score > best_score:
                best, best_score, said = choice, score, token
        self._counts[said] = self._counts.get(said, 0) + 1
        if sampling.repetition_penalty != 1.0:
            self._seen.add(said)
        return best


@dataclass(frozen=True)
class Language:
    """One model's way of speaking. Two engines with equal ``seed`` and ``lengths`` say the same."""

    seed: int = 0
    lengths: Lengths = field(default_factory=Lengths)

    def prompt_ids(self, ids: Sequence[int], *, length: int | None = None) -> list[int]:
        """A prompt's ids as the model gets them: with the special token that carries the answer's length.

        ``length`` forces it (tokens, end-of-sequence included); None: drawn.
        """
        if length is None:
            value = _mix(self.seed)
            for token in ids:
                value = (value * _MULTIPLY + token + 1) & _MASK
            length = self.lengths.draw(_mix(value) / (_MASK + 1))
        if length is None:
            return list(ids)
        return [*ids, LENGTH + min(max(length, 1), LENGTHS - 1)]

    def prompt(self, text: str, *, length: int | None = None) -> list[int]:
        """``prompt_ids`` of a text."""
        return self.prompt_ids(encode(text), length=length)

    def walker(self, ids: Sequence[int], sampling: Sampling = GREEDY) -> Walker:
        """The model's state after ``ids``. Raises ValueError where an id is no token."""
        if ids and not 0 <= min(ids) <= max(ids) < VOCABULARY:
            raise ValueError(f"Token id {next(t for t in ids if not 0 <= t < VOCABULARY)} is out of vocabulary")
        hazard = int((_MASK + 1) / self.lengths.mean)
        return Walker(ids, start=_mix(self.seed ^ _STEP), hazard=hazard, sampling=sampling)

    def answer(self, ids: Sequence[int], limit: int, sampling: Sampling = GREEDY) -> list[int]:
        """At most ``limit`` tokens that follow ``ids``; the last is ``END`` where the answer ended by itself."""
        walker = self.walker(ids, sampling)
        made: list[int] = []
        while len(made) < limit:
            made.append(walker.step())
            if made[-1] == END:
                break
        return made
