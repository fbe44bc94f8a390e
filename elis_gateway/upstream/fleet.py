"""All upstreams together: who is in service, what they serve and can do; tells a listener when that changes.

Knows: probing loops and capabilities. Never: jobs, slots in use, choosing an upstream for a job.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elis_gateway import config
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.errors import ConfigError, UpstreamError, UpstreamRefused
from elis_gateway.tasks import spawn
from elis_gateway.upstream.auto_slots import AutoSlots, Look
from elis_gateway.upstream.base import Capabilities
from elis_gateway.upstream.gauges import Gauges, gauges
from elis_gateway.upstream.health import Health
from elis_gateway.upstream.http import HttpUpstream
from elis_gateway.upstream.probe import LLAMA_CPP, generates, probe

__all__ = ["Fleet", "in_place"]

_log = logging.getLogger("elis_gateway.upstream")

_HEALTH, _MODELS = "/health", "/v1/models"
_LOAD_EVERY = 1.0
"""Longest time between two looks at an engine's load, where its slots follow from that."""
_ASK_AGAIN = 5
"""Probing intervals between two attempts to find out what an upstream can do, where the first was not conclusive."""

Listener = Callable[[UpstreamInfo], None]


class _Member:
    """One upstream, its health, and the task that looks after it."""

    def __init__(
        self,
        settings: config.Upstream,
        overcommit: int,
        changed: Callable[[_Member], None],
        lost: Callable[[str, float], None],
    ) -> None:
        self.settings = settings
        self.overcommit = _in_hand(settings, overcommit)
        self.upstream = HttpUpstream(settings, report=self._failed, well=self._succeeded)
        self._lost = lost
        self.health = Health(settings.health)
        self.auto = AutoSlots() if settings.slots == "auto" else None
        self.load: Gauges | None = None
        """What the engine said last of its own load, where its slots follow from that."""
        self.draining = False
        self.published: UpstreamInfo | None = None
        self.task: asyncio.Task[None] | None = None
        self.looked = asyncio.Event()
        """Set once the first probe is over, whatever it said."""
        self._changed = changed
        self._nudge = asyncio.Event()
        self._capable = False
        self._without_health = False
        self._ask_at = 0.0
        """When what it can do is asked again, where it was not settled."""

    @property
    def slots(self) -> int:
        """Sequences the engine runs at once: configured, or as far as it is known by now."""
        return self.auto.slots if self.settings.slots == "auto" and self.auto is not None else int(self.settings.slots)

    @property
    def info(self) -> UpstreamInfo:
        now = asyncio.get_running_loop().time()
        slots = self.slots
        allowed = 0 if self.draining else self.health.allowed(slots, now)
        capabilities = self.upstream.capabilities
        return UpstreamInfo(
            self.upstream.id,
            capabilities.models,
            allowed,
            # Calls in the engine's own queue are for one that is known to get through them.
            self.overcommit if allowed == slots else 0,
            capabilities.orders,
            self.draining,
        )

    async def watch(self) -> None:
        """Look after it until cancelled: probe, ask what it can do when it comes back, tell the listener."""
        loop = asyncio.get_running_loop()
        while True:
            self._nudge.clear()
            await self._look()
            self._changed(self)
            self.looked.set()
            if self.health.known and not self.health.up:
                self._lost(self.upstream.id, self.settings.health.timeout)
            wait = self.health.next_look(loop.time(), self.slots)
            try:
                async with asyncio.timeout(wait if self.auto is None else min(wait, _LOAD_EVERY)):
                    await self._nudge.wait()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        was_up = self.health.up
        loop = asyncio.get_running_loop()
        try:
            await self._alive()
            if not self._capable and loop.time() >= self._ask_at:
                # New, or back after an absence in which it may have become another: ask before it gets work.
                # A queue of one call has no order.
                found = await probe(self.upstream, orders=self.overcommit > 1)
                self._capable = found.settled
                self.upstream.capabilities = found if found.settled else _as_before(found, self.upstream.capabilities)
                self._ask_at = loop.time() + _ASK_AGAIN * self.settings.health.interval
                if found.engines > 1:
                    _log.warning(
                        "upstream %s: %d engines behind one address; say data_parallel_size: %d, or answers go on "
                        "where their prompt is not cached", self.upstream.id, found.engines, found.engines,
                    )  # fmt: skip
            if self.health.breaker.doubtful:
                await self._judge()
            if self.auto is not None:
                await self._look_at_load(self.auto)
        except UpstreamError as error:
            self.health.probed(False, error.cause, loop.time())
            if not self.looked.is_set():
                # Nothing changes by it, so nothing else would say so: an address with a slip in it looks like peace.
                _log.warning("upstream %s does not answer yet: %s", self.upstream.id, error)
        else:
            self.health.probed(True, now=loop.time())
        if was_up and not self.health.up:
            self._forget()
        if was_up != self.health.up:
            _log.info("upstream %s is %s", self.upstream.id, "up" if self.health.up else f"down: {self.health.cause}")

    async def _judge(self) -> None:
        """Its calls were answered with 5xx in a row: is it the engine, or somebody's requests (an image for a model
        that sees none, say), for which nobody else should have to wait?"""
        model = min(self.upstream.capabilities.models, default=None)
        well = model is not None and await generates(self.upstream, model)
        self.health.breaker.judged(asyncio.get_running_loop().time(), well=well)
        if well:
            _log.info("upstream %s answers others: what it fails of are the requests", self.upstream.id)

    async def _look_at_load(self, auto: AutoSlots) -> None:
        """`slots: auto`: what the engine says of itself, and what follows from it."""
        first = not self.looked.is_set()
        auto.bound(self.upstream.capabilities.most)
        self.load = seen = await gauges(self.upstream)
        if seen is None:
            auto.settle()
            if first:
                _log.warning(
                    "upstream %s: slots: auto, but it shows neither running and waiting calls (/metrics) nor slots; "
                    "it is given %d%s", self.upstream.id, auto.slots,
                    "" if auto.most is not None else ": say how many it runs at once",
                )  # fmt: skip
            return
        before = auto.slots
        ours = self.upstream.in_flight
        if auto.look(Look(seen.running, seen.waiting, seen.kv, seen.evicted, ours)):
            _log.info(
                "upstream %s: %d slots instead of %d; it runs %g calls, %g wait in it, %s of its KV memory is in use",
                self.upstream.id, auto.slots, before, seen.running, seen.waiting,
                "an unknown share" if seen.kv is None else f"{seen.kv:.0%}",
            )  # fmt: skip

    async def _alive(self) -> None:
        """Raises ``UpstreamError`` where it is not. Ollama and hosted models have no /health: their models will do."""
        path = self.settings.health.path
        try:
            await self.upstream.get(_MODELS if self._without_health else path)
        except UpstreamRefused as error:
            # Led elsewhere, to a website perhaps: there is no such path either.
            absent = error.status in (404, 405) or error.status < 400
            if not absent or path != _HEALTH or self._without_health:
                raise
            await self.upstream.get(_MODELS)
            self._without_health = True

    def _forget(self) -> None:
        self._capable = False
        self._ask_at = 0.0

    def _failed(self, error: UpstreamError) -> None:
        """A call failed. What it means is settled now: whoever asks next must not be sent there again."""
        was_up = self.health.up
        self.health.failed(error, asyncio.get_running_loop().time())
        if was_up and not self.health.up:
            self._forget()
            _log.warning("upstream %s is down: %s", self.upstream.id, error)
        self._changed(self)
        self._nudge.set()

    def _succeeded(self, begun: bool) -> None:
        """A call went well, and that may be news."""
        if self.health.succeeded(asyncio.get_running_loop().time(), begun=begun):
            _log.info("upstream %s answers again", self.upstream.id)
            self._changed(self)
            self._nudge.set()

    def change(self, settings: config.Upstream, overcommit: int) -> None:
        """Take over settings that need no new connections and no new questions (``in_place``)."""
        self._without_health = self._without_health and settings.health.path == self.settings.health.path
        self.settings = settings
        self.overcommit = _in_hand(settings, overcommit)
        if settings.slots != "auto":
            self.auto = self.load = None
        elif self.auto is None:
            self.auto = AutoSlots()
            # How many it says it runs is asked with everything else.
            self._forget()
        self.upstream.change(settings)
        self.health.change(settings.health)
        self._changed(self)
        self._nudge.set()

    def keep_in_hand(self, overcommit: int) -> None:
        """So many calls beyond the slots from now on, unless its settings say otherwise."""
        self.overcommit = _in_hand(self.settings, overcommit)
        self._changed(self)


def _in_hand(settings: config.Upstream, overcommit: int) -> int:
    """Calls kept in flight beyond the slots: none where the engine's queue is to tell how many slots there are."""
    if settings.slots == "auto":
        return 0
    return overcommit if settings.overcommit is None else settings.overcommit


_IN_PLACE = ("slots", "overcommit", "timeouts", "health")


def in_place(old: config.Upstream, new: config.Upstream) -> bool:
    """Can an upstream take these settings over without being drained?"""
    same = {name: getattr(old, name) for name in _IN_PLACE}
    return new.model_copy(update=same) == old


class Fleet:
    """The upstreams of one gateway. ``listener`` hears of every change, from the event loop, never before ``start``.

    ``lost`` hears of every look that finds an upstream down, with the seconds after which a call there that is silent
    may be given up.
    """

    def __init__(
        self,
        upstreams: Sequence[config.Upstream],
        listener: Listener,
        *,
        overcommit: int = 0,
        lost: Callable[[str, float], None] = lambda name, after: None,
    ) -> None:
        self._listener = listener
        self._lost = lost
        self._overcommit = overcommit
        self._members: dict[str, _Member] = {}
        self._upstreams: dict[str, HttpUpstream] = {}
        self._by_model: dict[str, Capabilities] = {}
        for settings in upstreams:
            self._add(settings)

    @property
    def upstreams(self) -> Mapping[str, HttpUpstream]:
        """By id. The same mapping for the fleet's whole life."""
        return self._upstreams

    async def start(self, *, patience: float = 2.0) -> None:
        """Open the connection pools and begin to probe; returns when every upstream was looked at once, or ``patience``
        seconds have passed."""
        for member in self._members.values():
            await self._watch(member)
        looks = [spawn(m.looked.wait(), name="first look") for m in self._members.values()]
        if looks:
            _, pending = await asyncio.wait(looks, timeout=patience)
            for look in pending:
                look.cancel()

    async def close(self) -> None:
        """Stop probing and close every connection."""
        await asyncio.gather(*(_stop(member) for member in self._members.values()))

    # --- views ---------------------------------------------------------------------------------------------------

    def knows(self, model: str) -> bool:
        """Does any upstream serve it, up or not? True as long as no upstream at all has told its models."""
        nobody_told = True
        for member in self._members.values():
            models = member.upstream.capabilities.models
            if model in models:
                return True
            nobody_told = nobody_told and not models
        return nobody_told

    def lists(self, model: str) -> bool:
        """Does any upstream say that it serves it, up or not?"""
        return any(model in member.upstream.capabilities.models for member in self._members.values())

    def serving(self, model: str | None) -> list[HttpUpstream]:
        """Upstreams in service that have ``model`` (None: any)."""
        return [
            m.upstream
            for m in self._members.values()
            if m.info.slots and (model is None or model in m.upstream.capabilities.models)
        ]

    @property
    def models(self) -> dict[str, int | None]:
        """Every model of an upstream in service, and its context length where that is known."""
        found: dict[str, int | None] = {}
        for member in self._members.values():
            if member.info.slots:
                for model in sorted(member.upstream.capabilities.models):
                    found.setdefault(model, member.upstream.capabilities.context.get(model))
        return found

    def capabilities(self, model: str) -> Capabilities:
        """What every upstream of ``model`` can do: the least of them, since a job may continue on any."""
        merged = self._by_model.get(model)
        if merged is None:
            known = [m.upstream.capabilities for m in self._members.values() if m.health.known]
            serving = [c for c in known if model in c.models]
            # One that stumbled when it was asked says nothing about itself, let alone about the others.
            settled = [c for c in serving if c.settled]
            merged = _least(settled or serving, model)
            if serving and not settled:
                merged = merged._replace(ids=True, settled=False)
            self._by_model[model] = merged
            if len(self._by_model) > 1024:
                self._by_model.clear()
        return merged

    def describe(self) -> list[dict[str, Any]]:
        """Every upstream as the admin listener shows it."""
        return [
            {
                "id": m.upstream.id,
                "url": m.settings.url,
                "up": m.health.up,
                "in_service": m.info.slots > 0,
                "draining": m.draining,
                "cause": m.health.cause,
                "slots": m.slots,
                "slots_auto": m.auto is not None,
                "slots_allowed": m.info.slots,
                "engine_running": None if m.load is None else m.load.running,
                "engine_waiting": None if m.load is None else m.load.waiting,
                "engine_kv_usage": None if m.load is None else m.load.kv,
                "engines": m.upstream.capabilities.engines,
                "data_parallel_rank": m.settings.data_parallel_rank,
                "breaker": m.health.breaker.state(asyncio.get_running_loop().time()),
                "overcommit": m.overcommit,
                "kind": m.upstream.capabilities.kind,
                "models": sorted(m.upstream.capabilities.models),
                "context": dict(m.upstream.capabilities.context),
                "token_ids": m.upstream.capabilities.ids,
                "orders_by_priority": m.upstream.capabilities.orders,
            }
            for m in self._members.values()
        ]

    # --- changes -------------------------------------------------------------------------------------------------

    async def add(self, settings: config.Upstream) -> None:
        """Begin to use another upstream. Raises ``ConfigError`` for keys or certificates that cannot be read."""
        member = self._add(settings)
        try:
            await self._watch(member)
        except ConfigError:
            # What never began must not be listed, nor stand in the way of the next attempt.
            del self._members[settings.name], self._upstreams[settings.name]
            raise

    def settings(self) -> dict[str, config.Upstream]:
        """Every upstream's settings by name."""
        return {name: member.settings for name, member in self._members.items()}

    def change(self, settings: config.Upstream) -> None:
        """Other settings for an upstream that ``in_place`` says can take them over."""
        self._members[settings.name].change(settings, self._overcommit)

    def keep_in_hand(self, overcommit: int) -> None:
        """Calls in flight beyond the slots from now on, at upstreams whose settings do not say otherwise."""
        if overcommit != self._overcommit:
            self._overcommit = overcommit
            for member in self._members.values():
                member.keep_in_hand(overcommit)

    def drain(self, upstream_id: str, *, draining: bool = True) -> None:
        """Send it nothing more (or again). What runs there goes on elsewhere where it can, or finishes."""
        member = self._members[upstream_id]
        member.draining = draining
        self._publish(member)

    async def remove(self, upstream_id: str) -> None:
        """Forget a drained upstream."""
        member = self._members.pop(upstream_id)
        self._by_model.clear()
        del self._upstreams[upstream_id]
        await _stop(member)

    def _add(self, settings: config.Upstream) -> _Member:
        member = _Member(settings, self._overcommit, self._publish, self._lost)
        self._members[settings.name] = member
        self._upstreams[settings.name] = member.upstream
        return member

    async def _watch(self, member: _Member) -> None:
        await member.upstream.start()
        self._publish(member)
        member.task = spawn(member.watch(), name=f"watch {member.upstream.id}")

    def _publish(self, member: _Member) -> None:
        self._by_model.clear()
        info = member.info
        if info != member.published:
            member.published = info
            self._listener(info)


async def _stop(member: _Member) -> None:
    if member.task is not None:
        member.task.cancel()
        await asyncio.wait([member.task])
    await member.upstream.close()


def _as_before(found: Capabilities, before: Capabilities) -> Capabilities:
    """What an upstream can do that stumbled over the question: what it could the last time, if it is the same still.

    Taken for a no, one bad moment of one engine would let every answer of its model go unsliced, on all of them.
    """
    if not before.models & found.models or ("other" not in (found.kind, before.kind) and found.kind != before.kind):
        return found
    kind = before.kind if found.kind == "other" else found.kind
    return found._replace(
        ids=before.ids,
        chat_ids=before.chat_ids,
        reasoning_parser=before.reasoning_parser,
        thinking=before.thinking,
        tool_parser=before.tool_parser,
        fingerprint=before.fingerprint,
        orders=before.orders,
        kind=kind,
    )


def _least(able: list[Capabilities], model: str) -> Capabilities:
    if not able:
        # Nothing is known. Assume the best: a call that is refused for it is repeated unsliced.
        return Capabilities(ids=True)
    contexts = [c.context[model] for c in able if model in c.context]
    return Capabilities(
        models=frozenset({model}),
        context={model: min(contexts)} if contexts else {},
        # The dialects by which ids are told differ: a job cannot go from one to the other.
        ids=all(c.ids for c in able) and len({c.kind == LLAMA_CPP for c in able}) == 1,
        chat_ids=all(c.chat_ids for c in able),
        text=all(c.ids or c.text for c in able),
        orders=all(c.orders for c in able),
        chat_parser=any(c.chat_parser for c in able),
        reasoning_parser=any(c.reasoning_parser for c in able),
        thinking=able[0].thinking if len({c.thinking for c in able}) == 1 else None,
        tool_parser=any(c.tool_parser for c in able),
        fingerprint=next((c.fingerprint for c in able if c.fingerprint is not None), None),
        kind=able[0].kind,
    )
