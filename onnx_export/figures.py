"""Figures of merit of estimates: errors, rank correlation, intervals by group. Knows: arrays. Never: models, files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

__all__ = ["Values", "draws", "edges", "figures", "intervals", "pairwise_accuracy", "tau", "tau_within"]

Values = npt.NDArray[Any]


def tau(truth: Values, said: Values) -> float:
    """Kendall's tau-b: 1 where estimates order as the truth does, 0 where they know nothing, or are all the same."""
    if len(truth) < 2:
        return float("nan")
    value = float(kendalltau(truth, said).statistic)
    return 0.0 if np.isnan(value) else value


def tau_within(truth: Values, said: Values, of: Values) -> float:
    """The mean of tau within each part (a served model, say), weighted by its rows: what one server sees."""
    total, weight = 0.0, 0
    for part in np.unique(of):
        rows = of == part
        if rows.sum() >= 10:
            total += tau(truth[rows], said[rows]) * int(rows.sum())
            weight += int(rows.sum())
    return total / weight if weight else float("nan")


def pairwise_accuracy(truth: Values, said: Values) -> float:
    """The share of pairs with unequal truth that are put in the right order; equal estimates count one half."""
    n = len(truth)
    pairs = n * (n - 1) / 2
    unequal_truth = pairs - _ties(truth)
    unequal_said = pairs - _ties(said)
    if not unequal_truth:
        return float("nan")
    balance = tau(truth, said) * float(np.sqrt(unequal_truth * unequal_said))
    return float(0.5 + 0.5 * balance / unequal_truth)


def _ties(values: Values) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1) / 2).sum())


def figures(truth: Values, said: Values, model: Values) -> dict[str, float]:
    """All of them for one set of pairs: ``truth`` and ``said`` are remaining tokens, ``model`` the served models."""
    truth = truth.astype(np.float64)
    error = said - truth
    spread = float(((truth - truth.mean()) ** 2).sum())
    return {
        "pairs": len(truth),
        "r2": 1.0 - float((error**2).sum()) / spread if spread else float("nan"),
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "bias": float(error.mean()),
        "tau": tau(truth, said),
        "tau_within": tau_within(truth, said, model),
        "pairwise": pairwise_accuracy(truth, said),
    }


def intervals(
    group: Values,
    statistics: dict[str, Callable[[Values], float]],
    *,
    samples: int = 200,
    seed: int = 0,
    level: float = 0.9,
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals by group: rows of one group are drawn together, or left out together.

    A statistic is given the rows drawn. All of them see the same draws, so differences of two may be among them."""
    drawn: dict[str, list[float]] = {name: [] for name in statistics}
    for sample in draws(group, samples, seed):
        for name, statistic in statistics.items():
            drawn[name].append(statistic(sample))
    return {name: edges(values, level) for name, values in drawn.items()}


def draws(group: Values, samples: int, seed: int) -> Iterator[Values]:
    """Rows, drawn by whole groups with replacement; always the same ones."""
    names, which = np.unique(group, return_inverse=True)
    order = np.argsort(which, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(which))[:-1])
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        yield np.concatenate([rows[at] for at in rng.integers(0, len(names), len(names))])


def edges(values: Sequence[float], level: float = 0.9) -> tuple[float, float]:
    """Between which the share ``level`` in the middle lies; of those that are numbers."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
