"""Open-loop sending: every request leaves at its intended time, however far behind the server is.

A closed loop would wait for answers and so stop asking exactly when the server is slow (coordinated omission). Every
request is followed to its end; nothing is cut off when the last one has been sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from elis_gateway.tasks import spawn
from loadtest.records import Row, Run
from loadtest.targets import Target
from loadtest.workload import Request, Workload

__all__ = ["run"]


async def run(
    workload: Workload,
    target: Target,
    *,
    start: float,
    name: str = "",
    patience: float = 600.0,
    on_end: Callable[[Request, Row], None] | None = None,
) -> Run:
    """Replay a workload. ``start``: ``time.perf_counter`` of its second 0. ``patience``: seconds a request may take.

    Raises nothing for a request that fails: its row says why.
    """

    async def one(request: Request) -> Row:
        row = Row(request.id, request.at, time.perf_counter() - start)
        try:
            async with asyncio.timeout(patience):
                await target.send(request, row)
        except TimeoutError:
            row.error = "timeout"
        if on_end is not None:
            on_end(request, row)
        return row

    tasks = []
    for request in workload.requests:
        if (delay := request.at - (time.perf_counter() - start)) > 0:
            await asyncio.sleep(delay)
        tasks.append(spawn(one(request), name=f"loadtest {request.id}"))
    return Run(name, workload.hash, [await task for task in tasks])
