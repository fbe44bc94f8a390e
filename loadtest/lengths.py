"""How long answers are: described distributions of tokens. Pure and seeded. Never: prompts, arrivals."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import exp, log

from loadtest.spec import Spec, parse

__all__ = ["KINDS", "draw"]


def _constant(rng: random.Random, spec: Spec) -> float:
    return spec.number("tokens", 200.0)


def _uniform(rng: random.Random, spec: Spec) -> float:
    return rng.uniform(spec.number("min", 1.0), spec.number("max"))


def _exponential(rng: random.Random, spec: Spec) -> float:
    return rng.expovariate(1 / spec.number("mean", 200.0))


def _lognormal(rng: random.Random, spec: Spec) -> float:
    """By its median, or by its mean; sigma is that of the logarithm."""
    sigma = spec.number("sigma", 1.0)
    middle = log(spec.number("mean")) - sigma**2 / 2 if "mean" in spec.options else log(spec.number("median", 150.0))
    return exp(rng.gauss(middle, sigma))


def _pareto(rng: random.Random, spec: Spec) -> float:
    """Heavy-tailed: P(longer than x) = (min / x)^alpha. With alpha of 2 or less the variance has no bound."""
    return spec.number("min", 40.0) * rng.paretovariate(spec.number("alpha", 1.5))


def _two(rng: random.Random, spec: Spec) -> float:
    """``short`` tokens, and a ``share`` of ``long``: the case order pays most for."""
    return spec.number("long", 800.0) if rng.random() < spec.number("share", 0.2) else spec.number("short", 30.0)


KINDS: dict[str, tuple[Callable[[random.Random, Spec], float], tuple[str, ...]]] = {
    "constant": (_constant, ("tokens",)),
    "uniform": (_uniform, ("min", "max")),
    "exponential": (_exponential, ("mean",)),
    "lognormal": (_lognormal, ("median", "mean", "sigma")),
    "pareto": (_pareto, ("min", "alpha")),
    "two": (_two, ("short", "long", "share")),
}
"""Name -> (one draw, its options). ``azure``, ``trace`` and ``own`` are recorded lengths and live in ``make``."""


def draw(text: str, n: int, rng: random.Random, *, longest: int) -> list[int]:
    """``n`` lengths of 1 to ``longest`` tokens; a longer draw counts as ``longest``, as under a limit.

    Raises ConfigError for a description that is not understood.
    """
    spec = parse(text, KINDS, "lengths")
    one, known = KINDS[spec.name]
    spec.only(*known)
    return [min(max(round(one(rng, spec)), 1), longest) for _ in range(n)]
