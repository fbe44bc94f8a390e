"""The learner's mathematics, as one would write it down: what fades is multiplied, every line is solved and every table
made anew whenever it is looked at. Slow; ``test_learner`` holds the real one against it."""

from __future__ import annotations

from math import erfc, exp, log, sqrt

import numpy as np

from elis_gateway.predictor import learner as real
from elis_gateway.predictor import spread as ratios
from elis_gateway.predictor.base import View
from elis_gateway.predictor.history import History
from elis_gateway.predictor.learner import Sight

RATIOS = np.exp(np.linspace(ratios._LOW, ratios._HIGH, ratios._BINS + 1))


class Plain:
    """``predict`` gives (mean, median, scale) of what remains."""

    def __init__(self, features: int, reduced: int, horizon: float = 1000.0) -> None:
        self.history = History(horizon=horizon)
        self.vectors = real.Learner(features, reduced)
        self.penalty, self.reduced, self.decay = self.vectors._penalty, reduced, 1.0 - 1.0 / (horizon + 1.0)
        self.levels: dict[object, Level] = {None: Level(None, self, 0)}

    def chain(self, model: str, app: str) -> list[Level]:
        every = self.levels[None]
        of_model = self.levels.setdefault(model, Level(every, self, 1))
        return [every, of_model, self.levels.setdefault((model, app), Level(of_model, self, 2))]

    def see(self, model: str, app: str, sight: Sight) -> tuple[np.ndarray, float, int, int]:
        anchor = log(self.history.median(model, app, sight.attained))
        origin, inputs = self.vectors._vector(sight, anchor, self.history.own(model, app))
        return inputs.astype(float), origin, real._kind(sight), sight.attained

    def predict(self, model: str, app: str, sight: Sight) -> tuple[float, float, float]:
        level = self.levels.get((model, app)) or self.levels.get(model) or self.levels[None]
        inputs, origin, kind, _ = self.see(model, app, sight)
        spread = level.spreads[kind]
        slope, shift = spread.slant()
        scale = exp(min(max(origin + shift + slope * level.line(inputs), 0.0), 13.0))
        survival = spread.survival()
        ends = survival[:-1] - survival[1:]
        mean = RATIOS[0] + float(np.sum(np.diff(RATIOS) * (survival[1:] + 0.5 * ends)))
        median = RATIOS[int(np.argmax(survival <= 0.5))]
        return max(mean * scale, 1.0), max(float(median) * scale, 1.0), scale

    def learn(
        self, model: str, app: str, seen: list[tuple[np.ndarray, float, int, int]], tokens: int, complete: bool
    ) -> None:
        self.history.learn(View("", model, app, "", "", tokens, None), complete=complete)
        for level in self.chain(model, app):
            level.learn(seen, tokens, complete)


class Level:
    def __init__(self, parent: Level | None, whole: Plain, depth: int) -> None:
        self.parent, self.whole, self.depth = parent, whole, depth
        size = len(whole.penalty)
        self.moments, self.with_target = np.zeros((size, size)), np.zeros(size)
        self.coefficients = np.zeros(size) if parent is None else parent.coefficients
        self.low, self.high = (
            (np.full(size, -np.inf), np.full(size, np.inf)) if parent is None else (parent.low, parent.high)
        )
        self.spreads = [Spread(parent.spreads[kind] if parent else None) for kind in range(real._KINDS)]

    def line(self, inputs: np.ndarray) -> float:
        return float(np.clip(np.clip(inputs, self.low, self.high) @ self.coefficients, -2.0, 2.0))

    def learn(self, seen: list[tuple[np.ndarray, float, int, int]], tokens: int, complete: bool) -> None:
        self.moments *= self.whole.decay
        self.with_target *= self.whole.decay
        for inputs, origin, kind, attained in seen:
            spread, line, weight = self.spreads[kind], self.line(inputs), 1.0 / sqrt(len(seen))
            slope, shift = spread.slant()
            placed = shift + slope * line
            bound = off = log(max(tokens - attained, 0.5)) - origin - placed
            if not complete:
                off, sure = spread.beyond(bound)
                weight *= sure
            target = placed + min(max(off, -2.0), 2.0)
            spread.learn(bound, complete)
            spread.sums = spread.sums / ratios._GROWTH + weight * np.array(
                (1.0, line, target, line * line, line * target)
            )
            self.moments += weight * np.outer(inputs, inputs)
            self.with_target += weight * target * inputs
        self.solve()

    def solve(self) -> None:
        total, fixed = self.moments[0, 0], real._FIXED
        mean = self.moments[0] / total
        variance = np.maximum(self.moments.diagonal() / total - mean**2, 0.0)
        reach = 3.0 * np.sqrt(variance)
        reach[:fixed] = np.inf
        self.low, self.high = mean - reach, mean + reach
        counters = len(variance) - self.whole.reduced
        variance[:fixed] = 1.0
        variance[fixed:counters] = np.maximum(variance[fixed:counters], real._RARE)
        variance[counters:] = max(variance[counters:].mean(), 1e-5)
        lean = self.whole.penalty * variance * real._STEPS[self.depth]
        believed = self.parent.coefficients.copy() if self.parent else np.zeros(len(mean))
        believed[0] += believed[1:] @ mean[1:]
        # The same line in inputs of which the mean is taken off: turn @ inputs.
        turn = np.eye(len(mean))
        turn[1:, 0] = -mean[1:]
        moments, with_target = turn @ self.moments @ turn.T, turn @ self.with_target
        self.coefficients = turn.T @ np.linalg.solve(moments + np.diag(lean), with_target + lean * believed)


class Spread:
    def __init__(self, parent: Spread | None) -> None:
        self.parent = parent
        self.ended, self.lasted, self.sums = np.zeros(ratios._BINS), np.zeros(ratios._BINS), np.zeros(5)

    def slant(self) -> tuple[float, float]:
        slope, shift = self.parent.slant() if self.parent else (ratios._SLOPE, 0.0)
        count, lines, trues, squares, products = self.sums
        if count > 0.0:
            believed = ratios._SLOPE_STRENGTH * ratios._SLOPE_VARIANCE
            over = squares - lines * lines / count + believed
            slope = min(max((products - lines * trues / count + believed * slope) / over, 0.1), 1.2)
            shift = (trues - slope * lines + ratios._SLOPE_STRENGTH * shift) / (count + ratios._SLOPE_STRENGTH)
        return float(slope), float(shift)

    def learn(self, off: float, complete: bool) -> None:
        self.ended /= ratios._GROWTH
        self.lasted /= ratios._GROWTH
        (self.ended if complete else self.lasted)[
            min(max(int((off - ratios._LOW) / ratios._STEP), 0), ratios._BINS - 1)
        ] += 1.0

    def hazards(self) -> np.ndarray:
        if self.parent is None:
            beyond = np.array([0.5 * erfc(x / (0.7 * sqrt(2.0))) for x in np.log(RATIOS)])
            beyond[0] = 1.0
            prior = 1.0 - beyond[1:] / beyond[:-1]
        else:
            prior = self.parent.hazards()
        believed = ratios._STRENGTH * np.append(1.0, np.cumprod(1.0 - prior)[:-1])
        gone = self.ended + self.lasted
        after = np.append(np.cumsum(gone[::-1])[::-1][1:], 0.0)
        return (self.ended + believed * prior) / (self.ended + after + believed)

    def survival(self) -> np.ndarray:
        kept = 1.0 - np.minimum(self.hazards(), 0.999999)
        kept[-1] = 0.0
        return np.append(1.0, np.cumprod(kept))

    def beyond(self, off: float) -> tuple[float, float]:
        survival = self.survival()
        at = min(max(int((off - ratios._LOW) / ratios._STEP), 0), ratios._BINS - 1)
        if survival[at] <= 1e-9:
            return off, 1.0
        centres = ratios._LOW + (np.arange(at, ratios._BINS) + 0.5) * ratios._STEP
        share = (survival[at:-1] - survival[at + 1 :]) / survival[at]
        return max(float(share @ centres), off), 1.0 - float(survival[at])
