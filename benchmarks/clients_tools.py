"""The official Python client's helpers for tools, structured answers and responses, directly and through the gateway.

    python -m benchmarks.clients_tools --python ENV/bin/python --output benchmarks/results/clients-tools.json

``ENV`` holds ``openai``, unmodified. The engine is a real one, vLLM's CPU build with a tool parser (or ``--url`` of one
that runs): a grammar and a parser are nothing that the embedded engine pretends to have. Windows of seven tokens, so
that what may be sliced is. Everything the client's helpers say has to be the same either way; ids aside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tokenizers import Tokenizer

from benchmarks.vllm_engine import MODEL, VERSION, cache, vllm
from tests.engine.gateway import gateway

FLAGS = (
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    # As for ``blanks``, where a schema is the whole answer.
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip

HELPERS = """
import asyncio, json, sys
from enum import Enum
from typing import Literal
import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:3]
blanks = {token: -100 for token in json.loads(sys.argv[3])}
class Colour(str, Enum):
    red = "red"
    blue = "blue"
class Verdict(BaseModel):
    warm: bool
    colour: Colour
class Weather(BaseModel):
    "The weather of a city."
    city: Literal["Oslo", "Lima"]
    celsius: bool

text = "What is the weather in Lima? Is red a warm colour?"
ask = dict(model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=60)
tools = [openai.pydantic_function_tool(Weather)]
forced = dict(tools=tools, tool_choice="required", logit_bias=blanks)
named = dict(tools=tools, tool_choice={"type": "function", "function": {"name": "Weather"}}, logit_bias=blanks)
respond = dict(model=model, input=text, temperature=0, max_output_tokens=30)
out = {}

def told(completion):
    choice = completion.choices[0]
    calls = choice.message.tool_calls or []
    parsed = choice.message.parsed
    return {
        "finish": choice.finish_reason,
        "content": choice.message.content,
        "parsed": parsed and parsed.model_dump(mode="json"),
        "tools": [[c.function.name, c.function.arguments,
                   c.function.parsed_arguments and c.function.parsed_arguments.model_dump(mode="json")] for c in calls],
        "usage": completion.usage and [completion.usage.prompt_tokens, completion.usage.completion_tokens],
    }

def tried(name, act):
    try:
        out[name] = act()
    except Exception as error:
        out[name] = {"error": type(error).__name__, "said": str(getattr(error, "body", error))[:300]}

def streamed(api, **options):
    with api.chat.completions.stream(**ask, **options, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        return {**told(stream.get_final_completion()), "events": sorted(kinds)}

def responses_streamed(api):
    with api.responses.stream(**respond) as stream:
        kinds = {event.type for event in stream}
        return [stream.get_final_response().output_text, sorted(kinds)]

with OpenAI(base_url=url, api_key="x", max_retries=0) as api:
    chat = api.chat.completions
    tried("parse", lambda: told(chat.parse(response_format=Verdict, **ask)))
    tried("beta parse", lambda: told(api.beta.chat.completions.parse(response_format=Verdict, **ask)))
    tried("stream, parsed", lambda: streamed(api, response_format=Verdict))
    tried("stream, plain", lambda: streamed(api))
    tried("tools, required", lambda: told(chat.parse(**forced, **ask)))
    tried("tools, named", lambda: told(chat.parse(**named, **ask)))
    tried("tools, auto", lambda: told(chat.parse(tools=tools, **ask)))
    tried("tools, streamed", lambda: streamed(api, **named))
    tried("tools, required, streamed", lambda: streamed(api, **forced))
    tried("completion stream", lambda: "".join(chunk.choices[0].text for chunk in api.completions.create(
        model=model, prompt="Red is", temperature=0, max_tokens=40, stream=True)))
    def raw():
        with chat.with_streaming_response.create(**ask) as reply:
            return reply.parse().choices[0].message.content
    tried("streaming response", raw)
    tried("responses", lambda: api.responses.create(**respond).output_text)
    tried("responses, streamed", lambda: responses_streamed(api))
    tried("responses, parsed", lambda: api.responses.parse(text_format=Verdict, **respond).output_parsed.model_dump(
        mode="json"))
    tried("cut by its limit", lambda: told(chat.parse(response_format=Verdict, **{**ask, "max_tokens": 3})))
    tried("refused", lambda: chat.create(**{**ask, "temperature": -1}).id)

async def parsed():
    async with AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as api:
        return told(await api.chat.completions.parse(response_format=Verdict, **ask))

async def async_streamed():
    async with AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as api:
        async with api.chat.completions.stream(**named, **ask) as stream:
            kinds = {event.type async for event in stream}
            return {**told(await stream.get_final_completion()), "events": sorted(kinds)}
tried("async parse", lambda: asyncio.run(parsed()))
tried("async tools, streamed", lambda: asyncio.run(async_streamed()))
print(json.dumps(out))
"""


def blanks() -> list[str]:
    """Ids of the model's tokens that are nothing but white space: between the parts of a tool's arguments the grammar
    allows any number of them, and a model this small then writes no other."""
    tokenizer = Tokenizer.from_file(str(cache() / "smollm2-135m-instruct" / "tokenizer.json"))
    texts = {token: tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.get_vocab().values()}
    return [str(token) for token, text in sorted(texts.items()) if text and not text.strip()]


def ask(python: Path, url: str) -> dict[str, Any]:
    """What each helper said. Raises ClickException where the script itself failed."""
    argv = [str(python), "-c", HELPERS, f"{url}/v1", MODEL, json.dumps(blanks())]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=540, check=False)
    if done.returncode != 0:
        raise click.ClickException(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@contextmanager
def engine(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with vllm(slots=4, extra=FLAGS, say=click.echo) as made:
        yield made


@click.command(help=__doc__.split("\n")[0])
@click.option("--python", type=click.Path(exists=True, path_type=Path), default=Path(sys.executable))
@click.option("--url", help="A vLLM that runs already, with the flags of this file.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path))
def main(python: Path, url: str | None, output: Path | None) -> None:
    python = python.absolute()
    with engine(url) as at, tempfile.TemporaryDirectory() as folder:
        direct = ask(python, at)
        upstream = {"url": at, "slots": 4}
        with gateway(Path(folder), [upstream], scheduler={"mode": "fixed", "window": 7}) as gate:
            through = ask(python, gate.url)
    rows = [{"how": how, "equal": direct[how] == through[how], "direct": direct[how]} for how in direct]
    for row in rows:
        if not row["equal"]:
            row["through"] = through[row["how"]]
        click.echo(f"{row['how']:24s} {'equal' if row['equal'] else 'DIFFERENT'}  {json.dumps(row['direct'])[:150]}")
        if not row["equal"]:
            click.echo(f"{'':24s}            {json.dumps(row['through'])[:150]}")
    if output is not None:
        told = [str(python), "-c", "import openai; print(openai.__version__)"]
        version = subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
        about = {"date": time.strftime("%Y-%m-%d"), "openai": version, "engine": f"vLLM {VERSION} (CPU), {MODEL}"}
        output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    raise SystemExit(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    main()
