"""llama.cpp's server: OpenAI routes whose chunks carry ids only beside log-probabilities.

``logprobs`` brings the ids of a delta, ``timings_per_token`` how many tokens there are so far. Tokens of an incomplete
character are never shown; the delta that completes it has its text and the last id only. But a prompt may mix ids and
texts, so such a delta is continued by its text. A chat's prompt is what ``/apply-template`` makes of it.

Knows: this engine's requests and chunks. Never: what is kept of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from elis_gateway.wire import calls
from elis_gateway.wire.calls import Call
from elis_gateway.wire.dialects import Boundary, Delta, Mode
from elis_gateway.wire.ledger import Ledger
from elis_gateway.wire.openai import Request
from elis_gateway.wire.parameters import Way
from elis_gateway.wire.shapes import PLAIN_CHAT, PLAIN_COMPLETION

__all__ = ["LlamaCpp"]

_TEMPLATE = ("messages", "chat_template_kwargs", "add_generation_prompt", "reasoning_effort")
"""What of a request shapes its prompt."""


class LlamaCpp:
    """One answer from llama.cpp, continued by ids and, where they are not shown, by text."""

    mode = Mode.IDS
    way = Way.LLAMA
    plain = False
    exact = False
    one_document = False
    recounts = False
    names_stop = False
    known_prompt = False
    owed = ""
    completions_default = None
    prompt_ids: Sequence[int] = ()

    __slots__ = ("_counted", "_request", "_template")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._counted = 0
        self._template: str | None = None

    @property
    def usage_rides(self) -> bool:
        return not self._request.chat

    @property
    def document(self) -> dict[str, Any]:
        return PLAIN_CHAT if self._request.chat else PLAIN_COMPLETION

    def first(self, model: str, priority: int | None, limit: int | None) -> Call:
        self._counted = 0
        call = calls.first(self._request, model, None, limit, ids=True, whole_stops=False)
        return self._told(call)

    def more(
        self, model: str, priority: int | None, limit: int | None, tokens: list[int | str], text: str, count: int,
        *, stream: bool,
    ) -> Call:  # fmt: skip
        self._counted = 0
        prompt = _mixed([*self._prompt(), *tokens])
        call = calls.by_ids(
            self._request,
            model,
            None,
            limit or calls.BLIND_LIMIT,
            prompt,
            count,
            stream=stream,
            whole_stops=False,
            way=self.way,
        )
        return self._told(call) if stream else call

    def _prompt(self) -> list[int | str]:
        if self._request.chat:
            return [self._template or ""]
        prompt = self._request.body["prompt"]
        if isinstance(prompt, str):
            return [prompt]
        return list(prompt[0]) if isinstance(prompt[0], list) else list(prompt)

    def _told(self, call: Call) -> Call:
        """The same call, telling ids and counts."""
        body = orjson.loads(call.body)
        body.pop("return_token_ids", None)
        body["timings_per_token"] = True
        if "messages" in body:
            body["logprobs"], body["top_logprobs"] = True, 1
        else:
            body["logprobs"] = 1
        return call._replace(body=orjson.dumps(body))

    def open(self, chunk: dict[str, Any], choice: dict[str, Any]) -> int | None:
        timings = chunk.get("timings")
        return timings["cache_n"] + timings["prompt_n"] if timings else None

    def read(self, chunk: dict[str, Any], choice: dict[str, Any], text: str) -> Delta | None:
        so_far = (chunk.get("timings") or {}).get("predicted_n")
        shown = [entry["id"] for entry in (choice.get("logprobs") or {}).get("content") or ()]
        count = len(shown) if so_far is None else max(so_far - self._counted, 0)
        self._counted += count
        if len(shown) == count and "\ufffd" not in text:
            return shown, count
        return [text] if text else (), count

    def boundary(self, text: str, tokens: Sequence[int | str], fresh: bool) -> Boundary:
        return Boundary.SURE if text else Boundary.NONE

    def inquire(self, model: str, ledger: Ledger) -> Call | None:
        if not self._request.chat or not ledger.text or self._template is not None:
            return None
        body = {name: self._request.body[name] for name in _TEMPLATE if name in self._request.body}
        return Call("/apply-template", orjson.dumps(body), False)

    def informed(self, document: dict[str, Any] | None, ledger: Ledger) -> bool:
        """Without a template the prompt is not known, and the engine would go on after the answer alone."""
        if document is not None:
            self._template = str(document["prompt"])
        return document is not None

    def undress(self, chunk: dict[str, Any], choice: dict[str, Any], last: bool) -> None:
        """Log-probabilities and timings were ours to ask; timings and usage of the last chunk come unasked."""
        if "delta" in choice:
            choice.pop("logprobs", None)
        else:
            choice["logprobs"] = None
        if not last or self._request.chat:
            chunk.pop("usage", None)  # chats are told in a chunk of its own, where they ask for it
        if not last or (self._request.chat and self._request.include_usage):
            chunk.pop("timings", None)


def _mixed(items: list[int | str]) -> list[int | str] | str:
    """A prompt of ids and texts. Texts alone would be several prompts, so neighbours are joined."""
    joined: list[int | str] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, str) and isinstance(last, str):
            joined[-1] = last + item
        else:
            joined.append(item)
    only = joined[0] if len(joined) == 1 else None
    return only if isinstance(only, str) else joined
