"""``elis-gateway loadtest``: the sub-commands. What they need is imported inside them."""

from __future__ import annotations

from pathlib import Path

import click

from elis_gateway.errors import MissingExtra

__all__ = ["cli"]


@click.group()
def cli() -> None:
    """The same work under different policies: workloads and the demo."""


@cli.command()
@click.option("--real/--no-real", default=True, show_default=True, help="The small real model behind the gateway.")
@click.option("--modelled/--no-modelled", default=True, show_default=True, help="The comparison in virtual time.")
def demo(real: bool, modelled: bool) -> None:
    """Show the gateway at work, first on a small real model, then modelled; under five minutes."""
    try:
        from loadtest import demo as demonstration
        from loadtest.live import Screen
    except ModuleNotFoundError as error:
        raise MissingExtra("demo", "the demo") from error
    demonstration.run(Screen(), real=real, modelled=modelled)


@cli.command("make-workload")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--num-requests", default=100, show_default=True)
@click.option("--load", default=0.95, show_default=True, help="Offered tokens as a share of the capacity.")
@click.option("--capacity", type=float, required=True, help="Tokens per second with every slot at work.")
@click.option("--longest", default=1000, show_default=True, help="Leave out longer answers (tokens).")
@click.option("--seed", default=0, show_default=True, help="Of arrivals, lengths and prompts.")
def make_workload(path: Path, num_requests: int, load: float, capacity: float, longest: int, seed: int) -> None:
    """Draw a frozen workload from Azure's conversation trace and the shipped prompts."""
    from loadtest.workload import Seeds, azure

    work = azure(num_requests, load=load, capacity=capacity, seeds=Seeds.all(seed), longest=longest)
    work.save(path)
    click.echo(f"{path}: {len(work.requests)} requests, {work.tokens} tokens, hash {work.hash}")
