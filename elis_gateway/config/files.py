"""From a YAML file to the tree and back, and what is not wise in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from elis_gateway.config.access import ApiKey, distinct
from elis_gateway.config.explain import NO_YAML, explain, overridden
from elis_gateway.config.predictors import BgePredictor, OraclePredictor
from elis_gateway.config.tree import Config
from elis_gateway.errors import ConfigError

__all__ = ["dump", "from_mapping", "keys", "load", "warnings"]


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, apply the overrides of ``environ`` (default: the process's) and validate.

    Raises:
        ConfigError: unreadable file, bad YAML, or anything wrong within; one line per mistake.
    """
    data = _yaml(path, str(path))
    return from_mapping({} if data is None else data, os.environ if environ is None else environ)


def keys(config: Config) -> tuple[ApiKey, ...]:
    """Every key: those of the configuration and those of its ``auth.keys_file``. Raises ``ConfigError``."""
    path = config.auth.keys_file
    if path is None:
        return config.auth.keys
    where = f"auth.keys_file: {path}"
    listed = _yaml(path, where)
    if not isinstance(listed, list):
        raise ConfigError(f"{where}: expected a list of keys, got {type(listed).__name__}")
    try:
        found = tuple(ApiKey.model_validate(entry) for entry in listed)
        merged = distinct((*config.auth.keys, *found))
        config.check_keys(found)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, ApiKey)}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not merged:
        # Whoever names a file of keys does not mean to let everybody in because it has been emptied.
        raise ConfigError(f"{where}: expected at least one key; without any key everybody is let in")
    return merged


class _Loader(yaml.SafeLoader):
    """Of two equal keys YAML's loader keeps the last, and half a section would be gone without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} again", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"


def _yaml(path: str | Path, where: str) -> Any:
    try:
        # A safe loader, refined.
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # nosec B506
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: expected UTF-8 text: {error.reason} at byte {error.start}") from error
    except NO_YAML as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def from_mapping(data: Any, environ: Mapping[str, str] | None = None) -> Config:
    """Validate what a YAML file held. No ``environ``, no overrides. Raises ``ConfigError`` as ``load`` does."""
    if not isinstance(data, dict):
        raise ConfigError(f"expected a mapping of sections, got {type(data).__name__}")
    data = overridden(data, environ or {})
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from None


def warnings(config: Config, environ: Mapping[str, str] | None = None) -> list[str]:
    """What is valid here and now but will not work, or is not wise, in words."""
    environ = os.environ if environ is None else environ
    found = [
        f"upstreams: {u.name}: environment variable {u.api_key_env} (api_key_env) is not set here; "
        "serve will refuse to start"
        for u in config.upstreams
        if u.api_key_env is not None and not environ.get(u.api_key_env)
    ]
    found += _not_there(config, "")
    for place, section in (("scheduler.policy", config.scheduler.policy), ("predictor", config.predictor)):
        module = section.kind.partition(":")[0].partition(".")[0] if ":" in section.kind else None
        if module and find_spec(module) is None:
            found.append(f"{place}.kind: no module {module!r} can be found here; serve will refuse to start")
    if config.admin.host not in _LOOPBACK and config.admin.key_hash is None:
        found.append(f"admin: {config.admin.host} is not loopback and there is no key_hash: anybody can control it")
    return found


_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SHIPPED = Path(__file__).parent.parent / "predictor" / "models"
_WRITTEN = ("path", "state")
"""Files that are made where they are not there, but for the recording of an oracle and the folder of a model."""


def _not_there(section: BaseModel, place: str) -> list[str]:
    """Files that are to be read, and are missing."""
    found: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        where = f"{place}.{name}" if place else name
        if isinstance(value, BaseModel):
            found += _not_there(value, where)
        elif isinstance(value, tuple):
            for n, item in enumerate(value):
                if isinstance(item, BaseModel):
                    found += _not_there(item, f"{where}[{n}]")
        elif isinstance(value, Path) and not value.exists():
            read = name not in _WRITTEN or isinstance(section, OraclePredictor)
            what = str(value)
            if isinstance(section, BgePredictor) and name == "path":
                shipped = sorted(manifest.parent.name for manifest in _SHIPPED.glob("*/manifest.json"))
                read = what not in shipped
                what += f" (shipped: {', '.join(shipped)})" if len(value.parts) == 1 else ""
            if read:
                found.append(f"{where}: there is no {what} here; serve will refuse to start")
    return found


def dump(config: Config) -> str:
    """The effective configuration as YAML, every default spelled out. ``load`` accepts it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
