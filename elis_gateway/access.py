"""Who may ask for what, and how much of it: keys, their models and classes, rates, jobs at once. Never: HTTP statuses.

A key is known by its SHA-256 alone. That is enough because a key made by ``elis-gateway key`` is 256 random bits:
nothing to guess, so nothing for a slow hash to slow down. Without any key configured everybody is let in.

Rates are token buckets that hold one minute's allowance. A request is charged when it is let in; tokens are charged
for the prompt then and for the answer when it is over, so that the last answer of a minute may overdraw the bucket,
which delays the next request by as much.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from elis_gateway import config
from elis_gateway.errors import ClientError, Forbidden, ModelNotFound, Overloaded, Unauthorized
from elis_gateway.flight import Flight, Observer

__all__ = ["CREDENTIALS", "Door", "Grant", "Rounds", "hashed", "matches", "new_key", "presented"]

CREDENTIALS = ("Authorization", "api-key", "x-api-key")
"""Request headers in which a client may say who it is."""

_PREFIX = "elis-"
_CLASS = 2**40
"""Rounds between two classes: more than there will ever be."""
_FIRST_GUESS = 250.0
"""Tokens of an answer, until some have been seen."""
_SHORTEST = 20
"""Characters below which a key is no secret, whoever made it."""


def new_key() -> str:
    """A key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hashed(key: str) -> str:
    """What the configuration keeps of a key. Raises ``ClientError`` for one that could be guessed."""
    if len(key) < _SHORTEST:
        raise ClientError(f"a key needs at least {_SHORTEST} characters")
    return f"sha256:{_digest(key)}"


def matches(key: str | None, stored: str) -> bool:
    """Is this the key whose hash is stored? In constant time."""
    return key is not None and hmac.compare_digest(f"sha256:{_digest(key)}", stored)


def _digest(key: str) -> str:
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def presented(headers: Mapping[str, str]) -> str | None:
    """The key a client brings: ``Authorization: Bearer``, or the header other SDKs use."""
    given = headers.get("Authorization")
    if given is not None:
        scheme, _, key = given.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else None
    return headers.get("api-key") or headers.get("x-api-key")


class _Bucket:
    """An allowance per minute that fills steadily and may be overdrawn once."""

    __slots__ = ("_at", "_left", "_per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` may be taken; 0.0: now. More than the bucket holds may go when it is full."""
        rate = self._per_minute / 60.0
        self._left = min(self._left + (now - self._at) * rate, float(self._per_minute))
        self._at = now
        return max(min(amount, self._per_minute) - self._left, 0.0) / rate

    def take(self, amount: float) -> None:
        self._left -= amount

    def resized(self, per_minute: int | None, now: float) -> _Bucket | None:
        """The same bucket with another allowance, what was taken still missing."""
        if per_minute is None:
            return None
        if per_minute == self._per_minute:
            return self
        self.wait(0.0, now)
        new = _Bucket(per_minute, now)
        new._left -= min(max(self._per_minute - self._left, 0.0), per_minute)
        return new


class Grant:
    """One key's rights, and what it uses of them. ``name`` is for logs and the admin listener, never the key."""

    def __init__(self, settings: config.ApiKey, limits: config.Limits, now: float) -> None:
        self.name = settings.name
        self.live = 0
        """Jobs and relayed calls that are not over."""
        self.requests = 0
        self.tokens = 0
        self.refused = 0
        self.tag = 0.0
        """Virtual time at which all it has asked for would be served, had it exactly its share."""
        self._requests: _Bucket | None = None
        self._tokens: _Bucket | None = None
        self.change(settings, limits, now)

    def change(self, settings: config.ApiKey, limits: config.Limits, now: float) -> None:
        """Other settings from now on; what was used stays used."""
        self.name = settings.name
        self.settings = settings
        rates = limits.per_key
        self.concurrent = settings.concurrent or rates.concurrent
        self._requests = _changed(self._requests, settings.requests_per_minute or rates.requests_per_minute, now)
        self._tokens = _changed(self._tokens, settings.tokens_per_minute or rates.tokens_per_minute, now)

    def may_use(self, *names: str) -> bool:
        """Is any of these names of one model among the key's models?"""
        models = self.settings.models
        return not models or any(name in models for name in names)

    def charge(self, tokens: int, now: float, requests: int = 1) -> None:
        """Take so many requests and the tokens of their prompts. Raises ``Overloaded`` and takes nothing."""
        for bucket, amount, what in ((self._requests, requests, "requests"), (self._tokens, tokens, "tokens")):
            if bucket is not None and (wait := bucket.wait(amount, now)) > 0.0:
                raise Overloaded(f"this key has used up its {what} per minute", cause="rate_limit", retry_after=wait)
        if self._requests is not None:
            self._requests.take(requests)
        self.requests += requests
        self.add(tokens)

    def add(self, tokens: int) -> None:
        """Tokens that were used."""
        self.tokens += tokens
        if self._tokens is not None:
            self._tokens.take(tokens)


def _changed(bucket: _Bucket | None, per_minute: int | None, now: float) -> _Bucket | None:
    if bucket is not None:
        return bucket.resized(per_minute, now)
    return None if per_minute is None else _Bucket(per_minute, now)


class Door(Observer):
    """Lets requests in. ``clock``: the loop's time; ``patience``: seconds after which a model may have room again."""

    def __init__(
        self,
        keys: Iterable[config.ApiKey],
        limits: config.Limits,
        classes: Mapping[str, int],
        clock: Callable[[], float],
        patience: Callable[[str], float],
        *,
        fair_round: int | None = None,
    ) -> None:
        self._round = fair_round
        """Tokens each key has in a round of fair sharing; None: no fair sharing."""
        self._now_served = 0.0
        """Virtual time: where in the sequence of rounds we are."""
        self._usual = _FIRST_GUESS
        """Tokens of an answer on average."""
        self._clock = clock
        self._patience = patience
        self._grants: dict[str, Grant] = {}
        self._classes: dict[str, int] = {}
        """Live jobs by class."""
        self._bytes = 0
        """Of the bodies of live jobs."""
        self._inside: dict[str, Grant | None] = {}
        """Jobs that were let in and are not over, by id."""
        self.change(keys, limits, classes)

    def change(self, keys: Iterable[config.ApiKey], limits: config.Limits, classes: Mapping[str, int]) -> None:
        """Other keys and limits from now on. A key that stays keeps what it has used; one that is gone lets in no
        more, and what it has under way goes on."""
        now = self._clock()
        grants: dict[str, Grant] = {}
        for settings in keys:
            known = self._grants.get(settings.hash)
            if known is not None:
                known.change(settings, limits, now)
            grants[settings.hash] = known or Grant(settings, limits, now)
        self._limits, self._ranks = limits, dict(classes)
        self._grants = grants

    def who(self, headers: Mapping[str, str]) -> Grant | None:
        """Whose request this is; None: there are no keys. Raises ``Unauthorized``."""
        if not self._grants:
            return None
        key = presented(headers)
        if key is None:
            raise Unauthorized("You didn't provide an API key: send it as `Authorization: Bearer KEY`.")
        stored = f"sha256:{_digest(key)}"
        grant = self._grants.get(stored)
        # Found by the hash of what was sent: how long that takes says nothing about any key. Compared once more so
        # that this stays true whatever the table becomes.
        if grant is None or not hmac.compare_digest(grant.settings.hash, stored):
            raise Unauthorized("Incorrect API key provided.")
        return grant

    def default_class(self, grant: Grant | None, default: str) -> str:
        """The class of a request that names none: the key's own, and never above what the key may ask for."""
        if grant is None:
            return default
        settings = grant.settings
        if settings.default_class is not None:
            return settings.default_class
        best = settings.max_class
        return best if best is not None and self._ranks.get(default, 0) < self._ranks.get(best, 0) else default

    def check(self, grant: Grant | None, model: str, asked: str, class_name: str) -> None:
        """May this key use the model (under either name) and the class? Raises ``Forbidden`` or ``ModelNotFound``."""
        if grant is None:
            return
        if not grant.may_use(model, asked):
            # The same words as for one that does not exist: what else is served here is not this key's business.
            raise ModelNotFound(asked or model)
        best = grant.settings.max_class
        if best is not None and self._ranks.get(class_name, 0) < self._ranks.get(best, 0):
            raise Forbidden(f"this key may not ask for the class {class_name!r}, only up to {best!r}", "X-Elis-Class")

    # --- fair shares ---------------------------------------------------------------------------------------------

    def rank(self, grant: Grant | None, rank: int) -> int:
        """The rank of a job of this class. With fair sharing classes are divided into rounds.

        That is start-time fair queueing (Goyal, Vin and Cheng, 1996) in coarse steps: in every round each key has room
        for so many tokens, times its weight; who asks for more gets into later rounds, and who comes late begins with
        the round that is being served. Within a round the policy decides.
        """
        if self._round is None:
            return rank
        start = self._now_served
        if grant is not None:
            start = max(grant.tag, start)
            grant.tag = start + self._usual / grant.settings.weight
        return rank * _CLASS + int(start / self._round)

    def serving(self, flight: Flight) -> None:
        """Somebody is served: nobody can begin in an earlier round any more."""
        if self._round is not None:
            self._now_served = max(self._now_served, float(flight.spec.rank % _CLASS) * self._round)

    def _settle(self, grant: Grant, tokens: int) -> None:
        """What was reckoned for a job was an average: its key pays, or gets back, the difference."""
        if self._round is not None:
            grant.tag += (tokens - self._usual) / grant.settings.weight
            self._usual += 0.02 * (tokens - self._usual)

    def enter(self, flights: Sequence[Flight], grant: Grant | None) -> None:
        """Let the jobs of one request in, or raise ``Overloaded`` and take nothing. Once they are in, each leaves by
        ``finished`` or ``leave``.

        More than a limit ever allows at once (choices, bytes) may go where nothing else is under way: who is told to
        come back later must find room then.
        """
        spec, class_name = flights[0].spec, flights[0].class_name
        size = sum(len(flight.request.raw) for flight in flights)
        if self._bytes and self._bytes + size > self._limits.max_bytes:
            raise Overloaded(
                "too many bytes of requests are waiting", cause="queue_bytes", retry_after=self._patience(spec.model)
            )
        limit = self._limits.classes.get(class_name)
        live = self._classes.get(class_name, 0)
        if limit is not None and live and live + len(flights) > limit:
            raise Overloaded(
                f"too many requests of class {class_name} at once",
                cause="class_limit",
                retry_after=self._patience(spec.model),
            )
        if grant is not None:
            self._charge(grant, sum(flight.spec.prompt_tokens for flight in flights), spec.model, len(flights))
            grant.live += len(flights)
        for flight in flights:
            if self._round is not None:
                flight.spec = flight.spec._replace(rank=self.rank(grant, flight.spec.rank))
            self._inside[flight.spec.id] = grant
        self._classes[class_name] = live + len(flights)
        self._bytes += size

    def leave(self, flight: Flight) -> None:
        """The job is over, or never began. A second call changes nothing."""
        job_id = flight.spec.id
        if job_id not in self._inside:
            return
        grant = self._inside.pop(job_id)
        self._bytes -= len(flight.request.raw)
        self._classes[flight.class_name] -= 1
        if grant is not None:
            grant.live -= 1
            grant.add(flight.answer.attained)
            self._settle(grant, flight.answer.attained)

    def finished(self, flight: Flight) -> None:
        """A job is over."""
        self.leave(flight)

    @contextmanager
    def relayed(self, grant: Grant | None, size: int) -> Iterator[None]:
        """Let a relayed call in for as long as it lasts; ``size``: bytes of its body. Raises ``Overloaded``."""
        if grant is None:
            yield
            return
        self._charge(grant, size // 4, None)
        grant.live += 1
        try:
            yield
        finally:
            grant.live -= 1

    def _charge(self, grant: Grant, tokens: int, model: str | None, requests: int = 1) -> None:
        try:
            if grant.concurrent is not None and grant.live and grant.live + requests > grant.concurrent:
                wait = 1.0 if model is None else self._patience(model)
                raise Overloaded("this key has too many requests at once", cause="concurrency", retry_after=wait)
            grant.charge(tokens, self._clock(), requests)
        except Overloaded:
            grant.refused += 1
            raise

    def describe(self) -> list[dict[str, Any]]:
        """Every key as the admin listener shows it: by name, never by key or hash."""
        return [
            {
                "name": grant.name,
                "live": grant.live,
                "requests": grant.requests,
                "tokens": grant.tokens,
                "refused": grant.refused,
                "models": list(grant.settings.models),
            }
            for grant in self._grants.values()
        ]


class Rounds(Observer):
    """Tells the door of every call that begins: only fair sharing wants to know."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def slice_began(self, flight: Flight, upstream: str) -> None:
        """An upstream call is about to be made."""
        self._door.serving(flight)
