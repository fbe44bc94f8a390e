"""An event loop whose time jumps to the next timer when nothing else is ready (trio's autojump): no test waits.

Only for code without sockets: what the network would bring is not waited for either.
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


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test on a jumping loop."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(coroutine)
