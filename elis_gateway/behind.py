"""Writing that may block, done by a thread of its own: bounded, in order, in batches.

A pipe that nobody reads and a disk that hangs stop whoever writes to them. The event loop must not be who waits. Nor
for the thread's own work: what waits is a deque, whose operations are atomic, so that neither ever waits for a lock
the other holds, and a batch is taken in one short stretch.

Knows: queues and threads. Never: what is written, and where.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Behind"]

T = TypeVar("T")

_PAUSE = 0.02
"""Seconds between two batches: the first item is written at once, those that follow it closely together."""


class Behind(Generic[T]):
    """Hands items to ``write``, many at a time, in a daemon thread.

    ``write`` gets the items and how many were lost before them, because ``most`` were waiting already. It must not
    raise: what it can do about an error, it does itself.
    """

    def __init__(self, name: str, write: Callable[[list[T], int], None], *, most: int) -> None:
        self._waiting: deque[T | threading.Event] = deque()
        """Items, and marks that are set when all before them is written."""
        self._most = most
        self._write = write
        self._lost = 0
        self._news = threading.Event()
        """Something waits, or it is the end."""
        self._hurry = threading.Event()
        """Somebody waits until it is written."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Never waits."""
        if len(self._waiting) >= self._most:
            self._lost += 1
            return
        self._waiting.append(item)
        if not self._news.is_set():  # what was set is taken back before what waits is taken
            self._news.set()

    def flush(self, timeout: float) -> bool:
        """Wait until everything is written, at most ``timeout`` seconds; says whether it is."""
        if self._closed:
            return self.close(timeout)
        written = threading.Event()
        self._waiting.append(written)
        self._hurry.set()
        self._news.set()
        return written.wait(timeout)

    def close(self, timeout: float) -> bool:
        """The same, and the last: what comes later is not written."""
        self._closed = True
        self._hurry.set()
        self._news.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        waiting = self._waiting
        while waiting or not self._closed:
            self._news.wait()
            self._news.clear()
            taken = [waiting.popleft() for _ in range(len(waiting))]
            lost, self._lost = self._lost, 0
            if batch := [item for item in taken if not isinstance(item, threading.Event)]:
                self._write(batch, lost)
            for mark in taken:
                if isinstance(mark, threading.Event):
                    mark.set()
            self._hurry.wait(_PAUSE)
            self._hurry.clear()
