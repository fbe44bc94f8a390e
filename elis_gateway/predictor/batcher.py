"""Work for one thread, in small batches: what waits is bounded in time, and nobody waits for what he no longer wants.

Knows: a worker thread, micro-batches, deadlines, when to refuse. Never: which model, jobs, the scheduler.

A batch is whatever is waiting when the thread is free, up to ``max_batch``; there is no waiting for a batch to fill.
An item whose turn would come later than ``patience`` at the present pace is refused at once (``Busy``), one whose
``patience`` ran out, or whose asker went away, is skipped.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Batcher", "Busy"]

T = TypeVar("T")
R = TypeVar("R")

_SMOOTH = 0.2
_ALWAYS = 2
"""Batches that may wait whatever the pace: a single slow one must not shut the door."""
_GUESS = 0.02
"""Seconds a batch takes, before the first was seen."""


class Busy(RuntimeError):
    """Too much is waiting, or it waited too long."""


class _Item(NamedTuple):
    what: object
    answer: asyncio.Future[object]
    until: float


class Batcher(Generic[T, R]):
    """Asked on event loops; ``work`` runs in a thread of its own."""

    def __init__(
        self, work: Callable[[Sequence[T]], Sequence[R]], *, max_batch: int, patience: float, name: str = "batcher"
    ) -> None:
        """``work``: answers a batch, in order; what it raises, every asker of the batch gets. ``patience``: seconds."""
        self._work = work
        self.max_batch = max_batch
        self.patience = patience
        self._waiting: deque[_Item] = deque()
        self._wake = threading.Condition()
        self.closed = False
        self._thread: threading.Thread | None = None
        self._name = name
        self.pace: float | None = None
        """Seconds a batch takes, smoothed; None before the first."""
        self.in_hand = 0
        """Items being worked on."""

    async def ask(self, what: T) -> R:
        """Raises Busy, or what ``work`` raised."""
        batches = len(self._waiting) // self.max_batch + 1
        if batches > _ALWAYS and batches * (self.pace or _GUESS) > self.patience:
            raise Busy(f"{len(self._waiting)} are waiting")
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        with self._wake:
            if self.closed:
                raise Busy("closed")
            self._waiting.append(_Item(what, answer, time.monotonic() + self.patience))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()
        return await answer  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread after the batch in hand. What waits gets ``Busy``."""
        with self._wake:
            self.closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    # ---- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self.closed:
                    self._wake.wait()
                batch, late = self._take(time.monotonic())
                closed = self.closed
            if late:
                _tell(late, Busy("waited too long"))
            if closed:
                _tell(batch, Busy("closed"))
                return
            if batch:
                self._serve(batch)

    def _take(self, now: float) -> tuple[list[_Item], list[_Item]]:
        batch: list[_Item] = []
        late: list[_Item] = []
        while self._waiting and (self.closed or len(batch) < self.max_batch):
            item = self._waiting.popleft()
            if not item.answer.cancelled():
                (late if now > item.until else batch).append(item)
        return batch, late

    def _serve(self, batch: list[_Item]) -> None:
        begun = time.monotonic()
        self.in_hand = len(batch)
        result: Sequence[R] | Exception
        try:
            result = self._work([item.what for item in batch])  # type: ignore[misc]
            if len(result) != len(batch):
                raise ValueError(f"{len(result)} answers for {len(batch)} items")
        except Exception as error:  # noqa: BLE001 (handed to whoever asked; the thread goes on)
            result = error
        self.in_hand = 0
        took = time.monotonic() - begun
        self.pace = took if self.pace is None else self.pace + _SMOOTH * (took - self.pace)
        _tell(batch, result)


def _tell(batch: list[_Item], result: Sequence[object] | Exception) -> None:
    """Hand results over on the loops that asked."""
    for i, item in enumerate(batch):
        # A loop that is closed has nobody left who waits.
        with suppress(RuntimeError):
            one = result if isinstance(result, Exception) else result[i]
            item.answer.get_loop().call_soon_threadsafe(_settle, item.answer, one)


def _settle(answer: asyncio.Future[object], result: object) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)
