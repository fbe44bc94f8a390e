"""``elis-gateway loadtest``: the sub-commands. What they need is imported inside them."""

from __future__ import annotations

import click

__all__ = ["cli"]


@click.group()
def cli() -> None:
    """The same work under different policies: workloads, runs, the demo."""
