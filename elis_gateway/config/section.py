"""What every section of the configuration shares: strictness, the kinds of values, and choices by ``kind``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field
from pydantic import model_validator as validates_all

__all__ = [
    "EXTERNAL",
    "Bytes",
    "KeyHash",
    "Name",
    "NonNegative",
    "PerMinute",
    "Port",
    "Rank",
    "Seconds",
    "Section",
    "Tokens",
    "by_name",
    "kind_among",
]

NonNegative = Annotated[float, Field(ge=0)]
Seconds = NonNegative
Tokens = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, Field(min_length=1)]
KeyHash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
PerMinute = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=-100_000, le=100_000)]
"""Further apart, a class and a key would not fit into the 64 bits of an engine's priority."""

EXTERNAL = "external"
"""Tag of a policy or predictor that comes from outside this package."""


class Section(BaseModel):
    """What every section shares: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @validates_all(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """YAML reads on and off as true and false: words again where they are such, and never a number."""
        if not isinstance(data, dict):
            return data
        words = {}
        for name, value in data.items():
            if not isinstance(value, bool) or name not in cls.model_fields:
                continue
            kinds = set(_kinds(cls.model_fields[name].annotation))
            if (word := "on" if value else "off") in kinds:
                words[name] = word
            elif kinds & {int, float} and bool not in kinds:
                raise ValueError(f"expected {name} to be a number, got {str(value).lower()}")
        return {**data, **words}


def _kinds(annotation: Any) -> Iterator[Any]:
    """What a key takes: the types of a union, the words of a Literal."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for inner in get_args(annotation):
            yield from _kinds(inner)
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        yield annotation


def kind_among(known: tuple[str, ...], what: str) -> Discriminator:
    """Tells the sections of a union apart by ``kind``; one that is not ``known`` may come from outside, as a path or as
    an entry point of the group ``elis_gateway.WHAT``."""

    def tag(data: Any) -> str | None:
        kind = data.get("kind") if isinstance(data, dict) else getattr(data, "kind", None)
        if not isinstance(kind, str):
            return None
        if kind in known:
            return kind
        outside = ":" in kind or bool(entry_points(group=f"elis_gateway.{what}", name=kind))
        return EXTERNAL if outside else kind

    return Discriminator(tag)


def by_name(data: Any) -> Any:
    """``policy: fcfs`` is short for ``policy: {kind: fcfs}``."""
    return {"kind": data} if isinstance(data, str) else data
