"""Is an upstream in service? A state machine over events and ``now``. Never: sockets, timers, choosing upstreams.

Calls that cannot connect take it out at once; lost probes only after several in a row, and only several good ones
bring it back, so that one accident moves nothing. An upstream that asks for a pause (429 or 503) gets it. One whose
health page is fine but whose calls fail is the circuit breaker's (``breaker``).
"""

from __future__ import annotations

from elis_gateway import config
from elis_gateway.errors import UpstreamError, UpstreamRefused
from elis_gateway.upstream.breaker import Breaker

__all__ = ["Health"]

_EAGER = 0.25
"""First wait between probes of an upstream that has just gone down, doubling up to the interval."""
_PAUSE = 0.5
"""Seconds a shedding upstream is left alone when it does not say for how long."""
_LONGEST_PAUSE = 60.0
_SHORT_ABSENCE = 3.0
"""Seconds: whoever is back sooner was not started anew, and needs no slow start."""
_DOWN_AT_ONCE = frozenset({"connect", "reset", "dns", "tls"})


class Health:
    """Starts unknown, which is not in service; the first good probe is enough to begin with."""

    __slots__ = ("_bad", "_down_at", "_good", "_held_until", "_settings", "_wait", "breaker", "cause", "known", "up")

    def __init__(self, settings: config.Health) -> None:
        self._settings = settings
        self.breaker = Breaker(settings.break_after, settings.break_for, settings.slow_start)
        self.up = False
        self.known = False
        """It has answered a probe at least once, ever."""
        self.cause = "unknown"
        """Why it is not up; ``""`` while it is."""
        self._good = 0
        self._bad = 0
        self._down_at = 0.0
        self._held_until = 0.0
        self._wait = _EAGER

    def change(self, settings: config.Health) -> None:
        """Other dials from now on."""
        self._settings = settings
        self.breaker.change(settings.break_after, settings.break_for, settings.slow_start)

    def probed(self, ok: bool, cause: str = "", now: float = 0.0) -> None:
        """A probe came back."""
        if ok:
            self._bad = 0
            self._good += 1
            if not self.up and (not self.known or self._good >= self._settings.up_after):
                self.up = True
                self.cause = ""
                if self.known and now - self._down_at >= _SHORT_ABSENCE:
                    self.breaker.begin_slowly(now)
                self._wait = _EAGER
            self.known = True
            return
        self._good = 0
        self._bad += 1
        if not self.up:
            self.cause = cause
        elif self._bad >= self._settings.down_after:
            self._go_down(cause, now)

    def failed(self, error: UpstreamError, now: float) -> None:
        """A call failed."""
        if isinstance(error, UpstreamRefused):
            if error.status in (429, 503):
                pause = _PAUSE if error.retry_after is None else min(error.retry_after, _LONGEST_PAUSE)
                self._held_until = max(self._held_until, now + pause)
            elif error.status >= 500:
                self.breaker.failed(now, answered=True)
            return
        if not self.up:
            # The rest of what it took with it when it went down says nothing new.
            return
        self.breaker.failed(now)
        if error.cause in _DOWN_AT_ONCE:
            self._go_down(error.cause, now)

    def succeeded(self, now: float, *, begun: bool = False) -> bool:
        """A call went well, or has ``begun`` well. True: that changes how many may be sent."""
        return self.breaker.succeeded(now, begun=begun)

    def in_service(self, now: float) -> bool:
        """May calls be sent there?"""
        return self.up and now >= self._held_until and self.breaker.state(now) != "open"

    def allowed(self, slots: int, now: float) -> int:
        """How many of its slots may be used now."""
        return self.breaker.allowed(slots, now) if self.in_service(now) else 0

    def next_look(self, now: float, slots: int = 1) -> float:
        """Seconds until it should be looked at again: probed, or found to be past its pause or further up its ramp."""
        if self.up:
            waits = [self._settings.interval]
            if self._held_until > now:
                waits.append(self._held_until - now)
            if (change := self.breaker.next_change(slots, now)) is not None:
                waits.append(change)
            return min(waits)
        wait = min(self._wait, self._settings.interval)
        self._wait = min(self._wait * 2.0, self._settings.interval)
        return wait

    def _go_down(self, cause: str, now: float) -> None:
        self.up = False
        self._down_at = now
        self.cause = cause
        self._good = 0
        self._wait = _EAGER

    def __repr__(self) -> str:
        return f"<Health {'up' if self.up else f'down ({self.cause})'} good={self._good} bad={self._bad}>"
