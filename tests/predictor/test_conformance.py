"""The built-in predictors through the suite that outsiders run on theirs; and the suite catches what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from elis_gateway.predictor import conformance
from elis_gateway.predictor.base import Estimate, Predictor, View
from elis_gateway.predictor.baselines import Constant, MaxTokens, NoisyOracle, Oracle, write_lengths
from elis_gateway.predictor.history import History
from elis_gateway.predictor.make import make_predictor
from tests.predictor import tiny

Make = Callable[[], Predictor]


def bge(folder: Path, **options: object) -> Predictor:
    made = make_predictor("bge", path=folder, **options)
    assert made is not None
    return made


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    lengths = tmp_path / "lengths.jsonl"
    write_lengths(lengths, [("a", "Say hello.", 12), ("b", "写一首诗", 3000)])
    everyone = [*conformance.views(), *conformance.views(seed=2), *conformance.views(seed=3)]
    known = {view.job_id: 100 + number for number, view in enumerate(everyone)} | {"unknown": 5}
    makers: dict[str, Make] = {
        "constant": Constant,
        "max_tokens": MaxTokens,
        "oracle": lambda: Oracle(lengths),
        "noisy_oracle": lambda: NoisyOracle(known, 0.6),
        "history": History,
        "history with a file": lambda: History(tmp_path / "history.json"),
        "bge": lambda: bge(tiny.build(tmp_path), state=tmp_path / "learned.npz"),
        "elis-paper": lambda: bge(tiny.build(tmp_path, paper=True)),
    }
    return makers[request.param]


NAMES = ("constant", "max_tokens", "oracle", "noisy_oracle", "history", "history with a file", "bge", "elis-paper")


@pytest.mark.parametrize("make", NAMES, indirect=True)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conforms(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


class Broken(Constant):
    def instant(self, view: View) -> Estimate | None:
        return Estimate(self.tokens - view.attained, None, "broken")


class Lazy(Constant):
    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        return []


class Wide(Constant):
    def instant(self, view: View) -> Estimate | None:
        return Estimate(1.0, 1e9, "wide")


class NotAFlag(Constant):
    refines = "no"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("broken", "check", "complaint"),
    [
        (Broken, conformance.check_estimates, "not within 1 .. tokens still allowed"),
        (Wide, conformance.check_estimates, "gittins"),
        (Lazy, conformance.check_refine, "expected 40 estimates"),
        (NotAFlag, conformance.check_flags, "refines"),
    ],
)
def test_breaches_are_found(broken: Make, check: Callable[[Make], None], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(broken)
