"""Every policy through one conformance suite, and what sets each apart."""

from __future__ import annotations

import pytest

from elis_gateway.core.conformance import check_policy
from elis_gateway.core.job import Estimate, Job, JobSpec
from elis_gateway.core.lengths import Lengths, Quantile, solve_gamma
from elis_gateway.core.placement import Pool
from elis_gateway.core.policy import FCFS, ISRTF, LAS, SJF, Aging, RoundRobin, make_policy

MAKERS = {
    "fcfs": FCFS,
    "round_robin": RoundRobin,
    "las": LAS,
    "sjf": SJF,
    "isrtf": ISRTF,
    "isrtf mean": lambda: ISRTF("mean"),
    "isrtf linear": lambda: ISRTF(aging=Aging("linear")),
    "isrtf boost": lambda: ISRTF(aging=Aging("boost")),
}


@pytest.mark.parametrize("name", MAKERS)
def test_conforms(name):
    check_policy(MAKERS[name])


class Forgetful(FCFS):
    """Not pure: each look makes the job older."""

    def key(self, job, pool, now):
        job.arrival += 1.0
        return job.arrival


def test_the_suite_catches_an_impure_policy():
    with pytest.raises(AssertionError, match="not pure"):
        check_policy(Forgetful)


def job(arrival: float, tokens: float) -> Job:
    made = Job(JobSpec("x", "m"), arrival, Pool("m", 0.02, 0.0))
    made.estimate = Estimate(tokens)
    return made


class TestAging:
    pool = Pool("m", 0.02, 0.0)

    def test_linear_lies_between_first_come_and_isrtf(self):
        old_and_long, new_and_short = job(0.0, 1000.0), job(30.0, 10.0)
        for a, long_first in ((0.01, False), (10.0, True)):
            policy = SJF(aging=Aging("linear", a=a))
            keys = [policy.key(j, self.pool, 40.0) for j in (old_and_long, new_and_short)]
            assert (keys[0] < keys[1]) is long_first

    def test_boost_lets_short_jobs_jump_far_and_leaves_long_ones_in_order(self):
        pool = Pool("m", 0.02, 0.0)
        pool.gamma, pool.slots = 0.5, 1
        policy = SJF(aging=Aging("boost", factor=1.0))

        def head_start(tokens: float) -> float:
            return -policy.key(job(0.0, tokens), pool, 0.0)

        assert head_start(1) - head_start(10) > 4.0
        assert head_start(1000) - head_start(2000) < 0.1

    @pytest.mark.parametrize(
        "wrong", [{"kind": "cubic"}, {"kind": "linear", "a": 0.0}, {"kind": "boost", "factor": -1}]
    )
    def test_refuses_nonsense(self, wrong):
        with pytest.raises(ValueError, match="aging"):
            Aging(**wrong)


def test_make_policy_names_what_it_knows():
    assert make_policy("isrtf", order="mean").order == "mean"
    with pytest.raises(ValueError, match=r"unknown policy 'srtf': expected one of fcfs, round_robin"):
        make_policy("srtf")
    with pytest.raises(TypeError):
        make_policy("fcfs", order="mean")


def test_gamma_solves_its_equation_for_exponential_service():
    """M/M/1: the response tail decays at mu - lambda."""
    mu, rate, step = 1.0, 0.8, 0.01
    shares = [((i + 0.5) * step, step * mu * 2.718281828 ** (-mu * (i + 0.5) * step)) for i in range(4000)]
    assert solve_gamma(rate, shares, 1.0) == pytest.approx(mu - rate, rel=0.03)
    assert 0.0 < solve_gamma(2.0, shares, 1.0) < 0.05
    assert solve_gamma(1.0, [], 1.0) == 0.0


def test_lengths_know_their_percentile_and_forget():
    lengths = Lengths()
    assert lengths.p95 is None
    for tokens in range(1, 1001):
        lengths.add(tokens)
    assert lengths.quantile(0.5) == pytest.approx(500, rel=0.25), "older answers count a little less"
    assert lengths.p95 == pytest.approx(950, rel=0.15)
    for _ in range(20_000):
        lengths.add(10)
    assert lengths.p95 == pytest.approx(10, rel=0.15)


def test_quantile_is_exact_to_a_percent():
    quantile = Quantile(0.99)
    for i in range(10_000):
        quantile.add((i * 7919 % 10_000) / 10.0)
    assert quantile.value == pytest.approx(990, rel=0.02)
