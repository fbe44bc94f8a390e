"""An upstream in this process, without sockets: does what its script says. Satisfies ``upstream.base.Upstream``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import orjson

from elis_gateway.errors import UpstreamError
from elis_gateway.upstream.base import Capabilities
from elis_gateway.wire.continuation import Call
from elis_gateway.wire.sse import DONE

Step = list[bytes] | float | UpstreamError | None
"""Payloads of one read, seconds of silence, an error, or None: silence for ever."""


def token(text: str, token_id: int, finish: str | None = None) -> bytes:
    """One delta of a completion."""
    choice = {"index": 0, "text": text, "token_ids": [token_id], "finish_reason": finish, "prompt_token_ids": [1, 2]}
    return orjson.dumps({"id": "c", "created": 1, "model": "m", "object": "text_completion", "choices": [choice]})


def answer(count: int, *, start: int = 0, finish: str | None = "length", pause: float = 0.0) -> list[Step]:
    """``count`` tokens, one per read, ``pause`` seconds before each, and the goodbye where the answer finishes."""
    steps: list[Step] = []
    for n in range(start, start + count):
        if pause:
            steps.append(pause)
        steps.append([token(f" w{n}", 100 + n, finish if n == start + count - 1 else None)])
    if finish is not None:
        steps.append([DONE])
    return steps


class FakeSession:
    """One call, following its steps."""

    def __init__(self, upstream: FakeUpstream, call: Call, steps: Iterable[Step]) -> None:
        self.call = call
        self.closed_after: int | None = None
        """Reads taken when the session was left; None: it is open, or was never entered."""
        self._upstream = upstream
        self._steps = list(steps)
        self._reads = 0
        self._done = False

    async def __aenter__(self) -> Self:
        first = self._steps[0] if self._steps else None
        if isinstance(first, UpstreamError):
            raise first
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed_after = self._reads

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[bytes]:
        while self._steps and not self._done:
            step = self._steps.pop(0)
            if step is None:
                await asyncio.get_running_loop().create_future()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, UpstreamError):
                raise step
            else:
                self._reads += 1
                self._done = step[-1] == DONE
                return step
        raise StopAsyncIteration

    async def whole(self) -> bytes:
        async for payloads in self:
            return payloads[0]
        return b""

    def pending(self) -> list[bytes]:
        return []


class FakeUpstream:
    """Takes a script per call, in order; without one, answers what is asked for, token by token, at ``pace``."""

    def __init__(self, name: str = "fake", *, pace: float = 0.01, capabilities: Capabilities | None = None) -> None:
        self.id = name
        self.pace = pace
        self.capabilities = capabilities or Capabilities(models=frozenset({"m"}), ids=True)
        self.scripts: list[list[Step]] = []
        self.sessions: list[FakeSession] = []

    def failed(self, error: UpstreamError) -> UpstreamError:
        return error

    def succeeded(self) -> None:
        pass

    def open(
        self, call: Call, *, request_id: str, patient: bool = False, headers: Mapping[str, str] | None = None
    ) -> FakeSession:
        steps = self.scripts.pop(0) if self.scripts else self._as_asked(call)
        session = FakeSession(self, call, steps)
        self.sessions.append(session)
        return session

    def _as_asked(self, call: Call) -> list[Step]:
        body: dict[str, Any] = orjson.loads(call.body)
        prompt = body["prompt"]
        start = len(prompt) - 2 if isinstance(prompt, list) else 0
        return answer(body.get("max_tokens", 16), start=start, pause=self.pace)
