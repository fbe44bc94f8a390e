"""``slots: auto``: how many calls an engine gets, by what it says of itself. A control law over observations.

Knows: sequences running and waiting in the engine, its KV memory, our own calls among them. Never: sockets, metrics
pages, timers.

Up while every slot is used and the engine neither queues nor runs short of memory: twice as many at first, then step
by step. Down to what it really runs as soon as it is certain that it queues, which takes several looks, because a call
that has just arrived is seen waiting, too. Whoever has met a limit asks again what lies beyond it ever more seldom, and
ever more boldly once it turns out to have moved. Nothing is lowered again before the last cut has taken effect.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["AutoSlots", "Look"]

_START = 4
"""Slots before the engine has said anything."""
_CERTAIN = 3
"""Looks in a row that show a queue before it is believed."""
_FULL, _ROOM = 0.95, 0.85
"""Shares of the KV memory: above the one it is too much, below the other there is room for more."""
_FIRST_PAUSE, _LONGEST_PAUSE = 15, 240
"""Looks without any trouble before one more slot is tried, after a limit was met."""


class Look(NamedTuple):
    """What was seen of an engine in one moment."""

    running: float
    """Sequences in its batch, ours and others'."""
    waiting: float
    """Calls in its own queue."""
    kv: float | None = None
    """Share of its KV memory in use, where it says so."""
    evicted: float = 0.0
    """Sequences it has thrown out of its batch for want of memory, ever."""
    ours: int = 0
    """Calls of ours there, running or waiting."""


class AutoSlots:
    """One engine's number of slots. ``most``: the bound, where it is known."""

    __slots__ = ("_calm", "_evicted", "_held", "_met", "_pause", "_share", "_step", "_strain", "most", "slots")

    def __init__(self, most: int | None = None) -> None:
        self.slots = _START if most is None else min(_START, most)
        self.most = most
        self._met = False
        """It has met a limit: from then on it feels its way."""
        self._calm = 0
        """Looks in which all slots were used and nothing spoke against more."""
        self._strain = 0
        """Looks in a row that showed a queue, or too little memory."""
        self._share = 0.0
        """The most of our calls that it ran in these."""
        self._pause = 1
        self._step = 1
        self._held = False
        """Since the limit was met, a step beyond it has been taken, and nothing spoke against it yet."""
        self._evicted: float | None = None

    def bound(self, most: int | None) -> None:
        """The engine says that it runs so many at most, and not more."""
        self.most = most
        if most is not None:
            self.slots = min(self.slots, most)

    def settle(self) -> None:
        """It shows no gauges: the bound is all there is to go by, where it says that."""
        if self.most is not None:
            self.slots = self.most

    def look(self, seen: Look) -> bool:
        """Take an observation. True: there are more or fewer slots now."""
        before = self.slots
        evicting = self._evicted is not None and seen.evicted > self._evicted
        self._evicted = seen.evicted
        short = evicting or (seen.kv is not None and seen.kv >= _FULL)
        if seen.ours > self.slots:
            # What was sent before the last cut is still there: its queue says nothing new.
            self._calm = self._strain = 0
            self._share = 0.0
        elif seen.waiting > 0 or short:
            self._calm = 0
            self._strain += 1
            # Of what it runs, as much as our part of its calls; the most that was seen, for one may just have ended.
            share = seen.running * seen.ours / max(seen.running + seen.waiting, seen.ours, 1.0)
            self._share = max(self._share, share)
            if self._strain >= _CERTAIN or evicting:
                self._down(short=short)
        else:
            self._strain = 0
            self._share = 0.0
            if seen.ours >= self.slots and (seen.kv is None or seen.kv < _ROOM):
                self._calm += 1
                if self._calm >= self._pause:
                    self._up()
        return self.slots != before

    def _down(self, *, short: bool) -> None:
        # Memory that is short says more than a queue: it runs too many as it is.
        least = max(self.slots // 8, 1) if short else 1
        self.slots = max(min(self.slots - least, int(self._share)), 1)
        self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE) if self._met else _FIRST_PAUSE
        self._met = True
        self._step = 1
        self._held = False
        self._strain = 0
        self._share = 0.0

    def _up(self) -> None:
        more = self._step if self._met else self.slots
        self.slots += more if self.most is None else min(more, self.most - self.slots)
        self._calm = 0
        if self._held:
            # The last step went well and was used: the limit has moved.
            self._step *= 2
            self._pause = max(self._pause // 4, 1)
        self._held = self._met
