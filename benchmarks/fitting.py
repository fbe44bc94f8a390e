"""An engine's numbers from the token times of a run itself, so that a simulation of it has the same hour's machine.

Knows: rows with the times of their deltas and upstream calls. Never: sockets, which engine it was, what it is for.

Three figures, each a mean over the run:

- *step*: seconds between two tokens of a call, by how many calls decoded then, where no other call began meanwhile;
- *stall*: how much longer such a gap is where one did, per prompt token that the beginning call had to compute;
- *seam*: what a call takes to its first token beyond that, in decoded tokens. The way there and back is in it; what a
  call waited in the engine's own queue, sent before a slot was free, is not: it counts from when one was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import NamedTuple

from elis_gateway.sim.model import EngineModel
from loadtest.records import Row

__all__ = ["Fit", "fit"]

FEW = 20
"""Gaps below which a batch size has no rate of its own."""


class _Call(NamedTuple):
    sent: float
    first: float
    end: float
    computed: int
    """Prompt tokens that are in no cache."""


class Fit(NamedTuple):
    model: EngineModel
    gaps: dict[int, int]
    """How many gaps each batch size's rate is the mean of."""
    starts: int
    stall: float
    """Seconds that a beginning call held the others up."""


def fit(rows: Sequence[Row], *, slots: int, block: int) -> Fit:
    """The model behind a run of token times. Raises ValueError where there are too few of them."""
    calls = [call for row in rows for call in _calls(row, block)]
    running = _Running(calls, slots)
    gaps = [gap for row in rows for gap in _gaps(row)]
    # All calls of a batch get their tokens in one step and we hear of them one after the other: look between steps.
    aside = median(end - begin for begin, end in gaps) / 2 if gaps else 0.0
    plain: dict[int, list[float]] = {}
    held: list[tuple[int, int, float]] = []
    for begin, end in gaps:
        batch, began = running.at(begin + aside), running.began(begin + aside, end + aside)
        if began:
            held.append((batch, began, end - begin))
        else:
            plain.setdefault(batch, []).append(end - begin)
    # A delta may be more than one token, where a character was not complete.
    share = sum(len(row.gaps) + 1 for row in rows) / sum(row.tokens for row in rows)
    decode = tuple((n, 1 / (fmean(found) * share)) for n, found in sorted(plain.items()) if len(found) >= FEW)
    if not decode:
        raise ValueError(f"no batch size has {FEW} gaps between tokens")
    bare = EngineModel(slots, decode, block=block)
    stall = fmean((gap - 1 / (bare.rate(n) * share)) / began for n, began, gap in held) if held else 0.0
    computed = fmean(call.computed for call in calls)
    prefill = computed / stall if stall > 0 else None
    late = [
        (call.first - _admitted(call, calls, slots) - (call.computed / prefill if prefill else 0.0))
        * bare.rate(running.at(call.first + aside))
        - 1
        for call in calls
    ]
    model = replace(
        bare,
        prefill_tokens_per_second=prefill,
        prefill_stalls=prefill is not None,
        seam_tokens=max(fmean(late), 0.0),
        about="fitted to the token times of one run",
    )
    return Fit(model, {batch: len(plain[batch]) for batch, _ in decode}, len(calls), stall)


class _Running:
    """How many calls decode at a moment."""

    def __init__(self, calls: Sequence[_Call], slots: int) -> None:
        self._firsts = sorted(call.first for call in calls)
        self._ends = sorted(call.end for call in calls)
        self._slots = slots

    def at(self, moment: float) -> int:
        running = bisect_right(self._firsts, moment) - bisect_right(self._ends, moment)
        return min(max(running, 1), self._slots)

    def began(self, since: float, until: float) -> int:
        return bisect_right(self._firsts, until) - bisect_right(self._firsts, since)


def _calls(row: Row, block: int) -> Iterator[_Call]:
    made = 0
    for number, leg in enumerate(row.legs):
        if leg.first is None:
            continue
        prompt = row.prompt_tokens + made
        # Whole blocks are cached, and a prompt's last token is always computed.
        computed = prompt if number == 0 else prompt - (prompt - 1) // block * block
        made += leg.tokens
        yield _Call(leg.start, leg.first, leg.end, computed)


def _admitted(call: _Call, calls: Sequence[_Call], slots: int) -> float:
    """When the engine could begin with it: calls in hand are sent while every slot is taken by those before them."""
    ends = sorted(other.end for other in calls if other.first < call.first and other.end > call.sent)
    return ends[len(ends) - slots] if len(ends) >= slots else call.sent


def _gaps(row: Row) -> Iterator[tuple[float, float]]:
    """Between deltas of the same call."""
    if row.first is None:
        return
    times = list(accumulate(row.gaps, initial=row.first))
    seams = [leg.end for leg in row.legs[:-1]]
    for begin, end in pairwise(times):
        if not any(begin <= seam < end for seam in seams):
            yield begin, end
