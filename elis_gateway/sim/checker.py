"""Recomputes what the embedded engine must have answered, and compares.

Knows: the right answer to one unsliced request, worked out from the whole text at once: another way than the server's
(``sim.script`` goes token by token and holds text back), so that an error in one does not hide in the other. Never:
HTTP; how the answer was obtained.

Only requests whose answer is determined can be checked: temperature 0, or a seed with no seam.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from elis_gateway.errors import ConfigError
from elis_gateway.sim.server_calls import Call, parse
from elis_gateway.sim.server_config import ServerConfig
from elis_gateway.sim.tokens import END
from elis_gateway.sim.voice import Spoken, Voice

__all__ = ["Answer", "Checker", "differences", "of_stream", "of_whole"]


class Answer(NamedTuple):
    """What a client can see of an answer."""

    text: str
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    stop_reason: str | int | None = None


class Checker:
    """The right answers of servers with this configuration."""

    def __init__(self, config: ServerConfig, voice: Voice | None = None) -> None:
        """``voice``: needed where the configuration replays a recording."""
        if voice is None and config.replay is not None:
            raise ConfigError("checker: a replaying server's voice must be given")
        self._config = config
        self._voice = voice or Spoken(config.language)

    def expected(self, path: str, body: Mapping[str, Any]) -> Answer:
        """The answer to a request, unsliced. Raises ``server_calls.Refusal`` where it must be refused."""
        call = parse(path, orjson.dumps(body), self._config, self._voice)
        ids, finish, reason = self._run(call)
        text = self._text(ids if not isinstance(reason, int) or call.stops.include else ids[:-1])
        found = self._stop(call, ids, text)
        if found is not None:
            ids, text, reason = found
            finish = "stop"
        return Answer(text, finish, len(call.prompt), len(ids), reason)

    def check(self, path: str, body: Mapping[str, Any], got: Answer) -> list[str]:
        """What is wrong with an answer; empty: nothing. Parts that are None in ``got`` were not seen and are not
        compared."""
        return differences(self.expected(path, body), got)

    def _run(self, call: Call) -> tuple[list[int], str, str | int | None]:
        """The call without its stop strings."""
        stops = call.stops
        model = self._voice.stepper(call.prompt, call.sampling)
        ids: list[int] = []
        while len(ids) < stops.limit:
            may_end = len(ids) >= stops.minimum
            ids.append(model.step(may_end=may_end and not stops.ignore_end))
            if ids[-1] == END:
                return ids, "stop", None
            if may_end and ids[-1] in stops.tokens:
                return ids, "stop", ids[-1]
        return ids, "length", None

    def _stop(self, call: Call, ids: Sequence[int], text: str) -> tuple[list[int], str, str] | None:
        """Ids, text and stop string up to the first stop string that a token after ``min_tokens`` completes."""
        stops = call.stops
        seen = len(self._text(ids[: stops.minimum]))
        found = []
        for order, stop in enumerate(stops.strings):
            at = text.find(stop, max(seen + 1 - len(stop), 0))
            if at >= 0:
                found.append((at + len(stop), order, stop))
        if not found:
            return None
        end, _, stop = min(found)
        count = bisect_left(range(len(ids)), end, key=lambda made: len(self._text(ids[:made])))
        return list(ids[:count]), text[: end if stops.include else end - len(stop)], stop

    def _text(self, ids: Sequence[int]) -> str:
        """The text that these tokens make complete: up to the last one after which nothing is unfinished."""
        text = self._voice.decode(ids)
        while text.endswith("\ufffd") and not self._config.flush_unfinished:
            ids = ids[:-1]
            text = self._voice.decode(ids)
        return text


def differences(expected: Answer, got: Answer) -> list[str]:
    """Every field that was seen and is not as expected, in words."""
    wrong = []
    for name, right, seen in zip(Answer._fields, expected, got, strict=True):
        if name == "text" and right != seen:
            wrong.append(_text_difference(expected.text, got.text))
        elif name != "text" and seen is not None and right != seen:
            wrong.append(f"{name}: expected {right!r}, got {seen!r}")
    return wrong


def _text_difference(right: str, got: str) -> str:
    at = next((at for at, (a, b) in enumerate(zip(right, got, strict=False)) if a != b), min(len(right), len(got)))
    near = slice(max(at - 10, 0), at + 20)
    return (
        f"text: differs at character {at} of {len(right)}: expected {right[near]!r}, got {got[near]!r} (of {len(got)})"
    )


def of_whole(body: bytes) -> Answer:
    """What an unstreamed response says. Raises ValueError where it is no answer."""
    data = orjson.loads(body)
    try:
        choice = data["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = data.get("usage") or {}
        return _answer(text, choice, usage)
    except (KeyError, IndexError, TypeError) as exc:
        raise ValueError(f"no answer in {body[:200]!r}") from exc


def of_stream(payloads: Iterable[bytes]) -> Answer:
    """What a stream's event payloads say together, ``[DONE]`` included. Raises ValueError where they are no complete
    answer."""
    texts: list[str] = []
    ending: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    done = False
    for payload in payloads:
        if payload == b"[DONE]":
            done = True
            continue
        data = orjson.loads(payload)
        if "error" in data:
            raise ValueError(f"error event: {data['error']}")
        usage = data.get("usage") or usage
        for choice in data["choices"]:
            texts.append(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])
            if choice.get("finish_reason") is not None:
                ending = choice
    if not done or not ending:
        raise ValueError(f"incomplete stream: [DONE] {done}, finish reason {bool(ending)}")
    return _answer("".join(texts), ending, usage)


def _answer(text: str, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Answer:
    prompt, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Answer(text, choice["finish_reason"], prompt, made, choice.get("stop_reason"))
