"""An event loop whose time jumps to the next timer when nothing else is ready (trio's autojump): no test waits.

Only for code without sockets, as what the network would bring is not waited for either; ``run_local`` is for code
whose sockets all end in this process.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

START = 1000.0


class _Selector(selectors.DefaultSelector):
    """Never waits; the time it would have waited is added to the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("nothing will ever happen: every task waits and there is no timer")
            self.now += max(timeout, 0.0)
        return ready


class _Patient(_Selector):
    """Looks a moment longer before it jumps: what one side of a local socket wrote is on its way to the other."""

    MOMENT = 0.001

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0.0:
            return selectors.DefaultSelector.select(self, 0)
        return selectors.DefaultSelector.select(self, self.MOMENT) or super().select(timeout)


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self, selector: type[_Selector] = _Selector) -> None:
        self._jumping = selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def stand_still(self, seconds: float) -> None:
        """The machine stops and goes on: time has passed, and nothing was run."""
        self._jumping.now += seconds


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test on a jumping loop."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(coroutine)


def local_loop() -> JumpingLoop:
    """A jumping loop for servers and clients of one process."""
    return JumpingLoop(_Patient)


def run_local(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test with sockets within this process on a jumping loop."""
    with asyncio.Runner(loop_factory=local_loop) as runner:
        runner.run(coroutine)
