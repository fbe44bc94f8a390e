"""What an engine spent, for ``benchmarks.capacity``: its processor time and its decoding steps while a load runs.

On a machine with other work, seconds say more about that work than about the engine. Tokens per second of the engine's
own processor time, and tokens per decoding step, do not depend on how much of the machine it got.

Knows: /proc, vLLM's metric of steps. Never: what the load is.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import aiohttp

__all__ = ["Pace", "Spent", "processor_time", "session_of"]

_TICK = os.sysconf("SC_CLK_TCK")
_STEPS = re.compile(r"^vllm:iteration_tokens_total_count\{.*\} (\S+)$", re.MULTILINE)


def _stat(pid: str) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty: the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def session_of(port: int) -> int | None:
    """The process session of the server that was told to listen on ``port``; None: not found."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--port" in words and str(port).encode() in words and (fields := _stat(entry.name)):
            return int(fields[3])
    return None


def processor_time(session: int) -> float:
    """Seconds of processor time, user and system, of all living processes of a session."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(entry.name)
        if fields and int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK


_BUSY = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", re.MULTILINE)


class Pace:
    """An engine's own clock: the decoding steps it has made, and, while it has nothing to do, those it could have made.

    By it arrivals keep their load on a machine whose speed changes under other work: by the seconds of a slow hour the
    same arrivals are an overload, by those of a quick one they are none.
    """

    def __init__(self) -> None:
        self.now = 0.0
        """In steps."""
        self._made: float | None = None
        self._at = 0.0
        self._step = 0.1
        """Seconds of a step, as seen lately."""

    def read(self, metrics: str, at: float) -> None:
        """What the engine's metrics say at ``at``, in seconds of any clock."""
        found = _STEPS.search(metrics)
        made = float(found[1]) if found else 0.0
        if self._made is not None:
            steps, seconds = made - self._made, at - self._at
            if steps > 0:
                self.now += steps
                self._step += 0.2 * (seconds / steps - self._step)
            elif not any(float(count) for count in _BUSY.findall(metrics)):
                self.now += seconds / self._step
        self._made, self._at = made, at


class Spent:
    """Readings of an engine over time, and what lies between two moments."""

    def __init__(self, url: str, session: int | None, *, start: float) -> None:
        """``start``: ``time.perf_counter`` of the second 0."""
        self._url = url
        self._session = session
        self._start = start
        self._at: list[float] = []
        self._read: list[tuple[float, float]] = []

    async def watch(self, client: aiohttp.ClientSession, every: float = 0.5) -> None:
        """Read until cancelled."""
        if self._session is None:
            return
        while True:
            async with client.get(f"{self._url}/metrics") as reply:
                found = _STEPS.search(await reply.text())
            steps = float(found[1]) if found else 0.0
            self._read.append((processor_time(self._session), steps))
            self._at.append(time.perf_counter() - self._start)
            await asyncio.sleep(every)

    def between(self, begin: float, end: float) -> dict[str, float]:
        """``cpu``: seconds of processor time; ``steps``: decoding steps. Empty where nothing was read around them."""
        if len(self._at) < 2 or self._at[0] > begin or self._at[-1] < end:
            return {}
        first, last = self._value(begin), self._value(end)
        return {"cpu": last[0] - first[0], "steps": last[1] - first[1]}

    def _value(self, at: float) -> Sequence[float]:
        """Linear between the readings around ``at``."""
        right = min(max(bisect_right(self._at, at), 1), len(self._at) - 1)
        left = right - 1
        share = (at - self._at[left]) / (self._at[right] - self._at[left])
        return [a + share * (b - a) for a, b in zip(self._read[left], self._read[right], strict=True)]
