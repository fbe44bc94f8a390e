"""Predictors by name, from here and from outside."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import make
from elis_gateway.predictor.baselines import Constant, MaxTokens
from elis_gateway.predictor.history import History
from elis_gateway.predictor.make import KINDS, make_predictor


class Strange:
    """Not a predictor."""


def test_built_in_kinds(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("")
    assert make_predictor("none") is None
    assert isinstance(make_predictor("constant", tokens=5), Constant)
    assert isinstance(make_predictor("max_tokens"), MaxTokens)
    assert isinstance(make_predictor("history", path=None), History)
    assert make_predictor("oracle", path=lengths) is not None
    assert set(KINDS) == {"none", "constant", "max_tokens", "oracle", "history", "bge"}


def test_a_class_of_ones_own() -> None:
    assert isinstance(make_predictor("elis_gateway.predictor.baselines:Constant", tokens=9), Constant)


def test_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = EntryPoints(
        [
            EntryPoint("mine", "elis_gateway.predictor.baselines:MaxTokens", make.GROUP),
            EntryPoint("gone", "no_such_package:Thing", make.GROUP),
        ]
    )
    monkeypatch.setattr(make, "entry_points", lambda group: offered.select(group=group))
    assert isinstance(make_predictor("mine"), MaxTokens)
    with pytest.raises(ConfigError, match="no_such_package"):
        make_predictor("gone")
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        make_predictor("mime")


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        ("histroy", {}, "did you mean 'history'"),
        ("none", {"path": "x"}, "takes no options, got path"),
        ("constant", {"token": 5}, "options: tokens"),
        ("constant", {"tokens": 0}, "at least 1"),
        ("oracle", {}, "missing a required argument: 'path'"),
        ("no_such_package.x:Y", {}, "cannot import"),
        ("elis_gateway.predictor.baselines:Nothing", {}, "has no 'Nothing'"),
        ("elis_gateway.predictor.make:GROUP", {}, "a class or a function"),
        (f"{__name__}:Strange", {}, "lacks reads_text, refines, instant, refine, learn, save"),
    ],
)
def test_errors_say_what_was_expected(kind: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_predictor(kind, **options)
