"""May calls be sent to an upstream, and how many? A circuit breaker and a slow start, over events and ``now``.

Knows: failures in a row, pauses, the one call that finds out, the ramp after it. Never: sockets, timers, what failed.

Closed, everything passes. After several failures in a row it opens: nothing passes for a while, each time for longer.
Then it is half open: one call at a time, and what becomes of it decides. Where all that failed was answered, with an
error, the requests themselves may be to blame: a call of our own that goes well acquits it. After a recovery, of this
kind or any other, slots come back one after the other, so that an engine that has just started is not buried at once.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

__all__ = ["Breaker"]

_LONGEST = 60.0


class Breaker:
    """``after``: failures in a row that open it; ``pause``: seconds of the first pause; ``ramp``: of a slow start."""

    __slots__ = (
        "_acquitted_until", "_failures", "_heard", "_judged", "_open_until", "_opened", "_pause", "_ramp_since",
        "after", "pause", "ramp",
    )  # fmt: skip

    def __init__(self, after: int, pause: float, ramp: float) -> None:
        self.after = after
        self.pause = pause
        self.ramp = ramp
        self._failures = 0
        self._opened = False
        self._open_until = 0.0
        self._pause = pause
        self._ramp_since: float | None = None
        self._heard = False
        """All that failed in this row was answered."""
        self._judged = False
        """Since it opened last."""
        self._acquitted_until = 0.0

    def failed(self, now: float, *, answered: bool = False) -> None:
        """A call failed in a way that speaks against the upstream; ``answered``: it was told so. What was sent before
        it opened counts no more."""
        if self._opened and now < self._open_until:
            return
        if answered and now < self._acquitted_until:
            return
        self._heard = answered and (self._heard or not self._failures)
        self._failures += 1
        if self._opened or self._failures >= self.after:
            self._open_until = now + self._pause
            self._pause = min(self._pause * 2.0, _LONGEST) if self._opened else self.pause * 2.0
            self._opened = True
            self._judged = False
            self._ramp_since = None

    def succeeded(self, now: float, *, begun: bool = False) -> bool:
        """A call went well; ``begun``: so far, its first byte has come, which is enough to close it again. True: that
        changes how many may be sent."""
        if not begun:
            self._failures = 0
        if not self._opened or now < self._open_until:
            return False
        self._opened = False
        self._failures = 0
        self._pause = self.pause
        self.begin_slowly(now)
        return True

    def change(self, after: int, pause: float, ramp: float) -> None:
        """Other dials from now on; a pause that has begun goes on to its end."""
        self.after, self.pause, self.ramp = after, pause, ramp
        if not self._opened:
            self._pause = pause
        if ramp <= 0:
            self._ramp_since = None

    @property
    def doubtful(self) -> bool:
        """It is open, that may be the requests' fault, and nobody has asked yet."""
        return self._opened and self._heard and not self._judged

    def judged(self, now: float, *, well: bool) -> None:
        """A call of ours was made, once for each time it opens. It went well: nothing was wrong, and for as long as a
        pause errors say nothing against it."""
        self._judged = True
        if well:
            self._opened = False
            self._failures = 0
            self._pause = self.pause
            self._acquitted_until = now + self.pause

    def begin_slowly(self, now: float) -> None:
        """It has come back from wherever it was."""
        if self.ramp > 0:
            self._ramp_since = now

    def state(self, now: float) -> Literal["closed", "open", "half_open"]:
        """For people and for decisions."""
        if not self._opened:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    def allowed(self, slots: int, now: float) -> int:
        """How many of its slots may be used."""
        state = self.state(now)
        if state != "closed":
            return 0 if state == "open" else min(1, slots)
        if self._ramp_since is None:
            return slots
        share = (now - self._ramp_since) / self.ramp
        if share >= 1.0:
            self._ramp_since = None
            return slots
        return min(max(ceil(slots * share), 1), slots)

    def next_change(self, slots: int, now: float) -> float | None:
        """Seconds until ``allowed`` says something else, if time alone changes it."""
        if self._opened:
            return self._open_until - now if now < self._open_until else None
        if self._ramp_since is None:
            return None
        return max(self._ramp_since + self.ramp * self.allowed(slots, now) / slots - now, 0.01)
