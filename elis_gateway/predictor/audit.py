"""How good were the estimates? Every finished job scores those it was given, beside what history would have said.

Knows: predictions, truths, Kendall's tau, when a difference is more than noise. Never: how an estimate is made.

Per served model the last jobs are remembered, two moments of each: its arrival, and one while it ran. Where the
predictor orders them worse than history, by more than twice the standard error of the difference (pairs share jobs, so
the error is that of a U-statistic, by job), history takes over for this model, until the predictor, which goes on being
scored, is no worse any more.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["EVERYBODY", "Audit", "Moment", "Score", "tau_difference"]

_log = logging.getLogger("elis_gateway.predictor")

EVERYBODY = "*"
"""The name under which all models together are scored."""
_JOBS = 200
_LEAST = 50
_EVERY = 32
_MODELS = 200
_ERRORS = 2.0


class Moment(NamedTuple):
    """What was said of a job's remaining tokens after ``attained``."""

    attained: int
    said: float
    low: float
    high: float
    """Four of five truths should lie between these."""
    history: float


class Score(NamedTuple):
    """The recent past of one served model."""

    model: str
    jobs: int
    mae: float
    """Mean absolute error, tokens."""
    bias: float
    """Mean of said - true, tokens."""
    coverage: float
    """Share of truths within the bounds that four of five should be within."""
    tau: float
    """Kendall's tau of what was said with the truth; 0.0 until there are enough jobs."""
    tau_history: float
    trusted: bool
    """False: history is used in its place."""


class _Row(NamedTuple):
    job: int
    said: float
    history: float
    true: float
    inside: bool


class _Record:
    """One model's recent jobs."""

    __slots__ = ("changes", "fresh", "jobs", "tau", "tau_history", "trusted")

    def __init__(self) -> None:
        self.jobs: deque[tuple[_Row, ...]] = deque(maxlen=_JOBS)
        self.changes = 0
        self.fresh = False
        """Jobs came that no tau has been worked out with."""
        self.tau = 0.0
        self.tau_history = 0.0
        self.trusted = True

    def add(self, rows: tuple[_Row, ...]) -> bool:
        """Whether it is time to compare."""
        self.jobs.append(rows)
        self.changes += 1
        self.fresh = len(self.jobs) >= _LEAST
        return self.fresh and not self.changes % _EVERY

    def score(self, model: str) -> Score:
        rows = [row for job in self.jobs for row in job]
        count = max(len(rows), 1)
        return Score(
            model,
            len(self.jobs),
            sum(abs(row.said - row.true) for row in rows) / count,
            sum(row.said - row.true for row in rows) / count,
            sum(row.inside for row in rows) / count,
            self.tau,
            self.tau_history,
            self.trusted,
        )


class Audit:
    """Scores by served model, and the verdict: is the predictor to be trusted?"""

    def __init__(self, *, gives_way: bool = True) -> None:
        """``gives_way``: whether history takes over where it is better; False: there is nothing but scores."""
        self._gives_way = gives_way
        self._records: OrderedDict[str, _Record] = OrderedDict({EVERYBODY: _Record()})
        self._number = 0

    def trusts(self, model: str) -> bool:
        """Whether the predictor's estimates may be used."""
        record = self._records.get(model)
        return record is None or record.trusted

    def learn(self, model: str, moments: Sequence[Moment], tokens: int) -> None:
        """A job ended by itself after ``tokens``."""
        made = [moment for moment in moments if moment.attained < tokens]
        if not made:
            return
        self._number += 1
        # Its arrival, and a moment that differs from job to job.
        chosen = [made[0], made[1 + self._number % (len(made) - 1)]] if len(made) > 1 else made
        rows = tuple(
            _Row(self._number, m.said, m.history, true := float(tokens - m.attained), m.low <= true <= m.high)
            for m in chosen
        )
        record = self._records.get(model)
        if record is None:
            record = self._records[model] = _Record()
            if len(self._records) > _MODELS + 1:
                self._records.popitem(last=False)
        self._records.move_to_end(model)
        self._records.move_to_end(EVERYBODY)
        if record.add(rows):
            self._compare(model, record)
        self._records[EVERYBODY].add(rows)

    def scores(self) -> Iterator[Score]:
        """Of every model, and of all together."""
        everybody = self._records[EVERYBODY]
        if everybody.fresh:
            # Nothing follows from it but a number to look at: worked out when somebody looks.
            everybody.tau, everybody.tau_history, _ = _taus(everybody)
            everybody.fresh = False
        for model, record in self._records.items():
            if record.jobs:
                yield record.score(model)

    def _compare(self, model: str, record: _Record) -> None:
        record.tau, record.tau_history, error = _taus(record)
        ahead = record.tau - record.tau_history
        if not self._gives_way:
            return
        if record.trusted and ahead < -_ERRORS * error:
            record.trusted = False
            _log.warning(
                "%s: estimates order recent answers worse than history does (tau %.2f, history %.2f): using history",
                model, record.tau, record.tau_history,
            )  # fmt: skip
        elif not record.trusted and ahead >= 0.0:
            record.trusted = True
            _log.warning(
                "%s: estimates order recent answers as well as history again (tau %.2f, history %.2f): using them",
                model, record.tau, record.tau_history,
            )  # fmt: skip


def _taus(record: _Record) -> tuple[float, float, float]:
    rows = [row for job in record.jobs for row in job]
    said, history, true, job = (np.array([row[i] for row in rows]) for i in (1, 2, 3, 0))
    return tau_difference(said, history, true, job)


def tau_difference(
    one: npt.NDArray[np.float64],
    other: npt.NDArray[np.float64],
    true: npt.NDArray[np.float64],
    job: npt.NDArray[np.int64],
) -> tuple[float, float, float]:
    """Kendall's tau-b of two predictions with the truth, and the standard error of their difference.

    ``job``: rows of one job are not independent of each other. For n rows about 4 n² nanoseconds.
    """
    truth, pairs = _signs(true)
    taus, shares = [], []
    for said in (one, other):
        signs, ours = _signs(said)
        agree = np.einsum("ij,ij->i", signs, truth).astype(np.float64)
        scale = sqrt(ours * pairs)
        taus.append(float(agree.sum()) / scale if scale else 0.0)
        shares.append(agree / scale if scale else agree)
    # Each row's part in the difference, summed by job: twice their spread is that of the difference.
    _, places = np.unique(job, return_inverse=True)
    parts = np.bincount(places, weights=shares[0] - shares[1])
    count = len(parts)
    error = 2.0 * float(parts.std(ddof=1)) * sqrt(count) if count > 1 else float("inf")
    return taus[0], taus[1], error


def _signs(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float32], float]:
    """Of every pair, which is larger; and how many pairs differ, counted both ways."""
    single = values.astype(np.float32)
    above = single[:, None] > single
    signs = (above.view(np.int8) - above.T.view(np.int8)).astype(np.float32)
    return signs, 2.0 * np.count_nonzero(above)
