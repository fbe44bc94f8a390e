"""What a simulated gateway knows of the lengths to come: a fresh predictor per run. Never: how it is used.

``perfect``, ``shuffled`` (perfect lengths dealt to the wrong requests: what still gains is no knowledge), ``noisy:S``
(off by a factor of e^±S), ``history`` (taught with earlier answers of the same kind of work), ``history-cold`` (from
nothing), ``none``, ``constant:N``, ``max_tokens``, or ``config:FILE``, the predictor of a gateway's configuration.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from elis_gateway import build, config
from elis_gateway.errors import ConfigError
from elis_gateway.predictor.base import Predictor, View
from elis_gateway.predictor.baselines import Constant, MaxTokens, NoisyOracle
from elis_gateway.predictor.history import History
from loadtest.spec import parse
from loadtest.targets import MODEL
from loadtest.workload import Workload

__all__ = ["KINDS", "Knowledge"]

KINDS = ("perfect", "shuffled", "noisy", "history", "history-cold", "none", "constant", "max_tokens", "config")


class Knowledge:
    """A description, and the predictors made from it."""

    def __init__(self, text: str, past: Callable[[int], Workload], *, apps: bool = True) -> None:
        """``past``: work of the same kind with other seeds, to teach ``history`` with. ``apps``: clients say which
        application they are. Raises ConfigError."""
        name, _, rest = text.partition(":")
        self.text = text
        self._apps = apps
        self._past = past
        if name == "config":
            self._section = config.load(Path(rest)).predictor
            self._name = name
            return
        spec = parse(text, KINDS, "predictor")
        self._name = spec.name
        try:
            self._number = float(spec.rest[0]) if spec.rest else {"noisy": 0.6, "constant": 250.0}.get(spec.name, 0.0)
        except ValueError:
            raise ConfigError(f"predictor {text!r}: expected a number, got {spec.rest[0]!r}") from None
        spec.only(rest=1 if spec.name in ("noisy", "constant") else 0)

    def make(self, workload: Workload, noise: int) -> Predictor | None:
        """For one run. ``noise``: seed of whatever is random in it, or of the past it learned from."""
        lengths = {request.id: request.tokens for request in workload.requests}
        match self._name:
            case "none":
                return None
            case "perfect":
                return NoisyOracle(lengths, 0.0)
            case "shuffled":
                dealt = list(lengths.values())
                random.Random(f"shuffled {noise}").shuffle(dealt)
                return NoisyOracle(dict(zip(lengths, dealt, strict=True)), 0.0)
            case "noisy":
                return NoisyOracle(lengths, self._number, seed=noise)
            case "constant":
                return Constant(self._number)
            case "max_tokens":
                return MaxTokens()
            case "config":
                return build.predictor(self._section)
        return self._history(noise if self._name == "history" else None)

    def _history(self, noise: int | None) -> History:
        history = History()
        for request in self._past(noise).requests if noise is not None else ():
            view = View(request.id, MODEL, request.app if self._apps else "", "", "", request.tokens, None)
            history.learn(view, complete=request.tokens < request.max_tokens)
        return history
