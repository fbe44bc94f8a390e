"""What the server needs of a model: prompts to ids, ids to the next token, ids to text. Two kinds: see the classes.

Knows: the chat template. Never: HTTP, limits, stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from elis_gateway.sim.language import Language, Sampling
from elis_gateway.sim.script import Stepper
from elis_gateway.sim.tokens import END, START, Detokenizer, decode, encode

__all__ = ["Message", "Spoken", "Voice", "render"]

Message = tuple[str, str]
"""(role, text)"""


def render(messages: Sequence[Message], *, open_turn: bool = True, continue_last: bool = False) -> list[int]:
    """Ids of a conversation in the ChatML template. ``open_turn`` adds the assistant's header; ``continue_last``
    leaves the last message open, so that its text is continued."""
    ids: list[int] = []
    for role, text in messages:
        ids += (START, *encode(f"{role}\n"), *encode(text), END, *encode("\n"))
    if continue_last:
        del ids[-1 - len(encode("\n")) :]
    elif open_turn:
        ids += (START, *encode("assistant\n"))
    return ids


class Voice(Protocol):
    """One way to have a model. All methods are pure; ids of a prompt include the special tokens."""

    def prompt(self, text: str, *, length: int | None) -> list[int]:
        """A completion's prompt. ``length`` forces the answer's (tokens, end-of-sequence included)."""

    def chat(
        self, messages: Sequence[Message], *, open_turn: bool, continue_last: bool, length: int | None
    ) -> list[int]:
        """A conversation."""

    def stepper(self, ids: Sequence[int], sampling: Sampling) -> Stepper:
        """The model after these ids. Raises ValueError where an id is no token."""

    def decoder(self, ids: Sequence[int]) -> Detokenizer:
        """A detokenizer primed with a prompt's ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these ids. Raises ValueError where an id is no token."""


class Spoken:
    """The synthetic language: any prompt, any length, unforgiving."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def prompt(self, text: str, *, length: int | None) -> list[int]:
        return self.language.prompt(text, length=length)

    def chat(
        self, messages: Sequence[Message], *, open_turn: bool, continue_last: bool, length: int | None
    ) -> list[int]:
        ids = render(messages, open_turn=open_turn, continue_last=continue_last)
        return self.language.prompt_ids(ids, length=length)

    def stepper(self, ids: Sequence[int], sampling: Sampling) -> Stepper:
        return self.language.walker(ids, sampling)

    def decoder(self, ids: Sequence[int]) -> Detokenizer:
        return Detokenizer(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return decode(ids)
