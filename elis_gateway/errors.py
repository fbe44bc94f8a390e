"""Our exception tree, by whose fault it is. Knows no HTTP status: ``wire.problems`` alone maps these to responses."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ClientError", "ConfigError", "Forbidden", "GatewayError", "MethodNotAllowed", "MissingExtra", "ModelNotFound",
    "Overloaded", "ShuttingDown", "Unauthorized", "UnknownUpstream", "UpstreamError", "UpstreamRefused",
    "UpstreamUnavailable",
]  # fmt: skip


class GatewayError(Exception):
    """Anything the gateway raises on purpose."""


class ConfigError(GatewayError):
    """The configuration is wrong. The message names place, expectation and the nearest valid key."""


class UnknownUpstream(ConfigError):
    """Something was to be done with an upstream that is not there."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no upstream {name}")


class MissingExtra(GatewayError):
    """A sub-command needs packages that an extra brings."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs packages that are not installed: pip install 'elis-gateway[{extra}]'")
        self.extra = extra


class ClientError(GatewayError):
    """The request is wrong. ``param`` names the field, ``code`` is a stable word for programs."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFound(ClientError):
    """No upstream serves the model asked for."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist.", param="model", code="model_not_found")


class Unauthorized(ClientError):
    """No key, or none that we know."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class Forbidden(ClientError):
    """The key is known, and this is not for it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param, code="insufficient_permissions")


class MethodNotAllowed(ClientError):
    """The path is there, but not for this method; ``allowed`` are."""

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        self.allowed = tuple(allowed)
        super().__init__(f"{method} is not for this path, but {' or '.join(self.allowed)}", code="method_not_allowed")


class Overloaded(GatewayError):
    """Not accepted, or given up while waiting. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, cause: str, retry_after: float) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class ShuttingDown(GatewayError):
    """The gateway is stopping and cannot finish this request."""

    retry_after = 2.0
    """Seconds after which another one should be there."""


class UpstreamError(GatewayError):
    """An upstream misbehaved. ``retryable``: another call, here or elsewhere, may succeed."""

    def __init__(self, message: str, *, cause: str, retryable: bool) -> None:
        super().__init__(message)
        self.cause = cause
        self.retryable = retryable
        self.reported = False
        """Whoever watches the upstream's health knows of it."""


class UpstreamUnavailable(UpstreamError):
    """Refused the connection, died, stalled or answered garbage."""

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message, cause=cause, retryable=True)


class UpstreamRefused(UpstreamError):
    """The upstream answered with an error status; status and body are kept so that the client sees the engine's own."""

    def __init__(self, status: int, body: bytes, *, retry_after: float | None = None) -> None:
        retryable = status == 429 or status >= 500
        super().__init__(f"upstream answered {status}", cause=f"status_{status}", retryable=retryable)
        self.status = status
        self.body = body
        self.retry_after = retry_after
