"""The command line: one command, ``elis-gateway``, with its sub-commands.

Knows: the sub-commands, and that the serving loop is uvloop (chosen here and nowhere else). Never: scheduling, HTTP
handling. What a sub-command needs is imported inside it, so that ``--help`` and completion are quick and a missing
extra is answered with the pip command that brings it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
from collections.abc import Coroutine
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import click
from click.shell_completion import get_completion_class

from elis_gateway import __version__
from elis_gateway.errors import ConfigError, GatewayError, MissingExtra

__all__ = ["cli", "main"]

PROGRAM = "elis-gateway"

_ELSEWHERE = {
    "predictor": ("onnx_export.cli", "train", "The length predictor: collect, train, evaluate, export, show."),
    "loadtest": ("loadtest.cli", "loadtest", "The same work under different policies: workloads, runs, the demo."),
}
"""Groups that live in packages of their own: module, extra that brings what it imports, short help."""


class _Failure(click.ClickException):
    """``Error: message`` on standard error. Exit status 2: command line or installation are wrong; 1: the rest."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


class _Commands(click.Group):
    """Finds the groups of ``_ELSEWHERE`` when they are asked for, and says our errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _ELSEWHERE:
            return super().get_command(ctx, name)
        module, extra, _ = _ELSEWHERE[name]
        return _imported(module, extra, f"{PROGRAM} {name}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does it, but without importing what is only listed."""
        rows = [(name, command.get_short_help_str(70)) for name, command in self.commands.items()]
        rows += [(name, help) for name, (_, _, help) in _ELSEWHERE.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GatewayError as error:
            raise _Failure(str(error), 2 if isinstance(error, ConfigError | MissingExtra) else 1) from error
        except OSError as error:
            # An address in use, a file that cannot be opened: the operator's to mend, no traceback needed.
            raise _Failure(str(error), 1) from error


def _imported(module: str, extra: str, what: str) -> click.Command:
    try:
        command = import_module(module).cli
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("elis_gateway", "loadtest", "onnx_export"):
            raise
        raise _Failure(str(MissingExtra(extra, what)), 2) from error
    assert isinstance(command, click.Command)
    return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=f"Shell completion: {PROGRAM} completion --help",
)
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM)
def cli() -> None:
    """A reverse proxy for OpenAI-compatible LLM servers: the request with the least left to generate goes first."""
    _use_all_descriptors()


def _use_all_descriptors() -> None:
    """A stream takes two sockets, its client's and its upstream's. The soft limit that shells and services begin with,
    1024, is for programs that call ``select``; up to the hard one it is ours to raise."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems name no limit, and refuse that all the same.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


_config_file = click.argument("path", metavar="CONFIG.yaml", type=click.Path(dir_okay=False, path_type=Path))


@cli.command()
@_config_file
def serve(path: Path) -> None:
    """Run the gateway.

    SIGTERM or Ctrl-C stops it gracefully, SIGHUP reads the configuration again.
    Any key of the file can be overridden by environment: ELIS__SCHEDULER__WINDOW=25.
    """
    # Before numpy is imported: the matrices here are small, and threads that spin for them take milliseconds, and the
    # cores, from the event loop.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A reload that is asked for before anything serves would end the process: what it asks for is about to be read.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from elis_gateway import app, config, logs

    effective = config.load(path)
    logs.setup(effective.logging.level, effective.logging.format)
    for words in config.warnings(effective):
        logging.getLogger("elis_gateway").warning(words)
    _run(app.serve(effective, reload=lambda: config.load(path)))


@cli.command("check-config")
@_config_file
@click.option("-q", "--quiet", is_flag=True, help="Only say what is wrong.")
def check_config(path: Path, quiet: bool) -> None:
    """Validate a configuration and print what is in effect.

    That is the file, overridden by the environment (ELIS__SECTION__KEY), with every default spelled out.
    """
    from elis_gateway import config, tls

    effective = config.load(path)
    if effective.auth.keys_file is not None and effective.auth.keys_file.exists():
        config.keys(effective)
    tls.try_files(effective)
    for words in config.warnings(effective):
        click.echo(f"Warning: {words}", err=True)
    if not quiet:
        click.echo(config.dump(effective), nl=False)


@cli.command("key")
@click.argument("name", default="client")
@click.option("--existing", is_flag=True, help="Hash a key that is read from standard input instead of making one.")
@click.option("--admin", is_flag=True, help="Print the line for the section `admin` instead.")
def key(name: str, existing: bool, admin: bool) -> None:
    """Make an API key and print it once, with the lines that let it in.

    The configuration keeps the key's hash alone, so what is printed here cannot be had again.
    """
    from elis_gateway.access import hashed, new_key

    made = input().strip() if existing else new_key()
    stored = hashed(made)
    if not existing:
        click.echo(f"key: {made}", err=True)
    # Quoted: YAML would take `yes` or `42` for something else than a name.
    quoted = json.dumps(name, ensure_ascii=False)
    click.echo(f"admin:\n  key_hash: {stored}" if admin else f"- name: {quoted}\n  hash: {stored}")


@cli.command()
@click.argument("target", metavar="URL|CONFIG.yaml")
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the engine's key, for a URL.")
@click.option("-q", "--quiet", is_flag=True, help="Only print the YAML.")
def doctor(target: str, api_key_env: str | None, quiet: bool) -> None:
    """Look at an engine, or at every engine of a configuration: what it is and can do, the slots it really has, what
    interrupting costs, and whether order can help. Takes a minute per engine, of all its slots.

    Prints the YAML to use. Exit status 1: an engine does not answer or generates nothing, or the configuration is
    wrong about one.

    \b
    With a configuration whose gateway runs, its metrics tell whether requests wait and answers differ
    (the admin key, where it asks for one, from ELIS_ADMIN_KEY).
    """
    from elis_gateway import config, doctor_report
    from elis_gateway import doctor as doctoring

    if "://" not in target and ":" in target and not Path(target).exists():
        raise ConfigError(f"{target}: neither a file nor a URL, such as http://127.0.0.1:8000")
    if "://" in target:
        given: dict[str, Any] = {"url": target, "slots": 1, "api_key_env": api_key_env}
        upstreams = config.from_mapping({"upstreams": [given]}).upstreams
        effective = None
    else:
        effective = config.load(Path(target))
        upstreams = effective.upstreams

    def say(what: str) -> None:
        if not quiet:
            click.echo(f"looking: {what} ...", err=True)

    found, failed = asyncio.run(doctoring.examine_all(upstreams, effective, say=say))
    if not quiet:
        for one in found:
            click.echo("\n".join(doctor_report.report(one)) + "\n")
    if yaml := doctor_report.snippet(found):
        click.echo(yaml if quiet else f"The YAML to use:\n\n{yaml}", nl=False)
    for line in failed:
        click.echo(f"Error: {line}", err=True)
    if failed or any(one.wrong for one in found):
        raise SystemExit(1)


@cli.command("sim-engine")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    default=8100,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0: any free port, printed at the start.",
)
@click.option(
    "--model", "models", multiple=True, default=("sim",), show_default=True, help="Name it serves; repeatable."
)
@click.option(
    "--engine", default="vllm-cpu", show_default=True, help="Engine model: a JSON file, or a shipped one's name."
)
@click.option("--slots", type=click.IntRange(min=1), help="Sequences run at once, instead of the engine model's.")
@click.option(
    "--speed",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Modelled seconds per real second.",
)
@click.option(
    "--replay", type=click.Path(exists=True, dir_okay=False), help="Speak recorded answers from this JSONL file."
)
@click.option(
    "--max-model-len",
    default=8192,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens of prompt and answer together.",
)
@click.option(
    "--priority",
    type=click.Choice(["honour", "ignore", "refuse"]),
    default="ignore",
    show_default=True,
    help="What it does with the field `priority`.",
)
@click.option("--token-ids/--no-token-ids", default=True, show_default=True, help="Whether it returns token ids.")
@click.option("--prompt-tokens-details", is_flag=True, help="Report cached prompt tokens in the usage.")
@click.option(
    "--stream-interval", default=1, show_default=True, type=click.IntRange(min=1), help="Tokens per streamed delta."
)
@click.option("--delay/--no-delay", default=True, show_default=True, help="Without: every token is ready at once.")
@click.option("--api-key", envvar="ELIS_SIM_API_KEY", help="Key that clients must bring.  [env: ELIS_SIM_API_KEY]")
@click.option("--seed", default=0, show_default=True, help="Of sampled requests that bring none.")
def sim_engine(
    host: str,
    port: int,
    models: tuple[str, ...],
    engine: str,
    slots: int | None,
    speed: float,
    replay: str | None,
    max_model_len: int,
    priority: Literal["honour", "ignore", "refuse"],
    token_ids: bool,
    prompt_tokens_details: bool,
    stream_interval: int,
    delay: bool,
    api_key: str | None,
    seed: int,
) -> None:
    """Run the embedded engine.

    An OpenAI-compatible server over a model of a batching engine, for trying things out and for tests.
    """
    from dataclasses import replace

    from elis_gateway import logs
    from elis_gateway.sim.engine import EngineModel
    from elis_gateway.sim.server import ServerConfig, serve

    model = EngineModel.load(engine)
    if slots is not None:
        model = replace(model, slots=slots)
    logs.setup()
    config = ServerConfig(
        host=host,
        port=port,
        models=models,
        engine=model,
        speed=speed,
        replay=replay,
        max_model_len=max_model_len,
        priority=priority,
        token_ids=token_ids,
        prompt_tokens_details=prompt_tokens_details,
        stream_interval=stream_interval,
        delay=delay,
        api_key=api_key,
        seed=seed,
    )
    _run(serve(config, ready=lambda url: click.echo(f"listening on {url}")))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(elis-gateway completion bash)"        in ~/.bashrc
    zsh:   eval "$(elis-gateway completion zsh)"         in ~/.zshrc
    fish:  elis-gateway completion fish > ~/.config/fish/completions/elis-gateway.fish
    """
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(cli, {}, PROGRAM, "_ELIS_GATEWAY_COMPLETE").source())


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(coroutine)
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def main() -> None:
    """Entry point of the console command."""
    cli(prog_name=PROGRAM)
