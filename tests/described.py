"""Requests made from an OpenAPI description, and answers held against it. (schemathesis in little: it has more kinds of
checks, and would be one more dependency.)

Knows: the part of JSON Schema that our descriptions use. A request is now and then wrong on purpose: a value of another
type, a field too many or too few, anything at all in place of the body.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import yaml
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

METHODS = ("get", "head", "put", "post", "delete", "patch", "options", "trace")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=6,
)
HEADER = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20) | st.sampled_from(
    ["", "0", "-1", "nan", "1e999", "1e300", "é", "x" * 3000]
)


@dataclass
class Operation:
    method: str
    path: str
    spec: dict[str, Any]
    shared: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.method.upper()} {self.path}"


@dataclass
class Call:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None


class Description:
    """One description file."""

    def __init__(self, path: Path) -> None:
        self.document = yaml.safe_load(path.read_text())

    def operations(self) -> list[Operation]:
        return [
            Operation(method, path, spec, item.get("parameters", []))
            for path, item in self.document["paths"].items()
            for method, spec in item.items()
            if method in METHODS
        ]

    def resolved(self, node: Any) -> Any:
        while isinstance(node, dict) and "$ref" in node:
            found = self.document
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            node = found
        return node

    # --- requests ------------------------------------------------------------------------------------------------

    def calls(self, operation: Operation, paths: dict[str, st.SearchStrategy[str]]) -> st.SearchStrategy[Call]:
        """Calls of an operation; ``paths``: values for path parameters, some of which exist."""
        path: st.SearchStrategy[str] = st.just(operation.path)
        headers: dict[str, st.SearchStrategy[str | None]] = {}
        for given in (*operation.shared, *operation.spec.get("parameters", ())):
            parameter = self.resolved(given)
            name, known = parameter["name"], self.values(parameter["schema"]).map(_in_header)
            if parameter["in"] == "path":
                values = st.text(min_size=1, max_size=20) | paths.get(name, st.nothing())
                path = st.builds(
                    lambda p, v, name=name: p.replace("{" + name + "}", quote(v, safe="", errors="replace")),
                    path,
                    values,
                )
            else:
                headers[name] = st.none() | known | HEADER
        body: st.SearchStrategy[bytes | None] = st.none()
        if "requestBody" in operation.spec:
            schema = self.resolved(operation.spec["requestBody"])["content"]["application/json"]["schema"]
            good = self.values(schema)
            body = (good | good.flatmap(spoiled) | JSON).map(_dumped) | st.binary(max_size=40)
        return st.builds(
            lambda p, h, b: Call(operation.method.upper(), p, {k: v for k, v in h.items() if v is not None}, b),
            path, st.fixed_dictionaries(headers), body,
        )  # fmt: skip

    def values(self, schema: Any) -> st.SearchStrategy[Any]:
        """Values that a schema allows."""
        schema = self.resolved(schema)
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        if "oneOf" in schema:
            return st.one_of(*(self.values(one) for one in schema["oneOf"]))
        kinds = schema.get("type")
        if kinds is None and "allOf" not in schema:
            return JSON
        if isinstance(kinds, list):
            return st.one_of(*(self.values({**schema, "type": kind}) for kind in kinds))
        return self._of_kind(kinds, schema)

    def _of_kind(self, kind: str | None, schema: Any) -> st.SearchStrategy[Any]:
        low, high = schema.get("minimum"), schema.get("maximum")
        match kind:
            case "null":
                return st.none()
            case "boolean":
                return st.booleans()
            case "integer":
                return st.integers(low, high)
            case "number":
                low = schema.get("exclusiveMinimum", low)
                return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, allow_nan=False)
            case "string":
                return st.text(min_size=schema.get("minLength", 0), max_size=40)
            case "array":
                items = self.values(schema["items"]) if "items" in schema else JSON
                return st.lists(items, min_size=schema.get("minItems", 0), max_size=min(schema.get("maxItems", 4), 4))
        required, optional = self._properties(schema)
        return st.fixed_dictionaries(required, optional=optional)

    def _properties(self, schema: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found: dict[str, Any] = {}
        needed: set[str] = set()
        for part in (*(self.resolved(p) for p in schema.get("allOf", ())), schema):
            if part is not schema:
                required, optional = self._properties(part)
                needed |= set(required)
                found |= required | optional
            needed |= set(part.get("required", ()))
            found |= {name: self.values(s) for name, s in part.get("properties", {}).items()}
        return (
            {name: found.get(name, JSON) for name in needed},
            {name: values for name, values in found.items() if name not in needed},
        )

    # --- answers -------------------------------------------------------------------------------------------------

    def wrong(self, operation: Operation, status: int, content_type: str, body: bytes) -> str | None:
        """What of an answer the description does not allow; None: nothing."""
        if status >= 500:
            return f"{status}: {body[:300]!r}"
        responses = operation.spec["responses"]
        described = self.resolved(responses.get(str(status), responses.get("default")))
        if described is None:
            return f"status {status} is not described: {body[:300]!r}"
        content = described.get("content")
        if content is None:
            return None
        if content_type not in content:
            return f"content type {content_type} of {status} is not described"
        if content_type != "application/json":
            return None
        schema = {**self.resolved(content[content_type]["schema"]), "components": self.document["components"]}
        errors = [error.message for error in Draft202012Validator(schema).iter_errors(orjson.loads(body))]
        return f"{status}: {errors[0]}" if errors else None


@st.composite
def spoiled(draw: st.DrawFn, good: Any) -> Any:
    """A good body with something wrong in it."""
    if not isinstance(good, dict):
        return draw(JSON)
    body = dict(good)
    match draw(st.integers(0, 2)):
        case 0 if body:
            body.pop(draw(st.sampled_from(sorted(body))))
        case 1:
            body[draw(st.text(max_size=12))] = draw(JSON)
        case _:
            body[draw(st.sampled_from(sorted({*body, "model", "stream", "stop", "n", "max_tokens"})))] = draw(JSON)
    return body


def _dumped(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except (TypeError, ValueError):
        return repr(value).encode("utf-8", "replace")  # lone surrogates: no JSON at all


def _in_header(value: Any) -> str:
    return "".join(c for c in str(value) if c.isprintable()).strip()
