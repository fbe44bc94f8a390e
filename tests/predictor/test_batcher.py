"""One thread, small batches: order, deadlines, refusing, going away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import pytest

from elis_gateway.predictor.batcher import Batcher, Busy
from elis_gateway.tasks import spawn


class Worker:
    """Doubles numbers when it is let; remembers batches. -1 is a bad one."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.let = threading.Semaphore(0)

    def __call__(self, batch: Sequence[int]) -> list[int]:
        assert self.let.acquire(timeout=60)
        self.batches.append(list(batch))
        if -1 in batch:
            raise ValueError("a bad one")
        return [2 * each for each in batch]


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.let.release(1000)


def start(asking: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
    return spawn(asking, name="asking")


async def taken(worker: Worker, batcher: Batcher[int, int]) -> None:
    """Until the worker holds a batch and waits to be let."""
    while batcher.in_hand == 0:
        await asyncio.sleep(0.001)


async def test_what_waits_becomes_one_batch_in_order(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=3, patience=60.0)
    first = start(batcher.ask(1))
    await taken(worker, batcher)
    rest = [start(batcher.ask(n)) for n in (2, 3, 4, 5)]
    await asyncio.sleep(0)
    worker.let.release(3)
    assert await asyncio.gather(first, *rest) == [2, 4, 6, 8, 10]
    assert worker.batches == [[1], [2, 3, 4], [5]]
    batcher.close()


async def test_who_went_away_is_not_served(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=8, patience=60.0)
    first = start(batcher.ask(1))
    await taken(worker, batcher)
    gone, stays = start(batcher.ask(2)), start(batcher.ask(3))
    await asyncio.sleep(0)
    gone.cancel()
    worker.let.release(2)
    assert await first == 2
    assert await stays == 6
    assert worker.batches == [[1], [3]]
    batcher.close()


async def test_who_waited_too_long_is_told_so(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=1, patience=60.0)
    first = start(batcher.ask(1))
    await taken(worker, batcher)
    batcher.patience = 0.02
    late = start(batcher.ask(2))
    await asyncio.sleep(0.05)
    worker.let.release(2)
    assert await first == 2
    with pytest.raises(Busy, match="too long"):
        await late
    assert worker.batches == [[1]]
    batcher.close()


async def test_a_queue_that_would_take_longer_than_patience_is_not_joined(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=1, patience=10.0)
    worker.let.release(1)
    assert await batcher.ask(1) == 2
    batcher.pace = 4.0
    tasks = [start(batcher.ask(n)) for n in (2, 3, 4, 5, 6, 7)]
    await asyncio.sleep(0.02)
    refused = [task for task in tasks if task.done()]
    assert refused
    for task in refused:
        with pytest.raises(Busy):
            task.result()
    worker.let.release(10)
    served = [await task for task in tasks if task not in refused]
    assert served
    assert served == [4, 6, 8, 10][: len(served)]
    batcher.close()


async def test_the_first_burst_is_not_refused_for_want_of_a_pace(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=1, patience=10.0)
    asked = [start(batcher.ask(n)) for n in range(12)]
    await asyncio.sleep(0)
    worker.let.release(12)
    assert await asyncio.gather(*asked) == [2 * n for n in range(12)]
    batcher.close()


async def test_a_failure_reaches_its_batch_and_no_other(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=1, patience=60.0)
    worker.let.release(2)
    with pytest.raises(ValueError, match="a bad one"):
        await batcher.ask(-1)
    assert await batcher.ask(4) == 8
    batcher.close()


async def test_closing_ends_the_thread_and_whoever_waits(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=1, patience=60.0, name="to be closed")
    first = start(batcher.ask(1))
    await taken(worker, batcher)
    waiting = start(batcher.ask(2))
    await asyncio.sleep(0)
    closing = spawn(asyncio.to_thread(batcher.close), name="closing")
    while not batcher.closed:
        await asyncio.sleep(0.001)
    worker.let.release(5)
    await closing
    assert await first == 2
    with pytest.raises(Busy):
        await waiting
    with pytest.raises(Busy):
        await batcher.ask(3)
    assert not [thread for thread in threading.enumerate() if thread.name == "to be closed"]


def test_serves_one_loop_after_another(worker: Worker) -> None:
    batcher: Batcher[int, int] = Batcher(worker, max_batch=1, patience=60.0)
    worker.let.release(10)
    assert [asyncio.run(batcher.ask(n)) for n in (1, 2, 3)] == [2, 4, 6]
    batcher.close()
