"""A policy from outside: the longest prediction first. The worst idea there is, which makes it easy to see at work.

In the simulator:   python examples/policy_longest_first.py
Live:               PYTHONPATH=examples ELIS__SCHEDULER__POLICY='policy_longest_first:LongestFirst' \
                        elis-gateway serve config/example.yaml
While serving:      name it in the configuration's scheduler.policy, then `curl -X POST localhost:8081/admin/reload`.
                    PUT /admin/policy takes no class that the file does not name: it would run anybody's code.
"""

from elis_gateway.core.job import Job
from elis_gateway.core.policy import PoolView, remaining_tokens


class LongestFirst:
    """Lowest key first, so the key is the remaining work in seconds, negated."""

    needs_estimates = True
    preempts = False

    def key(self, job: Job, pool: PoolView, now: float) -> float:
        return -remaining_tokens(job, pool) * pool.seconds_per_token


if __name__ == "__main__":
    from elis_gateway.predictor.baselines import NoisyOracle
    from elis_gateway.sim.engine import EngineModel
    from loadtest.settings import setting
    from loadtest.stats import summarise
    from loadtest.targets import simulated
    from loadtest.workload import Seeds, azure

    engine = EngineModel.load("default")
    work = azure(2000, load=0.95, capacity=engine.capacity, seeds=Seeds())
    oracle = NoisyOracle({request.id: request.tokens for request in work.requests}, sigma=0.0)
    for policy in ("fcfs", "sjf", "policy_longest_first:LongestFirst"):
        run = simulated(work, setting("fcfs", policy=policy), engine, oracle)
        print(f"{policy:36s} mean completion time {summarise(run).mean:6.2f} s")
