"""Who may use the admin listener, and that its errors are JSON, too: middlewares. Never: what its routes do."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware

from elis_gateway.access import matches, presented

__all__ = ["errors_as_json", "guard"]

_OPEN = ("/", "/ui")
"""The page itself: it holds no facts, asks for the key, and brings it when it asks for some."""
_Next = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guard(key_hash: Callable[[], str | None]) -> Middleware:
    """Lets in who may come in. ``key_hash``: hash of the key that every request must bring; None: none is asked for."""

    @web.middleware
    async def check(request: web.Request, handler: _Next) -> web.StreamResponse:
        refusal = _refusal(request, key_hash())
        return await handler(request) if refusal is None else refusal

    return check


def _refusal(request: web.Request, key_hash: str | None) -> web.Response | None:
    """Why this request may not pass, if it may not.

    A browser on the operator's machine reaches the port, too, on behalf of any page it shows: such requests say where
    they come from (``Origin``), or, where the page's name was made to point here, carry that name as their host.
    """
    host = request.headers.get("Host", "")
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != host:
        return _error("a page of another origin may do nothing here", 403)
    if key_hash is None:
        # To its own origin a browser sends no Origin with GET; on loopback nobody needs a name that is made elsewhere.
        if (origin is not None or _on_loopback(request)) and not _is_address(host):
            return _error("without an admin key, ask by address or as localhost", 403)
        return None
    if request.path in _OPEN or matches(_admin_key(request.headers), key_hash):
        return None
    answer = _error("the admin key is missing or wrong", 401)
    answer.headers["WWW-Authenticate"] = 'Basic realm="elis-gateway admin"'
    return answer


def _admin_key(headers: Mapping[str, str]) -> str | None:
    """The key as programs send it, or as the password of a browser's prompt."""
    scheme, _, value = headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return presented(headers)
    with suppress(ValueError):
        return b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
    return None


def _on_loopback(request: web.Request) -> bool:
    """Did the request reach this machine's loopback address?"""
    address = None if request.transport is None else request.transport.get_extra_info("sockname")
    return isinstance(address, tuple) and (
        str(address[0]).startswith("127.") or address[0] in ("::1", "::ffff:127.0.0.1")
    )


def _is_address(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name == "localhost" or name.startswith("[") or name.replace(".", "").isdigit()


@web.middleware
async def errors_as_json(request: web.Request, handler: _Next) -> web.StreamResponse:
    """An unknown path, a wrong method, a body too large: JSON, as everything else here."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        answer = _error(error.text or error.reason, error.status)
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer


def _error(message: str, status: int) -> web.Response:
    return web.Response(status=status, body=orjson.dumps({"error": message}), content_type="application/json")
