"""What aiohttp's responses and exceptions mean to us.

Knows: which aiohttp or OS exception is which cause. Never: whose call it was.
"""

from __future__ import annotations

import ssl
import time
from datetime import UTC
from email.utils import parsedate_to_datetime

import aiohttp

from elis_gateway.errors import UpstreamUnavailable

__all__ = ["abort", "foreign_refusal", "read_body", "retry_after", "unavailable"]

_LIMIT = 1024 * 1024
"""Bytes that are read of what a probe brings, or of a refusal."""


def abort(response: aiohttp.ClientResponse) -> None:
    """Close a response's socket now: not after a TLS goodbye, not after what is still to be written."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    response.close()


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """A short body, or its first MiB. (``StreamReader.read(_LIMIT)`` would give what has come so far.)"""
    parts: list[bytes] = []
    left = _LIMIT
    while left > 0 and (data := await response.content.read(left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def unavailable(name: str, error: BaseException) -> UpstreamUnavailable:
    """Our exception for an aiohttp or OS exception; the cause is one of connect, dns, tls, timeout, garbage, reset."""
    if isinstance(error, TimeoutError):
        cause = "timeout"
    elif isinstance(error, aiohttp.ClientConnectorDNSError):
        cause = "dns"
    elif isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        cause = "tls"
    elif isinstance(error, aiohttp.ClientConnectorError):
        cause = "connect"
    elif isinstance(error, (aiohttp.ClientResponseError, aiohttp.InvalidURL)):
        cause = "garbage"
    else:
        cause = "reset"
    return UpstreamUnavailable(f"{name}: {error or type(error).__name__}", cause=cause)


def foreign_refusal(name: str, status: int) -> UpstreamUnavailable:
    """Our exception where an upstream refuses us for who we are: no business of the client's, nor are its words."""
    return UpstreamUnavailable(f"{name}: refused the gateway's own key ({status})", cause="auth")


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, in either of its forms (RFC 9110, 10.2.3); a date that has passed is 0.

    None: absent, unreadable, or more than a day.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        # Without a zone it is UTC, as every date of HTTP.
        seconds = max((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time(), 0.0)
    return seconds if 0 <= seconds < 86_400 else None
