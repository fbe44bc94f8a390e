"""What an upstream's call brings, event by event: what of it is the answer's, and what its client may see of that.

*Boundaries.* An engine sends text when it is complete: a character split over several tokens comes with its last one,
special tokens have no text, and busy engines send several tokens in one delta. A prompt that ends inside a character is
poison (vLLM then sends the whole prompt as text), so a call may only go on after a token that has given all its text.
Tokens without text wait for the next that has some; a call that ends before it is cut back to the last token with text,
and asks for more next time if nothing was kept. One token with text is a boundary. After several in one delta all text
has come, but the last may have more to give: that is known if it is whole characters by itself (``Lore``, learned from
deltas of one token), and otherwise the engine is asked (``/detokenize``) before the answer goes on; a token still owing
its text is taken back.

*Stop strings.* The engine ends a call at a stop string it sees within it. It is asked to leave the string in the text
(``include_stop_str_in_output``), because otherwise vLLM holds back the last characters of all text and deltas' texts no
longer belong to their tokens. The gateway cuts the string off, finds one that straddles a seam itself, and holds back
only what may still become one.

*Log-probabilities* travel with their tokens; completions' offsets into the text are moved to where it stands.

Knows: one call's events and what they add to the answer. Never: what is asked next.
"""

from __future__ import annotations

from typing import Any

import orjson

from elis_gateway.errors import UpstreamError, UpstreamUnavailable
from elis_gateway.wire import foreign
from elis_gateway.wire.dialects import Boundary, Dialect, Lore, Mode
from elis_gateway.wire.encode import Encoder, blank
from elis_gateway.wire.ledger import Ledger
from elis_gateway.wire.loose import fields
from elis_gateway.wire.openai import Request
from elis_gateway.wire.sse import DONE
from elis_gateway.wire.stops import Pushed
from elis_gateway.wire.thoughts import Count, Thinking, between, head
from elis_gateway.wire.whole import WholeStream, number, reported

__all__ = ["NO_PROMPT", "Reading"]

_NOTHING = 16
"""Where the limit is not known: a call for so many tokens that brings none has met the end of the context."""

_NULL = b"null"
"""llama.cpp's event for a step that shows nothing."""

_UNCOUNTED = "no thoughts whose tokens could be counted"
NO_PROMPT = "the upstream does not tell its prompt"
_MALFORMED = (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError, ValueError)


class Reading:
    """The half of an ``Answer`` that takes what arrives. Its state is the answer's; its maker sets all of it."""

    __slots__ = (
        "_adds", "_alone", "_asked", "_careful", "_closed", "_context", "_counted", "_dialect", "_echo", "_encoder",
        "_ends_thinking", "_first", "_foreign", "_inquiring", "_last", "_ledger", "_lore", "_message", "_opened",
        "_paid", "_parsed", "_parser", "_plain", "_preamble", "_reasoned", "_restart", "_retry", "_running", "_safe",
        "_same", "_seam", "_shape", "_start", "_stop_ids", "_stream", "_summed", "_sums", "_thinking", "_thinks",
        "_thought", "_thoughts", "_told", "_undivided", "_unheard", "_usage", "_usage_shown", "_whole", "attained",
        "cached", "committed",
        "error", "finish_reason", "finished", "limit", "mode", "over", "prompt_tokens", "request", "started",
        "stop_reason",
    )  # fmt: skip

    request: Request
    mode: Mode
    """How the answer goes on after a seam; becomes WHOLE where the request turns out to need that."""
    attained: int
    """Kept tokens: what the answer would have if the call ended now. Exact with ids, else by usage or deltas."""
    prompt_tokens: int | None
    limit: int | None
    """Most tokens the answer may have; falls once the prompt's length is known."""
    committed: bool
    """Has any byte of the answer been handed out?"""
    finished: bool
    finish_reason: str | None
    stop_reason: object

    # of the call under way
    started: bool
    """A token of the current call has arrived."""
    over: bool
    """The current call needs no further reading: close it and end the slice as finished."""
    error: UpstreamError | None
    """What the engine reported inside a stream that had begun."""
    cached: tuple[int, int] | None
    """Of a call that went on: tokens the engine had cached, of so many of its prompt; None where it does not say."""
    _asked: int | None
    """Tokens the call was limited to."""
    _start: int
    """Kept tokens when it began."""
    _stream: WholeStream
    """Only where it is relayed (``mode`` is WHOLE)."""
    _first: bool
    """It reads the client's own request."""
    _same: bool
    """Its chunks have the form of the client's route."""
    _foreign: bool
    """Its chunks carry another identity than the answer's."""
    _opened: bool
    _seam: bool
    """The engine ended it at a limit of ours."""
    _retry: bool
    """What it brought last was taken back on purpose, to be asked for again."""
    _restart: str
    """It shows that the answer cannot be continued: why."""
    _undivided: bool
    """It must not be cut: it has gone beyond the thoughts, where no call could take over."""
    _safe: int
    """Kept tokens when it last could have been cut."""
    _adds: bool
    """It began inside the thoughts, and tells how many of its tokens count as such."""
    _closed: bool
    """In this call a thought has ended."""
    _told: int
    """What it told last."""
    _plain: bool
    """Nothing stands between a delta and the client."""
    _inquiring: bool

    # of the answer
    _dialect: Dialect
    _encoder: Encoder
    _ledger: Ledger
    _lore: Lore
    _context: int | None
    _careful: int
    """Single tokens up to this count: a stop string ends in one of several tokens that came together."""
    _unheard: int
    """Stop strings do not count among the first so many tokens (``min_tokens``)."""
    _stop_ids: frozenset[int]
    """Tokens that end the answer, where stop strings are searched too."""
    _parsed: bool
    """The engine parses it, in every call: its deltas are relayed as they are parsed."""
    _thinks: bool
    """It may begin with thoughts."""
    _thinking: bool
    """What was kept last is one."""
    _ends_thinking: bool
    """What came last is one."""
    _thoughts: int
    """Characters of thoughts that were kept."""
    _thought: int
    """And of those since the last boundary."""
    _parser: Thinking | None
    """What is known of the engine's reasoning parser, where it parses this answer."""
    _alone: bool
    """What follows its thoughts is to be one call."""
    _last: bool
    """And that one is next, or under way."""
    _message: dict[str, Any] | None
    """The message of the document that was the last call."""
    _shape: dict[str, Any] | None
    """And all of that document, blanked out."""
    _summed: Thinking | None
    """``_parser`` where the counts of calls are added up."""
    _counted: int
    """Reasoning tokens before this call, by the engine's count."""
    _reasoned: int
    """And until now."""
    _sums: list[tuple[int, int]]
    """Tokens kept, and ``_reasoned`` then, as far back as tokens may be given back."""
    _paid: bool
    """This call's first text has come, with what the parser of the call before held back."""
    _echo: str
    """The prompt, still to be shown in front of the answer."""
    _preamble: bytes
    """The role chunk of a chat stream, sent with the first text."""
    _whole: bytes
    """The engine's own document, where it is the answer."""
    _usage: dict[str, Any] | None
    _usage_shown: bool
    _running: dict[str, Any] | None
    """The form of running usage on the client's route."""

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
        clear = None if ledger.stops is None else ledger.stops.clear
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
                and not text.endswith("\ufffd")
                and "usage" not in chunk
                and (clear is None or clear(text))
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
        if not isinstance(text, str) or not (finish is None or isinstance(finish, str)):
            raise TypeError("a text that is none")
        if not self._opened:
            self._opened = True
            self._encoder.open(chunk)
            self._foreign = self._encoder.name is not None or chunk.get("id") != self._encoder.id
        if self._first and self.prompt_tokens is None:
            self._learn_prompt(chunk, choice)
            if self.limit is not None and self._unheard > self.limit:
                self._give_up()  # more than the context leaves: the engine refuses that, in its own words
                return
        said = text
        if self._adds and (told := chunk.pop("usage", None)):  # asked for by us
            self._told = _reasoning(told)
        if self._parser is not None and self._parser.closes in (choice.get("token_ids") or ()):
            self._closed = True
        if self._alone and not self._undivided and self._is_past_thoughts(choice, finish) and not self._stays():
            return
        if self._parsed:
            said, text = self._fields(choice["delta"], text, finish)
        unknown = not self._undivided and _unknown(choice, self._thinks)
        read = None if unknown else self._dialect.read(chunk, choice, text)
        if read is None:
            self._give_up()
            return
        if self._summed is not None and said and not self._thoughts + self._thought:
            self._give_up(_UNCOUNTED)
            return
        tokens, count = read
        if not text and not count and finish is None:
            self._bare(chunk, choice)
            return
        ledger = self._ledger
        self.started = True
        if ledger.logprobs is not None:
            ledger.logprobs.take(choice)
        before = ledger.count + ledger.pending
        total = before + count
        held = 0
        found = _NOT_SEARCHED
        if ledger.stops is not None:
            held = len(ledger.stops.held)
            ended = self._dialect.exact and finish == "stop" and self._ended_by_token(reason, tokens)
            if ended and count == 1:
                text = ""  # asking for stop strings in the text also brings the text of the token that ends it
            if ended and isinstance(reason, str):
                reason = tokens[-1]
            found = ledger.search(text, search=total > self._unheard)
            if not self._placed(found, ended, before, count, finish, reason) and self._asked_again(total):
                return
        if found.stop is not None:
            self.over = finish is None
            finish, reason = "stop", found.stop if self._dialect.names_stop else None
        elif finish is not None and not self._is_real(finish, total):
            self._seam = True
            finish = reason = None
        shown = said if ledger.stops is None else found.shown
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
        if self._seam and (self._parsed or not (shown or count)):
            return  # a parser was told that the answer ends
        shows = self.request.stream and not self._is_silent(choice, finish)
        event = self._render(chunk, choice, shown, tokens, finish, reason) if shows else b""
        fresh = not (ledger.pending or ledger.unsure)
        ledger.add(text, tokens, count, event)
        if finish is not None:
            self.finished = True
            self.finish_reason, self.stop_reason = finish, reason
            self._commit(out, True)
            ledger.shorten(held + len(text) - len(found.shown) if found.stop is not None else 0)
            return
        if self._undivided:
            self._commit(out, True)
            return
        boundary = self._dialect.boundary(text, tokens, fresh)
        told = self.request.wants_ids or self.request.logprobs  # of tokens, and could not be taken back
        if boundary is Boundary.SURE or (boundary is Boundary.UNSURE and not told):
            self._commit(out, boundary is Boundary.SURE)
        else:
            self._plain = False

    def _fields(self, delta: dict[str, Any], said: str, finish: str | None) -> tuple[str, str]:
        """(content, all text) of a delta that a parser took apart.

        What it held back when the call before was closed goes first, but blanks at the end of thoughts, which it drops.
        """
        thought = (delta.get("reasoning") or "") if self._thinks else ""
        if not (thought or said) and finish is None:
            return "", ""
        before = ""
        if not self._paid and (owed := self._dialect.owed):
            if not self._thinking:
                before = owed
            elif (thought and not self._closed) or (owed := owed.rstrip()):
                delta["reasoning"] = thought = owed + thought
        self._paid = True
        self._ends_thinking = not said
        self._thought += len(thought)
        return before + said, before + thought + said

    def _is_past_thoughts(self, choice: dict[str, Any], finish: str | None) -> bool:
        """Has the answer gone beyond its thoughts? Of a document also: has it ended inside them?"""
        total = self._ledger.count + self._ledger.pending + len(choice.get("token_ids") or ())
        if finish is not None and not (self._is_real(finish, total) and self.request.stream):
            return self._is_real(finish, total)
        delta = choice["delta"]
        return bool(self._closed or delta.get("content") or delta.get("tool_calls"))

    def _stays(self) -> bool:
        """This call is to bring all the rest, or else the next one, which begins inside the thoughts."""
        if self._summed is not None and not self._thoughts + self._thought:
            self._give_up(_UNCOUNTED)
            return False
        remaining = None if self.limit is None else self.limit - self._start
        if self.request.stream and (self._asked is None or self._asked == remaining):
            self._undivided, self._safe = True, self._ledger.count
            return True
        self._last = self.over = self._seam = self._retry = True
        self._plain = False
        return False

    def _is_silent(self, choice: dict[str, Any], finish: str | None) -> bool:
        """Has a parser nothing to show for this delta, so that the engine would not have sent it but for us?"""
        return self._parsed and finish is None and not (
            choice["delta"] or self.request.wants_ids or choice.get("logprobs")
        )  # fmt: skip

    def _ended_by_token(self, reason: object, tokens: Any) -> bool:
        """Did a token end the call, not a stop string? Its text, which only we asked for, may have completed one."""
        if self.request.include_stop:
            return False
        return not isinstance(reason, str) or bool(tokens and tokens[-1] in self._stop_ids)

    def _placed(
        self, found: Pushed, ended: bool, before: int, count: int, finish: str | None, reason: object
    ) -> bool:  # fmt: skip
        """Is it known which of the delta's tokens a match, or an end, belongs to?"""
        if count <= 1:
            return True
        if before < self._unheard < before + count or (ended and self._stop_ids):
            return False
        return found.stop is None or (finish == "stop" and isinstance(reason, str) and found.at_end)

    def _asked_again(self, total: int) -> bool:
        """Several tokens came together: take them back, to have them again one by one. False: no use."""
        if not (self.request.body.get("temperature") == 0 and self._dialect.exact):
            return False
        if self._ledger.count >= self._careful:
            self._careful = total
            self.over = self._seam = self._retry = True
            return True
        if not self.committed:
            self._give_up()  # tokens without text of their own stand between
            return True
        return False

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

    def _give_up(self, why: str = "the upstream gives no token ids or parses its answers") -> None:
        """Deltas without ids, or parsed into fields: this upstream's answer cannot be continued after all."""
        self.over = True
        self._plain = False
        self._restart = "" if self.committed else why
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
        self._thoughts += self._thought
        self._thought = 0
        self._thinking = self._ends_thinking
        if self._adds:
            self._reasoned = self._counted + self._told
            if sure:
                self._sums.clear()
            self._sums.append((ledger.count, self._reasoned))
        self.attained = ledger.count - ledger.unsure
        self._plain = (
            sure
            and self._dialect.plain
            and not self._thinking
            and ledger.logprobs is None
            and (ledger.stops is None or (not ledger.stops.tail and ledger.count >= self._unheard))
        )

    def _render(
        self, chunk: dict[str, Any], choice: dict[str, Any], text: str, tokens: Any, finish: str | None, reason: object
    ) -> bytes:
        if self._echo:
            text, self._echo = self._echo + text, ""
        if self._same:
            if self._first:
                self._encoder.remember(chunk, choice)
            if (self.request.wants_ids or self.request.echo) and not self.request.chat:  # with the answer's first delta
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
        if self._running is None:
            self._running = dict(chunk["usage"])
        chunk["usage"] = {**self._running, **counts}

    def _aside(self, chunk: dict[str, Any], out: list[bytes]) -> None:
        """An event without choices: usage, or an error inside the stream."""
        if chunk.get("error") is not None:
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
        else:
            self.cached = _cached(usage)
        if self.prompt_tokens is None and usage.get("prompt_tokens"):
            self.prompt_tokens = usage["prompt_tokens"] - (0 if self._first else self._start)

    def feed_whole(self, body: bytes) -> None:
        """Take the response of a call that was not streamed. Raises ``UpstreamUnavailable`` (cause ``garbage``)."""
        if self._inquiring:
            self._informed(body)
            return
        if self.request.route.foreign:
            self._foreign_document(body)
            return
        try:
            document = orjson.loads(body)
            choice = document["choices"][0]
            usage = document.get("usage") or {}
            text = choice.get("text") or (choice.get("message") or {}).get("content") or ""
            count = int(usage.get("completion_tokens") or 0)
            if self._ledger.logprobs is not None and self.mode is not Mode.WHOLE:
                self._ledger.logprobs.take(choice)
            if self._last and self.mode is not Mode.WHOLE:
                text = self._last_document(document, choice["message"], text)
        except _MALFORMED as error:
            raise UpstreamUnavailable(f"the upstream sent an unreadable answer: {error}", cause="garbage") from error
        self.started = self.finished = True
        self.finish_reason, self.stop_reason = choice.get("finish_reason"), choice.get("stop_reason")
        self._ledger.add(text, choice.get("token_ids") or (), count, b"")
        self._ledger.commit([], True)
        self.attained = self._ledger.count
        self._usage = usage
        if not self._first:
            self.cached = _cached(usage)
        self._note_fingerprint(document.get("system_fingerprint"))
        if self._first:
            self.prompt_tokens = usage.get("prompt_tokens")
            self._whole = body if self._encoder.name is None else self._encoder.rename(document)
            if self.mode is not Mode.WHOLE and self.request.route not in self._lore.documents:
                self._lore.documents[self.request.route] = blank(document)

    def _last_document(self, document: dict[str, Any], message: dict[str, Any], content: str) -> str:
        """All text of a document that began inside the thoughts, with what a parser held back before it."""
        thought, owed = message.get("reasoning") or "", self._dialect.owed
        thought = (owed if thought else owed.rstrip()) + thought
        self._message, self._shape = message, blank(document)
        self._thoughts += len(thought)
        return thought + content

    def _foreign_document(self, body: bytes) -> None:
        try:
            document = orjson.loads(body)
            text, usage = foreign.said(document), foreign.usage(document)
        except _MALFORMED as error:
            raise UpstreamUnavailable(f"the upstream sent an unreadable answer: {error}", cause="garbage") from error
        self.started = self.finished = True
        self.finish_reason = "stop"
        self.prompt_tokens = number(usage.get("input_tokens"))
        self._ledger.add(text, (), number(usage.get("output_tokens")) or 0, b"")
        self._ledger.commit([], True)
        self.attained = self._ledger.count
        alias = self._encoder.name
        self._whole = orjson.dumps(document) if alias is not None and foreign.rename(document, alias) else body

    def _informed(self, body: bytes) -> None:
        ledger = self._ledger
        try:
            known = self._dialect.informed(orjson.loads(body), ledger)
        except _MALFORMED:
            known = self._dialect.informed(None, ledger)
        if not known:
            self._give_up(NO_PROMPT)
        while self._sums and self._sums[-1][0] > ledger.count:
            self._sums.pop()
            self._reasoned = self._sums[-1][1] if self._sums else 0
        self.attained = ledger.count - ledger.unsure

    def _total_usage(self) -> dict[str, Any]:
        usage = self._encoder.usage(self.prompt_tokens or 0, self.attained, self._usage)
        if self._parser is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self._reasoning_tokens(self._parser)}
        return usage

    def _reasoning_tokens(self, parser: Thinking) -> int:
        tokens = self._ledger.tokens
        if Count.MARKED is (parser.streamed if self.request.stream else parser.whole):
            return between(tokens, parser)
        return self._reasoned if self.request.stream else head(tokens[: self._safe], parser) + _reasoning(self._usage)


_NOT_SEARCHED = Pushed("", None, False)


def _reasoning(usage: dict[str, Any] | None) -> int:
    """Tokens that an engine counts as thoughts."""
    return number(fields(usage, "completion_tokens_details").get("reasoning_tokens")) or 0


def _cached(usage: dict[str, Any]) -> tuple[int, int] | None:
    """Cached tokens and all tokens of a call's prompt."""
    cached = number(fields(usage, "prompt_tokens_details").get("cached_tokens"))
    prompt = number(usage.get("prompt_tokens"))
    return None if cached is None or prompt is None else (cached, prompt)


def _unknown(choice: dict[str, Any], thinks: bool) -> bool:
    """Has a reasoning or tool parser taken text out of this delta, from where it cannot go on?"""
    delta = choice.get("delta")
    if delta is None:
        return False
    return bool(delta.get("tool_calls") or (not thinks and (delta.get("reasoning") or delta.get("reasoning_content"))))
