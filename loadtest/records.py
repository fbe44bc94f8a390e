"""One row per request, the same for live and simulated runs; versioned, and kept as JSON Lines.

Times are seconds since the run's start. Latency counts from the intended time, never from when we got round to sending.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from elis_gateway.errors import ConfigError

__all__ = ["VERSION", "Leg", "Row", "Run", "read_rows", "write_rows"]

VERSION = 2


class Leg(NamedTuple):
    """One upstream call of a request."""

    upstream: str
    start: float
    first: float | None
    """Its first token."""
    end: float
    tokens: int
    why: str
    """Why it ended: ``finished``, ``window``, ``preempted``, ``interrupted``, ``failed``."""


@dataclass(slots=True)
class Row:
    """What became of one request."""

    id: str
    intended: float
    """When the workload says it arrives; in a closed loop, when it was sent."""
    sent: float
    """When it left; the load generator's own lag is the difference."""
    first: float | None = None
    """First token of the answer."""
    end: float | None = None
    tokens: int = 0
    preemptions: int = 0
    slices: int = 0
    error: str = ""
    """Empty: completed."""
    app: str = ""
    prompt_tokens: int = 0
    expected: int = 0
    """Tokens that the workload says the answer has; 0: not known."""
    wait: float | None = None
    """Seconds spent waiting for a slot, all waits together; None: the server does not say."""
    predictions: list[tuple[int, float]] = field(default_factory=list)
    """(tokens so far, predicted remaining) of every estimate."""
    legs: list[Leg] = field(default_factory=list)
    """Upstream calls, where the target tells of them."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between one streamed delta and the next, live."""

    @property
    def jct(self) -> float:
        """Job completion time in seconds. Raises ValueError for a request that never ended."""
        if self.end is None:
            raise ValueError(f"request {self.id} never ended")
        return self.end - self.intended

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds."""
        return None if self.first is None else self.first - self.intended

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds, waits in between included."""
        if self.first is None or self.end is None or self.tokens < 2:
            return None
        return (self.end - self.first) / (self.tokens - 1)

    @property
    def lag(self) -> float:
        return self.sent - self.intended


@dataclass(slots=True)
class Run:
    """One workload under one setting."""

    setting: str
    workload: str
    """Hash of the workload."""
    rows: list[Row]
    seed: int = 0
    arm: str = ""
    """Empty, or ``again``: the second of an A/A pair."""
    complete: bool = True
    """Every request was followed to its end."""
    unsent: int = 0
    """Requests of the workload that were never sent, because the run was stopped."""
    users: int | None = None
    """A closed loop of so many users; None: open loop."""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def lag(self) -> float:
        """Worst delay of the load generator itself; a run where it matters measures the generator."""
        return max((row.lag for row in self.rows), default=0.0)

    @property
    def name(self) -> str:
        return f"{self.setting} {self.arm}".strip()


def write_rows(path: Path, runs: Iterable[Run]) -> None:
    """Every row of every run, one JSON object per line, times to the microsecond."""
    with path.open("wb") as file:
        for run in runs:
            head = {"version": VERSION, "setting": run.setting, "seed": run.seed, "arm": run.arm}
            head["workload"] = run.workload
            for row in run.rows:
                data = _rounded(asdict(row))
                file.write(orjson.dumps({**head, **data}) + b"\n")


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], Row]]:
    """(what run it belongs to, the row). Raises ConfigError naming the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    heads = ("version", "setting", "seed", "arm", "workload")
    for number, line in enumerate(lines, 1):
        try:
            data = orjson.loads(line)
            head = {name: data.pop(name) for name in heads}
            data["legs"] = [Leg(*leg) for leg in data["legs"]]
            data["predictions"] = [(int(at), float(left)) for at, left in data["predictions"]]
            row = Row(**data)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}:{number}: not a row of a run: {error}") from None
        if head["version"] != VERSION:
            raise ConfigError(f"{path}:{number}: version {head['version']}, expected {VERSION}")
        yield head, row


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
