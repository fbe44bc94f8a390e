"""The seam: one answer out of many upstream calls, indistinguishable from one call.

An ``Answer`` builds the next call, reads what it brings (``reading``), and decides at every end which tokens are kept.

*Bias.* At temperature 0 this is exact. Above, tokens dropped at a seam are drawn anew, so a character of several tokens
that would have begun just before a seam survives with less than its probability p (about p², if it needs the seam to be
cut again); away from seams, and for characters of one token, nothing changes.

*Limits.* ``length`` at a window is ours and never shown. The client's own limit is the lesser of its ``max_tokens`` and
what the context leaves after the prompt, as vLLM 0.32 clamps it.

Knows: whether and how an answer goes on. Never: scheduling, sockets, clocks.
"""

from __future__ import annotations

from typing import Literal

import orjson

from elis_gateway.core.slice import SliceEnd
from elis_gateway.errors import GatewayError
from elis_gateway.wire import calls, foreign
from elis_gateway.wire.calls import Call
from elis_gateway.wire.dialects import ById, ByText, Dialect, Lore, Mode
from elis_gateway.wire.encode import Encoder
from elis_gateway.wire.ledger import Ledger
from elis_gateway.wire.llamacpp import LlamaCpp
from elis_gateway.wire.logprobs import Logprobs
from elis_gateway.wire.openai import Request, Route
from elis_gateway.wire.parameters import Way, alone_at_last, unsliceable
from elis_gateway.wire.problems import error_body
from elis_gateway.wire.reading import NO_PROMPT, Reading
from elis_gateway.wire.sse import DONE_EVENT, comment, encode
from elis_gateway.wire.thoughts import Count, Thinking
from elis_gateway.wire.whole import WholeStream

__all__ = ["Answer", "Call", "Lore", "Mode"]

UNARY_LIMIT = 64
"""Without windows, most tokens a non-streaming client's answer may have to be fetched as one JSON document: what is
lost if the upstream dies half-way."""
_NOT_IMPLEMENTED = 501
"""The one status from 500 up that says what an engine cannot do, not how it is."""


class Answer(Reading):
    """One request's growing answer. Pure; belongs to one job; not thread-safe.

    Life: ``call`` -> ``feed`` ... (or ``feed_whole``) -> ``end_slice``, again until FINISHED, then ``close`` (streams)
    or ``body``. All token counts are of the answer.
    """

    __slots__ = ("_grow", "_implied", "_insisted", "_ours", "_owed", "_unary", "reason")

    def __init__(
        self,
        request: Request,
        mode: Mode,
        *,
        reason: str = "",
        context: int | None = None,
        model: str = "",
        default_limit: int | None = None,
        lore: Lore | None = None,
        engine: str = "vllm",
        way: Way = Way.IDS,
        thinking: Thinking | None = None,
    ) -> None:
        """``context``: the engine's context length in tokens, where known. ``default_limit``: its own ``max_tokens``
        for a chat that names none. ``engine``: ``llama.cpp`` for its dialect, anything else for vLLM's, and
        ``way`` how that goes on; ``thinking``: what is known of its reasoning parser."""
        self.request = request
        self.mode = mode
        self.reason = reason
        """Why ``mode`` is WHOLE."""
        self.attained = 0
        self.prompt_tokens: int | None = None
        self.committed = False
        self.finished = False
        self.finish_reason: str | None = None
        self.stop_reason: object = None
        self._context = context
        self._lore = lore if lore is not None else Lore()
        self._encoder = Encoder(request)
        self._ledger = Ledger(
            request.stop,
            include=request.include_stop,
            logprobs=Logprobs(request.chat) if request.logprobs else None,
        )
        self._parser = thinking if way is Way.THOUGHTS else None
        sums = self._parser is not None and self._parser.streamed is Count.SUMMED and request.include_usage
        self._summed = self._parser if sums else None
        self._dialect: Dialect = (
            ByText(request) if mode is Mode.TEXT
            else LlamaCpp(request) if engine == "llama.cpp"
            else ById(request, self._lore, way, self._summed)
        )  # fmt: skip
        self._implied = request.max_tokens
        """Tokens the engine would stop at by itself, as far as the request says."""
        if self._implied is None and request.route is Route.COMPLETIONS:
            self._implied = self._dialect.completions_default
        self.limit = default_limit if self._implied is None and request.chat else self._implied
        self._preamble = b""
        self._echo = request.echo
        self._unheard = request.body.get("min_tokens") or 0
        self._stop_ids = frozenset[int]()
        self._owed = b""
        """The event that ends the answer, where the engine did not send one."""
        self._whole = b""
        self._usage = None
        self._usage_shown = False
        self._running = None
        self._insisted = False
        """A question that found no answer was put once more."""
        self._grow = 0
        """The next call asks for at least so many tokens, because the last one kept none."""
        self._careful = 0
        self._parsed = self._dialect.way in (Way.PARSED, Way.THOUGHTS)
        self._thinks = self._dialect.way is Way.THOUGHTS
        self._thinking = self._ends_thinking = False
        self._thought = self._thoughts = 0
        self._reasoned = 0
        self._sums = []
        self._alone = self._last = False
        self._message = self._shape = None
        self._begin(None)
        if mode is Mode.WHOLE:
            return
        if (why := unsliceable(request.body, request.chat, self._dialect.way, self._parser)) is not None:
            self._go_whole(why)
            return
        self._alone = self._thinks and alone_at_last(request.body)
        if self._alone and self.limit is None and context is None:
            self._go_whole("how long the last call may be is not known")
            return
        self._stop_ids = frozenset(request.body.get("stop_token_ids") or ())
        if self._dialect.exact and request.max_tokens is not None and request.max_tokens > (context or 1 << 62):
            self._go_whole("max_tokens beyond the context")  # the engine refuses that, in its own words

    @property
    def divisible(self) -> bool:
        """May the call under way be cut, and the answer go on?"""
        return self.mode is not Mode.WHOLE and not self._undivided

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._stream.text) if self.mode is Mode.WHOLE and not self._whole else self._ledger.text

    @property
    def content(self) -> str:
        """The answer so far without the thoughts before it: what a client sends back in a next turn."""
        return self.text[self._thoughts :]

    # -- asking ---------------------------------------------------------------------------------------------------

    def call(
        self, slice_limit: int | None, *, model: str, priority: int | None = None, window: int | None = None
    ) -> Call:
        """The next upstream call, for at most ``slice_limit`` tokens (None: all that may still come).

        ``model``: the upstream's name for it. ``window``: the scheduler may preempt after every so many tokens; a
        non-streaming client whose whole answer fits into one gets one plain JSON call.
        """
        request = self.request
        self._encoder.name = request.model if request.model and model != request.model else None
        remaining = None if self.limit is None else max(self.limit - self.attained, 1)
        asked = None if slice_limit is None else max(slice_limit, self._grow)
        if self.attained < self._careful:
            asked = max(self._grow, 1)
        if self._last:
            asked = remaining
        elif asked is not None and self._parsed:
            asked += 1  # what a parser makes of a window's end would be ours: the last token is not kept
        if remaining is not None and (asked is None or asked > remaining):
            asked = remaining
        self._begin(asked)
        if self.mode is Mode.WHOLE:
            self._unary = not request.stream
            return calls.own(request, model, priority)
        ledger = self._ledger
        inquiry = self._dialect.inquire(model, ledger)
        if inquiry is not None:
            self._inquiring = True
            return inquiry
        self._start = self.attained = self._safe = ledger.count
        self._undivided = self._last
        self._adds = self._summed is not None and self._summed.closes not in ledger.tokens
        self._first = not (self._dialect.known_prompt or ledger.text)
        self._same = self._first or not request.chat or self.mode is Mode.TEXT or request.logprobs or self._parsed
        self._unary = remaining is not None and asked == remaining and self._may_be_unary(remaining, window)
        if not self._first:
            tokens, text = ledger.tokens, ledger.text
            return self._dialect.more(model, priority, asked, tokens, text, self.attained, stream=not self._unary)
        if self._unary:
            return calls.own(request, model, priority)
        self._ours = asked is not None and (self._implied is None or asked < self._implied)
        return self._dialect.first(model, priority, asked if self._ours else None)

    def _may_be_unary(self, remaining: int, window: int | None) -> bool:
        if self.request.stream or self.mode is Mode.TEXT:
            return False
        if self._last:
            return True
        if self._thinks and not self._first:
            return False
        if self.request.chat and not self._first and not self._dialect.one_document:
            return False
        if self._ledger.stops is not None and not self._first:
            return False  # a stop string over the seam could not be placed among the tokens
        return remaining <= (UNARY_LIMIT if window is None else window)

    def _begin(self, asked: int | None) -> None:
        self.started = False
        self.over = False
        self.error = None
        self.cached = None
        self._asked = asked
        self._start = self.attained
        if self.mode is Mode.WHOLE:
            self._stream = WholeStream(self.request, self._encoder)
        self._foreign = self._encoder.name is not None
        self._first = self._same = True
        self._restart = ""
        self._opened = self._seam = self._retry = self._unary = self._ours = self._plain = self._inquiring = (
            self._paid
        ) = self._undivided = self._adds = self._closed = False
        self._told = 0
        self._counted = self._reasoned

    def refused(self, status: int, body: bytes) -> bool:
        """The call was answered with an error status. True: what was refused was ours, not the client's.

        Then the request is repeated as the client's own, so that its answer or its refusal is the engine's own. False:
        the client asked for it.
        """
        if self._inquiring:
            return self._does_without(status)
        if self._last and not self.committed and self.mode is not Mode.WHOLE:
            self._go_whole("the engine refused the last call")
            return True
        if self.mode is Mode.WHOLE or self._unary or not self._first or self.committed:
            return False
        altered = self._ours or self.request.stop or not self.request.stream or self.request.body.get("echo")
        altered = altered or self._dialect.way in (Way.LLAMA, Way.TEXT)  # asked for more than the client did
        if status not in (400, 413, 422) or not altered:
            return False
        self._go_whole("the engine refused a window")
        return True

    def _does_without(self, status: int) -> bool:
        """A question between two calls was answered with an error status. False: then so is this answer."""
        if not self._insisted and (status == 429 or (status >= 500 and status != _NOT_IMPLEMENTED)):
            self._insisted = True
            return False  # busy, or ill: it may know when it is asked once more
        if self._dialect.informed(None, self._ledger):
            return True
        if self.committed:
            return False
        self._go_whole(NO_PROMPT)
        return True

    def _go_whole(self, reason: str) -> None:
        self.mode = Mode.WHOLE
        self._stream = WholeStream(self.request, self._encoder)
        self.reason = reason
        self.attained = self._thoughts = 0
        self._thinking = self._alone = self._last = False
        self._ledger.reset()
        self._preamble = b""
        self._echo = ""

    # -- ending ---------------------------------------------------------------------------------------------------

    def end_slice(self, how: Literal["finished", "aborted", "broken"]) -> SliceEnd:
        """The call is over: it ended, we closed it, or it died. Cuts the answer back to the last boundary.

        WINDOW with ``attained`` unchanged is a seam like any other; the next call asks differently.
        """
        if self.finished:
            return SliceEnd.FINISHED
        if self.mode is Mode.WHOLE:
            return self._end_whole(how)
        dropped = self._ledger.drop()
        self._thought = 0
        self._ends_thinking = self._thinking  # what the parser made of the window's end went with the rest
        if not self.committed:
            self._echo = self.request.echo  # it may have been in front of what was just taken back
        if self._inquiring and how == "finished" and not self.over:
            return SliceEnd.WINDOW
        if self.limit is not None and self._ledger.count >= self.limit and not self._restart:
            return self._end_at_limit()
        if self._restart:
            self._go_whole(self._restart)
            return SliceEnd.WINDOW
        if self._undivided and self._ledger.count > self._safe:
            return SliceEnd.FAILED  # its parser's state is gone with it
        if self._last and not self._ledger.count:
            self._go_whole("no thoughts to cut")
            return SliceEnd.WINDOW
        if self.error is not None:
            return SliceEnd.INTERRUPTED if self.error.retryable else SliceEnd.FAILED
        if how == "aborted":
            return SliceEnd.PREEMPTED
        if how == "broken" or not self._seam:
            return SliceEnd.INTERRUPTED
        kept = self._ledger.count > self._start or self._retry
        self._grow = 0 if kept else 2 * max(self._asked or 0, dropped, 1)
        return SliceEnd.WINDOW

    def _end_at_limit(self) -> SliceEnd:
        """Every token has come, but not the event that says so."""
        self.finished = True
        self.finish_reason = "length"
        if self.request.stream:
            shown = "" if self._ledger.stops is None else self._ledger.stops.flush()
            usage = None
            if self._dialect.usage_rides:
                usage = self._encoder.usage(self.prompt_tokens or 0, self._ledger.count, self._usage)
                self._usage_shown = True
            fingerprint = None if self.request.include_usage else self._lore.fingerprint
            self._owed = self._encoder.last(shown, "length", usage, fingerprint)
        return SliceEnd.FINISHED

    def _end_whole(self, how: str) -> SliceEnd:
        if self._stream.complete and self.error is None:
            self.finished = True
            return SliceEnd.FINISHED
        if self.committed or (self.error is not None and not self.error.retryable):
            return SliceEnd.FAILED
        self.attained = 0
        return SliceEnd.PREEMPTED if how == "aborted" else SliceEnd.INTERRUPTED

    def close(self, note: str | None = None) -> bytes:
        """The end of a finished stream: usage where the client asked for it and has not seen it, a comment, [DONE]."""
        out = self._owed
        if self.mode is not Mode.WHOLE and self.request.include_usage and not self._usage_shown:
            self._usage_shown = True
            out += self._encoder.usage_chunk(self._total_usage(), None, self._lore.fingerprint)
        if note is not None:
            out += comment(note)
        self.committed = True
        return out if self.request.route.foreign else out + DONE_EVENT

    def body(self) -> bytes:
        """A finished answer as the JSON document a non-streaming client waits for."""
        if self._whole:
            return self._whole
        shape = self._shape or self._lore.documents.get(self.request.route, self._dialect.document)
        ledger = self._ledger
        return self._encoder.document(
            shape,
            self._echo + self.text,
            self._total_usage(),
            self.finish_reason,
            self.stop_reason,
            self._dialect.prompt_ids,
            ledger.tokens,
            self._lore.fingerprint,
            None if ledger.logprobs is None else ledger.logprobs.document(),
            None if self._message is None else {**self._message, "reasoning": self.text[: self._thoughts] or None},
        )

    def error_event(self, error: GatewayError) -> bytes:
        """The last event of a stream that cannot go on: never a silent clean end."""
        body = error_body(error)
        if self.request.route.foreign and isinstance(body["error"], dict):
            return foreign.failure(self.request.route, {"message": str(error), **body["error"]})
        return encode(orjson.dumps(body))
