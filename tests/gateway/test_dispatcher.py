"""The driver on a clock that jumps: deadlines, late estimates, preemption and races, without a socket or a wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any

import orjson
import pytest

from elis_gateway.core.job import Estimate, JobSpec, Outcome
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.policy import ISRTF, Policy, make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.dispatcher import Dispatcher, RetryBudget
from elis_gateway.errors import GatewayError, Overloaded, ShuttingDown, UpstreamRefused, UpstreamUnavailable
from elis_gateway.flight import Flight, Leg, Observer
from elis_gateway.predictor.base import View
from elis_gateway.predictor.baselines import MaxTokens
from elis_gateway.tasks import spawn
from elis_gateway.wire.continuation import Answer, Mode
from elis_gateway.wire.openai import Route, parse
from tests.upstream.autojump import run
from tests.upstream.fake import FakeUpstream, answer


def jumping(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test on a loop whose time jumps."""

    @wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return wrapper


class Log(Observer):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.finished_jobs: list[Flight] = []
        self.legs: list[Leg] = []
        self.estimates = 0
        self.missed: list[str] = []

    def estimate_missed(self, flight: Flight, why: str) -> None:
        self.missed.append(why)

    def estimated(self, flight: Flight, seconds: float) -> None:
        self.estimates += 1

    def slice_ended(self, flight: Flight, leg: Leg) -> None:
        self.legs.append(leg)

    def finished(self, flight: Flight) -> None:
        self.finished_jobs.append(flight)


class Desk:
    """A dispatcher with fakes around it."""

    def __init__(
        self,
        *upstreams: FakeUpstream,
        slots: int = 1,
        policy: Policy | None = None,
        predictor: Any = None,
        **config: Any,
    ) -> None:
        self.log = Log()
        self.spent = 0.0
        """What predicting has cost, in seconds; a predictor of a test adds to it."""
        self.upstreams = {u.id: u for u in upstreams or (FakeUpstream(),)}
        self.upstream = next(iter(self.upstreams.values()))
        core = Scheduler(SchedulerConfig(**{"seam_cost": 1.0, **config}), policy or ISRTF())
        self.dispatcher = Dispatcher(
            core, predictor or MaxTokens(), self.upstreams, observers=[self.log], stopwatch=self.stopwatch
        )
        self.core = core
        for name in self.upstreams:
            self.dispatcher.upstream_changed(UpstreamInfo(name, frozenset({"m"}), slots))
        self._count = 0

    def stopwatch(self) -> float:
        return now() + self.spent

    def submit(self, tokens: int = 100, *, mode: Mode = Mode.IDS, stream: bool = True, **spec: Any) -> Flight:
        body = {"model": "m", "prompt": "x", "max_tokens": tokens, "stream": stream}
        request = parse(Route.COMPLETIONS, orjson.dumps(body))
        self._count += 1
        made = JobSpec(f"j{self._count}", "m", limit=tokens, sliceable=mode is not Mode.WHOLE, **spec)
        flight = Flight(made, request, Answer(request, mode))
        self.dispatcher.submit(flight)
        return flight

    def ends(self) -> list[str]:
        return [leg.end for leg in self.log.legs]


async def text(flight: Flight) -> str:
    """Read a stream to its end: the text its client gets."""
    data = b""
    while piece := await flight.channel.get():
        data += piece
    found = [orjson.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(chunk["choices"][0]["text"] for chunk in found if chunk["choices"])


def words(count: int) -> str:
    return "".join(f" w{n}" for n in range(count))


def now() -> float:
    return asyncio.get_running_loop().time()


@jumping
async def test_an_action_that_fails_does_not_hold_up_the_others() -> None:
    desk = Desk()
    first, second = desk.submit(10), desk.submit(10)
    first.describe = lambda flight: orjson.dumps(object()).decode()  # raises when the first job's stream is closed
    caught: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: caught.append(context))
    assert await text(second) == words(10), "it had waited for the first one's slot"
    with pytest.raises(GatewayError):
        await text(first)


@jumping
@pytest.mark.patches
@pytest.mark.parametrize("where", ["observer", "answer"])
async def test_a_bug_at_the_end_of_a_call_costs_no_slot(where: str) -> None:
    desk = Desk()
    first, second = desk.submit(10), desk.submit(10)

    def bug(*_: Any) -> Any:
        desk.dispatcher._tell_slice_ended.pop()
        raise RuntimeError("a bug")

    if where == "observer":
        desk.dispatcher._tell_slice_ended.append(bug)
        assert await text(first) == words(10)
    else:
        first.answer = Broken(first.request, Mode.IDS)
        with pytest.raises(UpstreamUnavailable):
            await text(first)
    assert await text(second) == words(10)


class Broken(Answer):
    """Has a bug."""

    def end_slice(self, how: Any) -> Any:
        raise RuntimeError("a bug")


@jumping
async def test_a_stream_from_start_to_end() -> None:
    desk = Desk()
    flight = desk.submit(100)
    assert await text(flight) == words(100)
    await asyncio.sleep(0.01)
    assert flight.job is not None
    assert flight.job.outcome is Outcome.COMPLETED
    assert desk.ends() == ["finished"]
    assert desk.log.finished_jobs == [flight]
    assert not desk.core.jobs


@jumping
async def test_fixed_windows_are_calls_of_one_window_each() -> None:
    desk = Desk(mode="fixed", window=30)
    assert await text(desk.submit(100)) == words(100)
    assert [leg.tokens for leg in desk.log.legs] == [30, 30, 30, 10]


@jumping
async def test_a_short_job_interrupts_a_long_one_and_no_token_is_lost() -> None:
    desk = Desk()
    long = desk.submit(1000)
    reading = spawn(text(long), name="long")
    await asyncio.sleep(1.005)
    start = now()
    short = desk.submit(10)
    assert await text(short) == words(10)
    assert now() - start < 0.2
    assert await reading == words(1000)
    assert desk.ends() == ["preempted", "finished", "finished"]
    assert sum(leg.tokens for leg in desk.log.legs) == 1010
    assert desk.upstream.sessions[0].closed_after is not None


@jumping
async def test_a_job_that_needs_one_call_is_not_interrupted() -> None:
    desk = Desk()
    long = desk.submit(500, mode=Mode.WHOLE)
    reading = spawn(text(long), name="long")
    await asyncio.sleep(1.0)
    desk.submit(10)
    assert await reading == words(500)
    assert desk.ends()[0] == "finished"


@jumping
async def test_cancelled_in_every_state() -> None:
    desk = Desk()
    running, queued, fresh = desk.submit(100), desk.submit(100), desk.submit(100)
    # Its slice's task has not even begun.
    desk.dispatcher.cancel(running)
    await asyncio.sleep(0.5)
    desk.dispatcher.cancel(fresh)
    desk.dispatcher.cancel(queued)
    desk.dispatcher.cancel(queued)
    await asyncio.sleep(0.01)
    assert not desk.core.jobs
    assert not desk.dispatcher.flights
    assert not desk.dispatcher._calls
    outcomes = {flight.job.outcome for flight in desk.log.finished_jobs if flight.job is not None}
    assert outcomes == {Outcome.CANCELLED}
    assert await text(desk.submit(10)) == words(10)


@jumping
async def test_an_interrupted_answer_goes_on_where_it_stopped() -> None:
    desk = Desk(retries=3)
    broken = UpstreamUnavailable("gone", cause="reset")
    desk.upstream.scripts = [[*answer(20, finish=None), broken], [broken], [*answer(5, start=20, finish=None), broken]]
    assert await text(desk.submit(60)) == words(60)
    assert [(leg.end, leg.tokens) for leg in desk.log.legs] == [
        ("interrupted", 20), ("interrupted", 0), ("interrupted", 5), ("finished", 35),
    ]  # fmt: skip


@jumping
async def test_a_job_without_progress_fails_with_the_last_reason() -> None:
    desk = Desk(retries=2)
    desk.upstream.scripts = [[UpstreamRefused(500, b'{"error":"x"}')] for _ in range(3)]
    flight = desk.submit(60)
    with pytest.raises(UpstreamRefused, match="500"):
        await text(flight)
    assert flight.job is not None
    assert (flight.job.outcome, flight.job.cause) == (Outcome.FAILED, "status_500")


@jumping
async def test_a_refusal_that_is_the_client_s_own_is_not_repeated() -> None:
    desk = Desk()
    desk.upstream.scripts = [[UpstreamRefused(404, b"{}")]]
    with pytest.raises(UpstreamRefused, match="404"):
        await text(desk.submit(60))
    assert desk.ends() == ["failed"]


@jumping
async def test_a_refused_window_is_repeated_as_the_client_s_own_request() -> None:
    desk = Desk(mode="fixed")
    desk.upstream.scripts = [[UpstreamRefused(400, b"{}")], answer(60)]
    assert await text(desk.submit(60)) == words(60)
    bodies = [orjson.loads(session.call.body) for session in desk.upstream.sessions]
    assert [body["max_tokens"] for body in bodies] == [50, 60]
    assert "return_token_ids" not in bodies[1]


@jumping
async def test_an_answer_that_begins_anew_takes_nothing_back_from_the_counters() -> None:
    """A counter that falls looks to Prometheus as if the gateway had been started anew."""
    desk = Desk(mode="fixed", window=10)
    no_ids = {"index": 0, "text": "w10", "finish_reason": None}
    whole = {"index": 0, "text": words(30), "finish_reason": "stop"}
    chunk, document = (
        orjson.dumps({"id": "c", "created": 1, "model": "m", "choices": [choice], "usage": usage})
        for choice, usage in ((no_ids, None), (whole, {"prompt_tokens": 2, "completion_tokens": 30}))
    )
    desk.upstream.scripts = [answer(10), [[chunk]], [[document]]]
    flight = desk.submit(300, stream=False)
    assert orjson.loads(await flight.channel.get())["choices"][0]["text"] == words(30)
    assert [leg.tokens for leg in flight.legs] == [10, 0, 30]


@jumping
async def test_waiting_too_long_for_the_first_slot_expires() -> None:
    desk = Desk(queue_ttl=5.0, policy=ISRTF())
    desk.submit(5000)
    start = now()
    waiting = desk.submit(5000)
    with pytest.raises(Overloaded) as caught:
        await text(waiting)
    assert caught.value.cause == "queue_ttl"
    assert now() - start == pytest.approx(5.0)


@jumping
async def test_a_deadline_ends_a_running_job() -> None:
    desk = Desk()
    flight = desk.submit(5000, deadline=now() + 2.0)
    with pytest.raises(Overloaded) as caught:
        await text(flight)
    assert caught.value.cause == "deadline"
    await asyncio.sleep(0.01)
    assert desk.core.running("fake") == 0


@jumping
async def test_without_an_upstream_jobs_wait_as_long_as_they_may() -> None:
    desk = Desk(unavailable_timeout=3.0)
    desk.dispatcher.upstream_changed(UpstreamInfo("fake", frozenset({"m"}), 0))
    start = now()
    with pytest.raises(Overloaded) as caught:
        await text(desk.submit(10))
    assert (caught.value.cause, now() - start) == ("unavailable", pytest.approx(3.0))
    patient = desk.submit(10)
    await asyncio.sleep(1.0)
    desk.dispatcher.upstream_changed(UpstreamInfo("fake", frozenset({"m"}), 1))
    assert await text(patient) == words(10)


@jumping
async def test_a_full_queue_says_when_to_come_again() -> None:
    desk = Desk(queue_limit=1)
    desk.submit(100)
    desk.submit(100)
    with pytest.raises(Overloaded) as caught:
        await text(desk.submit(100))
    assert caught.value.cause == "queue_full"
    assert caught.value.retry_after >= 1.0


@jumping
async def test_the_wait_told_is_the_work_left_over_the_throughput() -> None:
    desk = Desk(slots=2, queue_limit=10, seconds_per_token=0.01)
    for tokens in (1000, 1000, 3000, 5000):
        desk.submit(tokens)
    assert desk.dispatcher.retry_after("m") == pytest.approx(10_000 * 0.01 / 2)


@jumping
async def test_when_everything_fails_calls_are_not_multiplied() -> None:
    desk = Desk(FakeUpstream("a"), slots=8, retries=3)
    desk.dispatcher.budget = RetryBudget(0.5)
    desk.dispatcher.budget._left = 3.0
    upstream = desk.upstreams["a"]
    upstream.scripts = [[UpstreamUnavailable("no", cause="garbage")] for _ in range(100)]
    flights = [desk.submit(10) for _ in range(8)]
    for flight in flights:
        with pytest.raises(UpstreamUnavailable):
            await text(flight)
    assert len(upstream.sessions) == 8 + 3 + 4  # each once, what was left, and half a call for each job


@jumping
async def test_a_silent_call_of_an_upstream_that_is_down_goes_on_elsewhere() -> None:
    desk = Desk(FakeUpstream("a"), FakeUpstream("b"), slots=1)
    desk.upstreams["a"].scripts = [[*answer(10, finish=None), None]]
    flight = desk.submit(30)
    reading = spawn(text(flight), name="reading")
    await asyncio.sleep(5.0)
    desk.dispatcher.upstream_changed(UpstreamInfo("a", frozenset({"m"}), 0))
    desk.dispatcher.give_up_silent("a", after=6.0)
    await asyncio.sleep(0.1)
    assert not desk.upstreams["b"].sessions
    await asyncio.sleep(2.0)
    desk.dispatcher.give_up_silent("a", after=6.0)
    assert await reading == words(30)
    assert [(leg.upstream, leg.end, leg.cause) for leg in flight.legs] == [
        ("a", "interrupted", "stall"), ("b", "finished", ""),
    ]  # fmt: skip


@jumping
async def test_a_silent_call_stays_where_nobody_else_could_take_it() -> None:
    desk = Desk(FakeUpstream("a"), slots=1)
    desk.upstreams["a"].scripts = [[*answer(10, finish=None), 30.0, *answer(20, start=10)]]
    flight = desk.submit(30)
    reading = spawn(text(flight), name="reading")
    await asyncio.sleep(20.0)
    desk.dispatcher.upstream_changed(UpstreamInfo("a", frozenset({"m"}), 0))
    desk.dispatcher.give_up_silent("a", after=2.0)
    assert await reading == words(30)


@jumping
@pytest.mark.parametrize("begun", [True, False])
async def test_a_silent_call_that_only_its_engine_can_finish_is_waited_for(begun: bool) -> None:
    """An answer that needs one call, once its client has some of it."""
    desk = Desk(FakeUpstream("a"), FakeUpstream("b"), slots=1)
    desk.upstreams["a"].scripts = [[*answer(10 * begun, finish=None), 8.0, *answer(30 - 10 * begun, start=10 * begun)]]
    flight = desk.submit(30, mode=Mode.WHOLE)
    reading = spawn(text(flight), name="reading")
    await asyncio.sleep(5.0)
    desk.dispatcher.upstream_changed(UpstreamInfo("a", frozenset({"m"}), 0))
    desk.dispatcher.give_up_silent("a", after=2.0)
    assert await reading == words(30)
    assert [leg.upstream for leg in flight.legs] == (["a"] if begun else ["a", "b"])


@jumping
@pytest.mark.parametrize("policy", ["isrtf", "fcfs"])
async def test_an_upstream_that_is_left_hands_its_jobs_over(policy: str) -> None:
    """At the next window where there are windows, else at once; what cannot go on elsewhere finishes where it is."""
    desk = Desk(FakeUpstream("a"), FakeUpstream("b"), slots=2, policy=make_policy(policy))
    desk.dispatcher.upstream_changed(UpstreamInfo("b", frozenset({"m"}), 0))
    moving, staying = desk.submit(400), desk.submit(300, mode=Mode.WHOLE)
    both = [spawn(text(flight), name="reading") for flight in (moving, staying)]
    await asyncio.sleep(0.6)
    desk.dispatcher.upstream_changed(UpstreamInfo("b", frozenset({"m"}), 2))
    desk.dispatcher.upstream_changed(UpstreamInfo("a", frozenset({"m"}), 0, leaving=True))
    assert [await task for task in both] == [words(400), words(300)]
    assert [leg.upstream for leg in moving.legs] == ["a", "b"]
    assert moving.legs[0].tokens <= 110
    assert [leg.upstream for leg in staying.legs] == ["a"]
    await desk.dispatcher.idle("a")


@jumping
async def test_shutdown_waits_and_then_ends_what_is_left() -> None:
    desk = Desk(slots=2)
    short, long = desk.submit(100), desk.submit(5000)
    reading = spawn(text(short), name="short")
    start = now()
    await desk.dispatcher.drain(5.0)
    assert now() - start == pytest.approx(5.0, abs=0.1)
    assert await reading == words(100)
    with pytest.raises(ShuttingDown):
        await text(long)
    with pytest.raises(ShuttingDown):
        desk.submit(10)
    assert not desk.dispatcher._calls


class Slow:
    """A predictor that thinks for ``seconds``."""

    reads_text = True
    refines = True

    def __init__(self, seconds: float, remaining: float = 40.0, error: Exception | None = None) -> None:
        self.seconds = seconds
        self.remaining = remaining
        self.error = error
        self.views: list[View] = []
        self.learned: list[tuple[int, bool]] = []

    def instant(self, view: View) -> Estimate | None:
        return None

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        self.views += views
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return [Estimate(self.remaining) for _ in views]

    def learn(self, view: View, *, complete: bool) -> None:
        self.learned.append((view.attained, complete))

    def save(self) -> None: ...


@jumping
async def test_a_late_estimate_is_done_without() -> None:
    desk = Desk(predictor=Slow(10.0))
    start = now()
    desk.submit(20)
    flight = desk.submit(20)
    await flight.channel.get()
    # The slot was free after 0.2 s, and nobody knew whose turn it was.
    assert now() - start == pytest.approx(0.5, abs=0.05)
    assert flight.estimates == []


@jumping
async def test_a_free_slot_waits_for_no_estimate() -> None:
    desk = Desk(predictor=Slow(0.3))
    start = now()
    flight = desk.submit(100)
    await flight.channel.get()
    assert now() - start < 0.05
    await text(flight)
    assert flight.estimates[0] == (0, 40.0)


@jumping
async def test_an_estimate_made_meanwhile_is_counted_down() -> None:
    predictor = Slow(0.12, remaining=200.0)
    desk = Desk(FakeUpstream(pace=0.001), predictor=predictor)
    flight = desk.submit(430)
    assert await text(flight) == words(430)
    await asyncio.sleep(0.01)
    # Asked at a window's end, answered two windows later: 100 are left of what was said, and at last 30 allowed.
    assert flight.estimates == [(100, 100.0), (250, 100.0), (400, 30.0)]
    assert [view.attained for view in predictor.views] == [0, 150, 300]
    assert predictor.views[1].answer == words(150)
    assert predictor.learned == [(430, False)]


@jumping
@pytest.mark.parametrize("error", [RuntimeError("no model"), KeyError("a bug")])
async def test_a_predictor_that_fails_holds_nobody_up(error: Exception) -> None:
    desk = Desk(predictor=Slow(0.01, error=error))
    assert await text(desk.submit(20)) == words(20)


class Hasty(Slow):
    """Answers at once."""

    refines = False
    desk: Desk | None = None
    """Where each answer costs ``seconds``."""

    def instant(self, view: View) -> Estimate | None:
        if self.error is not None:
            raise self.error
        self.views.append(view)
        if self.desk is not None:
            self.desk.spent += self.seconds
        return Estimate(self.remaining)


@jumping
async def test_the_predictor_hears_of_a_job_that_never_ran() -> None:
    """What it remembers of every job it was asked about it may then forget."""
    predictor = Hasty(0.0)
    desk = Desk(predictor=predictor, queue_ttl=0.1)
    running = desk.submit(100)
    expires, leaves = desk.submit(10, rank=1), desk.submit(10, rank=1)
    desk.dispatcher.cancel(leaves)
    with pytest.raises(Overloaded):
        await text(expires)
    await text(running)
    await asyncio.sleep(0.01)
    assert sorted(predictor.learned) == [(0, False), (0, False), (100, False)]


@jumping
async def test_estimates_that_nobody_waits_for_take_three_hundredths_of_the_time() -> None:
    predictor = Hasty(0.001)
    predictor.desk = desk = Desk(predictor=predictor, slots=1000)
    first = desk.submit(40)
    assert not predictor.views, "the call comes first"
    await asyncio.sleep(0.0)
    assert [view.job_id for view in predictor.views] == [first.spec.id]
    for _ in range(800):
        desk.submit(1)
        await asyncio.sleep(0.001)
    # 20 ms were saved, and 24 ms are three hundredths of the time; estimates themselves take time as well.
    assert 42 <= len(predictor.views) <= 50
    late = [view.job_id for view in predictor.views[-20:]]
    assert len(set(late)) == 20, "spread over all that came"
    await asyncio.sleep(2.0)
    assert len(predictor.learned) == len({view.job_id for view in predictor.views}), "the sample, and nothing else"


@jumping
async def test_where_somebody_waits_everybody_is_estimated() -> None:
    predictor = Hasty(0.05)
    predictor.desk = desk = Desk(predictor=predictor, slots=10)
    for _ in range(10):
        desk.submit(1000)
        await asyncio.sleep(0.0)
    assert len(predictor.views) == 1, "the allowance is spent"
    for _ in range(9):
        desk.submit(10)
        await asyncio.sleep(0.0)
    assert len(predictor.views) >= 19, "each newcomer, and one of those it is compared with"
    asked = [view.job_id for view in predictor.views]
    assert len(set(asked)) == len(asked)


@jumping
@pytest.mark.parametrize(
    ("said", "kept", "missed"),
    [(float("nan"), [], "absurd"), (float("inf"), [], "absurd"), (-5.0, [(0, 1.0)], None), (1e9, [(0, 20.0)], None)],
)
async def test_absurd_estimates_are_bounded_or_none(
    said: float, kept: list[tuple[int, float]], missed: str | None
) -> None:
    desk = Desk(predictor=Hasty(0.0, remaining=said))
    flight = desk.submit(20)
    assert await text(flight) == words(20)
    assert flight.estimates == kept
    assert desk.log.missed == ([] if missed is None else [missed])


@jumping
async def test_a_predictor_that_raises_at_once_holds_nobody_up() -> None:
    desk = Desk(predictor=Hasty(0.0, error=KeyError("a bug")))
    assert await text(desk.submit(20)) == words(20)
    assert desk.log.missed == ["failed"]


@jumping
async def test_learning_tells_a_natural_end_from_a_cut() -> None:
    predictor = Slow(0.0)
    desk = Desk(predictor=predictor)
    desk.upstream.scripts = [answer(7, finish="stop")]
    assert await text(desk.submit(50)) == words(7)
    cut = desk.submit(500)
    await asyncio.sleep(1.0)
    desk.dispatcher.cancel(cut)
    await asyncio.sleep(0.01)
    (stopped, complete), (attained, censored) = predictor.learned
    assert (stopped, complete) == (7, True)
    assert 0 < attained < 500
    assert not censored
