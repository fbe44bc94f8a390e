"""One trace, one modelled engine: the simulator and the live driver take the same decisions in the same order.

The live side is the real dispatcher, the real wire format and a clock that jumps; only sockets are missing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import orjson
import pytest

from elis_gateway.core.actions import Action, Finish, Preempt, Run
from elis_gateway.core.job import JobSpec
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.policy import Policy, make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.dispatcher import Dispatcher
from elis_gateway.errors import UpstreamError
from elis_gateway.flight import Flight
from elis_gateway.predictor.baselines import MaxTokens
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate
from elis_gateway.upstream.base import Capabilities
from elis_gateway.wire.continuation import Answer, Call, Mode
from elis_gateway.wire.openai import Route, parse
from elis_gateway.wire.sse import DONE
from tests.upstream.autojump import START, run
from tests.upstream.fake import token

Decision = tuple[str, str, str]
"""What (run, preempt, finish), which job, where or how."""

RATE = 64.0
"""Tokens a second of a sequence, whatever the batch: a power of two, so that times are exact on both sides."""


def model(slots: int, seam: float) -> EngineModel:
    return EngineModel(
        slots=slots, decode=((1, RATE), (slots + 1, RATE)), prefill_tokens_per_second=None, seam_tokens=seam
    )


def trace(seed: int, jobs: int, slots: int) -> list[SimJob]:
    """Arrivals near saturation, at moments that no token falls on; every answer's length is its limit."""
    random_ = random.Random(seed)
    at, made = 0.0, []
    for n in range(jobs):
        at += random_.expovariate(RATE * slots / 130.0 * 0.95)
        tokens = random_.choice((7, 33, 50, 90, 150, 401))
        arrival = round(at * RATE) / RATE + (n % 50 + 1) / 8192.0
        made.append(SimJob(id=f"j{n}", arrival=arrival, prompt_tokens=8, output_tokens=tokens, model="m", limit=tokens))
    return sorted(made, key=lambda job: job.arrival)


class Decisions:
    """Collects actions as decisions; slices get their job's name."""

    def __init__(self) -> None:
        self.made: list[Decision] = []
        self._jobs: dict[int, str] = {}

    def note(self, action: Action) -> None:
        if isinstance(action, Run):
            job = action.slice.job.spec.id
            self._jobs[action.slice.id] = job
            self.made.append(("run", job, f"{action.slice.upstream} {action.slice.job.attained}"))
        elif isinstance(action, Preempt):
            self.made.append(("preempt", self._jobs[action.slice_id], ""))
        elif isinstance(action, Finish):
            self.made.append(("finish", action.job.spec.id, str(action.job.outcome)))


class EngineUpstream:
    """The modelled engine behind the upstream protocol, paced by the loop's clock; speaks the wire's format."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.id = name
        self.engine = engine
        self.capabilities = Capabilities(models=frozenset({"m"}), ids=True)
        self.sessions: dict[int, _Session] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0

    def failed(self, error: UpstreamError) -> UpstreamError:
        return error

    def succeeded(self) -> None:
        pass

    def open(
        self, call: Call, *, request_id: str, patient: bool = False, headers: Mapping[str, str] | None = None
    ) -> _Session:
        self._count += 1
        return _Session(self, self._count, orjson.loads(call.body))

    def now(self) -> float:
        return self._loop.time() - START

    def arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self.engine.next_event()
        self._timer = None if due is None else self._loop.call_at(due + START, self._advance)

    def _advance(self) -> None:
        for event in self.engine.advance(self.now()):
            if (session := self.sessions.get(event.call_id)) is not None:  # type: ignore[call-overload]
                session.reach(event.tokens)
        self.arm()


class _Session:
    """One call. A job is told by its prompt: its number as text, or as the first id."""

    def __init__(self, upstream: EngineUpstream, number: int, body: dict[str, Any]) -> None:
        self._upstream = upstream
        self._number = number
        prompt = body["prompt"]
        self._base = len(prompt) - 1 if isinstance(prompt, list) else 0
        self._limit: int = body["max_tokens"]
        self._tokens = 0
        self._arrived: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._ended = False

    async def __aenter__(self) -> Self:
        up = self._upstream
        up.sessions[self._number] = self
        up.engine.start(self._number, 8, 8, self._limit, up.now(), mark_every=1)
        up.arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        up = self._upstream
        del up.sessions[self._number]
        up.engine.abort(self._number, up.now())
        up.arm()

    def reach(self, tokens: int) -> None:
        ended = tokens == self._limit
        made = [token(" w", 100, "length" if ended and n == tokens - 1 else None) for n in range(self._tokens, tokens)]
        self._tokens = tokens
        if made:
            self._arrived.put_nowait([*made, DONE] if ended else made)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[bytes]:
        if self._ended:
            raise StopAsyncIteration
        payloads = await self._arrived.get()
        self._ended = payloads[-1] == DONE
        return payloads

    async def whole(self) -> bytes:
        raise AssertionError("every answer here is a stream")

    def pending(self) -> list[bytes]:
        return [] if self._arrived.empty() else self._arrived.get_nowait()


def simulated(jobs: list[SimJob], scheduler: Scheduler, engines: dict[str, Engine]) -> list[Decision]:
    found = Decisions()
    simulate(jobs, scheduler, engines, MaxTokens(), observe=lambda now, action: found.note(action))
    return found.made


def live(jobs: list[SimJob], scheduler: Scheduler, engines: dict[str, Engine]) -> list[Decision]:
    found = Decisions()

    async def story() -> None:
        loop = asyncio.get_running_loop()
        upstreams = {name: EngineUpstream(name, engine) for name, engine in engines.items()}
        driver = _Noting(found, scheduler, upstreams)
        for name, engine in engines.items():
            driver.upstream_changed(UpstreamInfo(name, frozenset({"m"}), engine.model.slots))
        for job in jobs:
            loop.call_at(START + job.arrival, driver.submit, flight(job))
        await asyncio.sleep(jobs[-1].arrival)
        while driver.flights:
            await asyncio.sleep(1.0)

    run(story())
    return found.made


class _Noting(Dispatcher):
    """The dispatcher, telling what it performs."""

    def __init__(self, found: Decisions, core: Scheduler, upstreams: Any) -> None:
        super().__init__(core, MaxTokens(), upstreams, observers=[])
        for kind, perform in list(self._perform_one.items()):
            self._perform_one[kind] = lambda action, perform=perform: (found.note(action), perform(action))


def flight(job: SimJob) -> Flight:
    body = {"model": "m", "prompt": job.id, "max_tokens": job.limit, "stream": True}
    request = parse(Route.COMPLETIONS, orjson.dumps(body))
    spec = JobSpec(job.id, "m", job.app, job.prompt, job.prompt_tokens, job.limit)
    return Flight(spec, request, Answer(request, Mode.IDS))


def settings() -> Iterator[Any]:
    for name, mode, options in (
        ("fcfs", "elastic", {}),
        ("sjf", "elastic", {}),
        ("isrtf", "fixed", {}),
        ("isrtf", "elastic", {}),
        ("las", "elastic", {}),
        ("round_robin", "fixed", {}),
    ):
        for slots, count in ((1, 1), (2, 2)):
            yield pytest.param(name, mode, options, slots, count, id=f"{name}-{mode}-{count}x{slots}")


@pytest.mark.parametrize(("name", "mode", "options", "slots", "count"), [*settings()])
def test_the_same_decisions_in_the_same_order(name: str, mode: Any, options: Any, slots: int, count: int) -> None:
    jobs = trace(7, 60, slots * count)

    def fresh() -> tuple[Scheduler, dict[str, Engine]]:
        policy: Policy = make_policy(name, **options)
        engines = {f"e{n}": Engine(model(slots, 2.0)) for n in range(count)}
        return Scheduler(SchedulerConfig(mode=mode, seam_cost=2.0), policy), engines

    ours, its = live(jobs, *fresh()), simulated(jobs, *fresh())
    assert len(its) >= 2 * len(jobs)
    if mode == "elastic" and name in ("isrtf", "las"):
        assert any(what == "preempt" for what, _, _ in its)
    assert ours == its
