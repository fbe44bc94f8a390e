"""Where the gateway is reached: the public listener and the admin listener."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic import model_validator as validates_all

from elis_gateway.config.section import Bytes, KeyHash, Name, Port, Seconds, Section

__all__ = ["Admin", "Server", "ServerTLS"]


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
