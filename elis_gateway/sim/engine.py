"""A model of a batching LLM engine: a pure state machine over ``now``.

Knows: slots, how fast a batch decodes, what starting a call costs, key-value memory, its own queue. Never: asyncio,
text, who calls it.

*The model is a fluid.* While the batch does not change, every running sequence gains tokens at the same rate
r(batch). So one counter, the *service* a sequence would have received had it run since the beginning, and a heap of
the counter's values at which something happens, replace a step per token: a call costs O(log n) however long it is.
A real engine works in steps; the fluid differs by at most about a step per event (``tests/sim`` compares the two).

*What starting a call costs* is work added to that sequence before its first token: ``seam_tokens`` decoded-token
equivalents, plus the prompt tokens that are not cached, at the prefill rate. A real engine's prefill also holds up the
sequences beside it; ``prefill_stalls`` models the extreme, where nobody decodes meanwhile (small engines without
chunked prefill; the seam's own tokens stay work of the sequence). Either way
capacity spent on a seam is lost.

*Memory.* With ``kv_tokens`` a call is admitted only while its prompt fits, in order (the head of the queue blocks the
rest), and when growing sequences fill the memory the one of lowest priority, the latest among equals, is evicted, and
is computed anew when it is admitted again: vLLM's preemption by recomputation. A sequence's share is counted from its
admission in service units, so pessimistic by the few tokens that starting costs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush, heapreplace
from math import ceil, inf
from typing import NamedTuple

from elis_gateway.sim.model import EngineModel

__all__ = ["Engine", "EngineModel", "Event", "EventKind", "PrefixCache", "Totals"]


class EventKind(Enum):
    STARTED = "started"
    """The call's first token."""
    MARK = "mark"
    """Another ``mark_every`` tokens of this call."""
    ENDED = "ended"
    """Its last token; the slot is free."""


STARTED, MARK, ENDED = EventKind.STARTED, EventKind.MARK, EventKind.ENDED


class Event(NamedTuple):
    kind: EventKind
    call_id: Hashable
    tokens: int
    """Tokens of this call so far."""
    at: float


_new_event = tuple.__new__
"""``Event(...)`` without the detour through Python that a named tuple's constructor takes."""


@dataclass(slots=True)
class Totals:
    """What the engine did, since it was made."""

    busy: float = 0.0
    """Seconds with at least one sequence running."""
    full: float = 0.0
    """Seconds with every slot taken: the only ones by which capacity can be judged."""
    full_tokens: float = 0.0
    """Answer tokens made in them (work of starting calls excluded, at the call's admission)."""
    tokens: int = 0
    """Answer tokens made altogether, of ended and aborted calls."""
    calls: int = 0
    aborts: int = 0
    evictions: int = 0
    prefilled: int = 0
    """Prompt tokens computed, that is, not found in the cache."""


class _Call:
    """One call, waiting or running."""

    __slots__ = (
        "announced", "base", "cached", "every", "gone", "id", "key", "mark", "output", "prompt", "seq", "target",
        "tokens", "zero",
    )  # fmt: skip

    def __init__(
        self, call_id: Hashable, seq: int, key: int, prompt: int, cached: int, output: int, every: int | None
    ) -> None:
        self.id = call_id
        self.seq = seq
        self.key = key
        """Place in the queue before ``seq``: the priority where the engine orders, else 0."""
        self.prompt = prompt
        self.cached = cached
        self.output = output
        self.every = every or 0
        self.mark = every or output
        """Tokens at which the next MARK is due."""
        self.announced = False
        self.tokens = 0
        """Tokens made before it was last admitted (not 0 after an eviction)."""
        self.target = 1
        """Tokens at the event that its heap entry stands for."""
        self.zero = 0.0
        """Value of the service counter at which it had, or would have had, no token."""
        self.base = 0.0
        """What it adds to the memory in use beyond the service counter."""
        self.gone = False
        """Ended, aborted or evicted: its heap entry is stale."""


class Engine:
    """The state machine. ``now`` (seconds) never goes back; events due before an input are kept for ``advance``.

    A driver repeats: ask ``next_event``, wait until then, ``advance``, act on the events.
    """

    def __init__(self, model: EngineModel, *, now: float = 0.0) -> None:
        self.model = model
        self.totals = Totals()
        self._slots = model.slots
        self._orders = model.orders
        self._seam = model.seam_tokens
        self._prefill = model.prefill_tokens_per_second
        self._kv = model.kv_tokens
        self._rates = [0.0] + [model.rate(batch) for batch in range(1, model.slots + 1)]
        self._at = now
        self._stalled = now
        """Nobody decodes before this time."""
        self._service = 0.0
        self._rate = 0.0
        self._heap: list[tuple[float, int, _Call]] = []
        self._queue: list[tuple[int, int, _Call]] = []
        self._calls: dict[Hashable, _Call] = {}
        """Running calls."""
        self._waiting: dict[Hashable, _Call] = {}
        self._events: list[Event] = []
        self._seq = 0
        self._due = inf
        """When the next thing happens in here; -1: to be computed."""
        self._memory = 0.0
        """Memory in use is this plus the service counter times the batch."""

    @property
    def running(self) -> int:
        return len(self._calls)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_used(self) -> float:
        """Tokens of memory in use, as of the last input; 0 where memory is no limit."""
        if self._kv is None:
            return 0.0
        return self._memory + len(self._calls) * self._service

    def start(
        self,
        call_id: Hashable,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        now: float,
        mark_every: int | None = None,
        priority: int = 0,
    ) -> None:
        """Take a call that will produce ``output_tokens`` (at least 1); it runs at once or joins the queue.

        Raises ValueError where the id is in use, or the call could never fit into ``kv_tokens``.
        """
        if output_tokens < 1:
            raise ValueError(f"a call makes at least one token, not {output_tokens}")
        if call_id in self._calls or call_id in self._waiting:
            raise ValueError(f"call {call_id!r} is in progress")
        if self._kv is not None and prompt_tokens + output_tokens > self._kv:
            raise ValueError(f"{prompt_tokens} + {output_tokens} tokens do not fit into {self._kv}")
        if now > self._at or self._kv is not None:
            self._run_to(now)
        self._seq += 1
        self.totals.calls += 1
        key = priority if self._orders else 0
        call = _Call(call_id, self._seq, key, prompt_tokens, cached_tokens, output_tokens, mark_every)
        if not self._queue and len(self._calls) < self._slots and self._fits(call):
            self._admit(call)
            self._set_rate()
        else:
            self._waiting[call_id] = call
            heappush(self._queue, (key, call.seq, call))
            self._fill()

    def abort(self, call_id: Hashable, now: float) -> int:
        """Drop a call; returns the tokens it made. 0 for a call that is not known (it may just have ended).

        Events of the call that were due before ``now`` but not fetched yet are dropped with it, except ENDED: a call
        that had ended stays ended, and 0 is returned.
        """
        self._run_to(now)
        call = self._calls.pop(call_id, None)
        if call is None:
            waiting = self._waiting.pop(call_id, None)
            if waiting is None:
                return 0
            waiting.gone = True
            self.totals.aborts += 1
            self.totals.tokens += waiting.tokens
            self._fill()  # the head of the queue may have been what did not fit
            return waiting.tokens
        if self._events:
            self._events = [event for event in self._events if event.call_id != call_id]
        made = self._leave(call)
        self.totals.aborts += 1
        self.totals.tokens += made
        self._fill()
        return made

    def abort_all(self, now: float) -> dict[Hashable, int]:
        """Drop everything (the engine died); returns each call's tokens."""
        self._run_to(now)
        return {call_id: self.abort(call_id, now) for call_id in [*self._waiting, *self._calls]}

    def holds(self, call_id: Hashable) -> bool:
        """Is the call waiting or running? False as soon as it has ended, fetched or not."""
        return call_id in self._calls or call_id in self._waiting

    def tokens(self, call_id: Hashable, now: float) -> int:
        """Tokens a call has made by ``now``; 0 for an unknown one."""
        self._run_to(now)
        call = self._calls.get(call_id)
        if call is None:
            call = self._waiting.get(call_id)
            return 0 if call is None else call.tokens
        return self._made(call)

    def next_event(self) -> float | None:
        """When to ``advance`` next; None: never, without further input. An eviction is such a time, too."""
        if self._events:
            return self._events[0][3]
        due = self._due if self._due >= 0 else self._next()
        return None if due == inf else due

    def advance(self, now: float) -> list[Event]:
        """Events up to ``now``, in order of time."""
        self._run_to(now)
        events, self._events = self._events, []
        return events

    # What follows keeps one invariant: between inputs no event lies before ``_at``, and ``_service`` is as of ``_at``.

    def _next(self) -> float:
        """Compute ``_due``: the running call whose next mark is first, or the memory full."""
        heap = self._heap
        while heap and heap[0][2].gone:
            heappop(heap)
        if heap:
            mark = heap[0][0] if self._kv is None else min(heap[0][0], self._memory_mark())
            at = self._at if self._at > self._stalled else self._stalled
            self._due = due = at + (mark - self._service) / self._rate
            return due
        self._due = inf
        return inf

    def _memory_mark(self) -> float:
        """The service at which the memory is full; a sequence alone always fits."""
        batch = len(self._calls)
        if batch < 2 or self._kv is None:
            return inf
        return max((self._kv - self._memory) / batch, self._service)

    def _run_to(self, now: float) -> None:
        due = self._due if self._due >= 0 else self._next()
        while due <= now:
            if due > self._at:
                self._elapse(due)
            mark, _, call = self._heap[0]
            if self._kv is not None and (full := self._memory_mark()) < mark:
                self._service = full
                self._evict()
            else:
                self._service = mark
                self._reach(call, due)
            due = self._next()
        if now > self._at:
            self._elapse(now)

    def _elapse(self, to: float) -> None:
        """Let time pass in which nothing happens; ``to`` lies ahead."""
        span = to - self._at
        batch = len(self._calls)
        if batch:
            totals = self.totals
            totals.busy += span
            work = (span if self._at >= self._stalled else max(to - self._stalled, 0.0)) * self._rate
            self._service += work
            if batch == self._slots:
                totals.full += span
                totals.full_tokens += work * batch
        self._at = to

    def _reach(self, call: _Call, at: float) -> None:
        """A running call, top of the heap, has made ``call.target`` tokens."""
        tokens = call.target
        output = call.output
        if not call.announced:
            call.announced = True
            self._events.append(_new_event(Event, (STARTED, call.id, tokens, at)))
        if tokens == output:
            self._events.append(_new_event(Event, (ENDED, call.id, tokens, at)))
            heappop(self._heap)
            del self._calls[call.id]
            call.gone = True
            self._memory -= call.base
            self.totals.tokens += tokens
            self._fill()
            return
        mark = call.mark
        if tokens == mark and call.every:
            self._events.append(_new_event(Event, (MARK, call.id, tokens, at)))
            call.mark = mark = mark + call.every
        call.target = target = mark if mark < output else output
        heapreplace(self._heap, (call.zero + target, call.seq, call))

    def _fits(self, call: _Call) -> bool:
        if self._kv is None or not self._calls:
            return True
        return self._blocks(call) + len(self._calls) + 1 <= self._kv - self.kv_used

    def _blocks(self, call: _Call) -> int:
        block = self.model.block
        return ceil((call.prompt + call.tokens) / block) * block

    def _admit(self, call: _Call) -> None:
        """Put a call into the batch. The caller sets the rate afterwards."""
        self._calls[call.id] = call
        batch = len(self._calls)
        start = self._seam
        if self._prefill is not None:
            uncached = call.prompt + call.tokens - call.cached
            if uncached > 0:
                self.totals.prefilled += uncached
                seconds = uncached / self._prefill
                if self.model.prefill_stalls:
                    self._stalled = max(self._stalled, self._at) + seconds
                else:
                    start += seconds * self._rates[batch]
        if batch == self._slots:
            self.totals.full_tokens -= start
        call.zero = self._service + start - call.tokens
        if self._kv is not None:
            call.base = self._blocks(call) - self._service
            self._memory += call.base
        heappush(self._heap, (call.zero + call.target, call.seq, call))

    def _leave(self, call: _Call) -> int:
        """Take a call, already out of ``_calls``, out of the batch; returns its tokens."""
        call.gone = True
        made = self._made(call)
        if made == call.tokens and len(self._calls) + 1 == self._slots:
            # Starting may not have been finished: give back what was charged and not spent.
            self.totals.full_tokens += max(call.zero + call.tokens - self._service, 0.0)
        self._memory -= call.base
        if len(self._heap) > 2 * len(self._calls) + 64:
            self._heap[:] = [entry for entry in self._heap if not entry[2].gone]
            heapify(self._heap)
        return made

    def _made(self, call: _Call) -> int:
        made = int(self._service - call.zero + 1e-6)
        return min(max(made, call.tokens), call.output)

    def _set_rate(self) -> None:
        self._rate = self._rates[len(self._calls)]
        self._due = -1.0

    def _fill(self) -> None:
        """Admit from the queue what fits, and set the rate of the new batch."""
        queue = self._queue
        calls = self._calls
        while queue and len(calls) < self._slots:
            call = queue[0][2]
            if call.gone:
                heappop(queue)
                continue
            if not self._fits(call):
                break
            heappop(queue)
            del self._waiting[call.id]
            self._admit(call)
        if not calls:
            # Nothing depends on the counter's value now: starting over keeps its precision.
            self._heap.clear()
            self._service = self._memory = 0.0
        self._set_rate()

    def _evict(self) -> None:
        """Memory is full: push the least important running call back into the queue, to be computed anew."""
        victim = max(self._calls.values(), key=lambda call: (call.key, call.seq))
        del self._calls[victim.id]
        made = self._leave(victim)
        self.totals.evictions += 1
        again = _Call(victim.id, victim.seq, victim.key, victim.prompt, 0, victim.output, victim.every or None)
        again.tokens = made
        again.mark = victim.mark
        again.announced = victim.announced
        again.target = victim.target
        self._waiting[again.id] = again
        heappush(self._queue, (again.key, again.seq, again))
        self._set_rate()


class PrefixCache:
    """Which prefixes an engine still holds: tokens by key (a job, a conversation), least recently used out first.

    A stand-in for block hashing that needs no text: callers say which key a prompt extends. Whole blocks count, and a
    prompt's last token is always computed, as in vLLM.
    """

    def __init__(self, model: EngineModel, *, tokens: int | None = None) -> None:
        """``tokens``: how much it holds; by default the engine's ``kv_tokens``, or a million."""
        self._on = model.prefix_cache
        self._block = model.block
        self._room = tokens if tokens is not None else model.kv_tokens or 1_000_000
        self._held: OrderedDict[Hashable, int] = OrderedDict()
        self._total = 0

    def lookup(self, key: Hashable, prompt_tokens: int) -> int:
        """Tokens of a prompt that extends ``key`` which need not be computed."""
        held = self._held.get(key)
        if held is None:
            return 0
        self._held.move_to_end(key)
        usable = held if held < prompt_tokens else prompt_tokens - 1
        return max(usable - usable % self._block, 0)

    def store(self, key: Hashable, tokens: int) -> None:
        """The engine has computed ``tokens`` tokens of ``key`` (prompt and answer)."""
        if not self._on:
            return
        held = self._held
        self._total += tokens - held.pop(key, 0)
        held[key] = tokens
        while self._total > self._room and held:
            _, out = held.popitem(last=False)
            self._total -= out

    def clear(self) -> None:
        """The engine was restarted."""
        self._held.clear()
        self._total = 0
