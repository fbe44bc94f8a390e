"""What both listeners serve is what their descriptions say, and nothing made from these brings a 5xx of ours."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

import elis_gateway
from elis_gateway.config import from_mapping
from tests.described import METHODS, Call, Description, Operation
from tests.gateway.world import AT_ONCE, COMPLETIONS, World, world

HERE = Path(elis_gateway.__file__).parent
PUBLIC, ADMIN = Description(HERE / "openapi.yaml"), Description(HERE / "openapi-admin.yaml")
EXAMPLES = int(os.environ.get("ELIS_EXAMPLES", "25"))
"""Calls of each operation."""
NAMES = st.sampled_from(["sim", "other", "embeddings", "a/b", "..", "%2e", "x" * 300])


def _id(operation: Operation) -> str:
    return operation.name


@pytest.mark.parametrize("operation", PUBLIC.operations(), ids=_id)
def test_public(operation: Operation, caplog: pytest.LogCaptureFixture) -> None:
    _exercise(PUBLIC, operation, caplog, admin=False)


@pytest.mark.parametrize("operation", ADMIN.operations(), ids=_id)
def test_admin(operation: Operation, caplog: pytest.LogCaptureFixture) -> None:
    _exercise(ADMIN, operation, caplog, admin=True)


def _exercise(description: Description, operation: Operation, caplog: pytest.LogCaptureFixture, *, admin: bool) -> None:
    """As many calls as ``EXAMPLES`` says, to one gateway, which serves as well afterwards as before."""
    caplog.set_level(logging.ERROR)
    calls = description.calls(operation, {"name": NAMES, "id": NAMES, "model": NAMES, "path": NAMES})
    examples = EXAMPLES if "requestBody" in operation.spec or "parameters" in operation.spec else 1
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        w = runner.run(stack.enter_async_context(world(AT_ONCE)))
        given_first = dict(w.gateway.config.model_dump(mode="json", exclude_defaults=True))
        w.gateway._reload = lambda: from_mapping(given_first)

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(calls)
        def one(call: Call) -> None:
            wrong = runner.run(_ask(w, call, operation, description, admin=admin))
            assert wrong is None, (call, wrong)

        try:
            one()
            runner.run(w.check(COMPLETIONS, {"model": "sim", "prompt": "still here", "max_tokens": 5}))
            assert not w.gateway.flights
            ours = [r for r in caplog.records if r.name.startswith("elis_gateway") or r.name == "asyncio"]
            assert not [record for record in ours if record.exc_info]
        finally:
            runner.run(stack.aclose())


async def _ask(w: World, call: Call, operation: Operation, description: Description, *, admin: bool) -> str | None:
    url = URL((w.admin if admin else w.url) + call.path, encoded=True)
    headers = {"Content-Type": "application/json", **call.headers} if call.body is not None else call.headers
    try:
        async with w.session.request(
            call.method, url, data=call.body, headers=headers, allow_redirects=False
        ) as response:
            body = await response.read()
            if response.status == 504 and "X-Elis-Deadline" in call.headers and b"deadline has passed" in body:
                return None  # as it was asked to
            plain = operation.path != "/v1/{path}"
            return (
                description.wrong(operation, response.status, response.content_type, body)
                if plain
                else (f"{response.status}: {body[:200]!r}" if response.status >= 500 else None)
            )
    except ValueError:
        return None  # aiohttp's client refuses to send such a header
    except aiohttp.ClientError as error:
        return f"the connection was cut: {error!r}"


async def test_the_descriptions_name_every_route_and_no_other() -> None:
    async with world() as w:
        handlers = w.gateway._runners[0].server.request_handler  # type: ignore[union-attr]
        ours = {f"{method} {path}" for method, path in handlers._routes}
        more = {"GET /v1/models/{model}", "POST /v1/{path}"}
        assert {o.name for o in PUBLIC.operations()} == ours | more
        app: Any = w.gateway._runners[1].app  # type: ignore[attr-defined]
        routes: set[str] = set()
        for route in app.router.routes():
            if route.method != "HEAD":
                path = route.resource.canonical
                both = [path.replace("{what}", what) for what in ("drain", "undrain")] if "{what}" in path else [path]
                routes |= {f"{route.method} {one}" for one in both}
        assert {o.name for o in ADMIN.operations()} == routes


@pytest.mark.parametrize("admin", [False, True], ids=["public", "admin"])
async def test_a_method_that_is_not_described_is_refused(admin: bool) -> None:
    description = ADMIN if admin else PUBLIC
    async with world() as w:
        for path, item in description.document["paths"].items():
            if path == "/v1/{path}":
                continue
            implied = {"head"} if admin and "get" in item else set()  # aiohttp's router serves it with every GET
            for method in set(METHODS) - set(item) - {"trace"} - implied:
                url = (w.admin if admin else w.url) + re.sub(r"\{.*?\}", "x", path)
                async with w.session.request(method, url) as response:
                    assert response.status in (404, 405), (method, path)
                    assert response.content_type == "application/json"
                    if response.status == 405:
                        assert response.headers["Allow"]


async def test_they_are_served() -> None:
    async with world() as w:
        for url, description in ((w.url, PUBLIC), (w.admin, ADMIN)):
            async with w.session.get(url + "/openapi.yaml") as response:
                assert response.content_type == "application/yaml"
                assert (await response.text()).startswith("openapi: 3.1.0")
                assert description.document["info"]["title"] in await response.text()
