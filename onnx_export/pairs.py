"""Progressive pairs as arrays: for every answer and window what a head sees, and how many tokens were left.

Knows: answers, features. Never: torch. The same ``features`` as in serving, called here once per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elis_gateway.predictor.features import FEATURES, features
from onnx_export.records import Answer

__all__ = ["FIRST", "WINDOWS", "Floats", "Ints", "Pairs", "make"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FIRST = tuple(range(8))
"""The windows that are evaluated: 0 to 7."""
WINDOWS = (*FIRST, 9, 11, 14, 18, 24, 32, 48, 64)
"""Those trained on: later ones are ever more alike."""


@dataclass(slots=True)
class Pairs:
    """One row per pair; ``answer`` says of which answer."""

    answer: Ints
    window: Ints
    attained: Ints
    remaining: Ints
    features: Floats

    def __len__(self) -> int:
        return len(self.answer)

    def take(self, which: npt.NDArray[np.bool_] | Ints) -> Pairs:
        return Pairs(
            self.answer[which],
            self.window[which],
            self.attained[which],
            self.remaining[which],
            self.features[which],
        )


def make(answers: Sequence[Answer], windows: Sequence[int] = FIRST, *, window: int = 50) -> Pairs:
    """The pairs of ``answers`` at the given windows, as far as each answer lasted. Cut-off answers included."""
    wanted = frozenset(windows)
    index: list[int] = []
    places: list[tuple[int, int, int]] = []
    rows: list[list[float]] = []
    for at, answer in enumerate(answers):
        for attained, characters in answer.cuts:
            number = attained // window
            if number in wanted and attained < answer.tokens:
                index.append(at)
                places.append((number, attained, answer.tokens - attained))
                rows.append(features(answer.prompt, answer.answer[:characters], attained))
    numbers = np.array(places, dtype=np.int64).reshape(-1, 3)
    return Pairs(
        np.array(index, dtype=np.int64),
        numbers[:, 0],
        numbers[:, 1],
        numbers[:, 2],
        np.array(rows, dtype=np.float32).reshape(-1, len(FEATURES)),
    )
