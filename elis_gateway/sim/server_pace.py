"""Paces calls by the modelled engine over the event loop's time.

Knows: the loop's clock, one timer, who waits for which call's tokens. Never: text, HTTP.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from elis_gateway.sim.engine import Engine, EngineModel, EventKind

__all__ = ["BlockCache", "Pacer", "Ticket"]


_TICK = 0.001
"""Seconds between two looks at the engine, at least: a loop's clock is no finer (uvloop's counts milliseconds), and a
timer that fires a moment early would be set again and again."""


class Ticket:
    """One call in the engine. ``produced`` tokens are there; ``wait`` returns when there are more."""

    __slots__ = ("_waiter", "begun", "dead", "due", "ended", "id", "produced", "size", "started")

    def __init__(self, ticket_id: int, size: int) -> None:
        self.id = ticket_id
        self.size = size
        """Prompt tokens."""
        self.produced = 0
        self.begun: float | None = None
        """Loop time at which the engine got it."""
        self.started: float | None = None
        """Loop time of the first token."""
        self.due: float | None = None
        """Loop time at which the model made the last token: this process may have come to it later."""
        self.ended = False
        self.dead = False
        """The engine was killed."""
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self, have: int) -> int:
        """Tokens there are, once they are more than ``have`` or the call is over."""
        while self.produced <= have and not self.ended and not self.dead:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.produced

    def news(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pacer:
    """An engine in real time. ``speed``: modelled seconds per real second. ``delay`` False: no engine at all.

    ``stride``: see ``ServerConfig``.
    """

    def __init__(
        self, model: EngineModel, *, speed: float = 1.0, delay: bool = True, stride: float | None = None
    ) -> None:
        self.model = model
        self.delay = delay
        self._speed = speed
        self._stride = stride
        self._loop = asyncio.get_running_loop()
        self._looked = self._loop.time()
        self._lost = 0.0
        """Seconds that did not pass for the engine."""
        self._engine = Engine(model, now=self._now())
        self._tickets: dict[Hashable, Ticket] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0

    def _now(self) -> float:
        now = self._loop.time()
        if self._stride is not None:
            self._lost += max(now - self._looked - self._stride, 0.0)
            self._looked = now
        return (now - self._lost) * self._speed

    @property
    def running(self) -> int:
        return self._engine.running

    @property
    def waiting(self) -> int:
        return self._engine.waiting

    @property
    def kv_usage(self) -> float:
        """Share of the key-value memory in use, 0 to 1; 0 where the model has no limit."""
        limit = self.model.kv_tokens
        return 0.0 if limit is None else min(self._engine.kv_used / limit, 1.0)

    @property
    def evictions(self) -> int:
        return self._engine.totals.evictions

    def start(self, prompt: int, cached: int, output: int, *, every: int | None, priority: int) -> Ticket:
        """Give the engine a call of ``output`` tokens. Raises ValueError where it can never fit into memory."""
        self._next += 1
        ticket = Ticket(self._next, prompt)
        ticket.begun = self._loop.time()
        if not self.delay:
            ticket.produced, ticket.ended, ticket.started, ticket.due = output, True, ticket.begun, ticket.begun
            return ticket
        self._engine.start(ticket.id, prompt, cached, output, self._now(), mark_every=every, priority=priority)
        self._tickets[ticket.id] = ticket
        self._turn()
        return ticket

    def stop(self, ticket: Ticket) -> int:
        """Abort the call if it is not over; its slot is free at once. Returns the tokens it made."""
        if self._tickets.pop(ticket.id, None) is not None:
            ticket.produced = max(ticket.produced, self._engine.abort(ticket.id, self._now()))
            self._turn()
        return ticket.produced

    def kill(self) -> None:
        """The engine dies: every call ends here, and nothing is remembered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tickets, self._tickets = self._tickets, {}
        self._engine = Engine(self.model, now=self._now())
        for ticket in tickets.values():
            ticket.dead = True
            ticket.news()

    def _turn(self) -> None:
        """Hand out what is due, and set the timer for the next event."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for event in self._engine.advance(self._now()):
            ticket = self._tickets.get(event.call_id)
            if ticket is None:
                continue
            ticket.produced = event.tokens
            if event.kind is EventKind.STARTED:
                ticket.started = self._loop.time()
            elif event.kind is EventKind.ENDED:
                ticket.ended, ticket.due = True, event.at / self._speed + self._lost
                del self._tickets[ticket.id]
            ticket.news()
        due = self._engine.next_event()
        if due is not None:
            wait = due / self._speed + self._lost - self._loop.time()
            if self._stride is not None:
                wait = min(wait, self._stride / 2)
            self._timer = self._loop.call_later(max(wait, _TICK), self._turn)


class BlockCache:
    """Which blocks of tokens the engine's prefix cache holds, by hash chain, least recently used out first.

    As vLLM's: full blocks only, and a prompt's last token is always computed.
    """

    def __init__(self, model: EngineModel) -> None:
        self._on = model.prefix_cache
        self._block = model.block
        self._room = (model.kv_tokens or 1_000_000) // model.block
        self._held: OrderedDict[int, None] = OrderedDict()
        self.queries = 0
        self.hits = 0

    def _chain(self, ids: Sequence[int], upto: int) -> list[int]:
        block, value, chain = self._block, 0, []
        for start in range(0, upto - block + 1, block):
            value = hash((value, tuple(ids[start : start + block])))
            chain.append(value)
        return chain

    def lookup(self, ids: Sequence[int]) -> int:
        """Tokens at the start of this prompt that need not be computed."""
        if not self._on:
            return 0
        self.queries += len(ids)
        found = 0
        for value in self._chain(ids, len(ids) - 1):
            if value not in self._held:
                break
            self._held.move_to_end(value)
            found += self._block
        self.hits += found
        return found

    def store(self, ids: Sequence[int]) -> None:
        """These tokens, prompt and answer, have been computed."""
        if not self._on:
            return
        held = self._held
        for value in self._chain(ids, len(ids)):
            held[value] = None
            held.move_to_end(value)
        while len(held) > self._room:
            held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()
