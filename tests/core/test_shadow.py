"""First-come on paper: its figures against a first-come run of the same traffic, and the due times made of them."""

from __future__ import annotations

import random

import pytest

from elis_gateway.core.job import Job, JobSpec, Outcome
from elis_gateway.core.lengths import Slope
from elis_gateway.core.placement import Pool
from elis_gateway.core.policy import FCFS, ISRTF, Policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.core.shadow import Shadow
from elis_gateway.predictor.baselines import NoisyOracle
from elis_gateway.sim.engine import Engine
from elis_gateway.sim.model import EngineModel
from elis_gateway.sim.simulator import SimJob, simulate


def finished(name: str, arrival: float, end: float) -> Job:
    job = Job(JobSpec(name, "m"), arrival, Pool("m", 0.02, 0.0))
    job.finished = end
    job.outcome = Outcome.COMPLETED
    return job


def test_arrivals_take_the_free_slot_in_order_whatever_order_they_end_in():
    shadow = Shadow()
    first, second, third = finished("a", 0, 99), finished("b", 1, 99), finished("c", 2, 99)
    for job in (first, second, third):
        job.outcome, outcome = None, job.outcome
        shadow.arrived(job)
        job.outcome = outcome
    # One slot, ten seconds each: c, then b, then a are over; nothing is settled before a is.
    third.outcome, second.outcome, first.outcome = Outcome.COMPLETED, Outcome.COMPLETED, None
    shadow.over(third, 10.0)
    shadow.over(second, 10.0)
    assert shadow.settled == 0
    first.outcome = Outcome.COMPLETED
    shadow.over(first, 10.0)
    assert shadow.settled == 3
    assert shadow.shadow_mean == pytest.approx((10 + 19 + 28) / 3)


def test_cancelled_jobs_take_slot_time_but_count_in_no_figure():
    shadow = Shadow()
    gone, kept = finished("gone", 0, 3), finished("kept", 0, 99)
    gone.outcome = Outcome.CANCELLED
    kept.outcome = None
    shadow.arrived(gone)
    shadow.arrived(kept)
    shadow.over(gone, 3.0)
    kept.outcome = Outcome.COMPLETED
    shadow.over(kept, 5.0)
    assert (shadow.settled, shadow.shadow_mean) == (1, 8.0)


def traffic(seed: int, jobs: int, load: float, slots: int) -> list[SimJob]:
    rng = random.Random(seed)
    now, made = 0.0, []
    for i in range(jobs):
        now += rng.expovariate(load * slots * 50.0 / 200.0)
        made.append(SimJob(f"j{i}", now, 0, max(1, round(rng.gammavariate(1.7, 200 / 1.7)))))
    return made


def served(
    work: list[SimJob], policy: Policy, slots: int, model: EngineModel | None = None, **dials
) -> tuple[list[float], Shadow]:
    scheduler = Scheduler(SchedulerConfig(seconds_per_token=0.02, **{"seam_cost": 1.5, **dials}), policy)
    engine = Engine(model or EngineModel(slots=slots, decode=((1, 50.0),), seam_tokens=1.5))
    guess = NoisyOracle({j.id: j.output_tokens for j in work}, 0.6, seed=1)
    records = simulate(work, scheduler, {"u": engine}, guess).records
    return sorted(r.jct for r in records), scheduler.pools["model"].shadow


@pytest.mark.parametrize("load", [0.7, 0.95])
def test_the_shadow_tells_what_a_first_come_run_gives(load):
    """Mean within 3 %, p99 within 10 %, while serving in another order."""
    work = traffic(3, 3000, load, 4)
    real, _ = served(work, FCFS(), 4)
    _, shadow = served(work, ISRTF(), 4)
    assert shadow.shadow_mean == pytest.approx(sum(real) / len(real), rel=0.03)
    assert shadow.p99.value == pytest.approx(real[int(0.99 * len(real))], rel=0.10)


@pytest.mark.parametrize("name", ["vllm-cpu", "llama-cpp"])
def test_so_it_does_on_engines_that_a_prompt_stalls(name):
    """There every seam holds up all slots, as every new prompt does, and the pace depends on how many are taken."""
    model = EngineModel.load(name)
    stretch = 50.0 / model.capacity
    draw = random.Random(0).randint
    arrivals = traffic(5, 4000, 0.88, 1)
    work = [j._replace(arrival=j.arrival * stretch, prompt_tokens=draw(5, 75)) for j in arrivals]
    real, _ = served(work, FCFS(), model.slots, model)
    _, shadow = served(work, ISRTF(), model.slots, model, seam_cost=None)
    assert shadow.shadow_mean == pytest.approx(sum(real) / len(real), rel=0.02)
    assert shadow.p99.value == pytest.approx(real[int(0.99 * len(real))], rel=0.10)


def test_what_a_continuation_costs_the_others_is_told_from_what_new_prompts_do():
    """Both come when a slot changes hands, so that each alone would explain what the other does."""
    draw = random.Random(1)
    stall = Slope()
    for _ in range(3000):
        continued = draw.randint(0, 2)
        prompts = 40.0 * continued + draw.randint(0, 60)
        stall.add(continued, prompts, 1.0 + 0.005 * continued + 0.01 * prompts + draw.gauss(0.0, 0.01), 50.0)
    assert stall.value == pytest.approx(0.005, abs=0.001)


@pytest.mark.parametrize("prompts", [0.0, 40.0])
def test_where_no_prompt_varies_continuations_explain_all(prompts):
    stall = Slope()
    assert stall.value == 0.0
    for continued in (0, 1, 2, 1, 0, 2):
        stall.add(continued, prompts, 1.0 + 0.5 * continued, 50.0)
    assert stall.value == pytest.approx(0.5)


def test_the_promise_is_kept_where_plain_isrtf_breaks_it():
    work = traffic(5, 3000, 0.95, 4)
    first_come, _ = served(work, FCFS(), 4)
    plain, _ = served(work, ISRTF(), 4)
    promised, _ = served(work, ISRTF(), 4, tail=1.25)
    p99 = [jcts[int(0.99 * len(jcts))] for jcts in (first_come, plain, promised)]
    assert p99[1] > 1.5 * p99[0]
    assert p99[2] < 1.35 * p99[0]
    assert sum(promised) < 0.9 * sum(first_come)


def test_in_overload_the_promise_leaves_room_to_order_by():
    """First-come's percentile so far is of the past there: by that alone nearly everybody is overdue."""
    work = traffic(5, 3000, 1.15, 4)
    first_come, _ = served(work, FCFS(), 4)
    promised, _ = served(work, ISRTF(), 4, tail=1.25)
    assert promised[int(0.99 * len(promised))] < 1.25 * first_come[int(0.99 * len(first_come))]
    assert sum(promised) < 0.9 * sum(first_come)


def waiting(name: str, arrival: float) -> Job:
    return Job(JobSpec(name, "m"), arrival, Pool("m", 0.02, 0.0))


def over(shadow: Shadow, job: Job, end: float, slot_time: float) -> None:
    job.finished, job.outcome = end, Outcome.COMPLETED
    shadow.over(job, slot_time)


def due(shadow: Shadow, job: Job, remaining: float) -> float:
    if job.due is None:
        shadow.arrived(job)
    job.due = shadow.due(job, remaining, 1.0)
    return job.due


def overloaded(slots: int = 1) -> Shadow:
    """First-come's percentile has been of the past for long."""
    shadow = Shadow()
    shadow.resize(slots, 0.0)
    shadow.beyond = 1.0
    return shadow


def test_who_comes_behind_many_is_due_when_first_come_would_have_come_to_him():
    shadow = overloaded()
    jobs = [waiting(f"j{n}", 0.0) for n in range(10)]
    for n, job in enumerate(jobs):
        assert due(shadow, job, 10.0) == pytest.approx(0.85 * 10.0 * (n + 1) - 10.0), "one slot, ten seconds each"
    for job in jobs[5:]:
        over(shadow, job, 25.0, 5.0)
    # Five are left, and estimates have turned out to be twice too long: of the others', too, once they are asked again.
    assert due(shadow, waiting("next", 25.0), 10.0) == pytest.approx(25.0 + 0.85 * (5 * 10.0 + 5.0) - 10.0)
    for job in jobs[:5]:
        due(shadow, job, 10.0)
    assert due(shadow, waiting("another", 25.0), 10.0) == pytest.approx(25.0 + 0.85 * (5 * 5.0 + 5.0 + 5.0) - 10.0)


def test_one_long_answer_under_way_makes_nobody_else_s_wait_look_short():
    shadow = overloaded(8)
    long = waiting("long", 0.0)
    long.first_run = 0.0
    shadow.arrived(long)
    for n in range(400):
        last = due(shadow, waiting(f"j{n}", 1000.0), 10.0)
    assert last == pytest.approx(1000.0 + 0.85 * (399 * 10.0 / 8 + 10.0) - 10.0)


def test_who_has_begun_at_once_is_not_behind_those_who_came_later():
    shadow = overloaded()
    first = waiting("first", 0.0)
    first.first_run = 0.0
    shadow.arrived(first)
    for n in range(500):
        due(shadow, waiting(f"j{n}", 1.0), 30.0)
    first.served = 2.0
    first.due = shadow.due(first, 28.0, 1.0)
    assert first.due == pytest.approx(0.85 * 30.0 - 28.0)


def test_a_job_that_stays_where_it_is_keeps_its_place_on_paper_whatever_comes_behind_it():
    shadow = overloaded(2)
    first, second = waiting("first", 0.0), waiting("second", 0.0)
    due(shadow, first, 30.0)
    before = due(shadow, second, 10.0)
    for n in range(50):
        due(shadow, waiting(f"j{n}", 1.0), 10.0)
    assert due(shadow, second, 10.0) == before


def test_while_first_come_keeps_to_its_percentile_that_decides_and_in_overload_what_it_would_make_of_the_job():
    shadow = Shadow()
    for n in range(200):
        job, work = waiting(f"settled {n}", 100.0 * n), 5.0 if n % 50 else 10.0
        due(shadow, job, work)
        over(shadow, job, 100.0 * n + work, work)
    usual = due(shadow, waiting("usual", 20_000.0), 5.0) - 20_000.0
    assert usual == pytest.approx(0.92 * 10.0 - 5.0, rel=0.05)
    waits = [due(shadow, waiting(f"rush {n}", 20_001.0), 5.0) - 20_001.0 for n in range(6000)]
    assert waits[20] == pytest.approx(usual), "a rush, as there are some"
    assert waits[-1] == pytest.approx(0.85 * 6000 * 5.0, rel=0.05)
