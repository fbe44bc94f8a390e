"""What the seam costs per chunk: an answer's chunks through ``Answer.feed``, against another tree of this project.

    python -m benchmarks.wire_speed --against ../old-checkout --output benchmarks/results/wire-speed.json

Each case in a process of its own, both trees alternating, best of a few repeats each: a ratio in one run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import click

MEASURE = """
import json, sys, time, orjson
from elis_gateway.wire.continuation import Answer, Mode
from elis_gateway.wire.openai import Route, parse
COUNT = 4000
def chunks(chat):
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = {"id": "cmpl-1", "object": kind, "created": 1, "model": "m"}
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    out = [orjson.dumps(head | {"choices": [first], "prompt_token_ids": [1, 2, 3]})] if chat else []
    for n in range(COUNT):
        text = " word" if n % 7 else " \u5b57"
        choice = {"index": 0} | ({"delta": {"content": text}} if chat else {"text": text})
        choice |= {"logprobs": None, "finish_reason": None}
        if not chat:
            choice |= {"stop_reason": None, "prompt_token_ids": None if n else [1, 2, 3]}
        out.append(orjson.dumps(head | {"choices": [choice | {"token_ids": [500 + n % 900]}]}))
    return out
CASES = {"chat": (True, {}), "completions": (False, {}), "chat, stop strings": (True, {"stop": ["###", "User:"]}),
         "chat, common stop strings": (True, {"stop": ["word word word word x"]})}
result = {}
for name, (chat, more) in CASES.items():
    body = {"model": "m", "stream": True, **more}
    body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body |= {} if chat else {"max_tokens": 8000}
    request = parse(Route.CHAT if chat else Route.COMPLETIONS, orjson.dumps(body))
    payloads = chunks(chat)
    best = 1e9
    for _ in range(5):
        answer = Answer(request, Mode.IDS, context=100000)
        answer.call(None, model="m")
        start = time.process_time()
        for payload in payloads:
            answer.feed([payload])
        best = min(best, (time.process_time() - start) / COUNT)
    assert answer.attained == COUNT
    result[name] = best * 1e6
print(json.dumps(result))
"""


def measure(tree: Path) -> dict[str, float]:
    env = dict(os.environ, PYTHONPATH=str(tree))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=tree, env=env, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


@click.command()
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path))
def main(against: Path, rounds: int, output: Path | None) -> None:
    """Microseconds of processor time per chunk, and this tree's as a ratio of the other's."""
    here = Path(__file__).parent.parent
    pairs = [(measure(here), measure(against)) for _ in range(rounds)]
    rows = {}
    for name in pairs[0][0]:
        ratios = [ours[name] / theirs[name] for ours, theirs in pairs]
        rows[name] = {
            "us": round(min(ours[name] for ours, _ in pairs), 3),
            "us_against": round(min(theirs[name] for _, theirs in pairs), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        }
        click.echo(f"{name}: {rows[name]['us']} us, against {rows[name]['us_against']}, ratio {rows[name]['ratio']}")
    if output is not None:
        about = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work", "rounds": rounds}
        output.write_text(json.dumps({**about, "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
