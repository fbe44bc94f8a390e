"""From raw data to words: environment overrides, and what exactly is wrong with a configuration.

Knows: how a pydantic error maps to a place, an expectation and the nearest valid key. Never: which keys exist (the
model class is an argument).
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from elis_gateway.errors import ConfigError

__all__ = ["NO_YAML", "PREFIX", "explain", "members", "overridden"]

PREFIX = "ELIS__"
NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What the loader raises: of a 13th month, a tag that its value does not fit, or a thousand brackets it says so in its
own way."""


def overridden(data: dict[Any, Any], environ: Mapping[str, str]) -> dict[Any, Any]:
    """A copy of ``data`` with every ``ELIS__SECTION__KEY`` of ``environ`` put in its place.

    Values are YAML (``25``, ``true``, ``null``, ``[a, b]``); a part that is a number indexes a list, and the index
    just behind its end appends.
    """
    for name in sorted(environ):
        if name.startswith(PREFIX):
            parts = [part.lower() for part in name.removeprefix(PREFIX).split("__")]
            try:
                value = yaml.safe_load(environ[name])
            except NO_YAML as error:
                raise ConfigError(f"{name}: not valid YAML: {error}") from error
            data = _put(data, parts, value, name)
    return data


def _put(node: Any, parts: list[str], value: Any, name: str) -> Any:
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, list) or (node is None and head.isdigit()):
        items = list(node or [])
        if not head.isdigit() or int(head) > len(items):
            raise ConfigError(f"{name}: expected an index of the list, 0 to {len(items)}, got {head!r}")
        index = int(head)
        old = items[index] if index < len(items) else None
        items[index : index + 1] = [_put(old, rest, value, name)]
        return items
    if node is None:
        node = {}
    if isinstance(node, str):
        node = {"kind": node}  # the short form of a policy or predictor
    if not isinstance(node, dict):
        raise ConfigError(f"{name}: {head!r} is set on a value that has no keys")
    return {**node, head: _put(node.get(head), rest, value, name)}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per mistake: ``place: what was expected; the nearest valid key``."""
    expected: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        place, text = _line(dict(item), root)
        if text not in expected.setdefault(place, []):
            expected[place].append(text)
    return "\n".join(_joined(place, texts) for place, texts in expected.items())


def _joined(place: str, texts: list[str]) -> str:
    first, *rest = texts
    said = "; or ".join([first, *(text.removeprefix("expected ") for text in rest)])
    return f"{place}: {said}" if place else said


def _line(item: dict[str, Any], root: type[BaseModel]) -> tuple[str, str]:
    """The place, and what is wrong there; several items may share a place (one for each alternative of a union)."""
    place, owner, siblings = _walk(item["loc"], root)
    kind = item["type"]
    if kind == "extra_forbidden":
        return place, _unknown_key(str(item["loc"][-1]), owner, siblings)
    if kind == "missing":
        return place, "required, but not there"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_kind(place, item["input"], siblings)
    message = _PLAIN.get(kind) or item["msg"].removeprefix("Value error, ").replace("Input should", "expected to")
    message = message.replace("String should", "expected to").replace("expected to be", "expected")
    return place, message if kind == "value_error" else f"{message}, got {item['input']!r}"


_PLAIN = {
    "model_type": "expected a section, with keys of its own",
    "model_attributes_type": "expected a section, with keys of its own",
    "dict_type": "expected keys and values",
    "tuple_type": "expected a list",
    "string_type": "expected text",
    "path_type": "expected a path",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
}
"""By kind of error, where pydantic speaks of Python's types."""


def _unknown_key(key: str, owner: type[BaseModel] | None, siblings: Mapping[str, type[BaseModel]]) -> str:
    valid = [] if owner is None else list(owner.model_fields)
    if near := difflib.get_close_matches(key, valid, n=1, cutoff=0.6):
        return f"unknown key; did you mean '{near[0]}'?"
    if homes := [tag for tag, cls in siblings.items() if key in cls.model_fields]:
        return f"belongs to kind {' or '.join(homes)}, not to this one"
    return f"unknown key; expected one of {', '.join(valid)}"


def _unknown_kind(place: str, given: Any, siblings: Mapping[str, type[BaseModel]]) -> tuple[str, str]:
    kind = given.get("kind") if isinstance(given, dict) else None
    known = [tag for tag in siblings if tag != "external"]
    outside = ", or package.module:Class" if "external" in siblings else ""
    if kind is None:
        return place, f"expected a key 'kind', one of {', '.join(known)}{outside}"
    near = difflib.get_close_matches(str(kind), known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{place}.kind", f"expected one of {', '.join(known)}{outside}, got {kind!r}{hint}"


def _walk(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[str, type[BaseModel] | None, Mapping[str, type[BaseModel]]]:
    """Follow an error's location: its place in the file, the section it is in, that section's alternatives by kind."""
    place = ""
    here: Any = root
    owner: type[BaseModel] | None = None
    siblings: Mapping[str, type[BaseModel]] = {}
    for part in loc:
        if isinstance(part, str) and part in (alternatives := members(here)):
            siblings, here = alternatives, alternatives[part]
            continue  # pydantic names the alternative it chose; the file does not
        if _is_marker(part):
            continue
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
        model = _model(here)
        if model is not None:
            owner = model
            field = model.model_fields.get(str(part))
            here = None if field is None else field.annotation
        else:
            owner, siblings, here = None, {}, _item(here)
    if loc and (last := members(here)):
        siblings = last
    return place, owner, siblings


def _is_marker(part: int | str) -> bool:
    """Pydantic adds names of its own to a location: union members (``float``, ``literal['auto']``), ``[key]``."""
    return isinstance(part, str) and (part in ("float", "int", "str") or "[" in part or part.startswith("constrained-"))


def members(annotation: Any) -> dict[str, type[BaseModel]]:
    """The alternatives of a union told apart by ``kind``, by kind; empty for anything else."""
    found: dict[str, type[BaseModel]] = {}
    for inner in _alternatives(annotation):
        tag, model = None, inner
        if hasattr(inner, "__metadata__"):
            tag = next((m.tag for m in inner.__metadata__ if isinstance(m, Tag)), None)
            model = get_args(inner)[0]
        cls = _model(model)
        if cls is None or "kind" not in cls.model_fields:
            continue
        if tag is None:
            tag = str(next(iter(get_args(cls.model_fields["kind"].annotation)), ""))
        found[tag] = cls
    return found


def _alternatives(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        yield from get_args(annotation)


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _item(annotation: Any) -> Any:
    """The type of a list's items or a mapping's values."""
    args = [arg for arg in get_args(annotation) if arg is not Ellipsis]
    return args[-1] if args else None
