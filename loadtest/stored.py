"""``loadtest compare``: two stored runs held against each other, with limits for CI. Never: how a run is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from elis_gateway.errors import ConfigError
from loadtest import store
from loadtest.compare import AGAIN, METRICS, Arm, Difference, contrast
from loadtest.experiment import Experiment
from loadtest.figures import alone_in, alone_on, figures
from loadtest.stats import Comparison
from loadtest.tables import ratio

__all__ = ["Held", "Limit", "broken", "compared", "limit", "rows"]


class Limit(NamedTuple):
    """``jct.mean`` at most, or at least, so many times the other's."""

    metric: str
    value: float
    above: bool
    """A ratio above the value breaks it; else one below."""

    def broken(self, found: Comparison) -> bool:
        return found.ratio > self.value if self.above else found.ratio < self.value

    def __str__(self) -> str:
        return f"{self.metric} {'at most' if self.above else 'at least'} {self.value:g}"


class Held(NamedTuple):
    """Two stored runs, held against each other."""

    differences: list[Difference]
    faults: list[str]
    """What makes the figures of either invalid or partial, in words."""
    valid: bool
    """Every run that was compared is complete, and none of them lagged."""


def limit(text: str, *, above: bool) -> Limit:
    """From ``jct.mean=1.05``. Raises ConfigError."""
    name, _, value = text.partition("=")
    if name not in METRICS:
        raise ConfigError(f"limit {text!r}: expected one of {', '.join(METRICS)}")
    try:
        return Limit(name, float(value), above)
    except ValueError:
        raise ConfigError(f"limit {text!r}: expected {name}=RATIO") from None


def compared(ours: str, theirs: str) -> Held:
    """The first against the second, each ``FOLDER`` or ``FOLDER:SETTING``. Of folders with several settings those
    of the same name are compared.

    Raises ConfigError where nothing can be compared, or the work was not the same.
    """
    left, our_setting = _opened(ours)
    right, their_setting = _opened(theirs)
    # Both against one ideal: of two live runs that of their best moments together.
    alone = alone_on(left.engine) if left.engine is not None and left.engine == right.engine else None
    if left.engine is None and right.engine is None:
        alone = alone_in([*left.runs, *right.runs])
    our_arms, their_arms = (
        {name: arm for name, arm in side.arms().items() if AGAIN not in name.split()} for side in (left, right)
    )
    for side, arms in ((left, our_arms), (right, their_arms)):
        for arm in arms.values():
            for seed, run in arm.runs.items():
                arm.figures[seed] = figures(run, objectives=left.objectives, alone=alone, interval=side.window)
    pairs = _pairs(our_arms, their_arms, our_setting, their_setting, (ours, theirs))
    differences = [contrast(a, b) for a, b in pairs]
    sides = []
    for n, (name, side) in enumerate(((ours, left), (theirs, right))):
        chosen = [run for pair in pairs for run in pair[n].runs.values()]
        sides.append((name, replace(side, runs=chosen, complete=all(run.complete for run in chosen))))
    faults = [f"{name}: {fault}" for name, side in sides for fault in side.faults()]
    faults += [
        f"{d.arm} and {d.base}: {d.unequal} requests got answers of different length, or under one of the two alone: "
        "not equal work"
        for d in differences
        if d.unequal
    ]
    return Held(differences, faults, all(side.valid for _, side in sides))


def _opened(text: str) -> tuple[Experiment, str | None]:
    folder, setting = Path(text), None
    if not folder.exists():
        before, colon, after = text.rpartition(":")
        if colon:
            folder, setting = Path(before), after
    return store.read(folder), setting


def _pairs(
    ours: Mapping[str, Arm], theirs: Mapping[str, Arm], our: str | None, their: str | None, names: tuple[str, str]
) -> Sequence[tuple[Arm, Arm]]:
    for side, arms, name in ((our, ours, names[0]), (their, theirs, names[1])):
        if side is not None and side not in arms:
            raise ConfigError(f"{name}: no setting {side!r} in it; there are {', '.join(arms)}")
    chosen_ours = {our: ours[our]} if our is not None else ours
    chosen_theirs = {their: theirs[their]} if their is not None else theirs
    if len(chosen_ours) == len(chosen_theirs) == 1:
        return list(zip(chosen_ours.values(), chosen_theirs.values(), strict=True))
    shared = [(arm, chosen_theirs[name]) for name, arm in chosen_ours.items() if name in chosen_theirs]
    if not shared:
        raise ConfigError(f"{names[0]} and {names[1]} have no setting in common: name them, FOLDER:SETTING")
    return shared


def rows(found: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    """A table: figures down, compared pairs across."""
    names = [name for name in METRICS if any(name in difference.metrics for difference in found)]
    heads = ["ratio", *(d.arm if d.arm == d.base else f"{d.arm} / {d.base}" for d in found)]
    body = [[METRICS[name], *(ratio(d.metrics.get(name)) for d in found)] for name in names]
    body.append(["requests that ended sooner", *(f"{d.wins:.0%}" for d in found)])
    body.append(["requests of unequal work", *(str(d.unequal) for d in found)])
    return heads, body


def broken(found: Sequence[Difference], limits: Sequence[Limit]) -> list[str]:
    """Limits that do not hold, in words. A figure that is missing breaks its limit: it was asked for."""
    said = []
    for difference in found:
        for one in limits:
            entry = difference.metrics.get(one.metric)
            if entry is None:
                said.append(f"{difference.arm}: {one.metric} is missing: too few samples")
            elif one.broken(entry):
                said.append(
                    f"{difference.arm}: {one.metric} is {ratio(entry)} times {difference.base}'s, allowed {one}"
                )
    return said
