"""``elis-gateway loadtest``: the sub-commands. What they need is imported inside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from elis_gateway.errors import MissingExtra
from loadtest.options import DRAWN, Work, work_options

__all__ = ["cli"]

_AT_LEAST_ONE = click.IntRange(min=1)
_ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
_LIVE = frozenset(("users", "model", "admin", "admin_key", "timeout", "max_lag", "headers", "body"))
_SIMULATED = frozenset(("predictor", "workers", "delay"))
"""Options that mean nothing to the other kind of target."""


@click.group()
def cli() -> None:
    """The same work under different policies: workloads, runs, comparisons, the demo."""


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


@cli.command()
@click.option(
    "--target", required=True, metavar="URL|sim[:MODEL]", help="A server, or the simulator with an engine model."
)
@work_options
@click.option(
    "--workload",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A frozen file from make-workload, instead of the options above.",
)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    type=_AT_LEAST_ONE,
    help="Workload seeds, from --seed on; the unit of comparison.",
)
@click.option(
    "--compare",
    default="",
    metavar="SETTING,...",
    help="fcfs, round_robin, las, sjf, isrtf-published, isrtf, isrtf-no-aging, isrtf-tail, perfect; the first is what "
    "the others are held against.",
)
@click.option("--aa/--no-aa", default=None, help="Run one setting twice as the noise floor.  [default: when comparing]")
@click.option("--prediction-interval", default=50, show_default=True, type=_AT_LEAST_ONE, help="Tokens of a window.")
@click.option("--batch-size", type=_AT_LEAST_ONE, help="Slots: of the simulated engine, or to measure a capacity.")
@click.option(
    "--slo", multiple=True, metavar="NAME=SECONDS", help="Objective for goodput: jct, ttft, tpot; repeatable."
)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: runs/TIME]")
@click.option("--model", help="Model to ask for.  [default: the server's first]")
@click.option("--admin", metavar="URL", help="The gateway's admin listener.  [default: the target's host, port 8081]")
@click.option(
    "--admin-key",
    envvar="ELIS_ADMIN_KEY",
    help="Key of the admin listener, where it asks for one.  [env: ELIS_ADMIN_KEY]",
)
@click.option("--closed", "users", type=_AT_LEAST_ONE, help="Closed loop of so many users; labelled as such.")
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=_ABOVE_ZERO,
    help="Seconds after which a request counts as failed.",
)
@click.option(
    "--max-lag", default=0.05, show_default=True, help="Seconds of own lag (p99) above which a run is invalid."
)
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent with every request; repeatable.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token.  [env: OPENAI_API_KEY]")
@click.option("--body", default="{}", metavar="JSON", help="Fields added to every request.")
@click.option("--apps/--no-apps", default=True, show_default=True, help="Say which application a request belongs to.")
@click.option(
    "--predictor",
    default="history",
    show_default=True,
    help="Simulated: history, history-cold, perfect, shuffled, noisy:0.6, none, constant:250, max_tokens, config:FILE.",
)
@click.option("--workers", default=1, show_default=True, type=_AT_LEAST_ONE, help="Simulated engines.")
@click.option(
    "--delay",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Simulated seconds from gateway to engine, each way.",
)
def run(
    work: Work,
    workload: Path | None,
    compare: str,
    aa: bool | None,
    prediction_interval: int,
    slo: tuple[str, ...],
    timeout: float,
    headers: tuple[str, ...],
    api_key: str | None,
    body: str,
    **given: Any,
) -> None:
    """Offer the same work under one or several settings, and say what differs.

    \b
    elis-gateway loadtest run --target sim:vllm-cpu --load 0.95 --seeds 10 --compare fcfs,sjf,isrtf,perfect
    elis-gateway loadtest run --target http://localhost:8080 --load 0.9 --batch-size 32 --compare fcfs,isrtf --seeds 5

    The exit status is 1 where a run is incomplete or invalid. Ctrl-C keeps what is done.
    """
    try:
        from loadtest import run as running
        from loadtest.live import Screen
    except ModuleNotFoundError as error:
        raise MissingExtra("loadtest", "loadtest run") from error
    options = running.Options(
        workload=workload,
        settings=tuple(name.strip() for name in compare.split(",") if name.strip()),
        again=aa,
        window=prediction_interval,
        objectives=_objectives(slo),
        patience=timeout,
        headers=_headers(headers, api_key),
        body=_fields(body),
        **given,
    )
    _refuse_pointless(simulated=options.simulated, frozen=workload is not None)
    _, experiment = running.execute(options, work, Screen())
    if not experiment.valid:
        sys.exit(1)


def _refuse_pointless(*, simulated: bool, frozen: bool) -> None:
    """An option without effect would be believed to have had one."""
    context = click.get_current_context()
    for option in context.command.params:
        name = str(option.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if name in (_LIVE if simulated else _SIMULATED):
            kind = "in virtual time" if simulated else "with a live target"
            raise click.UsageError(f"{option.opts[0]} has no effect {kind}: leave it out")
        if frozen and name in DRAWN:
            raise click.UsageError(f"{option.opts[0]} has no effect on a frozen workload: leave it out")


def _objectives(given: tuple[str, ...]) -> Any:
    from loadtest.figures import Objectives

    found = {}
    for text in given:
        name, _, seconds = text.partition("=")
        try:
            found[name] = float(seconds)
        except ValueError:
            raise click.BadParameter(f"expected NAME=SECONDS, got {text!r}", param_hint="--slo") from None
        if name not in ("jct", "ttft", "tpot") or not found[name] > 0:
            raise click.BadParameter(
                f"expected jct, ttft or tpot and seconds above 0, got {text!r}", param_hint="--slo"
            )
    return Objectives(**found)


def _headers(given: tuple[str, ...], api_key: str | None) -> dict[str, str]:
    found = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    for text in given:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise click.BadParameter(f"expected NAME:VALUE, got {text!r}", param_hint="--header")
        found[name.strip()] = value.strip()
    return found


def _fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--body") from None
    if not isinstance(found, dict):
        raise click.BadParameter("expected a JSON object", param_hint="--body")
    return found


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(folder: Path) -> None:
    """Make the reports of a stored run anew: figures, tables, plots and HTML from its rows."""
    try:
        from loadtest import store
        from loadtest.report import html
    except ModuleNotFoundError as error:
        raise MissingExtra("loadtest", "loadtest report") from error
    experiment = store.read(folder)
    store.write(folder, experiment)
    html.write(folder, experiment)
    click.echo(f"{folder / 'report.html'}")


@cli.command("compare")
@click.argument("ours", metavar="A[:SETTING]")
@click.argument("theirs", metavar="B[:SETTING]")
@click.option(
    "--fail-above", multiple=True, metavar="FIGURE=RATIO", help="Exit with 1 where A's figure is more times B's."
)
@click.option(
    "--fail-below", multiple=True, metavar="FIGURE=RATIO", help="Exit with 1 where A's figure is fewer times B's."
)
def compare_stored(ours: str, theirs: str, fail_above: tuple[str, ...], fail_below: tuple[str, ...]) -> None:
    """Hold one stored run against another on the same workloads.

    \b
    elis-gateway loadtest compare runs/new runs/old --fail-above jct.mean=1.05 --fail-above jct.p90=1.1
    elis-gateway loadtest compare runs/both:isrtf runs/both:fcfs

    A run that is incomplete or invalid keeps no limit. Figures: jct.mean, jct.p50, jct.p90, jct.p99, jct.max,
    wait.mean, ttft.mean, ttft.p90, tpot.mean, slowdown.mean, slowdown.longest_decile, throughput.tokens_per_second,
    goodput.share.
    """
    try:
        from loadtest import stored
        from loadtest.live import Screen
    except ModuleNotFoundError as error:
        raise MissingExtra("loadtest", "loadtest compare") from error
    limits = [stored.limit(text, above=True) for text in fail_above]
    limits += [stored.limit(text, above=False) for text in fail_below]
    found = stored.compared(ours, theirs)
    Screen().table(*stored.rows(found.differences))
    said = stored.broken(found.differences, limits)
    for line in (*found.faults, *said):
        click.echo(line, err=True)
    if said or (limits and not found.valid):
        sys.exit(1)


@cli.command()
@click.argument("url")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default="engine-model.json", show_default=True
)
@click.option("--model", help="Model to ask for.  [default: the server's first]")
@click.option("--slots", type=_AT_LEAST_ONE, help="Sequences decoded at once.  [default: found out]")
@click.option("--block", default=16, show_default=True, help="Tokens per block of the engine's prefix cache.")
@click.option("--kv-tokens", type=_AT_LEAST_ONE, help="Tokens of key-value memory, where that is a limit.")
@click.option("--rounds", default=3, show_default=True, type=_AT_LEAST_ONE)
@click.option("--about", default="", help="Engine and settings, in words.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token.  [env: OPENAI_API_KEY]")
def calibrate(
    url: str,
    output: Path,
    model: str | None,
    slots: int | None,
    block: int,
    kv_tokens: int | None,
    rounds: int,
    about: str,
    api_key: str | None,
) -> None:
    """Measure an engine (not the gateway in front of it) and write an engine model for the simulator.

    Slots, token rate by batch size, prefill rate, what a seam costs, capacity: a minute or two a round. Nobody else may
    use the engine meanwhile. Then: elis-gateway loadtest run --target sim:engine-model.json ...
    """
    try:
        from loadtest import run as running
    except ModuleNotFoundError as error:
        raise MissingExtra("loadtest", "loadtest calibrate") from error
    running.calibrate_to(
        url,
        output,
        model=model,
        slots=slots,
        block=block,
        kv_tokens=kv_tokens,
        rounds=rounds,
        about=about,
        headers=_headers((), api_key),
        said=click.echo,
    )


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
