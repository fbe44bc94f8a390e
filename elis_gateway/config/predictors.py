"""Where estimates come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from elis_gateway.config.section import EXTERNAL, Name, Seconds, Section, by_name, kind_among

__all__ = ["BgePredictor", "ExternalPredictor", "OraclePredictor", "Predictor"]


class NoPredictor(Section):
    """No estimates: every policy that needs them is first-come."""

    kind: Literal["none"]


class ConstantPredictor(Section):
    """Every answer is as long as the next."""

    kind: Literal["constant"]
    tokens: Annotated[float, Field(ge=1)] = 250.0
    """The length of an answer."""


class MaxTokensPredictor(Section):
    """The client's own max_tokens is the estimate."""

    kind: Literal["max_tokens"]


class OraclePredictor(Section):
    """Looks the length up in a recording; for experiments."""

    kind: Literal["oracle"]
    path: Path
    """JSON Lines of {model, prompt_hash, tokens}."""


class HistoryPredictor(Section):
    """The running distribution of answer lengths by model and application."""

    kind: Literal["history"]
    path: Path | None = None
    """File that keeps what was learned across restarts. Default: memory only."""
    strength: Annotated[float, Field(gt=0)] = 8.0
    """Answers that what is known of all applications counts as, when one application's own are few."""
    horizon: Annotated[float, Field(ge=1)] = 1000.0
    """Newer answers of the same application after which one counts 1/e."""
    max_apps: Annotated[int, Field(ge=1)] = 1000
    """Applications remembered, the least recently used forgotten first (about 10 KB each)."""


class BgePredictor(Section):
    """A trained model, corrected by what the served traffic teaches. Needs the extra `cpu` or `gpu`; without it, or
    where no model is installed, the gateway says so once and uses the history alone."""

    kind: Literal["bge"]
    path: Path | None = None
    """Folder of a model (`elis-gateway predictor export` writes them), or the name of a shipped one. `encode-once`:
    the prompt is encoded once per request, nobody waits for it. `elis-paper`, the published method: prompt and
    answer so far are encoded after every window, and the scheduler waits for that up to the deadline. Default:
    encode-once. Read again on reload."""
    deadline: Seconds = 0.5
    """Longest wait for the encoder. A prompt whose turn would come later is not encoded: the estimate then rests
    on the text's counters and the history."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs. auto: CUDA where onnxruntime has it."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of the encoder on the CPU."""
    learn: bool = True
    """Learn from every finished request: lengths, how far predictions were off, what kinds of prompt lead to what.
    Numbers only, never text."""
    state: Path | None = None
    """File that keeps what was learned across restarts; not for `elis-paper`, which learns token units alone. Default:
    memory only."""
    strength: Annotated[float, Field(gt=0)] = 8.0
    """Answers that what is known of all applications counts as, when one application's own are few."""
    horizon: Annotated[float, Field(ge=1)] = 1000.0
    """Newer answers of the same application after which one counts 1/e."""
    max_apps: Annotated[int, Field(ge=1)] = 256
    """Applications with a regression of their own, the least recently used forgotten first (about 200 KB each)."""
    cached_prompts: Annotated[int, Field(ge=1)] = 4096
    """Prompts whose embedding is remembered (about 2 KB each)."""


class ExternalPredictor(Section):
    """Code of your own."""

    kind: Name
    """`package.module:Class`, or the name of an entry point in the group `elis_gateway.predictors`."""
    options: dict[str, Any] = {}
    """Keyword arguments for its constructor."""
    deadline: Seconds = 0.5
    """Longest wait for what it computes off the event loop; then the previous estimate is counted down."""


Predictor = Annotated[
    Annotated[NoPredictor, Tag("none")]
    | Annotated[ConstantPredictor, Tag("constant")]
    | Annotated[MaxTokensPredictor, Tag("max_tokens")]
    | Annotated[OraclePredictor, Tag("oracle")]
    | Annotated[HistoryPredictor, Tag("history")]
    | Annotated[BgePredictor, Tag("bge")]
    | Annotated[ExternalPredictor, Tag(EXTERNAL)],
    kind_among(("none", "constant", "max_tokens", "oracle", "history", "bge"), "predictors"),
    BeforeValidator(by_name),
]
