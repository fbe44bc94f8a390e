"""What is known of the lengths in a study, by short names, a fresh predictor per run.

``noisyS``: off by a factor of e^±S, drawn once per job and counted down. ``noisyS+floor``: the same, and a job that
outlives its estimate is taken to have half of what it made still to go. ``noisyS+calibrated``: what such an estimate
means, seen as many earlier answers of the same work. ``shuffled``: perfect lengths of other jobs. ``refiningS``: drawn
anew at every window, sigma falling by a quarter each time. ``firstS``: the first of those alone, counted down.
``lateS``: noisyS that takes its time (the cell's latency). ``history``: learned from nothing while serving;
``history-app``: knows the application; ``-first``: only the first estimate, counted down.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from math import exp, log

from elis_gateway.core.job import Estimate
from elis_gateway.predictor.base import Predictor, View, clamp
from elis_gateway.predictor.baselines import Instant, NoisyOracle
from elis_gateway.predictor.gittins import BINS, EDGES, LengthTable, bin_of
from elis_gateway.predictor.history import History
from elis_gateway.sim.simulator import SimJob

__all__ = ["predictor"]


def predictor(name: str, jobs: Sequence[SimJob], seed: int, past: Sequence[int] = ()) -> Predictor | None:
    """``past``: lengths of earlier answers, where knowledge rests on some. Raises ValueError for an unknown name."""
    lengths = {job.id: job.output_tokens for job in jobs}
    if name == "none":
        return None
    if name == "shuffled":
        dealt = list(lengths.values())
        random.Random(f"shuffled {seed}").shuffle(dealt)
        return NoisyOracle(dict(zip(lengths, dealt, strict=True)), 0.0)
    if name.startswith("history"):
        return Told(History(), lengths, first="-first" in name, app="-app" in name)
    if name.endswith("+calibrated"):
        sigma = float(name.removeprefix("noisy").removesuffix("+calibrated"))
        return Calibrated(NoisyOracle(lengths, sigma, seed=seed), sigma, past)
    for start, make in (("noisy", _noisy), ("refining", _refining), ("first", _first), ("late", _late)):
        if name.startswith(start):
            return make(float(name[len(start) :].removesuffix("+floor")), lengths, seed, name.endswith("+floor"))
    raise ValueError(f"knowledge {name!r}")


def _noisy(sigma: float, lengths: dict[str, int], seed: int, floor: bool) -> Predictor:
    oracle = NoisyOracle(lengths, sigma, seed=seed)
    return Floored(oracle) if floor else oracle


def _refining(sigma: float, lengths: dict[str, int], seed: int, floor: bool) -> Predictor:
    return Told(Refining(lengths, sigma, seed), lengths)


def _first(sigma: float, lengths: dict[str, int], seed: int, floor: bool) -> Predictor:
    return Told(Refining(lengths, sigma, seed), lengths, first=True)


def _late(sigma: float, lengths: dict[str, int], seed: int, floor: bool) -> Predictor:
    return Late(NoisyOracle(lengths, sigma, seed=seed))


class Floored(Instant):
    """A job that outlived its estimate is no longer taken to end with the next token."""

    def __init__(self, inner: NoisyOracle) -> None:
        self._inner = inner

    def instant(self, view: View) -> Estimate | None:
        said = self._inner.instant(view)
        assert said is not None
        return Estimate(max(said.remaining, 0.5 * view.attained), None, said.source) if said.remaining <= 1 else said


class Calibrated(Instant):
    """What an estimate means, seen the lengths of earlier answers and how far estimates were off: a distribution, so
    that an index is known, and a job that outlives its estimate has more to go the longer it lasts."""

    def __init__(self, inner: NoisyOracle, sigma: float, past: Sequence[int]) -> None:
        self._inner, self._sigma = inner, sigma
        self._seen = Counter(map(bin_of, (tokens - 1 for tokens in past)))
        self._tables: dict[str, LengthTable] = {}

    def instant(self, view: View) -> Estimate | None:
        table = self._tables.get(view.job_id)
        if table is None:
            table = self._tables[view.job_id] = self._meant(view)
        mean, index = table(view.attained, view.allowed)
        return Estimate(mean, index, "calibrated")

    def _meant(self, view: View) -> LengthTable:
        """Bayes: how often each length came, times how likely it would have led to this estimate."""
        first = self._inner.instant(view._replace(attained=0, allowed=None))
        assert first is not None
        weights = array("d", bytes(8 * BINS))
        for number, count in self._seen.items():
            off = log(first.remaining / ((EDGES[number] + EDGES[number + 1] + 1) / 2)) / self._sigma
            weights[number] = count * exp(-off * off / 2)
        beyond, hazards = 0.0, array("d", bytes(8 * BINS))
        for number in range(BINS - 1, -1, -1):
            beyond += weights[number]
            hazards[number] = weights[number] / beyond if beyond > 0 else 1.0
        return LengthTable(hazards)


class Refining(Instant):
    """What remains, off by e^±(sigma 0.75^windows), drawn anew each time: the text so far tells more and more."""

    def __init__(self, lengths: dict[str, int], sigma: float, seed: int) -> None:
        self._lengths, self._sigma, self._seed = lengths, sigma, seed

    def instant(self, view: View) -> Estimate | None:
        window = view.attained // 50
        draw = random.Random(f"{self._seed} {view.job_id} {window}").gauss(0.0, 1.0)
        left = self._lengths[view.job_id] - view.attained
        return Estimate(clamp(left * exp(self._sigma * 0.75**window * draw), view.allowed), None, "refining")


class Late(Instant):
    """An oracle that refines: nothing at once, the estimate when the simulator lets it answer."""

    refines = True

    def __init__(self, inner: NoisyOracle) -> None:
        self._inner = inner

    def instant(self, view: View) -> Estimate | None:
        return None

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        return [self._inner.instant(view) for view in views]


class Told(Instant):
    """Another predictor, with its errors noted; ``first``: only its first estimate of a job, counted down from there.
    ``app`` False: it is not told the application."""

    def __init__(self, inner: Predictor, lengths: dict[str, int], *, first: bool = False, app: bool = True) -> None:
        self._inner, self._lengths, self._first, self._app = inner, lengths, first, app
        self._guess: dict[str, Estimate] = {}
        self._error = 0.0
        self._count = 0

    def instant(self, view: View) -> Estimate | None:
        if not self._app:
            view = view._replace(app="")
        said = self._guess.get(view.job_id) if self._first else None
        if said is None:
            said = self._inner.instant(view)
            if said is None:
                return None
            self._guess[view.job_id] = said
        else:
            said = Estimate(clamp(said.remaining - view.attained, view.allowed), None, said.source)
        self._error += abs(said.remaining - (self._lengths[view.job_id] - view.attained))
        self._count += 1
        return said

    def learn(self, view: View, *, complete: bool) -> None:
        self._inner.learn(view if self._app else view._replace(app=""), complete=complete)

    def told(self) -> dict[str, float]:
        return {"mae": self._error / max(self._count, 1)}
