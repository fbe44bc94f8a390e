"""Predictors that need no learning: a constant, the client's own limit, a recording, and noise for simulations."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import exp
from pathlib import Path

from elis_gateway.errors import ConfigError
from elis_gateway.predictor.base import Estimate, View, clamp

__all__ = ["Constant", "Instant", "MaxTokens", "NoisyOracle", "Oracle", "prompt_hash", "read_lengths", "write_lengths"]


def prompt_hash(prompt: str) -> str:
    """How a recording names a prompt: the first 16 hex digits of its SHA-256 in UTF-8."""
    return sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Instant:
    """What the predictors here share, and those of studies: they answer at once, read no text, and learn nothing."""

    reads_text = False
    refines = False

    def instant(self, view: View) -> Estimate | None:
        raise NotImplementedError

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        return [self.instant(view) for view in views]

    def learn(self, view: View, *, complete: bool) -> None:
        """Nothing to learn."""

    def save(self) -> None:
        """Nothing to keep."""


class Constant(Instant):
    """Every answer is ``tokens`` long, whatever was asked."""

    def __init__(self, tokens: float = 250.0) -> None:
        if not tokens >= 1:
            raise ValueError(f"constant: tokens: expected at least 1, got {tokens!r}")
        self.tokens = tokens

    def instant(self, view: View) -> Estimate | None:
        return Estimate(clamp(self.tokens - view.attained, view.allowed), None, "constant")


class MaxTokens(Instant):
    """The answer uses up what it is allowed; perfect where lengths are forced. Silent where no limit is known."""

    def instant(self, view: View) -> Estimate | None:
        if view.allowed is None:
            return None
        return Estimate(clamp(view.allowed, view.allowed), None, "max_tokens")


class Oracle(Instant):
    """Looks the length up in a recording: perfect knowledge, where the answers are the recorded ones.

    The file is JSON Lines of ``{"model": ..., "prompt_hash": ..., "tokens": ...}``, or one JSON object
    ``{model: {prompt hash: tokens}}``. Of several lines for a prompt the last counts. Silent about other prompts.
    """

    reads_text = True

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError naming file and line."""
        self._lengths = read_lengths(Path(path))
        self._jobs: dict[str, int | None] = {}
        """Lengths by job, so that a prompt is hashed once and not once per window."""

    def instant(self, view: View) -> Estimate | None:
        try:
            tokens = self._jobs[view.job_id]
        except KeyError:
            tokens = self._lengths.get((view.model, prompt_hash(view.prompt)))
            if len(self._jobs) >= 100_000:
                self._jobs.clear()
            self._jobs[view.job_id] = tokens
        if tokens is None:
            return None
        return Estimate(clamp(tokens - view.attained, view.allowed), None, "oracle")

    def learn(self, view: View, *, complete: bool) -> None:
        self._jobs.pop(view.job_id, None)


class NoisyOracle(Instant):
    """The true length times e^(sigma z), z standard normal and fixed per job: for simulations, which know lengths.

    A job's later estimates count the first one down, so they stay consistent and stick at 1 where it was too short.
    The noise depends on seed and job ids alone, not on the order in which estimates are asked for.
    """

    def __init__(self, lengths: Mapping[str, int], sigma: float, *, seed: int = 0) -> None:
        """``lengths``: tokens by job id. ``sigma`` 0.6: off by a factor of e^±0.6. 0: perfect knowledge."""
        if sigma < 0:
            raise ValueError(f"sigma: expected at least 0, got {sigma!r}")
        rng = random.Random(seed)
        self._guess = {job: lengths[job] * exp(sigma * rng.gauss(0.0, 1.0)) for job in sorted(lengths)}

    def instant(self, view: View) -> Estimate | None:
        return Estimate(clamp(self._guess[view.job_id] - view.attained, view.allowed), None, "noisy_oracle")


def read_lengths(path: Path) -> dict[tuple[str, str], int]:
    """Read a recording of lengths, by model and prompt hash. Raises ConfigError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"predictor oracle: path {str(path)!r}: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"predictor oracle: path {str(path)!r}: not UTF-8 text") from None
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "prompt_hash" not in whole:
        return _nested(whole, path)
    lengths = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            model, digest, tokens = _row(line, f"{path}:{number}")
            lengths[model, digest] = tokens
    return lengths


def write_lengths(path: Path, rows: Sequence[tuple[str, str, int]]) -> None:
    """Write a recording for ``Oracle``: (model, prompt, tokens) per row."""
    with path.open("w", encoding="utf-8") as file:
        for model, prompt, tokens in rows:
            row = {"model": model, "prompt_hash": prompt_hash(prompt), "tokens": tokens}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _nested(whole: dict[str, object], path: Path) -> dict[tuple[str, str], int]:
    lengths = {}
    for model, table in whole.items():
        if not isinstance(table, dict):
            raise ConfigError(f"predictor oracle: {path}: {model!r}: expected an object of prompt hash to tokens")
        for digest, tokens in table.items():
            lengths[model, str(digest)] = _tokens(tokens, f"{path}: {model}: {digest}")
    return lengths


def _row(line: str, where: str) -> tuple[str, str, int]:
    try:
        row = json.loads(line)
        return str(row["model"]), str(row["prompt_hash"]), _tokens(row["tokens"], where)
    except (ValueError, TypeError, KeyError):
        expected = '{"model": ..., "prompt_hash": ..., "tokens": ...}'
        raise ConfigError(f"predictor oracle: {where}: expected {expected}, got {line[:80]!r}") from None


def _tokens(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"predictor oracle: {where}: tokens: expected a whole number of at least 1, got {value!r}")
    return value
