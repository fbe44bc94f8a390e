"""The admin listener: metrics, live jobs, and changing what may change while serving. Never on the public port.

Knows: admin routes and their JSON. Never: how a policy is built or a reload is done (it is given functions for that).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import orjson
from aiohttp import web

from elis_gateway.errors import ConfigError
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

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/admin/policy", get_policy)
    app.router.add_put("/admin/policy", put_policy)
    app.router.add_get("/admin/jobs", jobs)
    app.router.add_get("/admin/jobs/{id}", job)
    app.router.add_post("/admin/reload", reload)
    app.router.add_get("/admin/upstreams", upstreams)
    return app


async def _set(desk: AdminDesk, wanted: Any) -> dict[str, Any]:
    desk.set_policy(wanted)
    return desk.policy()


async def _or_error(action: Callable[[], Awaitable[dict[str, Any]]]) -> web.Response:
    try:
        return _json(await action())
    except ConfigError as error:
        return _json({"error": str(error)}, status=400)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")
