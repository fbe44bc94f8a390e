"""What can be seen of the gateway from outside: its log, the traffic log, traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from elis_gateway.config.section import Bytes, Name, Section

__all__ = ["Logging", "Tracing", "TrafficLog"]


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
