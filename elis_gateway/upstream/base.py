"""The upstream protocol: open a call, iterate over what arrives, close it at any moment. Never: aiohttp, JSON.

Two implementations satisfy it: ``http.HttpUpstream`` and the in-process fake of the tests; one suite runs over both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Protocol, Self

from elis_gateway.errors import UpstreamError
from elis_gateway.wire.continuation import Call
from elis_gateway.wire.thoughts import Thinking

__all__ = ["Capabilities", "Session", "Upstream"]


class Capabilities(NamedTuple):
    """What an upstream was seen to do; nothing here is believed from its documentation."""

    models: frozenset[str] = frozenset()
    """Names its /v1/models lists, or the ones the operator configured."""
    context: Mapping[str, int] = MappingProxyType({})
    """Context length by model in tokens, prompt and answer together, where the upstream says so."""
    ids: bool = False
    """It returns the token ids of prompt and answer, and takes ids as a prompt."""
    chat_ids: bool = False
    """It takes ids as a chat's prompt too, so that a chat goes on as a chat."""
    text: bool = False
    """The operator allows answers to be continued by text."""
    orders: bool = False
    """It orders its own waiting calls by the field ``priority`` (seen, not believed)."""
    chat_parser: bool = False
    """The operator says that chat runs through a parser, and that it is to be left alone."""
    reasoning_parser: bool = False
    """Chat answers are parsed into thoughts and content."""
    thinking: Thinking | None = None
    """How, where a chat's answer is taken for more of the thoughts or of the content that its prompt ends in."""
    tool_parser: bool = False
    """Chat answers are parsed into tool calls where tools are offered."""
    fingerprint: str | None = None
    """Its ``system_fingerprint``, which a stream tells with its last chunk: too late for an answer that we end."""
    kind: str = "other"
    """``vllm``, ``llama.cpp`` or ``other``: for people and metrics, decides nothing."""
    most: int | None = None
    """Sequences it says it runs at once."""
    engines: int = 1
    """Engines it shows behind this one address (data-parallel ranks)."""
    settled: bool = True
    """False: some question found no answer (the engine was full, or stumbled) and should be asked again."""


class Session(Protocol):
    """One call. Entering it sends the request and waits for the status; leaving it early closes the socket at once.

    Entering, iterating and ``whole`` raise ``UpstreamRefused`` (an error status) and ``UpstreamUnavailable`` (refused,
    reset, stalled, garbage).
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        """Payloads of the event stream, one list per read from the network; ends after ``[DONE]`` or end of file."""

    async def whole(self) -> bytes:
        """The body of a call that does not stream."""

    def pending(self) -> list[bytes]:
        """Payloads that have arrived and were not iterated over yet. Never waits, never raises."""


class Upstream(Protocol):
    """One engine."""

    @property
    def id(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def failed(self, error: UpstreamError) -> UpstreamError:
        """A call failed in a way that the session could not see; hands the error back."""

    def succeeded(self) -> None:
        """A call brought what it should."""

    def open(
        self, call: Call, *, request_id: str, patient: bool = False, headers: Mapping[str, str] | None = None
    ) -> Session:
        """Prepare a call; nothing is sent before the session is entered. ``request_id``: one per slice. ``patient``:
        silence is no stall, because the whole answer comes at once. ``headers``: sent beside our own."""
