"""The seam: one answer out of many upstream calls, indistinguishable from one call.

An ``Answer`` builds the next call, reads what it brings, and decides at every end which tokens are kept.

*Boundaries.* An engine sends text when it is complete: a character split over several tokens comes with its last one,
special tokens have no text, and busy engines send several tokens in one delta. A prompt that ends inside a character is
poison (vLLM then sends the whole prompt as text), so a call may only go on after a token that has given all its text.
Tokens without text wait for the next that has some; a call that ends before it is cut back to the last token with text,
and asks for more next time if nothing was kept. One token with text is a boundary. After several in one delta all text
has come, but the last may have more to give: that is known if it is whole characters by itself (``Lore``, learned from
deltas of one token), and otherwise the engine is asked (``/detokenize``) before the answer goes on; a token still owing
its text is taken back.

*Bias.* At temperature 0 this is exact. Above, tokens dropped at a seam are drawn anew, so a character of several tokens
that would have begun just before a seam survives with less than its probability p (about p², if it needs the seam to be
cut again); away from seams, and for characters of one token, nothing changes.

*Stop strings.* The engine ends a call at a stop string it sees within it. It is asked to leave the string in the text
(``include_stop_str_in_output``), because otherwise vLLM holds back the last characters of all text and deltas' texts no
longer belong to their tokens. The gateway cuts the string off, finds one that straddles a seam itself, and holds back
only what may still become one.

*Limits.* ``length`` at a window is ours and never shown. The client's own limit is the lesser of its ``max_tokens`` and
what the context leaves after the prompt, as vLLM 0.32 clamps it.

Knows: whether and how an answer goes on, what its client has seen. Never: scheduling, sockets, clocks.
"""

from __future__ import annotations

from typing import Any, Literal

import orjson

from elis_gateway.core.slice import SliceEnd
from elis_gateway.errors import GatewayError, UpstreamError, UpstreamUnavailable
from elis_gateway.wire import calls
from elis_gateway.wire.calls import Call
from elis_gateway.wire.dialects import Boundary, ById, ByText, Dialect, Lore, Mode
from elis_gateway.wire.encode import Encoder, blank
from elis_gateway.wire.ledger import Ledger
from elis_gateway.wire.llamacpp import LlamaCpp
from elis_gateway.wire.openai import Request
from elis_gateway.wire.problems import error_body
from elis_gateway.wire.sse import DONE, DONE_EVENT, comment, encode
from elis_gateway.wire.whole import WholeStream, reported

__all__ = ["Answer", "Call", "Lore", "Mode"]

UNARY_LIMIT = 64
"""Without windows, most tokens a non-streaming client's answer may have to be fetched as one JSON document: what is
lost if the upstream dies half-way."""

_NOTHING = 16
"""Where the limit is not known: a call for so many tokens that brings none has met the end of the context."""

_NULL = b"null"
"""llama.cpp's event for a step that shows nothing."""

_MALFORMED = (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError, ValueError)


class Answer:
    """One request's growing answer. Pure; belongs to one job; not thread-safe.

    Life: ``call`` -> ``feed`` ... (or ``feed_whole``) -> ``end_slice``, again until FINISHED, then ``close`` (streams)
    or ``body``. All token counts are of the answer.
    """

    __slots__ = (
        "_asked", "_careful", "_context", "_dialect", "_encoder", "_first", "_foreign", "_grow", "_implied",
        "_inquiring", "_ledger", "_lore", "_opened", "_ours", "_owed", "_plain", "_preamble", "_restart", "_retry",
        "_same", "_seam", "_start", "_stream", "_unary", "_usage", "_usage_shown", "_whole", "attained", "committed",
        "error", "finish_reason", "finished", "limit", "mode", "over", "prompt_tokens", "reason", "request", "started",
        "stop_reason",
    )  # fmt: skip

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
    ) -> None:
        """``context``: the engine's context length in tokens, where known. ``default_limit``: its own ``max_tokens``
        for a chat that names none. ``engine``: ``llama.cpp`` for its dialect, anything else for vLLM's."""
        self.request = request
        self.mode = mode
        """How the answer goes on after a seam; becomes WHOLE where the request turns out to need that."""
        self.reason = reason
        """Why ``mode`` is WHOLE."""
        self.attained = 0
        """Kept tokens: what the answer would have if the call ended now. Exact with ids, else by usage or deltas."""
        self.prompt_tokens: int | None = None
        self.committed = False
        """Has any byte of the answer been handed out?"""
        self.finished = False
        self.finish_reason: str | None = None
        self.stop_reason: object = None
        self._context = context
        self._lore = lore if lore is not None else Lore()
        self._encoder = Encoder(request)
        self._ledger = Ledger(request.stop)
        self._dialect: Dialect = (
            ByText(request) if mode is Mode.TEXT
            else LlamaCpp(request) if engine == "llama.cpp"
            else ById(request, self._lore)
        )  # fmt: skip
        self._implied = request.max_tokens
        """Tokens the engine would stop at by itself, as far as the request says."""
        if self._implied is None and not request.chat:
            self._implied = self._dialect.completions_default
        self.limit = default_limit if self._implied is None and request.chat else self._implied
        """Most tokens the answer may have; falls once the prompt's length is known."""
        self._preamble = b""
        """The role chunk of a chat stream, sent with the first text."""
        self._owed = b""
        """The event that ends the answer, where the engine did not send one."""
        self._whole = b""
        """The engine's own document, where it is the answer."""
        self._usage: dict[str, Any] | None = None
        self._usage_shown = False
        self._grow = 0
        """The next call asks for at least so many tokens, because the last one kept none."""
        self._careful = 0
        """Single tokens up to this count: a stop string ends in one of several tokens that came together."""
        self._begin(None)
        if request.unsliceable is not None:
            self._go_whole(request.unsliceable)
        elif self._dialect.exact and request.max_tokens is not None and request.max_tokens > (context or 1 << 62):
            self._go_whole("max_tokens beyond the context")  # the engine refuses that, in its own words

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._stream.text) if self.mode is Mode.WHOLE and not self._whole else self._ledger.text

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
        self._start = self.attained = ledger.count
        self._first = not (self._dialect.known_prompt or ledger.text)
        self._same = self._first or not request.chat or self.mode is Mode.TEXT
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
        if self.request.chat and not self._first and not self._dialect.one_document:
            return False
        if self._ledger.stops is not None and not self._first:
            return False  # a stop string over the seam could not be placed among the tokens
        return remaining <= (UNARY_LIMIT if window is None else window)

    def _begin(self, asked: int | None) -> None:
        self.started = False
        """A token of the current call has arrived."""
        self.over = False
        """The current call needs no further reading: close it and end the slice as finished."""
        self.error: UpstreamError | None = None
        """What the engine reported inside a stream that had begun."""
        self._asked = asked
        self._start = self.attained
        self._stream = WholeStream(self.request, self._encoder)
        self._foreign = self._encoder.name is not None
        """Chunks of this call carry another identity than the answer's."""
        self._first = self._same = True
        """This call reads the client's own request; its chunks have the form of the client's route."""
        self._opened = self._seam = self._retry = self._restart = self._unary = self._ours = self._plain = (
            self._inquiring
        ) = False
        # _seam: the engine ended the call at a limit of ours. _plain: nothing stands between a delta and the client.

    def refused(self, status: int, body: bytes) -> bool:
        """The call was answered with an error status. True: what was refused was ours, not the client's.

        Then the request is repeated as the client's own, so that its answer or its refusal is the engine's own. False:
        the client asked for it.
        """
        if self._inquiring:
            self._dialect.informed(None, self._ledger)
            return True
        if self.mode is Mode.WHOLE or self._unary or not self._first or self.committed:
            return False
        altered = self._ours or self.request.stop or not self.request.stream
        if status not in (400, 413, 422) or not altered:
            return False
        self._go_whole("the engine refused a window")
        return True

    def _go_whole(self, reason: str) -> None:
        self.mode = Mode.WHOLE
        self.reason = reason
        self.attained = 0
        self._ledger.reset()
        self._preamble = b""

    # -- reading --------------------------------------------------------------------------------------------------

    def feed(self, payloads: list[bytes]) -> bytes:
        """Take the events of one network read; returns what to send to a streaming client now.

        Raises ``UpstreamUnavailable`` (cause ``garbage``) where an event is not what this API sends; after events that
        were, it says so by ``over`` and ``error`` instead, so that nothing already kept is lost.
        """
        if self.mode is Mode.WHOLE:
            data = self._relay(payloads)
        else:
            out: list[bytes] = []
            try:
                self._read(payloads, out)
            except _MALFORMED as error:
                self._plain = False
                self.over = True
                self.error = UpstreamUnavailable(f"the upstream sent an unreadable event: {error}", cause="garbage")
                if not out:
                    raise self.error from error
            data = b"".join(out) if out else b""
        if data:
            self.committed = True
        return data

    def _relay(self, payloads: list[bytes]) -> bytes:
        stream = self._stream
        data = stream.relay(payloads)
        self.attained, self.prompt_tokens, self.finish_reason = stream.count, stream.prompt_tokens, stream.finish_reason
        self.started = self.started or bool(data)
        self.error = stream.error
        self.over = stream.error is not None
        return data

    def _read(self, payloads: list[bytes], out: list[bytes]) -> None:
        chat = self.request.chat and self._same
        streams, hides_ids = self.request.stream, not self.request.wants_ids
        ledger, closed, encoder = self._ledger, self._lore.closed, self._encoder
        for payload in payloads:
            if payload in (DONE, _NULL):
                continue
            chunk = orjson.loads(payload)
            choices = chunk.get("choices")
            if not choices:
                self._aside(chunk, out)
                continue
            choice = choices[0]
            text = (choice["delta"].get("content") if chat else choice["text"]) or ""
            if (
                self._plain
                and text
                and (ids := choice.get("token_ids"))
                and len(ids) == 1
                and choice["finish_reason"] is None
                and text[-1] != "\ufffd"
                and "usage" not in chunk
            ):  # one token with its text: nearly all of them
                ledger.tokens.append(ids[0])
                ledger.pieces.append(text)
                ledger.count += 1
                self.attained += 1
                closed.add(ids[0])
                if not streams:
                    continue
                if not self._same:
                    out.append(encoder.dress(chunk, text, ids, None, None))
                    continue
                if hides_ids:
                    choice["token_ids"] = None
                if self._foreign:
                    chunk["id"], chunk["created"], chunk["model"] = encoder.id, encoder.created, encoder.model
                out.append(b"data: " + orjson.dumps(chunk) + b"\n\n")
            elif not (self.over or self._seam or self.finished):
                self._delta(chunk, choice, text, out)

    def _delta(self, chunk: dict[str, Any], choice: dict[str, Any], text: str, out: list[bytes]) -> None:
        """Any delta that is not plain: the first, several tokens, no text, an end, or with stop strings about."""
        finish: str | None = choice.get("finish_reason")
        reason = choice.get("stop_reason")
        if not self._opened:
            self._opened = True
            self._encoder.open(chunk)
            self._foreign = self._encoder.name is not None or chunk.get("id") != self._encoder.id
        if self._first and self.prompt_tokens is None:
            self._learn_prompt(chunk, choice)
        read = None if _parsed(choice) else self._dialect.read(chunk, choice, text)
        if read is None:
            self._give_up()
            return
        tokens, count = read
        if not text and not count and finish is None:
            self._bare(chunk, choice)
            return
        ledger = self._ledger
        self.started = True
        if ledger.stops is not None and finish == "stop" and not isinstance(reason, str) and count == 1:
            text = ""  # asking for stop strings in the text also brings the text of the token that ends it
        held = 0 if ledger.stops is None else len(ledger.stops.tail)
        found = ledger.search(text)
        total = ledger.count + ledger.pending + count
        if found.stop is not None:
            exact = count <= 1 or (finish == "stop" and isinstance(reason, str) and found.at_end)
            greedy = self.request.body.get("temperature") == 0
            if not exact and greedy and self._dialect.exact and ledger.count >= self._careful:
                # Which of these tokens completed it? Take them back and have them again one by one.
                self._careful = total
                self.over = self._seam = self._retry = True
                return
            self.over = finish is None
            finish, reason = "stop", found.stop if self._dialect.names_stop else None
        elif finish is not None and not self._is_real(finish, total):
            self._seam = True
            finish = reason = None
        shown = found.shown
        if finish is not None and found.stop is None and ledger.stops is not None:
            shown += ledger.stops.flush()
        if chunk.get("usage"):
            if finish is not None:
                self._note_usage(chunk["usage"])
                if not self._dialect.exact:  # it counts tokens that no delta showed
                    missing = self._start + (chunk["usage"].get("completion_tokens") or 0) - total
                    count, total = count + missing, total + missing
            self._correct(chunk, total)
        self._dialect.undress(chunk, choice, finish is not None)
        if finish is not None and self._dialect.usage_rides:
            chunk["usage"] = self._encoder.usage(self.prompt_tokens or 0, total, self._usage)
            self._usage_shown = True
        if self._seam:
            self._note_fingerprint(chunk.pop("system_fingerprint", None))
        elif finish is not None and not self.request.include_usage:
            # On the last chunk of a stream, whichever that is; where we end the answer the engine did not put it there.
            self._note_fingerprint(chunk.get("system_fingerprint"))
            if self._lore.fingerprint is not None:
                chunk["system_fingerprint"] = self._lore.fingerprint
        if self._seam and not (shown or count):
            return
        event = self._render(chunk, choice, shown, tokens, finish, reason) if self.request.stream else b""
        fresh = not (ledger.pending or ledger.unsure)
        ledger.add(text, tokens, count, event)
        if finish is not None:
            self.finished = True
            self.finish_reason, self.stop_reason = finish, reason
            self._commit(out, True)
            ledger.shorten(held + len(text) - len(found.shown) if found.stop is not None else 0)
            return
        boundary = self._dialect.boundary(text, tokens, fresh)
        if boundary is Boundary.SURE or (boundary is Boundary.UNSURE and not self.request.wants_ids):
            self._commit(out, boundary is Boundary.SURE)  # ids once handed out could not be taken back
        else:
            self._plain = False

    def _learn_prompt(self, chunk: dict[str, Any], choice: dict[str, Any]) -> None:
        self.prompt_tokens = self._dialect.open(chunk, choice)
        if self.prompt_tokens is not None and self._context is not None:
            room = self._context - self.prompt_tokens
            self.limit = room if self.limit is None else min(self.limit, room)

    def _bare(self, chunk: dict[str, Any], choice: dict[str, Any]) -> None:
        """A chunk without any token: a chat's opening one, which names the role, is kept for its first text."""
        if self._first and self.request.stream and not self.committed and "delta" in choice:
            if chunk.get("usage"):
                self._correct(chunk, 0)
            self._dialect.undress(chunk, choice, False)
            self._preamble = self._encoder.preamble(chunk)

    def _give_up(self) -> None:
        """Deltas without ids, or parsed into fields: this upstream's answer cannot be continued after all."""
        self.over = True
        self._plain = False
        self._restart = not self.committed
        if self.committed:
            self.error = UpstreamUnavailable("the upstream's answer cannot be continued", cause="garbage")

    def _is_real(self, finish: str, total: int) -> bool:
        """Is this end the answer's own? Else it is our window's, or the engine gave up on the call."""
        if finish == "abort":
            self.over = True
            self.error = UpstreamUnavailable("the engine aborted the call", cause="aborted")
            return False
        if finish != "length" or self._asked is None:
            return True
        remaining = None if self.limit is None else self.limit - self._start
        if not self._dialect.exact:  # our count may be short; of a call that brings nothing no more will come
            if remaining is None:
                return total == self._start and self._asked >= _NOTHING
            return self._asked >= remaining
        return total - self._start < self._asked or (remaining is not None and total - self._start >= remaining)

    def _commit(self, out: list[bytes], sure: bool) -> None:
        if self._preamble:
            out.append(self._preamble)
            self._preamble = b""
        ledger = self._ledger
        ledger.commit(out, sure)
        self.attained = ledger.count - ledger.unsure
        self._plain = sure and self._dialect.plain and ledger.stops is None

    def _render(
        self, chunk: dict[str, Any], choice: dict[str, Any], text: str, tokens: Any, finish: str | None, reason: object
    ) -> bytes:
        if self._same:
            if self._first:
                self._encoder.remember(chunk, choice)
            if self.request.wants_ids and not self.request.chat:  # with the first delta of the answer
                first = not (self._ledger.count or self._ledger.pending)
                choice["prompt_token_ids"] = self._dialect.prompt_ids if first else None
            return self._encoder.relay(chunk, choice, text, finish, reason)
        return self._encoder.dress(chunk, text, tokens, finish, reason)

    def _note_fingerprint(self, fingerprint: str | None) -> None:
        if fingerprint is not None:
            self._lore.fingerprint = fingerprint

    def _correct(self, chunk: dict[str, Any], total: int) -> None:
        """Running usage, for clients that want it: of the answer, not of the call."""
        prompt = self.prompt_tokens or 0
        counts = {"prompt_tokens": prompt, "completion_tokens": total, "total_tokens": prompt + total}
        chunk["usage"] = {**chunk["usage"], **counts}

    def _aside(self, chunk: dict[str, Any], out: list[bytes]) -> None:
        """An event without choices: usage, or an error inside the stream."""
        if "error" in chunk:
            self.error = reported(chunk)
            self.over = True
            return
        self._note_fingerprint(chunk.get("system_fingerprint"))
        usage = chunk.get("usage")
        if not usage:
            return
        self._note_usage(usage)
        count = usage.get("completion_tokens")
        recounts = self._dialect.recounts and not self._ledger.pending
        if count and not self._dialect.exact and (self.finished or recounts):
            self._ledger.count = self.attained = self._start + count
        if self.finished and self.request.include_usage and not self._usage_shown:
            self._usage_shown = True
            out.append(self._encoder.usage_chunk(self._total_usage(), chunk, self._lore.fingerprint))

    def _note_usage(self, usage: dict[str, Any]) -> None:
        """A call's own usage: its form, and what it says of the prompt."""
        self._usage = usage
        if self._first:
            self._encoder.details = usage.get("prompt_tokens_details")
        if self.prompt_tokens is None and usage.get("prompt_tokens"):
            self.prompt_tokens = usage["prompt_tokens"] - (0 if self._first else self._start)

    def feed_whole(self, body: bytes) -> None:
        """Take the response of a call that was not streamed. Raises ``UpstreamUnavailable`` (cause ``garbage``)."""
        if self._inquiring:
            self._informed(body)
            return
        try:
            document = orjson.loads(body)
            choice = document["choices"][0]
            usage = document.get("usage") or {}
            text = choice.get("text") or (choice.get("message") or {}).get("content") or ""
            count = int(usage.get("completion_tokens") or 0)
        except _MALFORMED as error:
            raise UpstreamUnavailable(f"the upstream sent an unreadable answer: {error}", cause="garbage") from error
        self.started = self.finished = True
        self.finish_reason, self.stop_reason = choice.get("finish_reason"), choice.get("stop_reason")
        self._ledger.add(text, choice.get("token_ids") or (), count, b"")
        self._ledger.commit([], True)
        self.attained = self._ledger.count
        self._usage = usage
        self._note_fingerprint(document.get("system_fingerprint"))
        if self._first:
            self.prompt_tokens = usage.get("prompt_tokens")
            self._whole = body if self._encoder.name is None else self._encoder.rename(document)
            if self.mode is not Mode.WHOLE and self.request.route not in self._lore.documents:
                self._lore.documents[self.request.route] = blank(document)

    def _informed(self, body: bytes) -> None:
        ledger = self._ledger
        try:
            self._dialect.informed(orjson.loads(body), ledger)
        except _MALFORMED:
            self._dialect.informed(None, ledger)
        self.attained = ledger.count - ledger.unsure

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
        if self._inquiring and how == "finished":
            return SliceEnd.WINDOW
        if self.limit is not None and self._ledger.count >= self.limit and not self._restart:
            return self._end_at_limit()
        if self._restart:
            self._go_whole("the upstream gives no token ids or parses its answers")
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
            self._owed = self._encoder.last(shown, "length", usage)
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
        return out + DONE_EVENT

    def body(self) -> bytes:
        """A finished answer as the JSON document a non-streaming client waits for."""
        if self._whole:
            return self._whole
        shape = self._lore.documents.get(self.request.route, self._dialect.document)
        prompt_ids, ids = self._dialect.prompt_ids, self._ledger.tokens
        usage = self._total_usage()
        return self._encoder.document(
            shape, self.text, usage, self.finish_reason, self.stop_reason, prompt_ids, ids, self._lore.fingerprint
        )

    def _total_usage(self) -> dict[str, Any]:
        return self._encoder.usage(self.prompt_tokens or 0, self.attained, self._usage)

    def error_event(self, error: GatewayError) -> bytes:
        """The last event of a stream that cannot go on: never a silent clean end."""
        return encode(orjson.dumps(error_body(error)))


def _parsed(choice: dict[str, Any]) -> bool:
    """Has a reasoning or tool parser taken text out of this delta?"""
    delta = choice.get("delta")
    return delta is not None and bool(
        delta.get("reasoning") or delta.get("reasoning_content") or delta.get("tool_calls")
    )
