"""Our exceptions as OpenAI error responses: the one place that knows status codes. Never: raising them."""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

import orjson

from elis_gateway.errors import (
    ClientError,
    GatewayError,
    MethodNotAllowed,
    ModelNotFound,
    Overloaded,
    ShuttingDown,
    Unauthorized,
    UpstreamError,
    UpstreamRefused,
)

__all__ = ["Problem", "error_body", "problem", "reason"]

_JSON = {"Content-Type": "application/json"}


class Problem(NamedTuple):
    """A complete error response."""

    status: int
    headers: dict[str, str]
    body: bytes


def problem(error: GatewayError) -> Problem:
    """The response for this error. An upstream's own refusal keeps its status and body to the byte."""
    headers = dict(_JSON)
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, ceil(retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, UpstreamRefused) and error.status >= 400 and _is_json(error.body):
        return Problem(error.status, headers, error.body)
    return Problem(status(error), headers, orjson.dumps(error_body(error)))


def status(error: GatewayError) -> int:
    """HTTP status of an error."""
    match error:
        case ModelNotFound():
            return 404
        case ClientError():
            # A wrong key and an oversized body are the client's fault too, but have statuses of their own.
            return _CLIENT_CODES.get(error.code or "", 400)
        case Overloaded():
            return _OVERLOADED.get(error.cause, 429)
        case ShuttingDown():
            return 503
        case UpstreamRefused():
            # A redirect, or a success without an answer, would be none to the client.
            return error.status if error.status >= 400 else 502
        case UpstreamError():
            return 504 if error.cause in _TIMEOUTS else 502
    return 500


def reason(error: GatewayError) -> str:
    """The error in one word of a short fixed list, for counting."""
    match error:
        case Overloaded():
            return error.cause
        case UpstreamRefused():
            return error.cause
    return _code(error) or "invalid_request"


_CLIENT_CODES = {
    "invalid_api_key": 401, "insufficient_permissions": 403, "not_found": 404, "method_not_allowed": 405,
    "request_timeout": 408, "request_too_large": 413,
}  # fmt: skip
_OVERLOADED = {"unavailable": 503, "shutdown": 503, "no_upstream": 503, "queue_ttl": 503, "deadline": 504}
_OWN_LIMITS = ("rate_limit", "concurrency")
_TIMEOUTS = ("stall", "timeout")
_MOST_WORDS = 2000
"""Bytes of a text that becomes an error's message."""


def error_body(error: GatewayError) -> dict[str, Any]:
    """The ``{"error": ...}`` object; an engine's own is passed on where it sent one."""
    if isinstance(error, UpstreamRefused) and _is_json(error.body):
        own = orjson.loads(error.body)
        if isinstance(own, dict) and "error" in own:
            return own
        return {"error": own}
    code = status(error)
    return {
        "error": {
            "message": _words(error) or str(error) or "internal error",
            "type": _type(code),
            "param": error.param if isinstance(error, ClientError) else None,
            "code": _code(error),
        }
    }


def _type(code: int) -> str:
    if code == 401:
        return "authentication_error"
    if code == 403:
        return "permission_error"
    if code == 429:
        return "rate_limit_error"
    if code == 503:
        return "service_unavailable_error"
    return "invalid_request_error" if code < 500 else "server_error"


def _code(error: GatewayError) -> str | None:
    if isinstance(error, ClientError):
        return error.code
    if isinstance(error, Overloaded):
        return "rate_limit_exceeded" if error.cause in _OWN_LIMITS else "overloaded"
    if isinstance(error, ShuttingDown):
        return "shutting_down"
    return f"upstream_{error.cause}" if isinstance(error, UpstreamError) else "internal_error"


def _words(error: GatewayError) -> str:
    """What an upstream said that sent no JSON: a text, or a page of something before it."""
    return error.body[:_MOST_WORDS].decode("utf-8", "replace").strip() if isinstance(error, UpstreamRefused) else ""


def _is_json(body: bytes) -> bool:
    if body[:1] not in (b"{", b"["):
        return False
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
