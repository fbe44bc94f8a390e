"""Who may use the gateway, and how much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic import field_validator as validates

from elis_gateway.config.section import Bytes, KeyHash, Name, PerMinute, Seconds, Section

__all__ = ["ApiKey", "Auth", "Limits", "PerKey", "distinct"]


class ApiKey(Section):
    """One client's key: by its hash, with what it may do."""

    name: Name
    """Whose it is: the name in logs and on the admin listener."""
    hash: KeyHash
    """`sha256:` and the hash of the key. `elis-gateway key` makes a key and prints both."""
    models: tuple[Name, ...] = ()
    """Models or aliases it may use. Empty: all."""
    default_class: Name | None = None
    """Class of its requests that name none. Default: scheduler.default_class, if it may use that."""
    max_class: Name | None = None
    """The best class it may ask for. Default: any."""
    requests_per_minute: PerMinute | None = None
    """Default: limits.per_key.requests_per_minute."""
    tokens_per_minute: PerMinute | None = None
    """Tokens of prompts and answers together. Default: limits.per_key.tokens_per_minute."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests under way at once, waiting ones included. Default: limits.per_key.concurrent."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share against other keys' under scheduler.fair."""


class Auth(Section):
    """Who may use the public listener. Without any key: everybody."""

    keys: tuple[ApiKey, ...] = ()
    """Clients' keys."""
    keys_file: Path | None = None
    """YAML file with a list of more keys, each as in `keys`; read again on every reload. One without any key is refused
    where there are none in `keys` either: everybody would be let in."""

    @validates("keys")
    @classmethod
    def _keys_differ(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        return distinct(keys)


class PerKey(Section):
    """What one key may use, unless its own entry says otherwise. Default: no limits."""

    requests_per_minute: PerMinute | None = None
    """Requests a key may begin per minute. Here and in what is under way at once, each of several choices or prompts
    counts as one."""
    tokens_per_minute: PerMinute | None = None
    """Tokens of prompts and answers a key may use per minute. An answer is charged when it is over."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests of one key under way at once, waiting ones included."""


class Limits(Section):
    """What is refused with 429 before it waits; see scheduler.queue for what may wait."""

    max_bytes: Bytes = 1024 * 1024 * 1024
    """Bytes of request bodies under way at once, waiting and running; beyond, 429."""
    client_backlog: Bytes = 4 * 1024 * 1024
    """Bytes of its answer that a client may be behind. One that is further is cut off; nobody waits for it."""
    client_stall: Seconds = 60.0
    """How long a client that is behind may read nothing at all before it is cut off; 0: for ever."""
    per_key: PerKey = PerKey()
    classes: dict[Name, Annotated[int, Field(ge=1)]] = {}
    """Requests of one class under way at once, waiting ones included."""


def distinct(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    """``keys``, each of its own name and hash. Raises ValueError."""
    for what in ("name", "hash"):
        values = [getattr(key, what) for key in keys]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"expected every {what} once; several keys have {', '.join(twice)}")
    return keys
