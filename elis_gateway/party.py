"""Several jobs that answer one request together: one flight for each of its choices, one channel to its client.

Knows: which flight is which choice, when all of them are over. Never: how answers are joined (``wire.several``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elis_gateway.channel import Channel
from elis_gateway.flight import Flight
from elis_gateway.wire.openai import Request
from elis_gateway.wire.several import Several
from elis_gateway.wire.sse import comment

__all__ = ["Party"]


class Party:
    """Flights that belong together. The first of them stands for all where a response's headers tell of one job."""

    def __init__(
        self, request: Request, flights: Sequence[Flight], describe: Callable[[Flight], str] | None = None
    ) -> None:
        self.request = request
        self.parts = tuple(flights)
        self.first = self.parts[0]
        """The one whose job stands for the request."""
        self.channel = Channel()
        self._several = Several(request, len(self.parts))
        self._describe = describe
        self._bodies: dict[int, bytes] = {}
        self._open = set(range(len(self.parts)))
        for number, flight in enumerate(self.parts):
            flight.channel = _Part(self, number)

    def put(self, part: int, data: bytes) -> None:
        """Something a part's client would have been sent."""
        if events := self._several.feed(part, data):
            self.channel.put(events)

    def ended(self, part: int, error: Exception | None, last: bytes) -> None:
        """A part is over. Where one has failed, all have: an answer with a hole in it is none."""
        self._open.discard(part)
        if error is not None:
            self.channel.close(error)
        elif self.request.stream:
            events = self._several.feed(part, last)
            if self._open:
                if events:
                    self.channel.put(events)
                return
            self.channel.close(last=events + self._several.close(self._comments()))
        else:
            self._bodies[part] = last
            if not self._open:
                bodies = [self._bodies[number] for number in range(len(self.parts))]
                self.channel.close(last=self._several.document(bodies))

    def _comments(self) -> bytes:
        if self._describe is None:
            return b""
        return b"".join(comment(self._describe(flight)) for flight in self.parts)


class _Part(Channel):
    """What the driver takes for a client's channel."""

    __slots__ = ("_number", "_party")

    def __init__(self, party: Party, number: int) -> None:
        super().__init__()
        self._party = party
        self._number = number

    def put(self, data: bytes) -> None:
        if not self._closed:
            self.puts += 1
            self._party.put(self._number, data)

    def close(self, error: Exception | None = None, *, last: bytes = b"") -> None:
        if not self._closed:
            self._closed = True
            self._party.ended(self._number, error, last)
