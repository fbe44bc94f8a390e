"""Which upstreams there should be, and the way there: begun, changed in place, or emptied and made anew.

Knows: upstreams by name, as they are wanted, and the fleet. Never: who wants that, or what runs on them (it is told
when nothing does any more).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

from elis_gateway.config import Upstream
from elis_gateway.errors import ConfigError, UnknownUpstream
from elis_gateway.tasks import spawn
from elis_gateway.upstream.fleet import Fleet, in_place

__all__ = ["Roster"]

_AT_ONCE = 16
"""Upstreams that are begun to be used in one turn of the event loop: some milliseconds."""


class Roster:
    """``idle`` returns when nothing runs on an upstream; ``gone`` hears of one that has left, and whether for good."""

    def __init__(
        self,
        fleet: Fleet,
        upstreams: Iterable[Upstream],
        *,
        idle: Callable[[str], Awaitable[None]],
        gone: Callable[[str, bool], None],
    ) -> None:
        self._fleet = fleet
        self._idle = idle
        self._gone = gone
        self._wanted = {u.name: u for u in upstreams}
        """Upstreams as they should be: the configuration's, and what the admin listener was told since."""
        self._leaving: set[str] = set()
        """Upstreams that are drained, and afterwards forgotten or made anew."""
        self._drained: set[str] = set()
        """Upstreams that are to get no work, whatever they become: the admin listener was told so."""
        self.closed = False
        """The gateway stops: what is begun now would be left open."""

    @property
    def wanted(self) -> Mapping[str, Upstream]:
        """By name."""
        return self._wanted

    @property
    def settled(self) -> bool:
        """Nobody is on the way out."""
        return not self._leaving

    def refuse_if_closed(self) -> None:
        """Raises ``ConfigError``."""
        if self.closed:
            raise ConfigError("the gateway is shutting down: nothing can be changed any more")

    async def change(self, wanted: Mapping[str, Upstream]) -> bool:
        """Make the fleet what is wanted, in place where that is possible. Says whether anything had to be done.

        Raises ``ConfigError`` when the gateway stops half-way.
        """
        self._wanted = dict(wanted)
        self._drained.intersection_update(wanted)
        changed = False
        for name, there in self._fleet.settings().items():
            if (new := wanted.get(name)) == there or name in self._leaving:
                continue
            changed = True
            if new is not None and in_place(there, new):
                self._fleet.change(new)
                continue
            self._leaving.add(name)
            self._fleet.drain(name)
            spawn(self._replace(name), name=f"replace upstream {name}")
        # One that is on its way out comes back when it is gone, as is then wanted.
        missing = [name for name in wanted if name not in self._fleet.upstreams and name not in self._leaving]
        for count, name in enumerate(missing, start=1):
            changed = True
            await self._begin(wanted[name])
            if count % _AT_ONCE == 0:
                # Tokens move in between, and a shutdown ends it. (A turn of a loop that probes a thousand is long.)
                await asyncio.sleep(0)
                self.refuse_if_closed()
        return changed

    def drain(self, name: str, draining: bool) -> None:
        """Send it nothing more, whatever it becomes; or use it again. Raises ``UnknownUpstream``."""
        if name not in self._wanted:
            raise UnknownUpstream(name)
        (self._drained.add if draining else self._drained.discard)(name)
        if name in self._fleet.upstreams and name not in self._leaving:
            self._fleet.drain(name, draining=draining)

    async def _replace(self, name: str) -> None:
        """Once nothing runs there any more, forget the upstream, and begin anew with what it has become by then."""
        await self._idle(name)
        await self._fleet.remove(name)
        self._leaving.discard(name)
        settings = self._wanted.get(name)
        self._gone(name, settings is None)
        if settings is not None and not self.closed:
            await self._begin(settings)

    async def _begin(self, settings: Upstream) -> None:
        await self._fleet.add(settings)
        if settings.name in self._drained:
            self._fleet.drain(settings.name)
