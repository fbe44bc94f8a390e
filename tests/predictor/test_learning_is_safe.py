"""A gateway in front of a mix of applications, from its first answer on: what was learned never orders or measures the
answers to come notably worse than the better of what it started from, the shipped model alone and history alone."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, log
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import kendalltau

from elis_gateway.predictor.learner import Learner, Prediction, Sight

APPS, FEATURES, REDUCED = 8, 12, 12
LEARNED = (0, 5, 10, 20, 40, 80, 160, 320)
ASKED = 240


class Job(NamedTuple):
    app: int
    tokens: int
    sights: list[Sight]


class Mix:
    """Applications with habits of their own (medians from 12 to 900 tokens), asked at random by one served model. The
    counters and the embedding tell the application, and a little of the length within it. ``knows``: how far the
    shipped model's log lengths are off (by chance, by application); what it knows of an answer grows with its text."""

    def __init__(self, seed: int, chance: float, bias: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.medians = np.exp(np.linspace(log(12.0), log(900.0), APPS))
        self.where = self.rng.normal(size=(APPS, FEATURES + REDUCED)) * 2.0
        self.says = self.rng.normal(size=FEATURES + REDUCED) * 0.12
        self.chance = chance
        self.bias = bias * self.rng.normal(size=APPS)

    def jobs(self, count: int) -> Iterator[Job]:
        for _ in range(count):
            app = int(self.rng.integers(APPS))
            apart = self.rng.normal(size=FEATURES + REDUCED)
            told = self.where[app] + apart
            tokens = max(1, round(self.medians[app] * exp(apart @ self.says + 0.5 * self.rng.normal())))
            wrong = self.bias[app] + self.chance * self.rng.normal()
            yield Job(app, tokens, [self.sight(told, tokens, at, wrong) for at in range(0, min(tokens, 400), 50)])

    def sight(self, told: np.ndarray, tokens: int, at: int, wrong: float) -> Sight:
        shipped = log(tokens - at) + wrong * exp(-at / 300.0) + 0.3 * self.rng.normal()
        features = np.append(told[: FEATURES - 1], log(1.0 + at)).astype(np.float32)
        return Sight(at, None, shipped, features, told[FEATURES:])


def life(learner: Learner, job: Job) -> list[Prediction]:
    first = learner.predict("m", f"{job.app}", job.sights[0])
    later = (learner.predict("m", f"{job.app}", sight._replace(first=first.whole)) for sight in job.sights[1:])
    return [first, *later]


def course(seed: int, chance: float, bias: float) -> np.ndarray:
    """By answers learned: Kendall's tau with the truth, and mean absolute error of the log, of what was learned, of the
    shipped model and of history."""
    mix, learner = Mix(seed, chance, bias), Learner(FEATURES, REDUCED)
    asked, taught, figures = list(mix.jobs(ASKED)), mix.jobs(LEARNED[-1]), []
    done = 0
    for count in LEARNED:
        for _ in range(count - done):
            job = next(taught)
            learner.learn("m", f"{job.app}", life(learner, job), job.tokens, complete=True)
        done = count
        rows = [
            (job.tokens - sight.attained, said.median, exp(sight.shipped or 0.0), exp(said.anchor))
            for job in asked
            for sight, said in zip(job.sights, life(learner, job), strict=True)
        ]
        true, *all_said = (np.log(np.array(column)) for column in zip(*rows, strict=True))
        figures.append([(kendalltau(true, said).statistic, np.abs(true - said).mean()) for said in all_said])
    return np.nan_to_num(np.array(figures))


@pytest.mark.parametrize(
    ("chance", "bias"),
    [
        pytest.param(0.3, 0.2, id="the shipped model knows this traffic"),
        pytest.param(0.6, 0.8, id="it is off by application"),
        pytest.param(1.5, 0.3, id="it hardly knows anything"),
    ],
)
def test_what_was_learned_is_as_good_as_the_better_of_what_it_came_from(chance: float, bias: float) -> None:
    figures = np.mean([course(seed, chance, bias) for seed in range(4)], axis=0)
    ours, shipped, history = figures[:, 0], figures[:, 1], figures[:, 2]
    for count, (tau, error), one, other in zip(LEARNED, ours, shipped, history, strict=True):
        assert tau > max(one[0], other[0]) - 0.03, f"after {count} answers: tau {tau:.3f}, {one[0]:.3f}, {other[0]:.3f}"
        best = min(one[1], other[1])
        assert error < best + 0.05, f"after {count} answers: off by {error:.3f}, {one[1]:.3f}, {other[1]:.3f}"
    assert ours[-1, 0] > max(shipped[-1, 0], history[-1, 0])
    assert ours[-1, 1] < min(shipped[-1, 1], history[-1, 1])
