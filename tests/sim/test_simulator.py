"""The simulator against queueing theory, and the stories of what it models around the scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import exp, inf
from statistics import fmean, stdev

import pytest

from elis_gateway.core.actions import Action, Preempt, Run
from elis_gateway.core.job import Outcome
from elis_gateway.core.policy import make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.predictor.base import Estimate, Predictor, View
from elis_gateway.predictor.baselines import Constant, NoisyOracle
from elis_gateway.predictor.history import History
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import Outage, Result, SimJob, simulate


def job(number: int, arrival: float, tokens: int, **more: object) -> SimJob:
    return SimJob(str(number), arrival, 10, tokens, **more)  # type: ignore[arg-type]


def engine(slots: int = 1, rate: float = 10.0, **more: object) -> Engine:
    return Engine(EngineModel(slots, ((1, rate),), **more))  # type: ignore[arg-type]


def scheduler(kind: str = "fcfs", **more: object) -> Scheduler:
    more.setdefault("seam_cost", 0.0)
    return Scheduler(SchedulerConfig(**more), make_policy(kind))  # type: ignore[arg-type]


def knowing(jobs: Sequence[SimJob], sigma: float = 0.0) -> Predictor:
    return NoisyOracle({j.id: j.output_tokens for j in jobs}, sigma)


def run(jobs: Sequence[SimJob], kind: str, *, mode: str = "elastic", slots: int = 1, **more: float) -> Result:
    return simulate(jobs, scheduler(kind, mode=mode), {"one": engine(slots, **more)}, knowing(jobs))


def poisson(count: int, load: float, seed: int, length: Callable[[random.Random], float]) -> list[SimJob]:
    """Arrivals at ``load`` of one slot of 10 tokens/s; mean length must be 100 tokens."""
    rng = random.Random(seed)
    now, jobs = 0.0, []
    for number in range(count):
        now += rng.expovariate(load / 10.0)
        jobs.append(job(number, now, max(1, round(length(rng)))))
    return jobs


# ---- theory ---------------------------------------------------------------------------------------------------------


def lindley(jobs: Sequence[SimJob]) -> list[float]:
    """First come, one slot, by Lindley's recursion: the waiting time of each job from that of the one before."""
    free, found = 0.0, []
    for asked in jobs:
        free = max(free, asked.arrival) + asked.output_tokens / 10.0
        found.append(free - asked.arrival)
    return found


LENGTHS: dict[str, tuple[Callable[[random.Random], float], float]] = {
    # length, E[S^2] / E[S]^2
    "exponential": (lambda rng: rng.expovariate(0.01), 2.0),
    "constant": (lambda rng: 100, 1.0),
    "two kinds": (lambda rng: 10 if rng.random() < 0.8 else 460, 0.8 * 0.01 + 0.2 * 4.6**2),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_first_come_is_what_theory_says(name: str, load: float) -> None:
    # Pollaczek-Khinchine: E[W] = load E[S^2] / (2 E[S] (1 - load)); for exponential lengths E[T] = E[S] / (1 - load).
    length, square = LENGTHS[name]
    means = []
    for seed in range(10):
        jobs = poisson(4000, load, seed, length)
        jcts = [r.jct for r in run(jobs, "fcfs").records]
        assert jcts == pytest.approx(lindley(jobs))
        means.append(fmean(jcts))
    theory = 10.0 + load * square * 10.0 / (2 * (1 - load))
    assert abs(fmean(means) - theory) < 3 * stdev(means) / len(means) ** 0.5


def schrage_miller(load: float) -> float:
    """E[T] of M/G/1 under shortest remaining processing time, service exponential, mean 10 s (Schrage, Miller 1966)."""
    rate, step = load / 10.0, 0.05
    below = square = inner = whole = 0.0
    for n in range(int(200 / step)):
        x = (n + 0.5) * step
        density = exp(-x / 10) / 10 * step
        # Load and second moment of what is shorter than x, to the middle of the step.
        rho, moment = below + rate * x * density / 2, square + rate * x * x * density / 2
        residence = inner + step / 2 / (1 - rho)
        whole += ((moment + rate * x * x * exp(-x / 10)) / (2 * (1 - rho) ** 2) + residence) * density
        below, square, inner = below + rate * x * density, square + rate * x * x * density, inner + step / (1 - rho)
    return whole


def test_shortest_remaining_first_is_what_theory_says() -> None:
    """Perfect knowledge and short windows; a job is not preempted twice within one, which costs a percent or two."""
    means = []
    for seed in range(6):
        jobs = poisson(2500, 0.8, seed, lambda rng: rng.expovariate(0.01))
        result = simulate(jobs, scheduler("isrtf", window=10), {"one": engine()}, knowing(jobs))
        means.append(fmean(r.jct for r in result.records))
    theory = schrage_miller(0.8)
    assert theory == pytest.approx(23.53, rel=0.001)  # 2.353 mean services, as the literature has it
    assert abs(fmean(means) - theory) < 0.01 * theory + 3 * stdev(means) / len(means) ** 0.5


def test_srpt_is_no_worse_than_anything() -> None:
    for seed in range(3):
        jobs = poisson(3000, 0.85, seed, lambda rng: rng.expovariate(0.01))
        mean = {
            name: fmean(r.jct for r in run(jobs, kind, mode=mode).records)
            for name, kind, mode in (
                ("fcfs", "fcfs", "elastic"),
                ("las", "las", "elastic"),
                ("sjf", "sjf", "elastic"),
                ("isrtf", "isrtf", "elastic"),
                ("fixed", "isrtf", "fixed"),
            )
        }
        assert mean["isrtf"] == min(mean.values())
        assert mean["sjf"] < mean["fcfs"]
        assert mean["fixed"] < mean["fcfs"]


def test_work_is_conserved() -> None:
    jobs = poisson(2000, 0.9, 1, lambda rng: rng.expovariate(0.01))
    for kind in ("fcfs", "sjf", "isrtf", "las", "round_robin"):
        result = run(jobs, kind)
        assert result.totals["one"].tokens == sum(j.output_tokens for j in jobs)
        # One slot, no seam: it is busy as long as there is work, plus the token that each preemption throws away.
        lost = result.totals["one"].busy * 10 - sum(j.output_tokens for j in jobs)
        assert -1e-6 <= lost <= sum(r.preemptions for r in result.records) + 1e-6
        assert all(r.completed and r.tokens == r.output_tokens for r in result.records)


def test_slots_share() -> None:
    jobs = [job(number, 0.0, 100) for number in range(8)]
    result = run(jobs, "fcfs", slots=4)
    assert [r.jct for r in result.records] == pytest.approx([10.0] * 4 + [20.0] * 4)


# ---- stories --------------------------------------------------------------------------------------------------------


def test_a_record_tells_a_jobs_life() -> None:
    jobs = [job(0, 0.0, 200, app="long"), job(1, 1.0, 20)]
    actions: list[Action] = []
    result = simulate(
        jobs,
        scheduler("isrtf"),
        {"one": engine()},
        knowing(jobs),
        predictions=True,
        observe=lambda now, action: actions.append(action),
    )
    long, short = result.records
    assert (long.app, long.upstream, long.outcome) == ("long", "one", Outcome.COMPLETED)
    assert (long.slices, long.preemptions) == (2, 1)
    assert long.ttft == pytest.approx(0.1)
    assert long.jct == pytest.approx(22.0)
    assert long.wait == pytest.approx(2.0)
    assert short.jct == pytest.approx(2.0)
    assert long.predictions is not None
    assert long.predictions[0] == (0, 200)
    assert all(attained + remaining == 200 for attained, remaining in long.predictions)
    assert [type(action) for action in actions].count(Preempt) == 1
    assert [type(action) for action in actions].count(Run) == 3


def test_fixed_windows_are_calls_of_at_most_one_window() -> None:
    result = run([job(0, 0.0, 120)], "isrtf", mode="fixed")
    assert result.records[0].slices == 3
    assert result.totals["one"].calls == 3


def test_a_seam_costs_once_per_call() -> None:
    fixed = run([job(0, 0.0, 120)], "isrtf", mode="fixed", seam_tokens=2.0)
    whole = run([job(0, 0.0, 120)], "isrtf", seam_tokens=2.0)
    assert fixed.records[0].jct == pytest.approx(12.6)
    assert whole.records[0].jct == pytest.approx(12.2)


def test_the_prefix_cache_makes_a_continuation_cheap() -> None:
    asked = [SimJob("a", 0.0, 1000, 100)]
    for cache, prefilled in ((True, 1000 + (1050 - 1040)), (False, 1000 + 1050)):
        model = EngineModel(1, ((1, 10.0),), prefill_tokens_per_second=100.0, prefix_cache=cache)
        result = simulate(asked, scheduler("isrtf", mode="fixed"), {"one": Engine(model)}, knowing(asked))
        assert result.totals["one"].prefilled == prefilled


def test_the_next_turn_finds_its_conversation_cached() -> None:
    jobs = [SimJob("a", 0.0, 1000, 100, conversation="c"), SimJob("b", 100.0, 1200, 100, conversation="c")]
    model = EngineModel(1, ((1, 10.0),), prefill_tokens_per_second=1000.0)
    result = simulate(jobs, scheduler(), {"one": Engine(model)})
    assert result.totals["one"].prefilled == 1000 + 1200 - 1088


def test_a_limit_cuts_an_answer_off() -> None:
    learned: list[tuple[int, bool]] = []

    class Notes(Constant):
        def learn(self, view: View, *, complete: bool) -> None:
            learned.append((view.attained, complete))

    jobs = [job(0, 0.0, 500, limit=30), job(1, 5.0, 20, limit=30)]
    result = simulate(jobs, scheduler("isrtf"), {"one": engine()}, Notes())
    assert [r.tokens for r in result.records] == [30, 20]
    assert learned == [(30, False), (20, True)]


def test_clients_leave() -> None:
    jobs = [job(0, 0.0, 500, patience=2.0), job(1, 0.5, 10, patience=1.0), job(2, 1.0, 10)]
    result = run(jobs, "fcfs")
    assert [r.outcome for r in result.records] == [Outcome.CANCELLED, Outcome.CANCELLED, Outcome.COMPLETED]
    assert [r.tokens for r in result.records] == [20, 0, 10]
    assert result.records[2].end == pytest.approx(3.0)


def test_deadlines_expire() -> None:
    result = run([job(0, 0.0, 50), job(1, 1.0, 50, deadline=2.0)], "fcfs")
    assert [r.outcome for r in result.records] == [Outcome.COMPLETED, Outcome.EXPIRED]
    assert result.records[1].end == pytest.approx(3.0)


def test_an_outage_loses_no_token() -> None:
    jobs = [job(0, 0.0, 100), job(1, 0.0, 100)]
    engines = {"one": engine(), "two": engine()}
    result = simulate(jobs, scheduler("isrtf"), engines, knowing(jobs), outages=[Outage("one", 5.0, 30.0)])
    assert all(r.completed and r.tokens == 100 for r in result.records)
    assert sum(totals.tokens for totals in result.totals.values()) == 200
    assert result.end == pytest.approx(15.0)


def test_with_every_engine_down_jobs_wait() -> None:
    jobs = [job(0, 0.0, 100)]
    result = simulate(jobs, scheduler(), {"one": engine()}, outages=[Outage("one", 5.0, 25.0)])
    assert result.records[0].end == pytest.approx(30.0)


def test_a_round_trip_leaves_slots_empty_and_overcommit_fills_them() -> None:
    jobs = [job(number, 0.0, 10) for number in range(20)]
    ends = {}
    for overcommit in (0, 1):
        result = simulate(jobs, scheduler(), {"one": engine()}, delay=0.1, overcommit=overcommit)
        assert all(r.completed and r.tokens == 10 for r in result.records)
        ends[overcommit] = result.end
    assert ends[0] == pytest.approx(20 * 1.2)
    assert ends[1] == pytest.approx(20 * 1.0 + 0.2)


@pytest.mark.parametrize("overcommit", [0, 2])
@pytest.mark.parametrize("orders", [False, True])
def test_preempting_with_a_delay_loses_no_token(overcommit: int, orders: bool) -> None:
    jobs = poisson(400, 3.4, 2, lambda rng: rng.expovariate(0.01))
    one = engine(4, orders=orders, seam_tokens=1.0)
    result = simulate(jobs, scheduler("isrtf"), {"one": one}, knowing(jobs), delay=0.07, overcommit=overcommit)
    assert all(r.completed and r.tokens == r.output_tokens for r in result.records)
    assert result.totals["one"].tokens == sum(j.output_tokens for j in jobs)
    assert sum(r.preemptions for r in result.records) > 20


def test_equal_inputs_give_equal_lives() -> None:
    jobs = poisson(500, 1.8, 3, lambda rng: rng.expovariate(0.01))

    def lives() -> list[tuple[object, ...]]:
        result = simulate(jobs, scheduler("isrtf"), {"one": engine(2), "two": engine(1)}, knowing(jobs, 0.6))
        return [(r.end, r.slices, r.upstream, r.wait) for r in result.records]

    assert lives() == lives()


def test_calls_that_end_at_the_same_instant_are_all_told() -> None:
    # Everything arrives in step and is equally long, so ends coincide with arrivals that would preempt.
    jobs = [job(number, float(number // 4), 10 + number % 2 * 10) for number in range(400)]
    result = run(jobs, "isrtf", slots=6)
    assert all(r.completed and r.tokens == r.output_tokens for r in result.records)


def test_memory_pressure_evicts_and_still_everything_completes() -> None:
    jobs = poisson(300, 3.0, 4, lambda rng: rng.uniform(50, 150))
    one = engine(4, kv_tokens=300, prefill_tokens_per_second=1000.0)
    result = simulate(jobs, scheduler("isrtf"), {"one": one}, knowing(jobs))
    assert result.totals["one"].evictions > 0
    assert all(r.completed and r.tokens == r.output_tokens for r in result.records)


def test_history_learns_the_applications_and_orders_better_than_first_come() -> None:
    rng = random.Random(1)
    lengths = {"short": 20, "middle": 100, "long": 600}
    now, jobs = 0.0, []
    for number in range(3000):
        now += rng.expovariate(0.9 / 24.0)
        app = rng.choice(list(lengths))
        jobs.append(job(number, now, max(1, round(lengths[app] * rng.lognormvariate(0, 0.3))), app=app))
    mean = {}
    for kind in ("fcfs", "isrtf"):
        result = simulate(jobs, scheduler(kind), {"one": engine()}, History())
        mean[kind] = fmean(r.jct for r in result.records)
    assert mean["isrtf"] < 0.6 * mean["fcfs"]


class Refining(Constant):
    """Knows nothing at once, and everything a little later."""

    refines = True
    reads_text = True

    def __init__(self, jobs: Sequence[SimJob]) -> None:
        super().__init__()
        self.lengths = {j.id: j.output_tokens for j in jobs}
        self.seen: list[str] = []

    def instant(self, view: View) -> Estimate | None:
        return None

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        self.seen += [view.answer for view in views]
        return [Estimate(float(max(1, self.lengths[view.job_id] - view.attained))) for view in views]


def test_an_estimate_takes_its_time() -> None:
    jobs = [job(0, 0.0, 120), job(1, 1.0, 10)]
    predictor = Refining(jobs)
    result = simulate(
        jobs, scheduler("isrtf"), {"one": engine()}, predictor, latency=0.5, text=lambda asked, tokens: "x" * tokens
    )
    assert result.records[0].first_token == pytest.approx(0.1), "a free slot waits for no estimate"
    assert result.records[1].end == pytest.approx(2.5)
    assert predictor.seen[:2] == ["", ""]
    assert set(predictor.seen[2]) == {"x"}, "later ones see the answer so far"


def test_what_cannot_be_simulated_is_said() -> None:
    with pytest.raises(ValueError, match="not sorted"):
        simulate([job(0, 2.0, 5), job(1, 1.0, 5)], scheduler(), {"one": engine()})
    with pytest.raises(RuntimeError, match="1 jobs are left"):
        simulate([job(0, 0.0, 5)], scheduler(unavailable_timeout=inf), {})
