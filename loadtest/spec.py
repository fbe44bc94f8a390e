"""Short descriptions on the command line and in mix files: ``name``, ``name:key=value,...``, ``name:text``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from elis_gateway.errors import ConfigError

__all__ = ["Spec", "parse"]


class Spec(NamedTuple):
    """``lognormal:median=150,sigma=1`` taken apart."""

    name: str
    options: Mapping[str, str]
    rest: tuple[str, ...]
    """What came without a ``=``: a file, a stage."""
    text: str

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """An option as a number greater than ``above``. Raises ConfigError; without a default it must be there."""
        given = self.options.get(key)
        if given is None:
            if default is None:
                raise ConfigError(f"{self.text!r}: expected {key}=...")
            return default
        try:
            value = float(given)
        except ValueError:
            raise ConfigError(f"{self.text!r}: {key}: expected a number, got {given!r}") from None
        if not above < value < float("inf"):
            raise ConfigError(f"{self.text!r}: {key}: expected more than {above:g}, got {given}")
        return value

    def only(self, *known: str, rest: int = 0) -> None:
        """Raises ConfigError for an option that is not known, or more than ``rest`` words without a ``=``."""
        for key in self.options:
            if key not in known:
                raise ConfigError(f"{self.text!r}: unknown option {key!r}; known: {', '.join(known) or 'none'}")
        if len(self.rest) > rest:
            raise ConfigError(f"{self.text!r}: {self.rest[rest]!r} is not understood")


def parse(text: str, known: Iterable[str], what: str) -> Spec:
    """Take a description apart. Raises ConfigError for a name that is not among ``known``."""
    name, _, rest = text.strip().partition(":")
    names = sorted(known)
    if name not in names:
        raise ConfigError(f"{what} {text!r}: expected one of {', '.join(names)}")
    options, words = {}, []
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = part.partition("=")
        if equals:
            options[key.strip()] = value.strip()
        else:
            words.append(part)
    return Spec(name, options, tuple(words), text)
