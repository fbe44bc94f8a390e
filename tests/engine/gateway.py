"""The gateway as its users run it: a process of its own in front of a real engine."""

from __future__ import annotations

import re
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loadtest.engines import Child, free_port, wait_ready

__all__ = ["Gateway", "gateway"]

_MAIN = """
from loadtest.engines import die_with_parent
from elis_gateway.cli import main
die_with_parent()
main()
"""


@dataclass(frozen=True)
class Gateway:
    """A running gateway: base URLs of its public and its admin listener, and its log."""

    url: str
    admin: str
    log: Path

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's series whose labels have these values."""
        text = urllib.request.urlopen(f"{self.admin}/metrics").read().decode()
        rows = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(value) for found, value in rows if all(pair in found for pair in wanted))


@contextmanager
def gateway(
    folder: Path,
    upstreams: list[dict[str, Any]],
    *,
    scheduler: Mapping[str, Any],
    predictor: Mapping[str, Any] | None = None,
) -> Iterator[Gateway]:
    """Serve with this configuration; ready when it yields."""
    ports = [free_port(), free_port()]
    config = {
        "server": {"host": "127.0.0.1", "port": ports[0], "shutdown_grace": 1},
        "admin": {"port": ports[1]},
        "upstreams": upstreams,
        "scheduler": dict(scheduler),
        "predictor": dict(predictor or {"kind": "history"}),
        "logging": {"level": "debug"},
    }
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(config))
    log = folder / "gateway.log"
    url, admin = (f"http://127.0.0.1:{port}" for port in ports)
    with Child([sys.executable, "-c", _MAIN, "serve", str(file)], log=log) as child:
        wait_ready(child, f"{url}/ready", timeout=30)
        yield Gateway(url, admin, log)
