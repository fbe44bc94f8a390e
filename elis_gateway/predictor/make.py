"""Predictors by name: the built-in ones, ``package.module:Class``, and entry points of other packages."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from elis_gateway.errors import ConfigError, MissingExtra
from elis_gateway.predictor.base import Predictor
from elis_gateway.predictor.baselines import Constant, MaxTokens, Oracle
from elis_gateway.predictor.history import History

__all__ = ["GROUP", "KINDS", "make_predictor"]

_log = logging.getLogger("elis_gateway.predictor")

GROUP = "elis_gateway.predictors"
"""Entry point group in which other packages offer predictors."""


def _bge(
    path: str | Path | None = None,
    *,
    deadline: float = 0.5,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 1,
    learn: bool = True,
    state: str | Path | None = None,
    strength: float = 8.0,
    horizon: float = 1000.0,
    max_apps: int = 256,
    cached_prompts: int = 4096,
) -> Predictor:
    """The encoder's family; ``history`` where onnxruntime, or the shipped model, is not there."""
    try:
        from elis_gateway.predictor.bge import make
        from elis_gateway.predictor.manifest import folder_of
    except (MissingExtra, ModuleNotFoundError) as missing:
        _log.warning("%s: estimates come from history alone", missing)
        return History(strength=strength, horizon=horizon)
    if path is None and not folder_of(None).is_dir():
        _log.warning("no model is installed at %s: estimates come from history alone", folder_of(None))
        return History(strength=strength, horizon=horizon)
    return make(
        path,
        deadline=deadline,
        device=device,
        threads=threads,
        learn=learn,
        state=state,
        max_apps=max_apps,
        strength=strength,
        horizon=horizon,
        cached_prompts=cached_prompts,
    )


_BUILT_IN: dict[str, Callable[..., Predictor]] = {
    "constant": Constant,
    "max_tokens": MaxTokens,
    "oracle": Oracle,
    "history": History,
    "bge": _bge,
}
KINDS = ("none", *_BUILT_IN)
"""Names that are always there."""
_PARTS = ("reads_text", "refines", "instant", "refine", "learn", "save")


def make_predictor(kind: str, **options: object) -> Predictor | None:
    """A predictor by kind, or None for ``none``. Raises ConfigError that names the place and what was expected."""
    where = f"predictor.kind: {kind!r}"
    if kind == "none":
        if options:
            raise ConfigError(f"{where} takes no options, got {', '.join(sorted(options))}")
        return None
    build = _BUILT_IN.get(kind) or _from_outside(kind, where)
    try:
        inspect.signature(build).bind(**options)
    except TypeError as exc:
        raise ConfigError(f"{where}: {exc}; options: {_options(build)}") from None
    except ValueError:
        pass  # a callable that does not tell its signature: let it speak for itself below
    try:
        made = build(**options)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{where}: {exc}") from exc
    missing = [part for part in _PARTS if not hasattr(made, part)]
    if missing:
        raise ConfigError(f"{where}: {type(made).__name__} is not a predictor: it lacks {', '.join(missing)}")
    return made


def _options(build: Callable[..., Predictor]) -> str:
    return ", ".join(inspect.signature(build).parameters) or "none"


def _from_outside(kind: str, where: str) -> Callable[..., Predictor]:
    module, colon, name = kind.partition(":")
    if colon:
        try:
            found = import_module(module)
        except ImportError as exc:
            raise ConfigError(f"{where}: cannot import {module!r}: {exc}") from exc
        try:
            build = getattr(found, name)
        except AttributeError:
            raise ConfigError(f"{where}: module {module!r} has no {name!r}") from None
    else:
        build = _entry_point(kind, where)
    if not callable(build):
        raise ConfigError(f"{where}: expected a class or a function that makes a predictor, got {build!r}")
    return build  # type: ignore[no-any-return]


def _entry_point(kind: str, where: str) -> object:
    offered: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=GROUP)}
    if kind in offered:
        try:
            return offered[kind].load()
        except (ImportError, AttributeError) as exc:
            raise ConfigError(f"{where}: entry point {offered[kind].value!r} cannot be loaded: {exc}") from exc
    known = [*KINDS, *offered]
    close = get_close_matches(kind, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{where}: expected one of {', '.join(known)}, or package.module:Class{hint}")
