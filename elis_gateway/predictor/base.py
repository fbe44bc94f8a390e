"""The predictor protocol. Knows what a predictor sees and says; never how one works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from elis_gateway.core.job import Estimate

__all__ = ["Estimate", "Predictor", "View", "clamp", "counted_down"]


class View(NamedTuple):
    """A job as a predictor sees it: frozen, so that it may cross to a worker thread."""

    job_id: str
    model: str
    app: str
    prompt: str
    answer: str
    """The answer so far. May be empty although ``attained`` is not: predictors that read no text are not given any."""
    attained: int
    """Answer tokens so far."""
    allowed: int | None
    """Tokens it may still produce; None: not known."""


@runtime_checkable
class Predictor(Protocol):
    """One interface for all: tables, models, oracles, and yours (``package.module:Class``)."""

    reads_text: bool
    """Whether views must carry the prompt and answer text."""
    refines: bool
    """Whether ``refine`` may improve on ``instant``; False spares the driver a task. A predictor that also has a method
    ``wants_refining(view) -> bool`` is asked for each view."""

    def instant(self, view: View) -> Estimate | None:
        """An estimate in microseconds, on the event loop; None: none yet (the old one is counted down)."""

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        """Better estimates, in the order of ``views``; off the event loop where that takes long."""

    def learn(self, view: View, *, complete: bool) -> None:
        """The job ended with ``view.attained`` tokens. ``complete``: the model stopped by itself; False: the length is
        a lower bound (cancelled, cut off by a limit), censored data rather than a short answer."""

    def save(self) -> None:
        """Keep what was learned across restarts, where the predictor was given a place for it."""


def clamp(remaining: float, allowed: int | None) -> float:
    """An estimate always lies within 1 .. tokens still allowed."""
    if allowed is not None and remaining > allowed:
        remaining = allowed
    return remaining if remaining > 1.0 else 1.0


def counted_down(estimate: Estimate | None, tokens: int) -> Estimate | None:
    """What is left of it, so many tokens later (earlier, if negative)."""
    if estimate is None or not tokens:
        return estimate
    return estimate._replace(remaining=clamp(estimate.remaining - tokens, None))
