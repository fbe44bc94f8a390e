"""The numbers of one engine on one machine, and the files that keep them. Never: how the engine behaves over time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from elis_gateway.errors import ConfigError

__all__ = ["EngineModel"]

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class EngineModel:
    """The numbers of one engine on one machine. Rates are tokens per second, memory is in tokens."""

    slots: int
    """Sequences decoded at once."""
    decode: tuple[tuple[int, float], ...]
    """(batch size, tokens per second of each sequence). Between the points, and beyond the last, the time of a step is
    linear in the batch; below the first it is constant. One point: the same rate for every batch."""
    prefill_tokens_per_second: float | None = None
    """Prompt tokens computed per second; None: a prompt costs nothing beyond the seam."""
    seam_tokens: float = 0.0
    """Work at the start of every call, in decoded tokens."""
    prefix_cache: bool = True
    kv_tokens: int | None = None
    """Tokens of key-value memory shared by the running sequences; None: never the limit."""
    orders: bool = False
    """The engine admits from its queue by priority (lower first), else first come."""
    block: int = 16
    """Tokens per block of memory and of the prefix cache."""
    prefill_stalls: bool = False
    """Nobody decodes while a prompt is computed."""
    about: str = ""
    """Where the numbers come from."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ConfigError(f"engine model: slots: expected a whole number of at least 1, got {self.slots!r}")
        batches = [batch for batch, _ in self.decode]
        if not batches or batches != sorted(set(batches)) or batches[0] < 1:
            raise ConfigError(f"engine model: decode: expected points of growing batch size from 1, got {batches!r}")
        if min(rate for _, rate in self.decode) <= 0:
            raise ConfigError("engine model: decode: every rate must be above 0 tokens per second")
        if self.prefill_tokens_per_second is not None and self.prefill_tokens_per_second <= 0:
            raise ConfigError("engine model: prefill_tokens_per_second: expected more than 0, or null for free")
        if self.seam_tokens < 0 or self.block < 1 or (self.kv_tokens is not None and self.kv_tokens < 1):
            raise ConfigError("engine model: seam_tokens >= 0, block >= 1 and kv_tokens >= 1 (or null) are expected")

    def rate(self, batch: int) -> float:
        """Tokens per second of each sequence in a batch of this size."""
        points = self.decode
        if batch <= points[0][0] or len(points) == 1:
            return points[0][1]
        left, right = next((pair for pair in pairwise(points) if batch <= pair[1][0]), (points[-2], points[-1]))
        share = (batch - left[0]) / (right[0] - left[0])
        step = 1 / left[1] + share * (1 / right[1] - 1 / left[1])
        # Beyond the last point a noisy falling slope must not reach zero time.
        return 1 / max(step, 1 / (2 * right[1]))

    @property
    def capacity(self) -> float:
        """Tokens per second with every slot at work, before seams and prompts."""
        return self.slots * self.rate(self.slots)

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, source: str = "engine model") -> EngineModel:
        """Build from parsed JSON. Raises ConfigError naming an unknown or missing key."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise ConfigError(f"{source}: unknown key {key!r}; known: {', '.join(known)}")
        for key in ("slots", "decode"):
            if key not in data:
                raise ConfigError(f"{source}: missing key {key!r}")
        try:
            points = tuple((int(batch), float(rate)) for batch, rate in data["decode"])
        except (TypeError, ValueError):
            raise ConfigError(f"{source}: decode: expected a list of [batch, tokens per second]") from None
        try:
            return cls(**{**data, "decode": points})
        except TypeError as exc:
            raise ConfigError(f"{source}: {exc}") from None

    @classmethod
    def load(cls, path: str | Path) -> EngineModel:
        """Read a JSON file, or a shipped model by its bare name (``vllm-cpu``). Raises ConfigError."""
        file = MODELS / f"{path}.json" if str(path) in cls.shipped() else Path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as exc:
            names = ", ".join(cls.shipped())
            raise ConfigError(f"engine model {str(path)!r}: {exc.strerror}; shipped models: {names}") from None
        except ValueError as exc:
            raise ConfigError(f"engine model {str(path)!r}: not JSON: {exc}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"engine model {str(path)!r}: expected a JSON object")
        return cls.from_dict(data, source=f"engine model {str(path)!r}")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def shipped() -> list[str]:
        """Names of the models that come with the package."""
        return sorted(file.stem for file in MODELS.glob("*.json"))
