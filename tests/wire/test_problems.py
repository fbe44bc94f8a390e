"""Errors as clients see them."""

from __future__ import annotations

import orjson
import pytest

from elis_gateway import errors
from elis_gateway.wire.problems import error_body, problem


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.ClientError("no", param="model", code="invalid_type"), 400, "invalid_request_error", "invalid_type"),
        (errors.ModelNotFound("m"), 404, "invalid_request_error", "model_not_found"),
        (errors.ClientError("no", code="invalid_api_key"), 401, "authentication_error", "invalid_api_key"),
        (errors.ClientError("no", code="request_too_large"), 413, "invalid_request_error", "request_too_large"),
        (errors.Overloaded("full", cause="queue_full", retry_after=2.2), 429, "rate_limit_error", "overloaded"),
        (errors.Overloaded("down", cause="unavailable", retry_after=0), 503, "service_unavailable_error", "overloaded"),
        (errors.ShuttingDown("bye"), 503, "service_unavailable_error", "shutting_down"),
        (errors.UpstreamUnavailable("gone", cause="connection"), 502, "server_error", "upstream_connection"),
        (errors.UpstreamUnavailable("slow", cause="stall"), 504, "server_error", "upstream_stall"),
        (errors.GatewayError("?"), 500, "server_error", "internal_error"),
    ],
)
def test_status_and_shape(error: errors.GatewayError, status: int, kind: str, code: str) -> None:
    answer = problem(error)
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    body = orjson.loads(answer.body)["error"]
    assert (body["type"], body["code"], body["message"]) == (kind, code, str(error))
    assert set(body) == {"message", "type", "param", "code"}


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert problem(errors.Overloaded("x", cause="queue_full", retry_after=2.2)).headers["Retry-After"] == "3"
    assert problem(errors.Overloaded("x", cause="unavailable", retry_after=0.0)).headers["Retry-After"] == "1"


def test_an_engines_refusal_keeps_its_words() -> None:
    own = b'{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}'
    refused = errors.UpstreamRefused(400, own)
    assert problem(refused) == (400, {"Content-Type": "application/json"}, own)
    assert error_body(refused) == orjson.loads(own)
    html = errors.UpstreamRefused(502, b"<html>bad gateway</html>")
    assert problem(html).status == 502
    assert orjson.loads(problem(html).body)["error"]["code"] == "upstream_status_502"
    assert orjson.loads(problem(html).body)["error"]["message"] == "<html>bad gateway</html>"
    silent = errors.UpstreamRefused(500, b"")
    assert orjson.loads(problem(silent).body)["error"]["message"] == "upstream answered 500"
    plain = errors.UpstreamRefused(400, b"Internal: \xff too long\n" + b"x" * 9000)
    message = orjson.loads(problem(plain).body)["error"]["message"]
    assert message.startswith("Internal: \ufffd too long\nxx")
    assert len(message) <= 2000
    detail = errors.UpstreamRefused(422, b'{"detail": "no"}')
    assert problem(detail).body == b'{"detail": "no"}'
    assert error_body(detail) == {"error": {"detail": "no"}}
