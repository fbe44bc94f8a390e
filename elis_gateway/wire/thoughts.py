"""Engines that take thoughts apart from content: what was seen of their parser, and how it counts.

Such a parser goes on inside a thought where a prompt ends in one. What follows the thoughts may have to be one call
(tools, grammars, whole documents); then that call begins inside the thoughts, at the last place that was kept.

``reasoning_tokens`` of many calls: an engine counts over the tokens of one call, each parser in its own way. Measured
on all of vLLM 0.32's (``benchmarks/parser_seams.py``) these are few: between the marks of the answer itself, where
ours to count; else the counts of the calls that begin inside the thoughts add up.

Knows: the ways of counting. Never: parsers' names, calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

__all__ = ["Count", "Thinking", "between", "head"]


class Count(Enum):
    """How the reasoning tokens of an answer follow from those of its calls."""

    MARKED = "marked"
    """Tokens between marks in the answer; a mark in the prompt does not count."""
    SUMMED = "summed"
    """Streams: what each call, begun inside the thoughts, had counted where it was cut."""
    EVERY = "every"
    """Documents: every token before, and what the last call counts."""
    UNMARKED = "unmarked"
    """Documents: every token before but the mark that opens the thoughts, and what the last call counts."""
    NOTHING = "nothing"
    """Documents: none are counted."""


class Thinking(NamedTuple):
    """What was seen of an engine's reasoning parser."""

    opens: int
    """The token that begins a thought."""
    closes: int
    streamed: Count | None = None
    """How streams count; None: in no way that we know."""
    whole: Count | None = None
    """How documents count, where their last part can be asked for as a document; None: it cannot."""
    waits: bool = False
    """Grammars wait until the thoughts are over."""


def between(tokens: Iterable[object], thinking: Thinking) -> int:
    """Tokens between marks, as vLLM's ``BaseThinkingReasoningParser`` counts them."""
    count = depth = 0
    for token in tokens:
        if token == thinking.opens:
            depth += 1
        elif token == thinking.closes:
            depth = max(depth - 1, 0)
        elif depth:
            count += 1
    return count


def head(tokens: Iterable[object], thinking: Thinking) -> int:
    """What the tokens before a document's last call, all of them thoughts, count."""
    if thinking.whole is Count.EVERY:
        return sum(1 for _ in tokens)
    return sum(token != thinking.opens for token in tokens) if thinking.whole is Count.UNMARKED else 0
