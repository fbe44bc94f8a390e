"""TLS from files: what listeners show their clients, what upstreams are asked for and shown.

Knows: certificate files and ssl's contexts. Never: who connects, or when.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from elis_gateway import config
from elis_gateway.errors import ConfigError

__all__ = ["Listening", "listener", "shared", "try_files", "upstream"]


def listener(section: config.ServerTLS) -> ssl.SSLContext | None:
    """What a listener with this section needs; None: no TLS. Raises ``ConfigError``."""
    if section.cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _naming(section.cert, section.key):
        context.load_cert_chain(section.cert, section.key, password=_nobody_to_ask)
    if section.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        with _naming(section.client_ca):
            context.load_verify_locations(section.client_ca)
        # A client whose authority is no longer trusted must not go on with what it was given before.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
    return context


class Listening:
    """A listener's files, read again on demand: every new connection gets what is there now, old ones go on.

    Not by loading them into the context that listens: what that trusts could only become more.
    """

    def __init__(self, section: config.ServerTLS) -> None:
        """Raises ``ConfigError``, as ``load`` does."""
        self.section = section
        self.load()
        self.context = self._current
        """What to listen with."""
        self.context.sni_callback = self._hand_over

    def load(self) -> None:
        """Read the files. What cannot be read changes nothing."""
        current = listener(self.section)
        assert current is not None
        self._current = current

    def _hand_over(self, connection: ssl.SSLObject, name: str | None, listening: ssl.SSLContext) -> None:
        connection.context = self._current


_in_use: WeakValueDictionary[tuple[object, ...], ssl.SSLContext] = WeakValueDictionary()


def shared(section: config.TLS) -> ssl.SSLContext | bool:
    """``upstream``, and one for all whose files are the same and as they were: a megabyte of authorities each."""
    files = (section.ca, section.cert, section.key)
    key = (section.verify, *files, *(path is not None and path.exists() and path.stat().st_mtime_ns for path in files))
    context = _in_use.get(key)
    if context is None:
        made = upstream(section)
        if not isinstance(made, ssl.SSLContext):
            return made
        context = _in_use[key] = made
    return context


def upstream(section: config.TLS) -> ssl.SSLContext | bool:
    """What a call of an upstream with this section needs, as aiohttp takes it. Raises ``ConfigError``."""
    if not section.verify and section.cert is None:
        return False
    with _naming(section.ca):
        context = ssl.create_default_context(cafile=section.ca)
    if not section.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if section.cert is not None:
        with _naming(section.cert, section.key):
            context.load_cert_chain(section.cert, section.key, password=_nobody_to_ask)
    return context


def try_files(settings: config.Config) -> None:
    """Open the certificates whose files are all here, as serving would. Raises ``ConfigError`` for what cannot be read.

    What is not here is ``config.warnings``' part: it may be where the gateway will run.
    """
    for place, section in (("server", settings.server.tls), ("admin", settings.admin.tls)):
        with _at(place):
            if _here(section.cert, section.key, section.client_ca):
                listener(section)
    for each in settings.upstreams:
        with _at(f"upstreams: {each.name}"):
            if _here(each.tls.ca, each.tls.cert, each.tls.key):
                upstream(each.tls)


def _nobody_to_ask() -> str:
    """OpenSSL would ask the terminal, and wait. Raises OSError, as it does for what else is wrong with a file."""
    raise OSError("the private key is encrypted; expected one without a passphrase")


def _here(*files: Path | None) -> bool:
    return all(path is None or path.exists() for path in files)


@contextmanager
def _naming(*files: Path | None) -> Iterator[None]:
    """Which files it was about, for what ssl and the file system say without them."""
    try:
        yield
    except OSError as error:
        named = ", ".join(str(path) for path in files if path is not None)
        raise ConfigError(f"tls: {named or 'the system authorities'}: {error}") from error


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
