"""A tiny deterministic engine with vLLM 0.32's habits, and a driver that cuts its answers wherever a test says.

Every token is a function of all ids before it, so one lost or doubled token changes all that follows. Characters are
split over tokens, incomplete ones are held back, a prompt that ends inside one leaks, stop strings hold text back,
and deltas may carry several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import orjson

from elis_gateway.core.slice import SliceEnd
from elis_gateway.wire.continuation import Answer, Call, Lore, Mode
from elis_gateway.wire.openai import Request, Route, parse
from elis_gateway.wire.parameters import Way
from elis_gateway.wire.sse import DONE, EventDecoder, encode
from elis_gateway.wire.thoughts import Count, Thinking, between

EOS = 0
SPECIAL = 1
OPEN, CLOSE = 900, 901
"""Marks of a thought."""
THINKING = Thinking(OPEN, CLOSE, streamed=Count.SUMMED, whole=Count.UNMARKED, waits=True)
MARKED = Thinking(OPEN, CLOSE, streamed=Count.MARKED, whole=Count.MARKED, waits=True)
WORDS = [b" a", b"b", b" the", b"\n", b"AB", b"A", b"B", b" stop", b"!", "é".encode(), "漢".encode(), " 글".encode()]
PIECES = [
    b"\xf0\x9f",
    b"\x99",
    b"\x82",
    b"\xe2\x80",
    b"\x8d",
    b"\xf0\x9f\xa6",
    b"\xa6",
    b"\xa3",
    b"x\xf0",
    b"\x9f\x8e",
    b"\x89y",
]
VOCAB: dict[int, bytes] = {EOS: b"", SPECIAL: b"", OPEN: b"", CLOSE: b""}
VOCAB |= {2 + i: token for i, token in enumerate(WORDS + PIECES)}
VOCAB |= {1000 + byte: bytes([byte]) for byte in range(256)}
_NEXT = {b"\xf0\x9f": (b"\x99", b"\xa6"), b"\x99": (b"\x82",), b"\xe2\x80": (b"\x8d",), b"\xf0\x9f\xa6": (b"\xa3",)}
_NEXT |= {b"x\xf0": (b"\x9f\x8e",), b"\x9f\x8e": (b"\x89y",)}
IDS = {token: token_id for token_id, token in VOCAB.items() if 1 < token_id < 1000}


class Refused(Exception):
    """The engine's error response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = orjson.dumps({"error": {"message": message, "type": "BadRequestError", "code": status}})


def decode(ids: list[int]) -> str:
    return b"".join(VOCAB[i] for i in ids).decode("utf-8", "replace")


def encode_text(text: str) -> list[int]:
    return [1000 + byte for byte in text.encode()]


class Detokenizer:
    """The rule of ``tokenizers.decoders.DecodeStream``: nothing while the end is incomplete, then all since."""

    def __init__(self, prompt: list[int]) -> None:
        self.ids = list(prompt)
        if not decode(prompt[-8:]).endswith("�"):
            self.ids = []  # nothing of it is owed

    def step(self, token: int) -> str:
        self.ids.append(token)
        text = decode(self.ids)
        if text.endswith("�") or not text:
            return ""
        self.ids = []
        return text


def first_stop(text: str, new: int, stops: list[str]) -> tuple[int, str] | None:
    """vLLM's choice: the match that ends first among those that end in the new text; ties by the list's order."""
    found = []
    for stop in stops:
        at = text.find(stop, max(0, len(text) - new - len(stop) + 1)) if new else -1
        if at >= 0:
            found.append((at + len(stop), stop))
    return min(found, key=lambda match: match[0], default=None)


class Parser:
    """The habits of vLLM's reasoning parsers, all at once: whether it thinks it reads in the prompt, what may begin a
    mark it holds back, and blanks at the end of thoughts it drops."""

    def __init__(self, prompt: list[int], tools: bool = False) -> None:
        marks = [token for token in prompt if token in (OPEN, CLOSE)]
        self.thinks = not marks or marks[-1] == OPEN
        self.held = ""
        self.tools = tools
        self.since = ""
        self.counted = 0
        self.closed = False

    def count(self, ids: list[int]) -> None:
        """Tokens of thoughts, as parsers that follow the state count them: a mark is none, nor is one without text."""
        self.closed = self.closed or CLOSE in ids
        if self.thinks and not self.closed:
            self.counted += sum(token != OPEN and bool(VOCAB[token]) for token in ids)

    def called(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A call begins with the first "b" after the thoughts, and tells what only this parser can know: where in all
        that followed them it stands."""
        content = fields.pop("content", "")
        before, call = self.since, self.since + content
        self.since = call
        start = call.find("b")
        if not content or start < 0 or not self.tools:
            return fields | ({"content": content} if content else {})
        shown = call[len(before) : max(start, len(before))]
        arguments = f"{len(before)}:{call[max(start, len(before)) :]};"
        calls = [{"index": 0, "function": {"arguments": arguments}}]
        return fields | ({"content": shown} if shown else {}) | {"tool_calls": calls}

    def parse(self, text: str, ids: list[int], finished: bool) -> dict[str, str]:
        """A delta's fields. Marks come alone, as tokens do in most streams."""
        if ids[0] == OPEN and self.thinks:
            return {}
        if ids[0] in (OPEN, CLOSE):
            held, self.held = self.held, ""
            thought, self.thinks = self.thinks, ids[0] == OPEN
            held = held.rstrip() if thought else held
            return {"reasoning" if thought else "content": held} if held else {}
        text, self.held = self.held + text, ""
        kept = text if finished else text.rstrip("Ape")
        kept = kept.rstrip() if self.thinks else kept
        if not finished:
            self.held = text[len(kept) :]
        fields = {"reasoning" if self.thinks else "content": kept} if kept else {}
        return fields | {"content": "(unfinished)"} if finished and self.thinks else fields


@dataclass
class FakeEngine:
    """``merge``: tokens per delta, cycled. ``context``: as ``max_model_len``. ``eos``: one token in so many ends.
    ``thinks``: chats run through a parser, which counts reasoning tokens by its state or, if ``marked``, by the marks
    in the answer."""

    merge: tuple[int, ...] = (1,)
    context: int = 400
    eos: int = 40
    name: str = "served"
    details: bool = False
    detokenizes: bool = True
    thinks: bool = False
    marked: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)

    def next_token(self, ids: list[int], ignore_eos: bool, body: dict[str, Any], said: list[int]) -> int:
        """``said``: this call's own tokens, the only ones that penalties count."""
        h = crc32(repr(ids).encode())
        last = VOCAB[ids[-1]] if ids else b""
        if last in _NEXT and h % 16:
            options = _NEXT[last]
            return IDS[options[(h >> 8) % len(options)]]
        if not ignore_eos and (h >> 4) % self.eos == 0:
            return EOS
        if (h >> 12) % 23 == 0:
            return SPECIAL
        if self.thinks and (h >> 13) % 11 == 0 and last not in _NEXT:
            return CLOSE if (h >> 14) % 3 else OPEN
        starts = WORDS + [b"\xf0\x9f", b"\xe2\x80", b"\xf0\x9f\xa6", b"x\xf0"] * 2
        presence, frequency = body.get("presence_penalty") or 0, body.get("frequency_penalty") or 0
        bias = body.get("logit_bias") or {}
        if not (presence or frequency or bias):
            return IDS[starts[(h >> 16) % len(starts)]]
        best, best_score = EOS, float("-inf")
        for rank in range(4):
            token = IDS[starts[crc32(b"%d %d" % (h, rank)) % len(starts)]]
            score = bias.get(str(token), 0) - presence * (token in said) - frequency * said.count(token) - rank
            if score > best_score:
                best, best_score = token, score
        return best

    def prompt_ids(self, body: dict[str, Any], chat: bool) -> list[int]:
        if body.get("kv_transfer_params"):
            return list(body["kv_transfer_params"]["prompt_token_ids"])
        if chat:
            text = "".join(f"<{m['role']}>{m['content']}" for m in body["messages"])
            return encode_text(text if body.get("continue_final_message") else text + "<assistant>")
        prompt = body["prompt"]
        return encode_text(prompt) if isinstance(prompt, str) else list(prompt)

    def generate(self, body: dict[str, Any], prompt: list[int]) -> Iterator[tuple[str, list[int], str | None, Any]]:
        """(text, ids, finish reason, stop reason) for each token, text lagging where stop strings demand it."""
        chat = "messages" in body
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or (None if chat else 16)
        room = self.context - len(prompt)
        limit = room if asked is None else min(asked, room)
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        include = bool(body.get("include_stop_str_in_output"))
        hold = 0 if include or not stops else max(map(len, stops)) - 1
        stop_ids = body.get("stop_token_ids") or []
        detokenizer, ids = Detokenizer(prompt), list(prompt)
        text, sent = "", 0
        for count in range(1, limit + 1):
            banned = count <= (body.get("min_tokens") or 0)
            token = self.next_token(ids, bool(body.get("ignore_eos")) or banned, body, ids[len(prompt) :])
            if banned and token in stop_ids:
                token = IDS[b"!"]
            ids.append(token)
            finish, reason = ("length", None) if count == limit else (None, None)
            ended = token == EOS and not body.get("ignore_eos")
            if ended or token in stop_ids:
                finish, reason = "stop", None if ended else token
            if finish != "stop" or include:
                new = detokenizer.step(token)
                text += new
                best = first_stop(text, len(new), stops) if not banned else None
                if best is not None:
                    end, reason = best
                    text = text[: end if include else end - len(reason)]
                    finish = "stop"
            end = len(text) if finish else max(sent, len(text) - hold)
            yield text[sent:end], [token], finish, reason
            sent = end
            if finish:
                return

    def deltas(self, body: dict[str, Any], prompt: list[int]) -> Iterator[tuple[str, list[int], str | None, Any]]:
        """The same, several tokens to a delta. The first is sent at once, as vLLM does."""
        sizes = [1] + [self.merge[i % len(self.merge)] for i in range(self.context)]
        text: str = ""
        ids: list[int] = []
        for new, token, finish, reason in self.generate(body, prompt):
            text, ids = text + new, ids + token
            if finish or len(ids) >= sizes[0]:
                yield text, ids, finish, reason
                text, ids = "", []
                sizes.pop(0)

    def run(self, call: Call) -> list[bytes]:
        """Payloads of a stream, or one document."""
        body = orjson.loads(call.body)
        if call.path == "/detokenize":
            if not self.detokenizes:
                raise Refused(404, "Not Found")
            return [orjson.dumps({"prompt": decode(body["tokens"])})]
        self.calls.append(body)
        chat = call.path == Route.CHAT.value
        prompt = self.prompt_ids(body, chat)
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if asked is not None and asked > self.context:
            raise Refused(400, f"max_tokens={asked} cannot be greater than max_model_len={self.context}.")
        if len(prompt) >= self.context:
            raise Refused(400, "the prompt is too long")
        if (body.get("min_tokens") or 0) > min(asked or self.context, self.context - len(prompt)):
            raise Refused(400, "min_tokens must be less than or equal to max_tokens")
        if not call.stream:
            return [orjson.dumps(self.document(body, chat, prompt))]
        return [orjson.dumps(chunk) for chunk in self.chunks(body, chat, prompt)] + [DONE]

    def logprobs(
        self, body: dict[str, Any], chat: bool, prompt: list[int], said: list[int], ids: list[int]
    ) -> dict[str, Any] | None:
        """Of ``ids``, which follow the prompt and what this call said: functions of all ids so far."""
        asked = body.get("logprobs")
        if asked is None or asked is False:
            return None
        detokenizer, sofar = Detokenizer(prompt), prompt + said
        for token in said:
            detokenizer.step(token)
        tokens, values, tops = [], [], []
        for token in ids:
            sofar.append(token)
            tokens.append(detokenizer.step(token) or ("<eos>" if token == EOS else ""))
            values.append(-(crc32(repr(sofar).encode()) % 997) / 100)
            number = body.get("top_logprobs") or 0 if chat else asked
            tops.append({f"t{crc32(repr((sofar, i)).encode()) % 50}": values[-1] - i for i in range(number)})
        if chat:
            shape = lambda text, value: {"token": text, "logprob": value, "bytes": list(text.encode())}  # noqa: E731
            return {
                "content": [
                    shape(text, value) | {"top_logprobs": [shape(*pair) for pair in top.items()]}
                    for text, value, top in zip(tokens, values, tops, strict=True)
                ]
            }
        return {"text_offset": [], "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def reasoning(self, parser: Parser | None, said: list[int]) -> dict[str, Any]:
        """What a thinking engine says of its tokens."""
        if parser is None:
            return {}
        count = parser.counted
        if self.marked:
            count = between(said, THINKING)
        return {"completion_tokens_details": {"reasoning_tokens": count}}

    def usage(self, prompt: list[int], count: int) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": len(prompt),
            "total_tokens": len(prompt) + count,
            "completion_tokens": count,
        }
        return usage | ({"prompt_tokens_details": {"cached_tokens": 0}} if self.details else {})

    def chunks(self, body: dict[str, Any], chat: bool, prompt: list[int]) -> Iterator[dict[str, Any]]:
        options = body.get("stream_options") or {}
        shows_ids = bool(body.get("return_token_ids"))
        number = len(self.calls)
        base = {
            "id": f"chatcmpl-{number}" if chat else f"cmpl-{number}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1700000000 + number,
            "model": self.name,
        }
        continuous = bool(options.get("include_usage")) and bool(options.get("continuous_usage_stats"))
        details = {"completion_tokens_details": None} if chat else {}
        running = lambda count: (  # noqa: E731
            {"usage": self.usage(prompt, count) | details | self.reasoning(parser, said)} if continuous else {}
        )
        parser = Parser(prompt, bool(body.get("tools"))) if chat and self.thinks else None
        said: list[int] = []
        if chat:
            choice = {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            shown = {"prompt_token_ids": prompt if shows_ids else None, "prompt_text": None}
            yield base | {"choices": [choice]} | running(0) | shown
        count = offset = 0
        echo = "" if chat or not body.get("echo") or shows_ids else decode(prompt)
        for text, ids, finish, reason in self.deltas(body, prompt):
            logprobs = self.logprobs(body, chat, prompt, said, ids)
            if logprobs is not None and not chat:
                logprobs["text_offset"], offset = _offsets(logprobs["tokens"], offset)
            said += ids
            text = echo + text
            choice = {"index": 0} | ({"delta": {"content": text}} if chat else {"text": text})
            if parser is not None:
                parser.count(ids)
                choice["delta"] = parser.called(parser.parse(text, ids, finish is not None))
                if not (choice["delta"] or finish or shows_ids):
                    count += len(ids)
                    continue
            choice |= {"logprobs": logprobs, "finish_reason": finish}
            if finish or not chat:
                choice["stop_reason"] = reason
            if not chat:
                choice["prompt_token_ids"] = prompt if (shows_ids or echo) and not count else None
            echo = ""
            choice["token_ids"] = ids if shows_ids else None
            count += len(ids)
            last = {"system_fingerprint": "fp"} if finish and not options.get("include_usage") else {}
            yield base | {"choices": [choice]} | running(count) | last
        if options.get("include_usage"):
            usage = self.usage(prompt, count) | self.reasoning(parser, said)
            yield base | {"choices": [], "usage": usage, "system_fingerprint": "fp"}

    def taken_apart(self, ids: list[int], text: str, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """The parser for documents: it does not look at the prompt, and takes all for thoughts until one is closed."""
        detokenizer, count = Detokenizer(prompt), len(_until_closed(ids))
        thought = "".join(map(detokenizer.step, ids[:count]))
        content = text[len(thought) :]
        thought = thought.rstrip()
        fields: dict[str, Any] = {"reasoning": thought or None, "content": content or None}
        if body.get("tools") and "b" in content:
            start = content.index("b")
            calls = [{"function": {"arguments": f"all: {content[start:]}"}}]
            fields |= {"content": content[:start] or None, "tool_calls": calls}
        return fields

    def document(self, body: dict[str, Any], chat: bool, prompt: list[int]) -> dict[str, Any]:
        text, ids, finish, reason = "", [], None, None
        for new, token, finish, reason in self.generate(body, prompt):  # noqa: B007
            text, ids = text + new, ids + token
        shows_ids = bool(body.get("return_token_ids"))
        logprobs = self.logprobs(body, chat, prompt, [], ids)
        if logprobs is not None and not chat:
            logprobs["text_offset"] = _offsets(logprobs["tokens"], 0)[0]
        if not chat and body.get("echo") and not shows_ids:
            text = decode(prompt) + text
        choice: dict[str, Any] = {"index": 0}
        message = {"role": "assistant", "content": text} | dict.fromkeys(
            ("refusal", "annotations", "audio", "function_call", "reasoning")
        )
        parser = Parser([]) if chat and self.thinks else None
        if parser is not None:
            message |= self.taken_apart(ids, text, prompt, body)
            parser.counted = sum(t not in (OPEN, CLOSE) and t != EOS for t in _until_closed(ids))
        choice |= {"message": message} if chat else {"text": text}
        choice |= {"logprobs": logprobs, "finish_reason": finish, "stop_reason": reason}
        choice["token_ids"] = ids if shows_ids else None
        choice |= {"routed_experts": None} if chat else {"prompt_logprobs": None, "routed_experts": None}
        number = len(self.calls)
        document = {
            "id": f"chatcmpl-{number}" if chat else f"cmpl-{number}",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1700000000 + number,
            "model": self.name,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": "fp",
            "usage": {"prompt_tokens_details": None, "completion_tokens_details": None}
            | self.usage(prompt, len(ids))
            | self.reasoning(parser, ids),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        document |= {"prompt_logprobs": None, "prompt_text": None} if chat else {}
        (document if chat else choice)["prompt_token_ids"] = prompt if shows_ids else None
        return document


def _until_closed(ids: list[int]) -> list[int]:
    return ids[: ids.index(CLOSE)] if CLOSE in ids else ids


def _offsets(tokens: list[str], offset: int) -> tuple[list[int], int]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return offsets, offset


@dataclass
class Script:
    """Where a test cuts. All lists are used up from the front; then the last rule is no cut.

    ``limits``: tokens each call may ask for (None: no limit). ``aborts``: close a call after so many of its payloads.
    ``breaks``: let it die there instead. ``reads``: payloads per network read, cycled.
    """

    limits: list[int | None] = field(default_factory=list)
    aborts: list[int | None] = field(default_factory=list)
    broken: bool = False
    reads: tuple[int, ...] = (1,)
    window: int | None = None
    rest: int | None = None


def serve(
    engine: FakeEngine,
    request: Request,
    script: Script,
    *,
    mode: Mode = Mode.IDS,
    model: str = "served",
    lore: Lore | None = None,
    default_limit: int | None = None,
    chat_ids: bool = True,
    way: Way | None = None,
) -> tuple[Answer, bytes]:
    """What the dispatcher does: calls until the answer is finished. Returns it and the bytes its client got."""
    way = way or (Way.CHAT_IDS if chat_ids else Way.IDS)
    thinking = (MARKED if engine.marked else THINKING) if engine.thinks else None
    answer = Answer(
        request, mode, context=engine.context, lore=lore, default_limit=default_limit, way=way, thinking=thinking
    )
    got = b""
    for _ in range(2000):
        limit = script.limits.pop(0) if script.limits else script.rest
        call = answer.call(limit, model=model, window=script.window)
        try:
            payloads = engine.run(call)
        except Refused as refused:
            if not answer.refused(refused.status, refused.body):
                raise
            continue
        how = "finished"
        if not call.stream:
            answer.feed_whole(payloads[0])
        else:
            stop_at = script.aborts.pop(0) if script.aborts else None
            if stop_at is not None and stop_at < len(payloads) and answer.mode is not Mode.WHOLE:
                rest, payloads = payloads[stop_at:], payloads[:stop_at]
                got, how = _read(answer, payloads, script.reads, got, "broken" if script.broken else "aborted")
                if answer.finished or not answer.divisible:  # too late to cut
                    got, how = _read(answer, rest, script.reads, got, "finished")
            else:
                got, how = _read(answer, payloads, script.reads, got, how)
        end = answer.end_slice(how)  # type: ignore[arg-type]
        assert end is not SliceEnd.FAILED, answer.error
        if end is SliceEnd.FINISHED:
            return answer, got + (answer.close() if request.stream else answer.body())
    raise AssertionError("the answer never ends")


def _read(answer: Answer, payloads: list[bytes], reads: tuple[int, ...], got: bytes, how: str) -> tuple[bytes, str]:
    decoder = EventDecoder()
    turn = 0
    while payloads:
        size = reads[turn % len(reads)]
        turn += 1
        now, payloads = payloads[:size], payloads[size:]
        got += answer.feed(decoder.feed(b"".join(map(encode, now))))
        if answer.over:
            return got, "finished"
    return got, how


def direct(engine: FakeEngine, request: Request) -> bytes:
    """The same request sent straight to the engine."""
    call = Call(request.route.value, orjson.dumps(request.body), request.stream)
    payloads = engine.run(call)
    return b"".join(map(encode, payloads)) if request.stream else payloads[0]


def make_request(route: Route, **body: Any) -> Request:
    """A request whose prompt is ``seed``."""
    seed = str(body.pop("seed_text", "hello"))
    whole: dict[str, Any] = {"model": "served"}
    whole |= {"messages": [{"role": "user", "content": seed}]} if route is Route.CHAT else {"prompt": seed}
    return parse(route, orjson.dumps(whole | body))


def joined(data: bytes, request: Request) -> dict[str, Any]:
    """What a client makes of the bytes: every field, with deltas joined and the id replaced by how many there were."""
    if not request.stream:
        document = orjson.loads(data)
        return document | {"id": document["id"].split("-")[0], "created": 0}
    payloads = EventDecoder().feed(data)
    assert payloads[-1] == DONE, payloads[-1]
    chunks = [orjson.loads(payload) for payload in payloads[:-1]]
    result: dict[str, Any] = {
        "ids": len({chunk["id"] for chunk in chunks}),
        "kind": {chunk["id"].split("-")[0] for chunk in chunks},
        "models": {(chunk["model"], chunk["object"]) for chunk in chunks},
        "fingerprint": [chunk["system_fingerprint"] for chunk in chunks if "system_fingerprint" in chunk],
        "prompt_ids": [c for chunk in chunks if (c := chunk.get("prompt_token_ids"))],
        "usage": [chunk["usage"] for chunk in chunks if "usage" in chunk and not chunk["choices"]],
        "roles": [], "text": "", "finish": [], "token_ids": [], "keys": set(), "logprobs": [], "fields": [],
    }  # fmt: skip
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert not result["finish"], "text after the end"
            delta = choice.get("delta", {"content": choice.get("text")})
            result["text"] += delta.get("content", "")
            for name in ("reasoning", "content"):
                if delta.get(name) and result["fields"][-1:] != [name]:
                    result["fields"].append(name)
            result["calls"] = result.get("calls", "") + "".join(
                call["function"]["arguments"] for call in delta.get("tool_calls", ())
            )
            result["thoughts"] = result.get("thoughts", "") + delta.get("reasoning", "")
            result["roles"] += [delta["role"]] if "role" in delta else []
            result["finish"] += [(choice["finish_reason"], choice["stop_reason"])] if choice["finish_reason"] else []
            result["token_ids"] += choice.get("token_ids") or []
            if choice["logprobs"]:
                lists = choice["logprobs"]
                result["logprobs"] += lists["content"] if "content" in lists else zip(*lists.values(), strict=True)
            result["keys"].add((*chunk, "|", *choice, "|", *sorted(chunk.get("usage") or ())))
    return result
