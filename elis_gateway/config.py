"""The shape of the YAML configuration: one frozen tree of pydantic models, and ``load``.

Knows: every key, its type, its default and its meaning (the descriptions are the reference, docs/configuration.md is
generated from them). Never: building what is configured; reading anything at import. Durations are seconds, lengths
are tokens, sizes are bytes. What is wrong with a file is said in words by ``config_explain``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic import field_validator as validates
from pydantic import model_validator as validates_all

from elis_gateway.config_explain import NO_YAML, explain, overridden
from elis_gateway.errors import ConfigError

__all__ = ["MOST_SLOTS", "Config", "dump", "from_mapping", "keys", "load", "warnings"]

NonNegative = Annotated[float, Field(ge=0)]
Seconds = NonNegative
Tokens = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, Field(min_length=1)]

MOST_SLOTS = 16_384
"""More sequences than any engine runs at once. First-come on paper remembers every slot, so their number is bounded."""
KeyHash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
PerMinute = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=-100_000, le=100_000)]
"""Further apart, a class and a key would not fit into the 64 bits of an engine's priority."""

EXTERNAL = "external"
"""Tag of a policy or predictor that comes from outside this package."""


class Section(BaseModel):
    """What every section shares: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @validates_all(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """YAML reads on and off as true and false: words again where they are such, and never a number."""
        if not isinstance(data, dict):
            return data
        words = {}
        for name, value in data.items():
            if not isinstance(value, bool) or name not in cls.model_fields:
                continue
            kinds = set(_kinds(cls.model_fields[name].annotation))
            if (word := "on" if value else "off") in kinds:
                words[name] = word
            elif kinds & {int, float} and bool not in kinds:
                raise ValueError(f"expected {name} to be a number, got {str(value).lower()}")
        return {**data, **words}


def _kinds(annotation: Any) -> Iterator[Any]:
    """What a key takes: the types of a union, the words of a Literal."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for inner in get_args(annotation):
            yield from _kinds(inner)
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        yield annotation


# --- listeners ---------------------------------------------------------------------------------------------------


class ServerTLS(Section):
    """What a listener shows its clients, and asks of them. A reload reads the files again."""

    cert: Path | None = None
    """PEM file of the certificate chain. Default: no TLS."""
    key: Path | None = None
    """PEM file of the private key, where it is not in `cert`."""
    client_ca: Path | None = None
    """PEM file of the authority whose certificates clients must bring. Default: none are asked for."""

    @validates_all(mode="after")
    def _has_a_certificate(self) -> ServerTLS:
        if self.cert is None and (self.key is not None or self.client_ca is not None):
            raise ValueError("expected a cert beside key and client_ca")
        return self


class Server(Section):
    """The public listener, which speaks the OpenAI API."""

    host: str = "0.0.0.0"  # nosec B104 - a server's public listener is meant to be reached
    """Address to listen on."""
    port: Port = 8080
    """Port to listen on; 0 picks a free one and logs it."""
    keepalive_after: Seconds = 15.0
    """A stream that has waited so long gets its status line and from then on SSE comments, so that no proxy
    in between gives up."""
    shutdown_grace: Seconds = 30.0
    """How long requests in flight, those only passed on too, may take to finish after SIGTERM before their streams end
    with an error event."""
    max_body: Bytes = 32 * 1024 * 1024
    """Largest request body accepted, unpacked."""
    max_header: Annotated[int, Field(ge=1024)] = 64 * 1024
    """Longest request line and longest header field accepted."""
    head_timeout: Seconds = 20.0
    """How long a request's head may take to arrive, from its first byte, on the admin listener too; 0: any time."""
    body_timeout: Seconds = 120.0
    """How long a request's body may take to arrive; 0: any time."""
    idle_timeout: Annotated[float, Field(gt=0)] = 75.0
    """How long a connection is kept open without a request. Longer than that of a load balancer in front."""
    cors_origins: tuple[Name, ...] = ()
    """Origins whose pages may call this API from a browser, such as https://chat.example.com; `*` for any.
    Default: none."""
    relay: tuple[Name, ...] = ("/v1/", "/tokenize", "/detokenize")
    """Beginnings of the paths that are passed on to upstreams although they are not scheduled (embeddings, audio,
    …). An engine's administration, such as /v1/load_lora_adapter, and what is not under /v1 are passed on only where
    they are named in full."""
    tls: ServerTLS = ServerTLS()


class Admin(Section):
    """The admin listener: metrics and controls. Keep it off the public network."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 8081
    """Port to listen on; 0 picks a free one and logs it."""
    key_hash: KeyHash | None = None
    """Hash of the key that every request here must bring, as `Authorization: Bearer` or as the password of a
    browser's prompt. `elis-gateway key` makes one. Default: whoever reaches the port is let in."""
    tls: ServerTLS = ServerTLS()


# --- upstreams ---------------------------------------------------------------------------------------------------


class Timeouts(Section):
    """When a silent upstream counts as stalled."""

    connect: Seconds = 5.0
    """Longest wait for a connection."""
    first_byte: Seconds = 300.0
    """Longest wait for the first byte of an answer, the engine's own queue and prefill included."""
    inter_token: Seconds = 60.0
    """Longest silence within an answer."""
    learn: bool = True
    """Give a stream up sooner where the last calls say so: after ten times their longest wait for a first byte (but
    not before 20 s), or ten times their longest silence (not before 5 s)."""


class Health(Section):
    """Probing, with hysteresis so that one lost probe moves nothing."""

    path: Annotated[str, Field(pattern=r"^/")] = "/health"
    """Path probed with GET, relative to the upstream's URL without its /v1; 2xx is healthy."""
    interval: Annotated[float, Field(gt=0)] = 2.0
    """Time between probes."""
    timeout: Annotated[float, Field(gt=0)] = 2.0
    """Longest wait for a probe's answer."""
    down_after: Annotated[int, Field(ge=1)] = 3
    """Failed probes in a row that take the upstream out of service."""
    up_after: Annotated[int, Field(ge=1)] = 2
    """Good probes in a row that bring it back."""
    break_after: Annotated[int, Field(ge=1)] = 5
    """Calls in a row that fail (reset, stalled, garbage, 5xx) although probes are fine, before calls are paused. Where
    all of them were answered with a 5xx, a short request of the gateway's own is asked at once; if that goes well, the
    failed requests are to blame and nothing is paused."""
    break_for: Annotated[float, Field(gt=0)] = 5.0
    """First such pause. One call then finds out whether it is over; if not, the next is twice as long, up to 60 s."""
    slow_start: Seconds = 5.0
    """After an upstream came back, its slots are used one after the other over this time; 0: all at once."""


class TLS(Section):
    """How an https upstream is verified, and what it sees of us."""

    verify: bool = True
    """Check the upstream's certificate and host name."""
    ca: Path | None = None
    """PEM file of the certificate authority to trust instead of the system's."""
    cert: Path | None = None
    """PEM file of our client certificate (with its private key, unless `key` names that)."""
    key: Path | None = None
    """PEM file of the client certificate's private key."""


class Upstream(Section):
    """One engine: a base URL and what is known of it. What is not known is probed."""

    name: Name
    """Name in logs, metrics and the admin API. Default: host and port of the URL."""
    url: str
    """Base URL, with or without the trailing /v1."""
    api_key_env: str | None = None
    """Environment variable that holds the upstream's API key. Clients' own keys are not passed on."""
    forward_credentials: bool = False
    """Pass clients' own Authorization, api-key and x-api-key headers on to this upstream, in place of its key. Only
    for upstreams that know the clients themselves."""
    models: tuple[Name, ...] = ()
    """Models it serves. Empty: asked of its /v1/models."""
    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)] | Literal["auto"]
    """Sequences the engine runs at once (vLLM: --max-num-seqs). Never set it higher than the engine's own
    limit: what waits inside the engine is not ordered by us. auto: found out and followed while serving, from what
    the engine shows of its batch, its queue and its KV memory (`/metrics` of vLLM and SGLang, `/props` of llama.cpp);
    not together with overcommit."""
    data_parallel_size: Annotated[int, Field(ge=1, le=512)] = 1
    """Ranks of a data-parallel engine behind this one URL (vLLM: --data-parallel-size). Each becomes an upstream of
    its own, NAME-rank-0 and so on, with `slots` each, and is addressed by the header X-data-parallel-rank, so that an
    answer goes on where its prompt is cached."""
    data_parallel_rank: Annotated[int, Field(ge=0)] | None = None
    """Calls are for this rank alone. Set for each by `data_parallel_size`."""
    overcommit: Annotated[int, Field(ge=0)] | None = None
    """Calls kept in flight beyond `slots`. Default: scheduler.overcommit."""
    engine_priority: Literal["auto", "on", "off"] = "auto"
    """Whether the engine orders its own queue by the field `priority` (vLLM: --scheduling-policy priority).
    auto: settled by a probe of its behaviour, where more than one call is kept in hand."""
    continuation: Literal["auto", "ids", "text", "off"] = "auto"
    """How a sliced answer goes on: by token ids, by text, or not at all (one call per request). auto: ids
    where the upstream returns them, otherwise off."""
    chat_parser: Literal["auto"] | bool = "auto"
    """Whether the engine parses chats' answers (vLLM: --reasoning-parser, --tool-call-parser). auto: settled by a probe
    of its behaviour, and sliced where that is exact; true: chats are one unsliced call each; false: it does not."""
    context: Tokens | None = None
    """The engine's context length, prompt and answer together. Default: asked of /v1/models where it says so.
    """
    timeouts: Timeouts = Timeouts()
    health: Health = Health()
    tls: TLS = TLS()

    @validates_all(mode="before")
    @classmethod
    def _named_by_its_address(cls, data: Any) -> Any:
        if isinstance(data, dict) and "name" not in data:
            url = str(data.get("url"))  # one that is missing, or is none, is complained of as that
            return {**data, "name": urlsplit(url).netloc.rpartition("@")[2] or url}
        return data

    @validates("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or any(map(str.isspace, url)):
            raise ValueError("expected a URL such as http://127.0.0.1:8000")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise ValueError("expected a port from 1 to 65535, as in http://127.0.0.1:8000")
        if "@" in parts.netloc:
            # What is in a URL is shown: in logs, by check-config, on the admin listener.
            raise ValueError(
                "expected no user or password in the URL; put the key into an environment variable and "
                "name that in api_key_env"
            )
        if parts.query or parts.fragment:
            raise ValueError("expected a URL without query or fragment")
        return url.rstrip("/").removesuffix("/v1")

    @validates_all(mode="after")
    def _knows_what_queues(self) -> Upstream:
        if self.slots == "auto" and (self.overcommit or self.engine_priority == "on"):
            raise ValueError(
                "expected slots: auto, or overcommit and engine_priority, not both: with calls of ours in the engine's "
                "queue that queue says nothing of its slots"
            )
        if self.data_parallel_size > 1 and self.data_parallel_rank is not None:
            raise ValueError("expected data_parallel_size or data_parallel_rank, not both")
        return self

    def ranks(self) -> tuple[Upstream, ...]:
        """The upstreams that stand for its data-parallel ranks; itself where it is one engine."""
        if self.data_parallel_size == 1:
            return (self,)
        return tuple(
            self.model_copy(
                update={"name": f"{self.name}-rank-{rank}", "data_parallel_size": 1, "data_parallel_rank": rank}
            )
            for rank in range(self.data_parallel_size)
        )


# --- scheduling --------------------------------------------------------------------------------------------------


class FCFS(Section):
    """First come, first served."""

    kind: Literal["fcfs"]


class RoundRobin(Section):
    """Windows in turn, without any estimate."""

    kind: Literal["round_robin"]


class LAS(Section):
    """Least attained service first: whoever has received the fewest tokens so far."""

    kind: Literal["las"]


class SJF(Section):
    """Shortest predicted answer first, estimated once and never interrupted."""

    kind: Literal["sjf"]
    order: Literal["mean", "gittins"] = "gittins"
    """Order by the estimate's mean, or by its Gittins index where the predictor knows a distribution."""


class ISRTF(Section):
    """Shortest predicted remaining time first, re-estimated after every window."""

    kind: Literal["isrtf"]
    order: Literal["mean", "gittins"] = "gittins"
    """Order by the estimate's mean, or by its Gittins index where the predictor knows a distribution."""


class ExternalPolicy(Section):
    """Code of your own."""

    kind: Name
    """`package.module:Class`, or the name of an entry point in the group `elis_gateway.policies`."""
    options: dict[str, Any] = {}
    """Keyword arguments for its constructor."""


def _kind(known: tuple[str, ...], what: str) -> Discriminator:
    def tag(data: Any) -> str | None:
        kind = data.get("kind") if isinstance(data, dict) else getattr(data, "kind", None)
        if not isinstance(kind, str):
            return None
        if kind in known:
            return kind
        outside = ":" in kind or bool(entry_points(group=f"elis_gateway.{what}", name=kind))
        return EXTERNAL if outside else kind

    return Discriminator(tag)


def _by_name(data: Any) -> Any:
    """``policy: fcfs`` is short for ``policy: {kind: fcfs}``."""
    return {"kind": data} if isinstance(data, str) else data


Policy = Annotated[
    Annotated[FCFS, Tag("fcfs")]
    | Annotated[RoundRobin, Tag("round_robin")]
    | Annotated[LAS, Tag("las")]
    | Annotated[SJF, Tag("sjf")]
    | Annotated[ISRTF, Tag("isrtf")]
    | Annotated[ExternalPolicy, Tag(EXTERNAL)],
    _kind(("fcfs", "round_robin", "las", "sjf", "isrtf"), "policies"),
    BeforeValidator(_by_name),
]


class NoAging(Section):
    """A waiting job's key is its remaining work alone. Long jobs may wait as long as short ones keep coming."""

    kind: Literal["none"]


class LinearAging(Section):
    """Key: arrival + remaining seconds / a. Between FCFS (a large) and plain ISRTF (a small)."""

    kind: Literal["linear"]
    a: Annotated[float, Field(gt=0)] = 0.2
    """Seconds of remaining work that one second of waiting makes up for."""


class BoostAging(Section):
    """Boost (Yu and Scully 2024): short jobs jump far, long ones are nearly first-come."""

    kind: Literal["boost"]
    factor: Annotated[float, Field(gt=0)] = 0.35
    """g as a multiple of the decay rate γ, which is learned from the traffic. Smaller: a better mean; larger:
    a better tail."""


Aging = Annotated[
    NoAging | LinearAging | BoostAging,
    Field(discriminator="kind"),
    BeforeValidator(_by_name),
]


class Queue(Section):
    """What may wait, and for how long."""

    max_jobs: Annotated[int, Field(ge=1)] = 10_000
    """Jobs waiting before new ones are refused with 429."""
    ttl: Seconds | None = None
    """Longest time in the queue before a job that never ran is given up. Default: no limit."""
    unavailable_timeout: Seconds = 30.0
    """How long jobs wait while no upstream of their model is healthy before they get 503."""


class Scheduler(Section):
    """Who goes next, for how long, and who may be interrupted."""

    policy: Policy = ISRTF(kind="isrtf")
    """The order."""
    window: Tokens = 50
    """Tokens between two estimates of one job."""
    mode: Literal["fixed", "elastic"] = "elastic"
    """fixed: every upstream call asks for at most one window (the published method). elastic: a call goes on
    until a waiting job deserves its slot by more than the seam's cost."""
    rescore: Literal["always", "contended"] = "contended"
    """always: a job waits for a fresh estimate after every fixed window, whether or not anyone else waits.
    contended: only when somebody waits."""
    seam_cost: Literal["auto"] | NonNegative = "auto"
    """What interrupting and resuming costs, in decoded tokens. auto: learned while serving."""
    overcommit: Annotated[int, Field(ge=0)] | None = None
    """Calls kept in flight beyond an upstream's slots, unless the upstream says otherwise. One in hand lets the engine
    refill a slot in the step in which it comes free; more pay only where the engine orders its queue by priority.
    Default: 1, and 0 with fixed windows or fair sharing."""
    aging: Aging = BoostAging(kind="boost")
    """How waiting makes up for length; for the policies that order by estimates (sjf, isrtf)."""
    tail: Annotated[float, Field(ge=1)] | None = None
    """Promise: the 99th percentile of completion time stays within this multiple of what plain first-come
    would have given on the same traffic. Default: no promise."""
    classes: dict[Name, Rank] = {"default": 0}
    """Priority classes and their ranks, lower first; a client names its class in X-Elis-Class. Classes stand
    above the policy."""
    default_class: Name = "default"
    """The class of a request that names none."""
    class_tail: dict[Name, Annotated[float, Field(ge=1)]] = {}
    """The promise of single classes, in place of `tail`: {interactive: 1.1}. It is held within the class: a better
    class may still go first."""
    fair: bool = False
    """Share fairly between keys, above the policy and below the classes: in every round each key has room for
    `fair_round` tokens times its `weight`, and the policy orders within the round. Not together with overcommit."""
    fair_round: Tokens = 2000
    """Tokens of answers a key has in a round. Smaller: fairer sooner; larger: more for the policy to order."""
    queue: Queue = Queue()
    retries: Annotated[int, Field(ge=0)] = 3
    """Interrupted calls in a row without a token of progress before a job fails."""
    retry_budget: NonNegative = 0.2
    """Calls that may be repeated without progress, as a share of all jobs; 100 more are allowed at the start, and one
    more every second. When it is spent, failures are told at once instead of multiplying the load."""

    @validates_all(mode="after")
    def _default_class_exists(self) -> Scheduler:
        if self.default_class not in self.classes:
            raise ValueError(f"expected default_class to be one of the classes ({', '.join(self.classes)})")
        if unknown := sorted(set(self.class_tail) - set(self.classes)):
            raise ValueError(f"expected class_tail to name classes of classes; unknown: {', '.join(unknown)}")
        if self.fair and self.overcommit:
            raise ValueError("expected fair or overcommit, not both: an engine's own queue knows no rounds")
        return self

    @property
    def in_hand(self) -> int:
        """``overcommit``, or its default."""
        if self.overcommit is not None:
            return self.overcommit
        return 0 if self.fair or self.mode == "fixed" else 1


# --- access ------------------------------------------------------------------------------------------------------


class ApiKey(Section):
    """One client's key: by its hash, with what it may do."""

    name: Name
    """Whose it is: the name in logs and on the admin listener."""
    hash: KeyHash
    """`sha256:` and the hash of the key. `elis-gateway key` makes a key and prints both."""
    models: tuple[Name, ...] = ()
    """Models or aliases it may use. Empty: all."""
    default_class: Name | None = None
    """Class of its requests that name none. Default: scheduler.default_class, if it may use that."""
    max_class: Name | None = None
    """The best class it may ask for. Default: any."""
    requests_per_minute: PerMinute | None = None
    """Default: limits.per_key.requests_per_minute."""
    tokens_per_minute: PerMinute | None = None
    """Tokens of prompts and answers together. Default: limits.per_key.tokens_per_minute."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests under way at once, waiting ones included. Default: limits.per_key.concurrent."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share against other keys' under scheduler.fair."""


class Auth(Section):
    """Who may use the public listener. Without any key: everybody."""

    keys: tuple[ApiKey, ...] = ()
    """Clients' keys."""
    keys_file: Path | None = None
    """YAML file with a list of more keys, each as in `keys`; read again on every reload. One without any key is refused
    where there are none in `keys` either: everybody would be let in."""

    @validates("keys")
    @classmethod
    def _keys_differ(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        return _distinct(keys)


class PerKey(Section):
    """What one key may use, unless its own entry says otherwise. Default: no limits."""

    requests_per_minute: PerMinute | None = None
    """Requests a key may begin per minute. Here and in what is under way at once, each of several choices or prompts
    counts as one."""
    tokens_per_minute: PerMinute | None = None
    """Tokens of prompts and answers a key may use per minute. An answer is charged when it is over."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests of one key under way at once, waiting ones included."""


class Limits(Section):
    """What is refused with 429 before it waits; see scheduler.queue for what may wait."""

    max_bytes: Bytes = 1024 * 1024 * 1024
    """Bytes of request bodies under way at once, waiting and running; beyond, 429."""
    client_backlog: Bytes = 4 * 1024 * 1024
    """Bytes of its answer that a client may be behind. One that is further is cut off; nobody waits for it."""
    client_stall: Seconds = 60.0
    """How long a client that is behind may read nothing at all before it is cut off; 0: for ever."""
    per_key: PerKey = PerKey()
    classes: dict[Name, Annotated[int, Field(ge=1)]] = {}
    """Requests of one class under way at once, waiting ones included."""


def _distinct(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    for what in ("name", "hash"):
        values = [getattr(key, what) for key in keys]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"expected every {what} once; several keys have {', '.join(twice)}")
    return keys


# --- predictors --------------------------------------------------------------------------------------------------


class NoPredictor(Section):
    """No estimates: every policy that needs them is first-come."""

    kind: Literal["none"]


class ConstantPredictor(Section):
    """Every answer is as long as the next."""

    kind: Literal["constant"]
    tokens: Annotated[float, Field(ge=1)] = 250.0
    """The length of an answer."""


class MaxTokensPredictor(Section):
    """The client's own max_tokens is the estimate."""

    kind: Literal["max_tokens"]


class OraclePredictor(Section):
    """Looks the length up in a recording; for experiments."""

    kind: Literal["oracle"]
    path: Path
    """JSON Lines of {model, prompt_hash, tokens}."""


class HistoryPredictor(Section):
    """The running distribution of answer lengths by model and application."""

    kind: Literal["history"]
    path: Path | None = None
    """File that keeps what was learned across restarts. Default: memory only."""
    strength: Annotated[float, Field(gt=0)] = 8.0
    """Answers that what is known of all applications counts as, when one application's own are few."""
    horizon: Annotated[float, Field(ge=1)] = 1000.0
    """Newer answers of the same application after which one counts 1/e."""
    max_apps: Annotated[int, Field(ge=1)] = 1000
    """Applications remembered, the least recently used forgotten first (about 10 KB each)."""


class BgePredictor(Section):
    """A trained model, corrected by what the served traffic teaches. Needs the extra `cpu` or `gpu`; without it, or
    where no model is installed, the gateway says so once and uses the history alone."""

    kind: Literal["bge"]
    path: Path | None = None
    """Folder of a model (`elis-gateway predictor export` writes them), or the name of a shipped one. `encode-once`:
    the prompt is encoded once per request, nobody waits for it. `elis-paper`, the published method: prompt and
    answer so far are encoded after every window, and the scheduler waits for that up to the deadline. Default:
    encode-once. Read again on reload."""
    deadline: Seconds = 0.5
    """Longest wait for the encoder. A prompt whose turn would come later is not encoded: the estimate then rests
    on the text's counters and the history."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs. auto: CUDA where onnxruntime has it."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of the encoder on the CPU."""
    learn: bool = True
    """Learn from every finished request: lengths, how far predictions were off, what kinds of prompt lead to what.
    Numbers only, never text."""
    state: Path | None = None
    """File that keeps what was learned across restarts; not for `elis-paper`, which learns token units alone. Default:
    memory only."""
    strength: Annotated[float, Field(gt=0)] = 8.0
    """Answers that what is known of all applications counts as, when one application's own are few."""
    horizon: Annotated[float, Field(ge=1)] = 1000.0
    """Newer answers of the same application after which one counts 1/e."""
    max_apps: Annotated[int, Field(ge=1)] = 256
    """Applications with a regression of their own, the least recently used forgotten first (about 200 KB each)."""
    cached_prompts: Annotated[int, Field(ge=1)] = 4096
    """Prompts whose embedding is remembered (about 2 KB each)."""


class ExternalPredictor(Section):
    """Code of your own."""

    kind: Name
    """`package.module:Class`, or the name of an entry point in the group `elis_gateway.predictors`."""
    options: dict[str, Any] = {}
    """Keyword arguments for its constructor."""
    deadline: Seconds = 0.5
    """Longest wait for what it computes off the event loop; then the previous estimate is counted down."""


Predictor = Annotated[
    Annotated[NoPredictor, Tag("none")]
    | Annotated[ConstantPredictor, Tag("constant")]
    | Annotated[MaxTokensPredictor, Tag("max_tokens")]
    | Annotated[OraclePredictor, Tag("oracle")]
    | Annotated[HistoryPredictor, Tag("history")]
    | Annotated[BgePredictor, Tag("bge")]
    | Annotated[ExternalPredictor, Tag(EXTERNAL)],
    _kind(("none", "constant", "max_tokens", "oracle", "history", "bge"), "predictors"),
    BeforeValidator(_by_name),
]


# --- being able to see inside ------------------------------------------------------------------------------------


class Logging(Section):
    """The process's own log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """info has one line per finished job; debug has every prediction's life."""
    format: Literal["text", "json"] = "text"
    """For people, or for machines."""
    prompts: Literal["full", "hash", "none"] = "hash"
    """How prompts and answers appear in the traffic log: the text, a hash of it, or not at all."""


class TrafficLog(Section):
    """The opt-in record of every job, as rotated JSON Lines."""

    path: Path | None = None
    """File to write. Default: off."""
    max_bytes: Bytes = 64 * 1024 * 1024
    """Size at which the file is rotated."""
    keep: Annotated[int, Field(ge=1)] = 5
    """Rotated files kept."""


class Tracing(Section):
    """OpenTelemetry: one span per request, its upstream calls as children. Needs the extra `otel`."""

    enabled: bool = False
    """Send spans. A client's W3C trace context (`traceparent`) is taken up, and passed on to the upstreams."""
    endpoint: str | None = None
    """Collector that takes OTLP over HTTP, such as http://localhost:4318. Default: what the environment says
    (OTEL_EXPORTER_OTLP_ENDPOINT, ..._HEADERS and so on), else that one."""
    service: Name = "elis-gateway"
    """Name of the service in traces."""
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the requests that are traced, where the client's own trace does not say."""


_MOST_UPSTREAMS = 1024


def check_count(upstreams: int) -> None:
    """Each is probed and keeps connections, and a rank is one of them. Raises ValueError."""
    if upstreams > _MOST_UPSTREAMS:
        raise ValueError(f"upstreams: expected at most {_MOST_UPSTREAMS}, ranks counted; got {upstreams}")


class Config(Section):
    """The whole configuration."""

    server: Server = Server()
    admin: Admin = Admin()
    upstreams: tuple[Upstream, ...]
    """The engines behind the gateway; at least one, and with their ranks at most 1024."""
    models: dict[Name, Name] = {}
    """Aliases: the name a client may ask for, and the model it gets."""
    scheduler: Scheduler = Scheduler()
    predictor: Predictor = BgePredictor(kind="bge")
    """Where estimates come from."""
    auth: Auth = Auth()
    limits: Limits = Limits()
    logging: Logging = Logging()
    traffic_log: TrafficLog = TrafficLog()
    tracing: Tracing = Tracing()

    @validates("models")
    @classmethod
    def _aliases_name_models(cls, models: dict[str, str]) -> dict[str, str]:
        if chained := sorted(alias for alias, model in models.items() if model in models):
            raise ValueError(
                f"expected aliases to name models, not aliases: {', '.join(f'{a} -> {models[a]}' for a in chained)}"
            )
        return models

    @validates_all(mode="after")
    def _classes_exist(self) -> Config:
        self.check_keys(self.auth.keys)
        for upstream in self.upstreams:
            self.check_upstream(upstream)
        if unknown := sorted(set(self.limits.classes) - set(self.scheduler.classes)):
            raise ValueError(f"limits.classes: expected classes of scheduler.classes; unknown: {', '.join(unknown)}")
        return self

    def check_upstream(self, upstream: Upstream) -> None:
        """Does this upstream go with the scheduler's section? Raises ValueError."""
        if upstream.slots == "auto" and upstream.overcommit is None and self.scheduler.overcommit:
            raise ValueError(
                f"upstreams: {upstream.name}: expected no scheduler.overcommit with slots: auto: with calls of ours in "
                "the engine's queue that queue says nothing of its slots"
            )
        if self.scheduler.fair and (upstream.overcommit or upstream.engine_priority == "on"):
            raise ValueError(
                f"upstreams: {upstream.name}: expected no overcommit and no engine_priority with scheduler.fair: "
                "an engine's own queue knows no rounds"
            )

    def check_keys(self, keys: Iterable[ApiKey]) -> None:
        """Do the classes exist that these keys name? Raises ValueError."""
        for key in keys:
            for name in (key.default_class, key.max_class):
                if name is not None and name not in self.scheduler.classes:
                    raise ValueError(f"auth: key {key.name}: expected a class of scheduler.classes, got {name!r}")
            ranks = self.scheduler.classes
            if key.default_class and key.max_class and ranks[key.default_class] < ranks[key.max_class]:
                raise ValueError(f"auth: key {key.name}: default_class is better than max_class")

    @validates("upstreams")
    @classmethod
    def _names_differ(cls, upstreams: tuple[Upstream, ...]) -> tuple[Upstream, ...]:
        if not upstreams:
            raise ValueError("expected at least one upstream")
        upstreams = tuple(rank for upstream in upstreams for rank in upstream.ranks())
        check_count(len(upstreams))
        names = [upstream.name for upstream in upstreams]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected different names; more than one upstream is called {', '.join(twice)}")
        return upstreams


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, apply the overrides of ``environ`` (default: the process's) and validate.

    Raises:
        ConfigError: unreadable file, bad YAML, or anything wrong within; one line per mistake.
    """
    data = _yaml(path, str(path))
    return from_mapping({} if data is None else data, os.environ if environ is None else environ)


def keys(config: Config) -> tuple[ApiKey, ...]:
    """Every key: those of the configuration and those of its ``auth.keys_file``. Raises ``ConfigError``."""
    path = config.auth.keys_file
    if path is None:
        return config.auth.keys
    where = f"auth.keys_file: {path}"
    listed = _yaml(path, where)
    if not isinstance(listed, list):
        raise ConfigError(f"{where}: expected a list of keys, got {type(listed).__name__}")
    try:
        found = tuple(ApiKey.model_validate(entry) for entry in listed)
        merged = _distinct((*config.auth.keys, *found))
        config.check_keys(found)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, ApiKey)}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not merged:
        # Whoever names a file of keys does not mean to let everybody in because it has been emptied.
        raise ConfigError(f"{where}: expected at least one key; without any key everybody is let in")
    return merged


class _Loader(yaml.SafeLoader):
    """Of two equal keys YAML's loader keeps the last, and half a section would be gone without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} again", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"


def _yaml(path: str | Path, where: str) -> Any:
    try:
        # A safe loader, refined.
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # nosec B506
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: expected UTF-8 text: {error.reason} at byte {error.start}") from error
    except NO_YAML as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def from_mapping(data: Any, environ: Mapping[str, str] | None = None) -> Config:
    """Validate what a YAML file held. No ``environ``, no overrides. Raises ``ConfigError`` as ``load`` does."""
    if not isinstance(data, dict):
        raise ConfigError(f"expected a mapping of sections, got {type(data).__name__}")
    data = overridden(data, environ or {})
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from None


def warnings(config: Config, environ: Mapping[str, str] | None = None) -> list[str]:
    """What is valid here and now but will not work, or is not wise, in words."""
    environ = os.environ if environ is None else environ
    found = [
        f"upstreams: {u.name}: environment variable {u.api_key_env} (api_key_env) is not set here; "
        "serve will refuse to start"
        for u in config.upstreams
        if u.api_key_env is not None and not environ.get(u.api_key_env)
    ]
    found += _not_there(config, "")
    for place, section in (("scheduler.policy", config.scheduler.policy), ("predictor", config.predictor)):
        module = section.kind.partition(":")[0].partition(".")[0] if ":" in section.kind else None
        if module and find_spec(module) is None:
            found.append(f"{place}.kind: no module {module!r} can be found here; serve will refuse to start")
    if config.admin.host not in _LOOPBACK and config.admin.key_hash is None:
        found.append(f"admin: {config.admin.host} is not loopback and there is no key_hash: anybody can control it")
    return found


_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SHIPPED = Path(__file__).parent / "predictor" / "models"
_WRITTEN = ("path", "state")
"""Files that are made where they are not there, but for the recording of an oracle and the folder of a model."""


def _not_there(section: BaseModel, place: str) -> list[str]:
    """Files that are to be read, and are missing."""
    found: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        where = f"{place}.{name}" if place else name
        if isinstance(value, BaseModel):
            found += _not_there(value, where)
        elif isinstance(value, tuple):
            for n, item in enumerate(value):
                if isinstance(item, BaseModel):
                    found += _not_there(item, f"{where}[{n}]")
        elif isinstance(value, Path) and not value.exists():
            read = name not in _WRITTEN or isinstance(section, OraclePredictor)
            what = str(value)
            if isinstance(section, BgePredictor) and name == "path":
                shipped = sorted(manifest.parent.name for manifest in _SHIPPED.glob("*/manifest.json"))
                read = what not in shipped
                what += f" (shipped: {', '.join(shipped)})" if len(value.parts) == 1 else ""
            if read:
                found.append(f"{where}: there is no {what} here; serve will refuse to start")
    return found


def dump(config: Config) -> str:
    """The effective configuration as YAML, every default spelled out. ``load`` accepts it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
