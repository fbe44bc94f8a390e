"""``elis-gateway loadtest``: the sub-commands. What they need is imported inside them."""

from __future__ import annotations

from pathlib import Path

import click

from elis_gateway.errors import MissingExtra
from loadtest.options import Work, work_options

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
@work_options
@click.option(
    "--replay", type=click.Path(dir_okay=False, path_type=Path), help="Also write its answers, for sim-engine --replay."
)
@click.option(
    "--oracle",
    metavar="MODEL=FILE",
    help="Also write its lengths, for predictor.kind: oracle; under that model's name.",
)
def make_workload(path: Path, work: Work, replay: Path | None, oracle: str | None) -> None:
    """Draw a frozen workload: who arrives when, asking what, and how long the answers are.

    The file has a hash: the same options give the same file. What was made is printed, as a table of percentiles.
    """
    from loadtest import make
    from loadtest.live import Screen

    made = work.make()
    made.save(path)
    click.echo(f"{path}: {len(made.requests)} requests, {made.tokens} tokens, hash {made.hash}")
    Screen().table(*make.describe(made))
    if replay is not None:
        click.echo(f"{replay}: {make.write_replay(made, replay)} answers")
    if oracle is not None:
        model, equals, file = oracle.partition("=")
        if not equals or not model or not file:
            raise click.BadParameter("expected MODEL=FILE", param_hint="--oracle")
        click.echo(f"{file}: {make.write_oracle(made, model, Path(file))} lengths")
