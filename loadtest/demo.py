"""``make demo``: the whole thing in one command and under five minutes. Real first, then modelled."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from elis_gateway.errors import GatewayError
from loadtest import demo_model, demo_real
from loadtest.live import Screen

__all__ = ["main", "run"]

LAST_WORDS = """\
For your own server (vLLM: --max-num-seqs is the number of slots):
  ELIS__UPSTREAMS='[{url: "http://localhost:8000", slots: 32}]' elis-gateway serve config/example.yaml
  then point your OpenAI client at it: OPENAI_BASE_URL=http://localhost:8080/v1"""


def run(screen: Screen, *, real: bool = True, modelled: bool = True) -> None:
    """Both parts, or one of them. Raises GatewayError where the real one cannot start."""
    start = time.monotonic()
    if real:
        screen.heading("1. Real: a small model on llama.cpp behind the gateway")
        with tempfile.TemporaryDirectory(prefix="elis-demo-") as folder:
            asyncio.run(demo_real.show(screen, Path(folder)))
    if modelled:
        screen.heading("2. Modelled: the embedded engine near saturation, in virtual time")
        demo_model.show(screen)
    screen.say(f"\n(done in {time.monotonic() - start:.0f} s)")
    screen.heading(LAST_WORDS)


def main() -> None:
    """Entry point of ``python -m loadtest.demo``; exit status 1 where something could not start."""
    screen = Screen()
    try:
        run(screen)
    except GatewayError as error:
        screen.say(str(error), style="bold red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
