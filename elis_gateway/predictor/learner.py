"""What finished jobs teach: from what is known of a job at one moment to a distribution of what remains of it.

Knows: numbers, numpy. Never: text, models' files, onnxruntime, asyncio, the scheduler.

Three things are learned from every finished job, for all of them, for its model and for its application of that model,
each leaning on the one above, so that a new application begins as its model's average and soon has its own mind:

*History*: the distribution of answer lengths (``predictor.history``), whose median of what remains is the anchor.
*A line*: ridge regression of log(remaining tokens / origin) on the shipped model's prediction, the anchor, the text's
counters and the projection of the prompt's embedding. Coefficients lean on those of the level above; the penalty of
each is in units of its own variance, so nobody has to scale anything, and that of the constant is for what the level's
mean answer is off by.
*The spread*: how far the truth lay from the line, as a ratio, by tokens attained: Kaplan-Meier hazards over log
ratios. Scaled by the line's prediction they are the distribution: its mean, its median, its Gittins index.

The *origin* is what is said before anything is known of how right it is: the shipped model's prediction, and of the
anchor the more, the more of the application's own answers it rests on. All that is learned says how far to go from
there, and how far it may be followed is measured on answers that it had not learned from: little evidence, or evidence
of nothing, leaves estimates where they were.

A job that was cancelled or cut off is a lower bound: for the spread as such, for the line as the expectation given
that bound (Buckley and James 1979). An absurd length moves the line no further than one that is off by e^2; of one
application, levels above take no more than of all others together (``history.Share``), and applications that hardly
ever asked count there as one. Old answers fade over ``horizon``. Memory is constant: about 200 KB a model and
application at 137 inputs; those that hardly ever asked are forgotten first (``shelf``).
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from math import exp, log, sqrt
from pathlib import Path
from threading import Lock
from time import sleep
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from elis_gateway.predictor.base import View
from elis_gateway.predictor.history import TURN, History, Share, set_aside
from elis_gateway.predictor.shelf import Shelf
from elis_gateway.predictor.spread import CLIP, RENEW, UNIT, Spread, ceiling, within

__all__ = ["Learner", "Prediction", "Sight"]

_log = logging.getLogger(__name__)

_VERSION = 3

Vector = npt.NDArray[np.float64]
Inputs = npt.NDArray[np.float32]

_SEEN = 3.0
"""Standard deviations from the mean, as a level has seen them, within which it takes an input seriously."""
_RARE = 0.05
"""Least variance that a counter is taken to have: one that was hardly ever anything but zero must not say much."""
_ROWS = 16
"""Moments of one job that teach, at most."""
_FIXED = 7
"""Inputs that are always there: 1; the shipped prediction; the anchor beside it, as far as it rests on answers of the
application's own, early in the answer and later, and as far as it does not; and what the first estimate leaves beside
the origin, early and later."""
_FADES = 150.0
"""Tokens after which early is over, by a factor of e."""
_DAMPING = 0.5
"""Share of the first estimate in the index of later ones. Orders follow the index, and one that follows every new guess
interrupts for nothing: at even odds the mean completion time is worse than that of never interrupting."""
_LEAST_LEFT = 25.0
"""Tokens that the first estimate leaves at least."""
_ANCHOR = log(200.0)
"""Where the anchor's input is zero."""
_EARLY, _LATER = 0.6, 0.3
"""Believed weight of the anchor against the shipped prediction, which soon has a text to read, where the anchor rests
on the application's own answers alone."""
_OWN = 8.0
"""Answers of its own at which an application's anchor is half its own."""
_PENALTY_FIXED = (40.0, *(50.0,) * 6)
_PENALTY_FEATURES = 200.0
_PENALTY_REDUCED = 300.0
"""Rows at which data and belief weigh the same, for an input of variance 1. Chosen on validation prompts."""
_WAITING = 64
"""Moments that wait for the matrix product that takes them all, at most."""
_STEPS = (2.0, 10.0, 3.0)
"""Penalties of all, model and application relative to these: levels below lean on what has seen the same answers."""


class Sight(NamedTuple):
    """What is known of a job at one moment. Lengths are tokens of the served model."""

    attained: int
    allowed: int | None
    shipped: float | None = None
    """Natural log of the remaining tokens as the shipped model predicts them; None: it did not."""
    features: Sequence[float] | Inputs | None = None
    """Counters of prompt and answer so far."""
    reduced: Vector | None = None
    """The prompt's embedding, projected; None: not there (yet)."""
    first: float | None = None
    """Length of the whole answer, by the first estimate made of this job (``Prediction.whole``)."""


class Prediction(NamedTuple):
    """The distribution of what remains, in tokens, cut off at what is allowed; and what it was made of."""

    mean: float
    gittins: float
    median: float
    low: float
    """One in ten is shorter."""
    high: float
    """One in ten is longer."""
    scale: float
    """The line's prediction, uncut; the spread is relative to it."""
    attained: int
    anchor: float
    """Log of history's median of what remains."""
    origin: float
    """Log of what would have been said had nothing been learned but history."""
    inputs: Inputs
    kind: int
    """Which spread."""

    @property
    def whole(self) -> float:
        """Length of the whole answer."""
        return self.attained + self.scale


class Learner:
    """Learns from what it predicted. One per gateway; not thread-safe."""

    def __init__(
        self,
        features: int,
        reduced: int,
        *,
        layout: str = "",
        history: History | None = None,
        horizon: float = 1000.0,
        max_apps: int = 256,
    ) -> None:
        """``features``, ``reduced``: how many there are; ``layout``: a name of what they mean. ``max_apps``: (model,
        application) pairs with a line and spreads of their own."""
        self.history = history if history is not None else History(horizon=horizon)
        self._growth = 1.0 + 1.0 / horizon
        self._max_apps = max_apps
        self._lock = Lock()
        """Saving goes on in a thread of its own; it copies one level at a time, and learning waits for that."""
        self._unread = False
        """There is a file, and it could not be read."""
        self._shape(features, reduced, layout)

    def _shape(self, features: int, reduced: int, layout: str) -> None:
        self.features, self.reduced, self.layout = features, reduced, layout
        self.inputs = _FIXED + features + reduced
        self._penalty: Vector = np.concatenate(
            [_PENALTY_FIXED, np.full(features, _PENALTY_FEATURES), np.full(reduced, _PENALTY_REDUCED)]
        )
        self.clear()

    def clear(self) -> None:
        """Forget all but the history."""
        self._all = _Level(None, self.inputs, 0)
        self._models: Shelf[str, _Level] = Shelf(self._max_apps)
        self._apps: Shelf[tuple[str, str], _Level] = Shelf(self._max_apps)

    # ---- asked --------------------------------------------------------------------------------------------------

    def predict(self, model: str, app: str, sight: Sight) -> Prediction:
        """What remains of a job. Tens of microseconds."""
        level = self._apps.get((model, app)) or self._models.get(model) or self._all
        anchor = log(self.history.median(model, app, sight.attained))
        origin, inputs = self._vector(sight, anchor, self.history.own(model, app))
        kind = _kind(sight)
        spread = level.spreads[kind]
        scale = exp(min(max(origin + spread.place(level.line(inputs)), 0.0), 13.0))
        mean, index, median, low, high = spread.table()(scale, sight.allowed)
        if sight.first is not None and sight.attained:
            # Half of the index is the first estimate's, counted down.
            left = max(sight.first - sight.attained, _LEAST_LEFT) * mean / scale
            index = within(index * (left / mean) ** _DAMPING, ceiling(sight.allowed))
        return Prediction(mean, index, median, low, high, scale, sight.attained, anchor, origin, inputs, kind)

    def _vector(self, sight: Sight, anchor: float, seen: float) -> tuple[float, Inputs]:
        """The origin and the line's inputs; ``seen``: answers of its own that the anchor rests on."""
        inputs = np.zeros(self.inputs, dtype=np.float32)
        early = exp(-sight.attained / _FADES)
        shipped = anchor if sight.shipped is None else sight.shipped
        beside = min(max(anchor - shipped, -3.0), 3.0)
        own = beside * seen / (seen + _OWN)
        origin = shipped + (_EARLY * early + _LATER * (1.0 - early)) * own
        left = 0.0
        if sight.first is not None and sight.attained:
            left = log(max(sight.first - sight.attained, _LEAST_LEFT)) - origin
        late = 1.0 - early
        inputs[:_FIXED] = 1.0, shipped - _ANCHOR, own * early, own * late, beside - own, left * early, left * late
        if sight.features is not None and self.features:
            inputs[_FIXED : _FIXED + self.features] = sight.features
        if sight.reduced is not None and self.reduced:
            inputs[_FIXED + self.features :] = sight.reduced
        return origin, inputs

    # ---- across restarts and models ------------------------------------------------------------------------------

    def fit(self, features: int, reduced: int, layout: str) -> None:
        """Another shipped model. What was learned stays where ``layout``, the name of what the inputs mean, does."""
        if (features, reduced, layout) != (self.features, self.reduced, self.layout):
            self._shape(features, reduced, layout)

    def save(self, path: Path, more: Mapping[str, Any] | None = None) -> None:
        """Write everything to one file, at once or not at all; ``more``: what JSON can hold, to be kept beside it.
        Raises OSError."""
        with self._lock:
            models = {key: level for key in self._models if (level := self._models.get(key)) is not None}
            apps = {key: level for key in self._apps if (level := self._apps.get(key)) is not None}
            layout = self.layout
        kept = [self._numbers(level) for level in (self._all, *models.values(), *apps.values())]
        names = {
            "version": _VERSION,
            "more": more or {},
            "layout": layout,
            "history": self.history.dump(),
            "models": list(models),
            "apps": [list(key) for key in apps],
        }
        arrays = {name: np.stack([numbers[name] for numbers in kept]) for name in kept[0]}
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            # In pieces: one call would keep the interpreter to itself for a tenth of a second.
            said = "".join(json.JSONEncoder().iterencode(names)).encode()
            np.savez(file, names=np.frombuffer(said, dtype=np.uint8), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        if self._unread:
            set_aside(path)
            self._unread = False
        temporary.replace(path)

    def _numbers(self, level: _Level) -> dict[str, npt.NDArray[Any]]:
        sleep(TURN)
        with self._lock:
            return level.numbers()

    def load(self, path: Path) -> dict[str, Any]:
        """Take up what was saved, and give back what was kept beside it. A file that cannot be read costs what was
        learned, not the service; of one that was saved with another model, the history is taken."""
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                names = json.loads(file["names"].tobytes())
                if names["version"] not in (2, _VERSION):
                    raise ValueError(f"version {names['version']!r}, expected {_VERSION}")
                self.history.restore(names["history"])
                if (names["version"], names["layout"]) == (_VERSION, self.layout):
                    self._restore(names, file)
                else:
                    _log.info("learned state %s: made with another model or version; its history is kept", path)
                return dict(names["more"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            _log.warning(
                "learned state %s cannot be read (%s: %s): starting without it", path, type(error).__name__, error
            )
            self._unread = True
            self.history.forget()
            self.clear()
            return {}

    def _restore(self, names: dict[str, Any], file: Mapping[str, Any]) -> None:
        arrays = {name: file[name] for name in self._all.numbers()}
        models = [str(model) for model in names["models"]]
        apps = [(str(model), str(app)) for model, app in names["apps"]]
        if any(len(array) != 1 + len(models) + len(apps) for array in arrays.values()):
            raise ValueError("its parts do not fit together")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("not all of its numbers are finite")
        self.clear()
        for at, key in enumerate([None, *models, *apps]):
            numbers = {name: array[at] for name, array in arrays.items()}
            level = self._all
            if isinstance(key, str):
                level = self._model(key, int(numbers["counts"][1]))
            elif isinstance(key, tuple):
                level = self._app(*key, int(numbers["counts"][1]))
            level.restore(numbers)
            level.solve(self._penalty, self.reduced)

    # ---- told ---------------------------------------------------------------------------------------------------

    def learn(self, model: str, app: str, made: Sequence[Prediction], tokens: int, *, complete: bool) -> None:
        """A job ended after ``tokens``; ``made``: what was predicted of it, by tokens attained. ``complete``: the model
        stopped by itself; False: ``tokens`` is a lower bound."""
        if tokens < 1:
            return
        self.history.learn(View("", model, app, "", "", tokens, None), complete=complete)
        made = _chosen([each for each in made if each.attained < tokens or not complete])
        if not made:
            return
        rows = np.array([each.inputs for each in made])
        trues = [(log(max(tokens - each.attained, 0.5)) - each.origin, each.kind) for each in made]
        with self._lock:
            for level, weight in self._levels(model, app):
                level.learn(rows, trues, complete, weight, self._growth)
                if level.stale:
                    level.solve(self._penalty, self.reduced)

    def _levels(self, model: str, app: str) -> list[tuple[_Level, float]]:
        """All, the model, the application, and what one answer of this application counts there."""
        everybody, fades = self._all, 1.0 / self._growth
        at_model, at_app = self._model(model), self._app(model, app)
        new = self._apps.stranger((model, app))
        to_all = (everybody.strangers if new else at_app.to_all).take(everybody.count, everybody.seen, fades)
        to_model = (at_model.strangers if new else at_app.to_model).take(at_model.count, at_model.seen, fades)
        return [(everybody, to_all), (at_model, to_model), (at_app, 1.0)]

    def _model(self, model: str, times: int = 1) -> _Level:
        return self._models.use(model, lambda: _Level(self._all, self.inputs, 1), times)

    def _app(self, model: str, app: str, times: int = 1) -> _Level:
        parent = self._models.get(model) or self._all
        return self._apps.use((model, app), lambda: _Level(parent, self.inputs, 2), times)


def _kind(sight: Sight) -> int:
    """Which spread: by tokens attained, with and without the prompt's embedding."""
    return 2 * bisect_left(_AGES, sight.attained) + (sight.reduced is not None)


_AGES = (0, 99, 199, 399)
_KINDS = 2 * (len(_AGES) + 1)

_True = tuple[float, int]
"""Log of (what remained / origin), and which spread."""


def _chosen(made: list[Prediction]) -> list[Prediction]:
    """At most ``_ROWS`` of them: the first ones, which most jobs have, then ever fewer."""
    if len(made) <= _ROWS:
        return made
    half = _ROWS // 2
    step = (len(made) / half) ** (1.0 / (_ROWS - half))
    later = {min(int(half * step**i), len(made) - 1) for i in range(_ROWS - half)}
    return made[:half] + [made[i] for i in sorted(later) if i >= half]


class _Level:
    """What is known of all, of a model or of an application: a line and its spreads.

    Old answers fade because newer ones count more: sums are kept in units that grow, and nothing is touched to decay.
    Moments wait, a few jobs' worth, until one matrix product takes them all.
    """

    __slots__ = (
        "coefficients", "count", "depth", "due", "high", "low", "moments", "parent", "seen", "spreads", "strangers",
        "targets", "to_all", "to_model", "unit", "waiting", "weights", "with_target",
    )  # fmt: skip

    def __init__(self, parent: _Level | None, inputs: int, depth: int) -> None:
        self.parent, self.depth = parent, depth
        self.moments = np.zeros((inputs, inputs))
        self.with_target = np.zeros(inputs)
        self.unit = 1.0
        """What one answer counts now, in ``moments`` and ``with_target``."""
        self.waiting: list[Inputs] = []
        """Inputs that are not in the moments yet, and with them what each counts and what was true."""
        self.weights: list[float] = []
        self.targets: list[float] = []
        self.seen = 0.0
        """Answers, faded."""
        self.count = 0
        """Answers since the beginning."""
        self.due = 1
        """``count`` at which to solve again."""
        self.coefficients: Inputs = np.zeros(inputs, dtype=np.float32) if parent is None else parent.coefficients
        self.low: Inputs = np.full(inputs, -np.inf, dtype=np.float32) if parent is None else parent.low
        self.high: Inputs = np.full(inputs, np.inf, dtype=np.float32) if parent is None else parent.high
        self.spreads: list[Spread] = [
            Spread(None if parent is None else parent.spreads[kind]) for kind in range(_KINDS)
        ]
        self.to_all, self.to_model = Share(), Share()
        self.strangers = Share()
        """What applications gave that are hardly known: together they count here as one."""

    def lines(self, inputs: Inputs) -> list[float]:
        """Log of (what remains / origin) for every row, within bounds."""
        seen = np.minimum(np.maximum(inputs, self.low), self.high) @ self.coefficients
        lines: list[float] = np.minimum(np.maximum(seen, -CLIP), CLIP).tolist()
        return lines

    def line(self, inputs: Inputs) -> float:
        """The same for one."""
        seen = np.minimum(np.maximum(inputs, self.low), self.high)
        return min(max(float(seen.dot(self.coefficients)), -CLIP), CLIP)

    @property
    def stale(self) -> bool:
        return self.count >= self.due

    def learn(self, rows: Inputs, trues: Sequence[_True], complete: bool, weight: float, growth: float) -> None:
        """``rows``: the inputs of the job's predictions; ``weight``: what this answer counts here."""
        self.count += 1
        self.seen = self.seen / growth + weight
        self.unit *= growth
        # Moments of one answer are not independent of each other.
        share = weight / sqrt(len(trues))
        spreads = self.spreads
        for (true, kind), line in zip(trues, self.lines(rows), strict=True):
            target, counts = spreads[kind].learn(line, true, complete, weight, share)
            self.weights.append(counts * self.unit)
            self.targets.append(target)
        self.waiting.append(rows)
        if len(self.weights) >= _WAITING:
            self.gather()

    def gather(self) -> None:
        """Take what waits into the moments."""
        if self.waiting:
            inputs = np.concatenate(self.waiting)
            # Single precision: rounding is nothing beside what an answer's length owes to chance.
            weighted = (inputs * np.array(self.weights, dtype=np.float32)[:, None]).T
            self.moments += weighted @ inputs
            self.with_target += weighted @ np.array(self.targets, dtype=np.float32)
            for waiting in (self.waiting, self.weights, self.targets):
                waiting.clear()
        if self.unit > UNIT:
            self.moments /= self.unit
            self.with_target /= self.unit
            self.unit = 1.0

    def numbers(self) -> dict[str, npt.NDArray[Any]]:
        """What is to be kept of it; the upper half of the moments is all of them."""
        self.gather()
        return {
            "moments": (self.moments[_upper(len(self.moments))] / self.unit).astype(np.float32),
            "with_target": self.with_target / self.unit,
            "spreads": np.array([spread.counts() for spread in self.spreads], dtype=np.float32),
            "slopes": np.array([spread.slopes() for spread in self.spreads]),
            "counts": np.array([self.seen, self.count, *(n for s in self._shares() for n in (s.given, s.at))]),
        }

    def restore(self, numbers: dict[str, npt.NDArray[Any]]) -> None:
        """Take up what ``numbers`` gave. Raises ValueError for arrays of another shape."""
        upper = _upper(len(self.moments))
        self.moments[upper] = numbers["moments"]
        self.moments.T[upper] = numbers["moments"]
        self.with_target[:] = numbers["with_target"]
        for spread, counts, slopes in zip(self.spreads, numbers["spreads"], numbers["slopes"], strict=True):
            spread.restore(counts, slopes)
        seen, count, *shares = (float(number) for number in numbers["counts"])
        self.seen, self.count = seen, int(count)
        for share, given, at in zip(self._shares(), shares[::2], shares[1::2], strict=True):
            share.given, share.at = given, int(at)

    def _shares(self) -> tuple[Share, ...]:
        return self.to_all, self.to_model, self.strangers

    def solve(self, penalty: Vector, reduced: int) -> None:
        """The line anew, from what was gathered and from the level above. The last ``reduced`` inputs, principal
        components, share one variance: the smaller ones are to count less."""
        self.due = self.count + 1 + int(RENEW * min(self.count, 1000))
        self.gather()
        total = self.moments[0, 0]
        if total <= 0.0:
            return
        mean = self.moments[0] / total
        variance = np.maximum(self.moments.diagonal() / total - mean**2, 0.0)
        reach = _SEEN * np.sqrt(variance)
        reach[:_FIXED] = np.inf
        self.low, self.high = (mean - reach).astype(np.float32), (mean + reach).astype(np.float32)
        variance[:_FIXED] = 1.0
        counters = len(variance) - reduced
        variance[_FIXED:counters] = np.maximum(variance[_FIXED:counters], _RARE)
        if reduced:
            variance[counters:] = max(variance[counters:].mean(), 1e-5)
        lean = penalty * variance * (_STEPS[self.depth] * self.unit)
        # Around the mean. Inputs that hardly vary here must not share in what all answers here have in common, as they
        # could for next to nothing: that is the constant's, and has its price.
        left = self.moments - np.outer(mean, self.moments[0])
        right = self.with_target - mean * self.with_target[0]
        left[0, 0], right[0] = total, self.with_target[0]
        left.flat[:: len(left) + 1] += lean
        if self.parent is not None:
            believed = self.parent.coefficients.astype(np.float64)
            believed[0] = believed @ mean
            right += lean * believed
        found = np.linalg.solve(left, right)
        found[0] -= found[1:] @ mean[1:]
        self.coefficients = found.astype(np.float32)


@cache
def _upper(size: int) -> tuple[npt.NDArray[np.intp], ...]:
    return np.triu_indices(size)
