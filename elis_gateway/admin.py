"""The admin listener: metrics, live jobs, and changing what may change while serving. Never on the public port.

Knows: admin routes and their JSON. Never: how a policy is built or a reload is done (it is given functions for that).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any, Protocol

import orjson
from aiohttp import web

from elis_gateway.admin_guard import errors_as_json, guard
from elis_gateway.errors import ConfigError, UnknownUpstream
from elis_gateway.flight import Flight
from elis_gateway.journal import Journal, story

__all__ = ["AdminDesk", "make_admin_app"]

_JOBS_SHOWN = 1000
_RECENT_SHOWN = 100


class AdminDesk(Protocol):
    """What the admin listener may see and do; the application is one."""

    @property
    def flights(self) -> Mapping[str, Flight]: ...

    @property
    def journal(self) -> Journal: ...

    def now(self) -> float:
        """The loop's time."""

    def render_metrics(self) -> bytes: ...

    def policy(self) -> dict[str, Any]:
        """The policy in effect, as in the configuration."""

    def set_policy(self, wanted: Any) -> None:
        """Raises ConfigError."""

    async def reload(self) -> dict[str, Any]:
        """Read the configuration again; says what was applied and what needs a restart. Raises ConfigError."""

    def upstreams(self) -> list[dict[str, Any]]: ...

    def look(self) -> dict[str, Any]:
        """What goes on right now, for the page."""

    async def add_upstream(self, wanted: Any) -> dict[str, Any]:
        """Raises ConfigError."""

    async def remove_upstream(self, name: str) -> dict[str, Any]:
        """Raises ConfigError."""

    async def drain_upstream(self, name: str, draining: bool) -> dict[str, Any]:
        """Raises ConfigError."""

    def client_keys(self) -> list[dict[str, Any]]:
        """Clients' keys by name, and what they use."""

    @property
    def key_hash(self) -> str | None:
        """Hash of the key that every request must bring; None: none is asked for."""


def make_admin_app(desk: AdminDesk) -> web.Application:
    """The admin listener's application."""

    async def metrics(request: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=desk.render_metrics(), headers=headers)

    async def get_policy(request: web.Request) -> web.Response:
        return _json(desk.policy())

    async def put_policy(request: web.Request) -> web.Response:
        try:
            wanted = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            return _json({"error": f"not JSON: {error}"}, status=400)
        return await _or_error(lambda: _set(desk, wanted))

    async def jobs(request: web.Request) -> web.Response:
        now = desk.now()
        live = [story(flight, now) for flight, _ in zip(list(desk.flights.values()), range(_JOBS_SHOWN), strict=False)]
        answer = {"live": len(desk.flights), "jobs": live, "finished": desk.journal.recent(_RECENT_SHOWN)}
        return _json(answer)

    async def job(request: web.Request) -> web.Response:
        job_id = request.match_info["id"]
        flight = desk.flights.get(job_id)
        found = story(flight, desk.now()) if flight is not None else desk.journal.get(job_id)
        if found is None:
            return _json({"error": f"no job {job_id}: it never was, or it is forgotten"}, status=404)
        return _json(found)

    async def reload(request: web.Request) -> web.Response:
        return await _or_error(desk.reload)

    async def upstreams(request: web.Request) -> web.Response:
        return _json({"upstreams": desk.upstreams()})

    async def live(request: web.Request) -> web.Response:
        return _json(desk.look())

    async def to_ui(request: web.Request) -> web.Response:
        raise web.HTTPFound("ui")

    page, page_headers = _page()

    async def ui(request: web.Request) -> web.Response:
        return web.Response(body=page, headers=page_headers)

    async def add(request: web.Request) -> web.Response:
        try:
            wanted = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            return _json({"error": f"not JSON: {error}"}, status=400)
        return await _or_error(lambda: desk.add_upstream(wanted))

    async def remove(request: web.Request) -> web.Response:
        return await _or_error(lambda: desk.remove_upstream(request.match_info["name"]))

    async def openapi(request: web.Request) -> web.Response:
        body = files("elis_gateway").joinpath("openapi-admin.yaml").read_bytes()
        return web.Response(body=body, content_type="application/yaml")

    async def drain(request: web.Request) -> web.Response:
        draining = request.match_info["what"] == "drain"
        return await _or_error(lambda: desk.drain_upstream(request.match_info["name"], draining))

    async def keys(request: web.Request) -> web.Response:
        return _json({"keys": desk.client_keys()})

    app = web.Application(middlewares=[errors_as_json, guard(lambda: desk.key_hash)])
    app.router.add_get("/", to_ui)
    app.router.add_get("/ui", ui)
    app.router.add_get("/admin/live", live)
    app.router.add_get("/openapi.yaml", openapi)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/admin/policy", get_policy)
    app.router.add_put("/admin/policy", put_policy)
    app.router.add_get("/admin/jobs", jobs)
    app.router.add_get("/admin/jobs/{id}", job)
    app.router.add_post("/admin/reload", reload)
    app.router.add_get("/admin/upstreams", upstreams)
    app.router.add_post("/admin/upstreams", add)
    app.router.add_delete("/admin/upstreams/{name}", remove)
    app.router.add_post("/admin/upstreams/{name}/{what:drain|undrain}", drain)
    app.router.add_get("/admin/keys", keys)
    return app


def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that let it run its own code and speak with this listener, and nothing else."""
    body = files("elis_gateway").joinpath("ui.html").read_bytes()
    own = {
        kind: base64.b64encode(hashlib.sha256(body.split(b"<%b>" % tag)[1].split(b"</%b>" % tag)[0]).digest()).decode()
        for kind, tag in (("script-src", b"script"), ("style-src", b"style"))
    }
    policy = "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    policy += "".join(f"; {kind} 'sha256-{digest}'" for kind, digest in own.items())
    return body, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


async def _set(desk: AdminDesk, wanted: Any) -> dict[str, Any]:
    desk.set_policy(wanted)
    return desk.policy()


async def _or_error(action: Callable[[], Awaitable[dict[str, Any]]]) -> web.Response:
    try:
        return _json(await action())
    except UnknownUpstream as error:
        return _json({"error": str(error)}, status=404)
    except ConfigError as error:
        return _json({"error": str(error)}, status=400)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")
