"""A table of limited size that strangers cannot empty.

Knows: keys, how often each was used. Never: what is kept by them.

What is used least recently goes first, but among those that are used for the first few times and those that came back
apart: names that are invented for a request each push out each other, never what was learned of the ones in use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from typing import Generic, TypeVar

__all__ = ["Shelf"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_PROVEN = 8
"""Uses after which a key is no stranger any more."""
_SHARE = 8
"""One in so many places is strangers' own; they have the others only while nobody else wants them."""


class Shelf(Generic[K, V]):
    """At most ``most`` values by key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._own = max(most // _SHARE, 1)
        self._known: OrderedDict[K, V] = OrderedDict()
        self._strangers: OrderedDict[K, V] = OrderedDict()
        self._uses: dict[K, int] = {}
        """Of strangers."""

    def __len__(self) -> int:
        return len(self._known) + len(self._strangers)

    def __iter__(self) -> Iterator[K]:
        """Keys, as they were at this moment, in the order in which they would go: strangers first."""
        return chain(list(self._strangers), list(self._known))

    def get(self, key: K) -> V | None:
        """What is kept by ``key``; this is no use of it."""
        found = self._known.get(key)
        return found if found is not None else self._strangers.get(key)

    def stranger(self, key: K) -> bool:
        """Whether this one was used a few times at most."""
        return key not in self._known

    def use(self, key: K, make: Callable[[], V], times: int = 1) -> V:
        """What is kept by ``key``, made if it is not there."""
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        value = self._strangers.get(key)
        if value is None:
            value = self._strangers[key] = make()
        self._strangers.move_to_end(key)
        uses = self._uses[key] = self._uses.get(key, 0) + times
        if uses >= _PROVEN:
            self._known[key] = self._strangers.pop(key)
            del self._uses[key]
        if len(self) > self._most:
            self._forget()
        return value

    def _forget(self) -> None:
        if len(self._strangers) > self._own or not self._known:
            gone, _ = self._strangers.popitem(last=False)
            del self._uses[gone]
        else:
            self._known.popitem(last=False)

    def clear(self) -> None:
        for table in (self._known, self._strangers, self._uses):
            table.clear()
