"""Faults on request: what can go wrong with an upstream, as data.

Knows: the kinds of fault, which calls a rule hits and how often. Never: sockets (``sim.server_stream`` performs them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

__all__ = ["Fault", "FaultBook", "Kind"]

Kind = Literal["status", "hang", "reset", "close", "end", "stall", "garbage", "error_event", "drip"]
"""status: refuse with ``status`` before anything else. hang: accept and never answer. drip: all the while, bytes come a
few at a time, ``seconds`` apart. The others happen after ``after`` tokens. reset: the connection is reset. close: it is
closed in the middle of the chunked body. end: the body ends properly, without ``[DONE]``. stall: nothing for
``seconds``. garbage: bytes that are no event. error_event: the engine's own error, as an event."""


@dataclass
class Fault:
    """One rule. With ``times`` it hits that many calls and is spent."""

    kind: Kind
    after: int = 0
    """Tokens of this call that are sent before it happens."""
    status: int = 500
    retry_after: float | None = None
    seconds: float | None = None
    """None: for ever (stall), 10 ms (drip)."""
    times: int | None = 1
    """Calls left to hit; None: all."""
    skip: int = 0
    """Matching calls to let pass first."""
    model: str | None = None
    path: str | None = None

    @classmethod
    def parse(cls, data: object) -> Fault:
        """From JSON. Raises ValueError saying what is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError("a fault is an object")
        known = {item.name for item in fields(cls)}
        unknown = set(data) - known
        if unknown or data.get("kind") not in get_args(Kind):
            raise ValueError(f"unknown {sorted(unknown) or 'kind'}; kinds: {get_args(Kind)}, fields: {sorted(known)}")
        return cls(**data)

    def hits(self, path: str, model: str) -> bool:
        return self.model in (None, model) and self.path in (None, path)


class FaultBook:
    """The rules in force, oldest first."""

    def __init__(self) -> None:
        self.rules: list[Fault] = []

    def add(self, fault: Fault) -> None:
        self.rules.append(fault)

    def take(self, path: str, model: str) -> Fault | None:
        """The fault that this call shall have, counted against its rule."""
        for rule in self.rules:
            if not rule.hits(path, model):
                continue
            if rule.skip:
                rule.skip -= 1
                continue
            if rule.times is not None:
                rule.times -= 1
                if rule.times <= 0:
                    self.rules.remove(rule)
            return rule
        return None

    def listed(self) -> list[dict[str, Any]]:
        return [asdict(rule) for rule in self.rules]
