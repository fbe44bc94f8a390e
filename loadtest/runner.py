"""Sending: open loop by intended time, or, labelled as such, a closed loop of so many users.

Open loop: every request leaves at its intended time, however far behind the server is. A closed loop waits for answers
and so stops asking exactly when the server is slow (coordinated omission): it measures capacity, not latency.

Every request is followed to its end; nothing is cut off when the last one has been sent. ``Stop`` ends a run early:
what is under way then is marked unfinished, what was never sent is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from elis_gateway.tasks import spawn
from loadtest.records import Row, Run
from loadtest.targets import Target
from loadtest.workload import Request, Workload

__all__ = ["LEAD", "UNFINISHED", "Stop", "closed", "run"]

LEAD = 0.2
"""Seconds between the beginning of a run and its second 0."""
UNFINISHED = "unfinished"
"""Error of a request that was under way when the run was stopped."""
_BRIEF = 0.05
"""Seconds that may be slept through without looking whether to stop."""

Ended = Callable[[Request, Row], None]


class Stop:
    """Asked from outside, by a signal; seen by the run."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until it is asked for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()


async def run(
    workload: Workload,
    target: Target,
    *,
    start: float,
    name: str = "",
    patience: float = 600.0,
    on_sent: Callable[[Row], None] | None = None,
    on_end: Ended | None = None,
    stop: Stop | None = None,
) -> Run:
    """Replay a workload, open loop. ``start``: ``time.perf_counter`` of its second 0. ``patience``: seconds a request
    may take. Raises nothing for a request that fails: its row says why.
    """
    clock = time.perf_counter
    halt = Stop() if stop is None else stop
    sent: list[Row] = []
    tasks: list[asyncio.Task[None]] = []

    async def due(request: Request, row: Row) -> None:
        # Now, not when the task was made: of many that are due at once the last must wait for the first, and a
        # generator with too much to do is late here too.
        row.sent = clock() - start
        if on_sent is not None:
            on_sent(row)
        await _one(target, request, row, patience, on_end)

    for request in workload.requests:
        while (delay := request.at - (clock() - start)) > 0:
            # A timer is late by up to a millisecond; what is due by then leaves together. Passing the time in turns of
            # the loop would be more exact, and would take a core from a server on the same machine.
            await (halt.wait(delay) if delay > _BRIEF else asyncio.sleep(delay))
            if halt:
                break
        if halt:
            break
        row = _row(request, request.at, clock() - start)
        sent.append(row)
        tasks.append(spawn(due(request, row), name="loadtest request"))
    complete = await _settle(tasks, sent, halt)
    return Run(name, workload.hash, sent, complete=complete, unsent=len(workload.requests) - len(sent))


async def closed(
    workload: Workload,
    target: Target,
    users: int,
    *,
    start: float,
    name: str = "",
    patience: float = 600.0,
    on_sent: Callable[[Row], None] | None = None,
    on_end: Ended | None = None,
    stop: Stop | None = None,
) -> Run:
    """The workload's requests in order, each sent by the next of ``users`` that is free; arrival times do not count."""
    clock = time.perf_counter
    halt = Stop() if stop is None else stop
    rows: list[Row] = []
    left: Iterator[Request] = iter(workload.requests)

    async def user() -> None:
        for request in left:
            if halt:
                return
            now = clock() - start
            row = _row(request, now, now)
            rows.append(row)
            if on_sent is not None:
                on_sent(row)
            await _one(target, request, row, patience, on_end)

    if (delay := start - clock()) > 0:
        await halt.wait(delay)
    complete = await _settle([spawn(user(), name="loadtest user") for _ in range(users)], rows, halt)
    unsent = len(workload.requests) - len(rows)
    return Run(name, workload.hash, rows, complete=complete and not unsent, unsent=unsent, users=users)


def _row(request: Request, intended: float, sent: float) -> Row:
    return Row(
        request.id,
        intended,
        sent,
        app=request.app,
        prompt_tokens=request.prompt_tokens,
        expected=request.tokens,
    )


async def _one(target: Target, request: Request, row: Row, patience: float, on_end: Ended | None) -> None:
    try:
        async with asyncio.timeout(patience):
            await target.send(request, row)
    except TimeoutError:
        row.error = "timeout"
    if on_end is not None:
        on_end(request, row)


async def _settle(tasks: Sequence[asyncio.Task[None]], rows: Sequence[Row], halt: Stop) -> bool:
    """Wait for everything, or until told to stop; True where every request sent came to its end."""
    pending = set(tasks)
    while pending and not halt:
        _, pending = await asyncio.wait(pending, timeout=0.2)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
    for row in rows:
        if row.end is None and not row.error:
            row.error = UNFINISHED
    return not halt
