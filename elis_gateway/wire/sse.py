"""Event streams, decoded as the bytes arrive and encoded back.

Knows: the ``text/event-stream`` line format (WHATWG HTML, section 9.2) as far as OpenAI-compatible servers use it: the
``data`` field. Never: what a payload means.
"""

from __future__ import annotations

from elis_gateway.errors import UpstreamUnavailable

__all__ = ["DONE", "DONE_EVENT", "EventDecoder", "comment", "encode"]

DONE = b"[DONE]"
"""The payload that ends an OpenAI stream."""
DONE_EVENT = b"data: [DONE]\n\n"

_PREFIX = b"data: "
_SEPARATOR = b"\n\ndata: "


class EventDecoder:
    """Bytes in, payloads out; any split of the bytes gives the same payloads.

    ``limit`` is the most bytes of one unfinished event that are buffered; more raises ``UpstreamUnavailable`` with
    cause ``garbage``. An event cut off by the end of the stream is never given out, as the standard says.
    """

    __slots__ = ("_buffer", "_data", "_held", "_limit", "_size", "_skip_newline", "_started")

    def __init__(self, limit: int = 8 << 20) -> None:
        self._limit = limit
        self._buffer = b""
        """Bytes after the last complete line, but for those in ``_held``."""
        self._held: list[bytes] = []
        """What followed them piece by piece, without a line's end: joined once, however many pieces there are."""
        self._size = 0
        """Bytes of the unfinished event that are kept."""
        self._data: list[bytes] = []
        """Data lines of the event under way."""
        self._skip_newline = False
        """The last byte was a CR that ended a line: an LF that follows belongs to it."""
        self._started = False

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads completed by these bytes, in order; lines of one event are joined by a newline."""
        if not self._size and data.startswith(_PREFIX) and data.endswith(b"\n\n"):
            # What every server sends: whole events of one data line each, no carriage returns. JSON escapes its
            # newlines, so a blank line can only be a separator; anything else goes the long way round.
            payloads = data[6:-2].split(_SEPARATOR)
            if b"\r" not in data and not any(b"\n" in payload for payload in payloads):
                self._started = True
                self._skip_newline = False
                return payloads
        return self._lines(data)

    def _lines(self, data: bytes) -> list[bytes]:
        self._size += len(data)
        if self._size > self._limit:
            raise UpstreamUnavailable("an event of the upstream's stream is too long", cause="garbage")
        if self._started and b"\n" not in data and b"\r" not in data:
            if data:
                self._skip_newline = False
                self._held.append(data)
            return []
        if self._held:
            data = b"".join((*self._held, data))
            self._held.clear()
            self._skip_newline = False
        if self._skip_newline and data.startswith(b"\n"):
            data = data[1:]
        if data:
            self._skip_newline = data.endswith(b"\r")
        text = (self._buffer + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not self._started:
            if len(text) < 3 and b"\xef\xbb\xbf".startswith(text):
                self._buffer = text
                return []
            text = text.removeprefix(b"\xef\xbb\xbf")
            self._started = True
        lines = text.split(b"\n")
        self._buffer = lines.pop()
        payloads: list[bytes] = []
        for line in lines:
            if not line:
                if self._data:
                    payloads.append(b"\n".join(self._data))
                    self._data.clear()
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(_PREFIX) else line[5:])
            elif line == b"data":
                self._data.append(b"")
        if payloads or not self._data:
            self._size = len(self._buffer) + sum(map(len, self._data))
        return payloads


def encode(payload: bytes) -> bytes:
    """One event with this payload; JSON has no raw newlines, so one data line is enough."""
    return b"data: " + payload + b"\n\n"


def comment(text: str) -> bytes:
    """A comment: ignored by every client, useful to keep a connection alive or to tell something to a human."""
    return b"".join(b": " + line.encode() + b"\n" for line in text.splitlines() or [""]) + b"\n"
