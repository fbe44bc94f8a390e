"""Real engines for the tests: started once per session, skipped with a reason where they are missing.

``ELIS_ENGINE=require`` turns the skip into a failure (``make test-engine`` does); ``ELIS_VLLM_URL`` and
``ELIS_LLAMA_URL`` name engines that already run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import vllm_engine
from elis_gateway.errors import MissingExtra
from loadtest import engines


def _absent(reason: str) -> None:
    if os.environ.get("ELIS_ENGINE") == "require":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # past pytest's capture: starting takes a while


@pytest.fixture(scope="session")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a vLLM with four slots that orders its queue by priority, model ``smollm2`` in float32."""
    if running := os.environ.get("ELIS_VLLM_URL"):
        yield running.rstrip("/")
        return
    if (reason := vllm_engine.missing()) is not None:
        _absent(reason)
    log: Path = tmp_path_factory.mktemp("vllm") / "server.log"
    with vllm_engine.vllm(slots=4, priority=True, log=log, say=_say) as url:
        yield url


@pytest.fixture(scope="module")
def parsing_vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a vLLM that parses thoughts and tool calls, with a tokenizer that knows their marks."""
    if (reason := vllm_engine.missing()) is not None:
        _absent(reason)
    folder: Path = tmp_path_factory.mktemp("parsing")
    flags = vllm_engine.marked(folder / "model")
    flags += ["--reasoning-parser", "deepseek_r1", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with vllm_engine.vllm(slots=4, extra=flags, log=folder / "server.log", say=_say) as url:
        yield url


@pytest.fixture(scope="session")
def llama_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of llama.cpp's server with four slots, model ``smollm2``."""
    if running := os.environ.get("ELIS_LLAMA_URL"):
        yield running.rstrip("/")
        return
    log: Path = tmp_path_factory.mktemp("llama") / "server.log"
    try:
        with engines.llama(slots=4, log=log) as url:
            yield url
    except MissingExtra as error:
        _absent(str(error))
