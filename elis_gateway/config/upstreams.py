"""The engines behind the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field
from pydantic import field_validator as validates
from pydantic import model_validator as validates_all

from elis_gateway.config.section import Name, Seconds, Section, Tokens

__all__ = ["MOST_SLOTS", "TLS", "Health", "Timeouts", "Upstream", "check_count"]

MOST_SLOTS = 16_384
"""More sequences than any engine runs at once. First-come on paper remembers every slot, so their number is bounded."""


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


_MOST_UPSTREAMS = 1024


def check_count(upstreams: int) -> None:
    """Each is probed and keeps connections, and a rank is one of them. Raises ValueError."""
    if upstreams > _MOST_UPSTREAMS:
        raise ValueError(f"upstreams: expected at most {_MOST_UPSTREAMS}, ranks counted; got {upstreams}")
