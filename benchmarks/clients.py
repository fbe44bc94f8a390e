"""Other people's clients, unmodified, against the gateway.

    python -m benchmarks.clients --python ENV/bin/python --node FOLDER --output benchmarks/results/clients.json

``ENV`` is a scratch environment with one or more of ``openai litellm langchain-openai llama-index-llms-openai-like``
(their requirements clash: give several); ``FOLDER`` is one in which ``npm install openai`` was run. The engine is the
embedded one, behind windows of seven tokens, so every answer has seams; each client's text, streamed and not, has to be
what the engine says by itself.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import click

from elis_gateway.sim.language import Language, Lengths
from elis_gateway.sim.server import ServerConfig, SimServer
from tests.engine.gateway import gateway

PROMPT = "What do clients say?"
LIMIT = 60

OPENAI = """
import asyncio, json, sys
from openai import AsyncOpenAI, OpenAI
url, prompt, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
ask = dict(model="sim", messages=[{"role": "user", "content": prompt}], max_tokens=limit)
out = {}
with OpenAI(base_url=url, api_key="x") as api:
    out["sync"] = api.chat.completions.create(**ask).choices[0].message.content
    chunks = api.chat.completions.create(stream=True, **ask)
    out["sync stream"] = "".join(c.choices[0].delta.content or "" for c in chunks)
    with api.chat.completions.stream(**ask) as stream:
        out["stream helper"] = stream.get_final_completion().choices[0].message.content
    out["raw"] = api.chat.completions.with_raw_response.create(**ask).parse().choices[0].message.content
    out["several"] = api.chat.completions.create(n=2, **ask).choices[1].message.content
    assert "sim" in [model.id for model in api.models.list()]
async def more():
    async with AsyncOpenAI(base_url=url, api_key="x") as api:
        out["async"] = (await api.chat.completions.create(**ask)).choices[0].message.content
        text = ""
        ask["stream_options"] = {"include_usage": True}
        async for chunk in await api.chat.completions.create(stream=True, **ask):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        out["async stream"] = text
asyncio.run(more())
print(json.dumps(out))
"""

LITELLM = """
import json, sys
import litellm
url, prompt, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
litellm.suppress_debug_info = True
ask = dict(model="openai/sim", messages=[{"role": "user", "content": prompt}], max_tokens=limit)
ask |= dict(api_base=url, api_key="x")
out = {"completion": litellm.completion(**ask).choices[0].message.content}
out["stream"] = "".join(c.choices[0].delta.content or "" for c in litellm.completion(stream=True, **ask))
print(json.dumps(out))
"""

LANGCHAIN = """
import asyncio, json, sys
from langchain_openai import ChatOpenAI
url, prompt, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
llm = ChatOpenAI(model="sim", base_url=url, api_key="x", max_tokens=limit)
out = {"invoke": llm.invoke(prompt).content, "stream": "".join(chunk.content for chunk in llm.stream(prompt))}
out["ainvoke"] = asyncio.run(llm.ainvoke(prompt)).content
out["batch"] = llm.batch([prompt, prompt])[1].content
print(json.dumps(out))
"""

LLAMA_INDEX = """
import json, sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
url, prompt, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
llm = OpenAILike(model="sim", api_base=url, api_key="x", is_chat_model=True, max_tokens=limit)
messages = [ChatMessage(role="user", content=prompt)]
out = {"chat": llm.chat(messages).message.content}
out["stream"] = "".join(piece.delta for piece in llm.stream_chat(messages))
print(json.dumps(out))
"""

NODE = """
import OpenAI from "openai";
const [url, prompt, limit] = process.argv.slice(2);
const api = new OpenAI({ baseURL: url, apiKey: "x" });
const ask = { model: "sim", messages: [{ role: "user", content: prompt }], max_tokens: Number(limit) };
const out = { create: (await api.chat.completions.create(ask)).choices[0].message.content };
let text = "";
for await (const chunk of await api.chat.completions.create({ ...ask, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
out.stream = text;
out["stream helper"] = (await api.chat.completions.stream(ask).finalChatCompletion()).choices[0].message.content;
console.log(JSON.stringify(out));
"""

PYTHON = {"openai": OPENAI, "litellm": LITELLM, "langchain-openai": LANGCHAIN, "llama-index-openai-like": LLAMA_INDEX}
VERSIONS = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


async def reference(url: str) -> str:
    body = {"model": "sim", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": LIMIT}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as response:
        text: str = (await response.json())["choices"][0]["message"]["content"]
        return text


def run(argv: list[str], folder: Path) -> tuple[dict[str, str], str]:
    """(texts by how they were asked for, what went wrong)."""
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode != 0:
        return {}, done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else f"status {done.returncode}"
    texts: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return texts, ""


def told(argv: list[str], folder: Path) -> str:
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False).stdout


async def everything(pythons: list[Path], node: Path | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    config = ServerConfig(port=0, delay=False, language=Language(lengths=Lengths(kind="constant", mean=45)))
    rows: list[dict[str, Any]] = []
    async with SimServer(config) as engine:
        expected = await reference(engine.url)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            upstream = {"url": engine.url, "slots": 8}
            context = gateway(folder, [upstream], scheduler={"mode": "fixed", "window": 7})
            gate = await asyncio.to_thread(context.__enter__)
            try:
                commands: dict[tuple[str, str], tuple[list[str], Path]] = {}
                for python in pythons:
                    for client, script in PYTHON.items():
                        package = "llama-index-llms-openai-like" if client.startswith("llama") else client
                        asks = [str(python), "-c", VERSIONS, package]
                        if version := (await asyncio.to_thread(told, asks, folder)).strip():
                            commands[client, version] = [str(python), "-c", script], folder
                if node is not None:
                    (node / "client.mjs").write_text(NODE)
                    asks = ["node", "-e", "console.log(require('./node_modules/openai/package.json').version)"]
                    version = (await asyncio.to_thread(told, asks, node)).strip()
                    commands["openai (node)", version] = ["node", "client.mjs"], node
                for (client, version), (argv, where) in commands.items():
                    argv = [*argv, f"{gate.url}/v1", PROMPT, str(LIMIT)]
                    texts, wrong = await asyncio.to_thread(run, argv, where)
                    same = {how: text == expected for how, text in texts.items()}
                    rows.append({"client": client, "version": version, "equal": same, "error": wrong})
                    say(f"{client} {version}: {same} {wrong}")
            finally:
                await asyncio.to_thread(context.__exit__, None, None, None)
    return rows


@click.command()
@click.option("--python", "pythons", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--node", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where openai is installed."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path))
def main(pythons: tuple[Path, ...], node: Path | None, output: Path | None) -> None:
    """Run them all, print and store what they saw."""
    rows = asyncio.run(everything([python.absolute() for python in pythons], node, click.echo))
    if output is not None:
        output.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "clients": rows}, indent=2) + "\n")
    raise SystemExit(any(row["error"] or not all(row["equal"].values()) for row in rows))


if __name__ == "__main__":
    main()
