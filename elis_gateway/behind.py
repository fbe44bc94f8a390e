"""Writing that may block, done by a thread of its own: bounded, in order, in batches.

A pipe that nobody reads and a disk that hangs stop whoever writes to them. The event loop must not be who waits.

Knows: queues and threads. Never: what is written, and where.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Full, Queue
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
        self._queue: Queue[T | None] = Queue(most)
        self._write = write
        self._lost = 0
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Never waits."""
        try:
            self._queue.put_nowait(item)
        except Full:
            self._lost += 1

    def flush(self, timeout: float) -> bool:
        """Wait until everything is written, at most ``timeout`` seconds; says whether it is."""
        queue = self._queue
        with queue.all_tasks_done:
            return queue.all_tasks_done.wait_for(lambda: not queue.unfinished_tasks, timeout)

    def close(self, timeout: float) -> bool:
        """The same, and the last: what comes later is not written."""
        self._hurry.set()
        end = time.monotonic() + timeout
        with suppress(Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(max(end - time.monotonic(), 0.0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        ended = False
        while not ended:
            taken = [self._queue.get()]
            with suppress(Empty):
                while True:
                    taken.append(self._queue.get_nowait())
            lost, self._lost = self._lost, 0
            batch = [item for item in taken if item is not None]
            ended = len(batch) < len(taken)
            if batch:
                self._write(batch, lost)
            for _ in taken:
                self._queue.task_done()
            self._hurry.wait(_PAUSE)
