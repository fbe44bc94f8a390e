"""From a parsed request and its headers to a job: whose it is, which class, by when, how it may be continued.

Knows: the X-Elis-* request headers, aliases, applications and conversations. Never: sockets, responses, the queue.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from elis_gateway.access import CREDENTIALS, Door, Grant
from elis_gateway.core.job import JobSpec
from elis_gateway.errors import ClientError, ModelNotFound, Overloaded
from elis_gateway.flight import Flight, Observer
from elis_gateway.party import Party
from elis_gateway.upstream.base import Capabilities
from elis_gateway.wire.continuation import Answer, Lore, Mode
from elis_gateway.wire.openai import Request
from elis_gateway.wire.parameters import Way
from elis_gateway.wire.several import split

__all__ = ["Intake", "ModelDirectory"]

_GUESSES = 256
"""Names of models that are taken for possible ones while no upstream has told which it serves."""
_LONGEST_APP = 128
"""Characters of an application's name that are kept as they are."""
_LONGEST_DEADLINE = 30 * 24 * 3600
"""Seconds: what is later is no deadline, and further than clocks of event loops count."""
_LATER = 5.0
"""Seconds after which an upstream may have been heard of."""
_CONVERSATIONS = 65_536
"""Conversations remembered; the least recently used is forgotten first."""


class ModelDirectory(Protocol):
    """What the upstreams together serve."""

    @property
    def models(self) -> Mapping[str, int | None]: ...

    def knows(self, model: str) -> bool: ...

    def capabilities(self, model: str) -> Capabilities: ...


class Intake(Observer):
    """Makes flights. ``clock`` gives the loop's time."""

    def __init__(
        self,
        directory: ModelDirectory,
        clock: Callable[[], float],
        *,
        aliases: Mapping[str, str],
        classes: Mapping[str, int],
        default_class: str,
        class_tail: Mapping[str, float] = MappingProxyType({}),
        describe: Callable[[Flight], str],
        door: Door,
        reads_text: bool = True,
        forward_credentials: bool = False,
        trace: Callable[[Mapping[str, str]], object] | None = None,
    ) -> None:
        """``trace``: makes of the headers which trace a request belongs to."""
        self.forward_credentials = forward_credentials
        """Some upstream wants to be told clients' own keys."""
        self._door = door
        self.aliases = dict(aliases)
        self.classes = dict(classes)
        self.default_class = default_class
        self.class_tail = dict(class_tail)
        """The promises of single classes."""
        self._directory = directory
        self._clock = clock
        self._describe = describe
        self._reads_text = reads_text
        self._trace = trace
        self._conversations: OrderedDict[str, str] = OrderedDict()
        self._lore: dict[str, Lore] = {}
        self._prefix = secrets.token_hex(4)
        self._count = itertools.count(1)

    def take(
        self, request: Request, size: int, headers: Mapping[str, str], grant: Grant | None = None
    ) -> Flight | Party:
        """The job, or the jobs, of one request. Raises as ``flight`` does."""
        parts = [self.flight(part, len(part.raw), headers, grant) for part in self._split(request)]
        if parts and all(part.answer.mode is Mode.IDS for part in parts):
            return Party(request, parts, self._describe if parts[0].describe is not None else None)
        return self.flight(request, size, headers, grant)

    def _split(self, request: Request) -> list[Request]:
        """llama.cpp counts the usage of several choices as one's, so that its sum is not ours to make."""
        parts = split(request)
        model = self.aliases.get(request.model, request.model)
        return [] if parts and self._directory.capabilities(model).kind == "llama.cpp" else parts

    def flight(self, request: Request, size: int, headers: Mapping[str, str], grant: Grant | None = None) -> Flight:
        """A job ready to be submitted. ``size``: bytes of the request's body; ``grant``: whose request it is.

        Raises:
            ModelNotFound: no upstream serves it, or not to this key.
            ClientError: a header that makes no sense, a class that is not for this key.
        """
        model = self._model(request.model, grant)
        able = self._directory.capabilities(model)
        if not able.models and model not in self._lore and len(self._lore) >= _GUESSES:
            # Each name is remembered here and in the scheduler; anybody could think of more.
            raise Overloaded("no upstream has told its models yet", cause="unavailable", retry_after=_LATER)
        answer = self._answer(request, model, able)
        class_name, rank = self._class(headers.get("X-Elis-Class"), grant)
        self._door.check(grant, model, request.model or self._names().get(model, model), class_name)
        client = next((headers[h] for h in CREDENTIALS if h in headers), "") if grant is None else grant.name
        conversation = self._conversation(request)
        job_id = f"{self._prefix}-{next(self._count):x}"
        spec = JobSpec(
            id=job_id,
            model=model,
            app=_readable(headers.get("X-Elis-App", "")) or _app(request, client),
            prompt=request.prompt_text if self._reads_text else "",
            prompt_tokens=size // 4,
            limit=answer.limit,
            rank=rank,
            deadline=self._deadline(headers.get("X-Elis-Deadline")),
            sliceable=answer.mode is not Mode.WHOLE,
            conversation=conversation or (job_id if request.chat else None),
            tail=self.class_tail.get(class_name),
        )
        describe = self._describe if headers.get("X-Elis-Debug") == "1" else None
        name = "" if grant is None else grant.name
        flight = Flight(spec, request, answer, class_name=class_name, client=name, describe=describe)
        if self.forward_credentials:
            flight.credentials = {h: headers[h] for h in CREDENTIALS if h in headers}
        if self._trace is not None:
            flight.trace = self._trace(headers)
        if not able.models:
            # No upstream of this model has been heard of yet. By the first call one has.
            flight.renew = lambda: self._answer(request, model, self._directory.capabilities(model))
        return flight

    def _answer(self, request: Request, model: str, able: Capabilities) -> Answer:
        mode, reason = continuation(request, able)
        lore = self._lore.get(model)
        if lore is None:
            lore = self._lore[model] = Lore()
        if lore.fingerprint is None:
            lore.fingerprint = able.fingerprint
        context = able.context.get(model)
        return Answer(
            request,
            mode,
            reason=reason,
            context=context,
            model=model,
            lore=lore,
            engine=able.kind,
            way=_way(request, able),
            thinking=able.thinking,
        )

    def finished(self, flight: Flight) -> None:
        """The next turn of this conversation will begin with what we saw of it."""
        if not (flight.request.chat and flight.answer.finished):
            return
        key = flight.request.next_conversation_key(flight.answer.content)
        if key is None:
            return
        memory = self._conversations
        memory[key] = flight.spec.conversation or flight.spec.id
        memory.move_to_end(key)
        if len(memory) > _CONVERSATIONS:
            memory.popitem(last=False)

    def _model(self, name: str, grant: Grant | None) -> str:
        """The name an upstream knows it by. A request that names none means the only one there is."""
        if not name:
            models = [m for m, name in self._names().items() if grant is None or grant.may_use(m, name)]
            if len(models) == 1:
                return models[0]
        if not name:
            raise ClientError("you must provide a model parameter", param="model", code="missing_model")
        model = self.aliases.get(name, name)
        if not self._directory.knows(model):
            raise ModelNotFound(name)
        return model

    def _names(self) -> dict[str, str]:
        """Every model in service, and an alias of it, or its own name where it has none."""
        aliases = {model: alias for alias, model in self.aliases.items()}
        return {model: aliases.get(model, model) for model in self._directory.models}

    def _conversation(self, request: Request) -> str | None:
        key = request.conversation_key()
        return None if key is None else self._conversations.get(key)

    def _class(self, name: str | None, grant: Grant | None) -> tuple[str, int]:
        name = name or self._door.default_class(grant, self.default_class)
        try:
            return name, self.classes[name]
        except KeyError:
            known = ", ".join(sorted(self.classes))
            raise ClientError(
                f"X-Elis-Class: expected one of {known}; got {name!r}", param="X-Elis-Class", code="unknown_class"
            ) from None

    def _deadline(self, value: str | None) -> float | None:
        if value is None:
            return None
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0.0 < seconds <= _LONGEST_DEADLINE:
            raise ClientError(
                f"X-Elis-Deadline: expected seconds above 0 and at most {_LONGEST_DEADLINE} (30 days), "
                f"got {value[:40]!r}",
                param="X-Elis-Deadline",
                code="bad_deadline",
            )
        return self._clock() + seconds


def continuation(request: Request, able: Capabilities) -> tuple[Mode, str]:
    """How answers may be continued on upstreams that are ``able``, and if they may not, why.

    What the request's own parameters say to that the answer knows.
    """
    if request.route.foreign:
        return Mode.WHOLE, request.route
    if request.chat and (able.chat_parser or not _can_be_parsed(able)):
        return Mode.WHOLE, "chat_parser"
    if able.ids:
        return Mode.IDS, ""
    if able.text:
        return Mode.TEXT, ""
    return Mode.WHOLE, "no_token_ids"


def _can_be_parsed(able: Capabilities) -> bool:
    """Where the engine parses chats, can it parse them a call at a time?"""
    if able.reasoning_parser:
        return able.chat_ids and able.thinking is not None
    return able.chat_ids or not able.tool_parser


def _way(request: Request, able: Capabilities) -> Way:
    """Of upstreams that tell token ids as vLLM does: the route on which an answer goes on, and who parses it."""
    if request.chat and able.chat_ids and able.reasoning_parser:
        return Way.THOUGHTS
    if request.chat and able.chat_ids and able.tool_parser:
        return Way.PARSED
    return Way.CHAT_IDS if able.chat_ids else Way.IDS


def _readable(header: str) -> str:
    """A header's value as text that can be written anywhere, and kept: bytes that were no UTF-8 came as lone
    surrogates, and a value may be as long as a header."""
    if len(header) > _LONGEST_APP:
        return hashlib.blake2b(header.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return header if header.isascii() else header.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _app(request: Request, client_key: str) -> str:
    parts = "\0".join(request.app_parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(client_key.encode("utf-8", "surrogateescape") + b"\0" + parts, digest_size=8).hexdigest()
