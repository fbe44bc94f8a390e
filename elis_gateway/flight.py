"""One request's belongings while it is under way: what the driver, the handlers and the record of jobs share.

A plain record. Knows no socket, no scheduler, no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from elis_gateway.channel import Channel
from elis_gateway.core.compiled import mypyc_attr
from elis_gateway.core.job import Estimate, Job, JobSpec
from elis_gateway.errors import GatewayError
from elis_gateway.wire.continuation import Answer
from elis_gateway.wire.openai import Request

__all__ = ["Flight", "Leg", "Observer", "overriding"]


class Leg(NamedTuple):
    """One slice as it went. Times are the loop's, in seconds."""

    upstream: str
    sent: float
    first_token: float | None
    ended: float
    tokens: int
    """Kept answer tokens of this slice."""
    end: str
    """Why it ended: a ``SliceEnd``."""
    cause: str
    continued: bool
    """It was not the job's first."""
    cached: tuple[int, int] | None = None
    """Of a continuation: tokens the engine had cached, of so many of its prompt, where it says so."""


class Flight:
    """A request on its way. ``job`` is set when the scheduler has taken it."""

    __slots__ = (
        "answer", "channel", "class_name", "client", "credentials", "describe", "error", "estimates", "first_estimate",
        "headers", "heard", "job", "legs", "refining", "renew", "request", "sampled", "spec", "trace",
    )  # fmt: skip

    def __init__(
        self,
        spec: JobSpec,
        request: Request,
        answer: Answer,
        *,
        class_name: str = "",
        client: str = "",
        describe: Callable[[Flight], str] | None = None,
    ) -> None:
        self.spec = spec
        self.request = request
        self.answer = answer
        self.channel = Channel()
        self.class_name = class_name
        self.client = client
        """The name of the key it came with, where keys are configured."""
        self.describe = describe
        """Makes the final comment of a stream whose client asked how it was scheduled."""
        self.job: Job | None = None
        self.error: GatewayError | None = None
        """The last thing that went wrong; what the client is told if the job fails."""
        self.estimates: list[tuple[int, float]] = []
        """Every estimate: tokens so far, predicted remaining tokens."""
        self.first_estimate: Estimate | None = None
        self.legs: list[Leg] = []
        self.heard = 0.0
        """When text arrived last, on the loop's clock; 0.0 before the first."""
        self.headers: Mapping[str, str] | None = None
        """Sent with its upstream calls beside our own."""
        self.credentials: Mapping[str, str] | None = None
        """The client's own, for upstreams that are to be told them."""
        self.trace: object = None
        """The tracer's, who alone knows what it is."""
        self.refining = False
        self.sampled: bool | None = None
        """The predictor is to learn from this answer; None: not decided yet."""
        self.renew: Callable[[], Answer] | None = None
        """Makes the answer anew before the first call, where it was made before any upstream was known."""

    @property
    def parts(self) -> tuple[Flight, ...]:
        """The flights that answer the request: this one alone."""
        return (self,)

    @property
    def first(self) -> Flight:
        """The one whose job stands for the request."""
        return self


@mypyc_attr(allow_interpreted_subclasses=True)
class Observer:
    """Told of what happened, never asked: metrics, the traffic log, the log. Override what you want to hear."""

    def submitted(self, flight: Flight) -> None:
        """A request was taken, and the scheduler hears of it next."""

    def slice_began(self, flight: Flight, upstream: str) -> None:
        """An upstream call is about to be made; what stands in ``flight.headers`` is sent with it."""

    def fed(self, flight: Flight, gap: float) -> None:
        """More of the answer has arrived, ``gap`` seconds after the piece before it. Once per read: be quick."""

    def window_passed(self, flight: Flight) -> None:
        """Another window's tokens have arrived."""

    def estimated(self, flight: Flight, seconds: float) -> None:
        """A new estimate stands at the end of ``flight.estimates``; ``seconds``: what it took."""

    def estimate_missed(self, flight: Flight, why: str) -> None:
        """An estimate that was asked for is not there: ``late``, ``failed`` or ``absurd``."""

    def slice_ended(self, flight: Flight, leg: Leg) -> None:
        """An upstream call is over."""

    def finished(self, flight: Flight) -> None:
        """A job is over; its client has been given the end of its answer."""


def overriding(observers: Iterable[Observer], name: str) -> list[Callable[..., None]]:
    """The observers' methods of this name, less those that would do nothing."""
    return [getattr(o, name) for o in observers if getattr(type(o), name) is not getattr(Observer, name)]
