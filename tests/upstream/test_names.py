"""Names of upstreams: one that nobody answers for holds up no other, and not the process's end."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from elis_gateway.config import Upstream
from elis_gateway.errors import UpstreamUnavailable
from elis_gateway.sim.server import SimServer
from elis_gateway.tasks import spawn
from elis_gateway.upstream.http import HttpUpstream
from elis_gateway.upstream.names import Names
from tests.gateway.world import AT_ONCE

DEAD = 40
"""More than any pool of threads has."""


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Nobody answers for ``dead…``, until minutes later it is given up; every other name is this machine."""
    release, ended = threading.Event(), list[str]()
    real = socket.getaddrinfo

    def look(host: str, *more: Any) -> Any:
        if host.startswith("dead"):
            release.wait(120)
            ended.append(host)
            raise socket.gaierror(socket.EAI_AGAIN, "nobody answered")
        return real("127.0.0.1", *more)

    monkeypatch.setattr(socket, "getaddrinfo", look)
    yield ended
    release.set()


def upstream(name: str, port: int) -> HttpUpstream:
    return HttpUpstream(
        Upstream.model_validate({"url": f"http://{name}:{port}", "slots": 1, "health": {"timeout": 60}})
    )


def test_a_healthy_upstream_is_found_while_names_of_others_hang_and_nobody_waits_for_those_in_the_end(
    given_up: list[str],
) -> None:
    async def ask() -> None:
        async with SimServer(AT_ONCE) as server:
            dead = [upstream(f"dead{n}.example", 9) for n in range(DEAD)]
            alive = upstream("alive.example", server.port)
            for each in (*dead, alive):
                await each.start()
            hanging = [spawn(each.get("/health"), name="hanging") for each in dead]
            await asyncio.sleep(0)
            await alive.get("/health")
            assert not any(task.done() for task in hanging)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
            for each in (*dead, alive):
                await each.close()

    asyncio.run(ask())
    assert not given_up, "the end waited for names"


async def test_what_is_no_name_is_a_failure_like_others() -> None:
    for name in ("x" * 70 + ".example", "no-such-host.invalid"):
        odd = upstream(name, 9)
        await odd.start()
        with pytest.raises(UpstreamUnavailable) as caught:
            await odd.get("/health")
        assert caught.value.cause == "dns"
        await odd.close()


async def test_addresses_of_both_families() -> None:
    found = await Names().resolve("localhost", 80, socket.AF_UNSPEC)
    assert {each["host"] for each in found} & {"127.0.0.1", "::1"}
    assert {each["port"] for each in found} == {80}
