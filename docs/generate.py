"""Write docs/configuration.md and config/example.yaml from the descriptions in elis_gateway/config/.

    python docs/generate.py

A test compares what is stored with what this would write, so that neither can go stale.
"""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from elis_gateway.config import Config, Upstream
from elis_gateway.config.explain import members

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "configuration.md"
EXAMPLE = ROOT / "config" / "example.yaml"
WIDTH = 110

Model = type[BaseModel]


def section(annotation: Any) -> Model | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def kind_name(tag: str) -> str:
    return "package.module:Class" if tag == "external" else tag


def one_line(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split())


def type_words(annotation: Any) -> str:
    """A type as an operator would say it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_words(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(arg) for arg in get_args(annotation))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is tuple:
        return f"list of {type_words(get_args(annotation)[0])}"
    if origin is dict:
        key, value = get_args(annotation)
        return f"mapping of {type_words(key)} to {type_words(value)}"
    names = {
        bool: "true, false",
        str: "text",
        int: "integer",
        float: "number",
        Path: "path",
        Any: "anything",
        type(None): "null",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_words(field: FieldInfo) -> str:
    if field.is_required():
        return "derived" if "Default:" in (field.description or "") else "required"
    value = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
        return f"`{value['kind']}`" if "kind" in value else ""
    return f"`{flow(value)}`"


def flow(value: Any) -> str:
    """One line of YAML."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    plain = list(plain) if isinstance(plain, tuple) else str(plain) if isinstance(plain, Path) else plain
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000)
    return text.removesuffix("...\n").strip()


# --- docs/configuration.md ---------------------------------------------------------------------------------------

INTRODUCTION = """\
# Configuration

One YAML file: `elis-gateway serve CONFIG.yaml`. `elis-gateway check-config CONFIG.yaml` validates it and prints what is
in effect, every default spelled out. A key that is not in these tables is refused, with its place and the nearest valid
key.

Every key can be overridden by environment: `ELIS__SCHEDULER__WINDOW=25`, `ELIS__UPSTREAMS__0__URL=http://engine:8000`.
Values are YAML; a number indexes a list. Durations are seconds, lengths tokens, sizes bytes.

Written by `docs/generate.py` from the descriptions in `elis_gateway/config/`; `config/example.yaml` holds every key
with its default.
"""


def reference() -> str:
    parts = [INTRODUCTION]
    top = [(name, field) for name, field in Config.model_fields.items()]
    parts += [block for name, field in top for block in sections(name, field)]
    return "\n".join(parts)


def sections(path: str, field: FieldInfo) -> Iterator[str]:
    """The table of a section, followed by those of the sections in it."""
    annotation = field.annotation
    if get_origin(annotation) is tuple and (model := section(get_args(annotation)[0])):
        path += "[]"
    else:
        model = section(annotation)
    if model is not None:
        yield from tables(path, model, f"## {path}" if "." not in path else f"### {path}")
    elif alternatives := members(annotation):
        level = "##" if "." not in path else "###"
        yield f"{level} {path}\n\n{one_line(field.description)} Default: {default_words(field)}.\n"
        for tag, alternative in alternatives.items():
            yield from tables(path, alternative, f"{level}# {path}: `{kind_name(tag)}`")
    else:
        yield f"## {path}\n\n{one_line(field.description)} ({type_words(annotation)}; default {default_words(field)})\n"


def tables(path: str, model: Model, heading: str) -> Iterator[str]:
    lines = [heading, "", one_line(model.__doc__), ""]
    rows = [
        f"| `{name}` | {type_words(field.annotation)} | {default_words(field)} | {one_line(field.description)} |"
        for name, field in model.model_fields.items()
        if name != "kind" and not is_nested(field)
    ]
    if rows:
        lines += ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    yield "\n".join(lines)
    for name, field in model.model_fields.items():
        if is_nested(field):
            yield from sections(f"{path}.{name}", field)


def is_nested(field: FieldInfo) -> bool:
    return section(field.annotation) is not None or bool(members(field.annotation))


# --- config/example.yaml -----------------------------------------------------------------------------------------

PREFACE = """\
# Every key, with its default. Only `upstreams` is required; delete what you do not change.
# Durations are seconds, lengths tokens, sizes bytes. Each key can be overridden by environment, e.g.
# ELIS__SCHEDULER__WINDOW=25. docs/configuration.md is the same as tables.
"""

EXAMPLES: dict[str, Any] = {
    "url": "http://127.0.0.1:8000",
    "slots": 4,
    "name": "engine",
    "api_key_env": None,
}


def example() -> str:
    return PREFACE + "".join(yaml_block(name, field, 0) for name, field in Config.model_fields.items())


def yaml_block(name: str, field: FieldInfo, depth: int) -> str:
    """One key, with what it means as a comment above it."""
    pad = "  " * depth
    annotation = field.annotation
    gap = "\n" if depth == 0 else ""
    if get_origin(annotation) is tuple and (model := section(get_args(annotation)[0])):
        if not field.is_required():
            keys = ", ".join(model.model_fields)
            return f"{gap}{comment(f'{field.description} Each has: {keys}.', pad)}{pad}{name}: []\n"
        items = yaml_keys(model, depth + 2)
        return f"{gap}{comment(field.description, pad)}{pad}{name}:\n{pad}  -{items[len(pad) + 3 :]}"
    if (model := section(annotation)) is not None:
        return f"{gap}{comment(model.__doc__, pad)}{pad}{name}:\n{yaml_keys(model, depth + 1)}"
    if alternatives := members(annotation):
        return gap + yaml_choice(name, field, alternatives, pad)
    value = EXAMPLES.get(name, field.default) if field.is_required() else field.default
    return f"{gap}{comment(field.description, pad)}{pad}{name}: {flow(value)}\n"


def yaml_keys(model: Model, depth: int) -> str:
    fields = list(model.model_fields.items())
    if model is Upstream:  # a list item must not begin with a comment
        fields.sort(key=lambda item: item[0] != "name")
        name, rest = fields[0][1], fields[1:]
        first = f"{'  ' * depth}name: {EXAMPLES['name']} # {one_line(name.description)}\n"
        return first + "".join(yaml_block(key, field, depth) for key, field in rest)
    return "".join(yaml_block(key, field, depth) for key, field in fields)


def yaml_choice(name: str, field: FieldInfo, alternatives: dict[str, Model], pad: str) -> str:
    chosen = field.default.model_dump(mode="json")
    lines = [comment(field.description, pad).rstrip("\n")]
    for tag, model in alternatives.items():
        keys = {"kind": kind_name(tag)} | {
            key: inner.default for key, inner in model.model_fields.items() if key != "kind" and not inner.is_required()
        }
        keys |= {key: "FILE" for key, inner in model.model_fields.items() if key != "kind" and inner.is_required()}
        lines.append(comment(f"{flow(keys)}: {one_line(model.__doc__)}", pad + "#   ", mark="").rstrip("\n"))
        for key, inner in model.model_fields.items():
            if key != "kind":
                lines.append(comment(f"{key}: {one_line(inner.description)}", pad + "#     ", mark="").rstrip("\n"))
    lines.append(f"{pad}{name}:")
    lines += [f"{pad}  {key}: {flow(value)}" for key, value in chosen.items()]
    return "\n".join(lines) + "\n"


def comment(text: str | None, pad: str, mark: str = "# ") -> str:
    words = one_line(text)
    lines = textwrap.wrap(words, WIDTH - len(pad) - len(mark), break_on_hyphens=False, break_long_words=False)
    return "".join(f"{pad}{mark}{line}\n" for line in lines)


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
    EXAMPLE.write_text(example(), encoding="utf-8")
