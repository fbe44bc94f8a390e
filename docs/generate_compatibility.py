"""Write docs/compatibility.md: what becomes of every parameter, asked of the code that decides it.

    python docs/generate_compatibility.py

A test compares what is stored with what this would write, so that the table cannot go stale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elis_gateway.wire.parameters import PARAMETERS, Parameter, Way, alone_at_last, unsliceable
from elis_gateway.wire.thoughts import Count, Thinking

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
FIELDS = json.loads((ROOT / "tests" / "wire" / "vllm_0_32_parameters.json").read_text())

COLUMNS: tuple[tuple[str, bool, Way], ...] = (
    ("vLLM chat", True, Way.CHAT_IDS),
    ("reasoning chat", True, Way.THOUGHTS),
    ("vLLM completions", False, Way.CHAT_IDS),
    ("llama.cpp", True, Way.LLAMA),
    ("by text", False, Way.TEXT),
)

VALUES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x"}], "prompt": "x", "echo": True, "max_tokens": 9, "min_tokens": 3,
    "max_completion_tokens": 9, "ignore_eos": True, "stop": ["x"], "stop_token_ids": [5], "seed": 7,
    "include_stop_str_in_output": True, "temperature": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "repetition_penalty": 1.1, "logit_bias": {"5": 1}, "n": 2, "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": True, "top_logprobs": 2, "logprob_token_ids": [5], "bad_words": ["x"], "tools": [{}],
    "return_tokens_as_token_ids": True, "return_prompt_text": True, "routed_experts_prompt_start": 4,
}  # fmt: skip
"""A value of each parameter that does something; "x" for the others."""

BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True}, "logprob_token_ids": {"logprobs": True}, "seed": {"temperature": 0},
    "return_tokens_as_token_ids": {"logprobs": True}, "tools": {"tool_choice": "none"},
    "min_tokens": {"max_tokens": 9}, "stream_options": {"stream": True},
}  # fmt: skip
"""What a parameter needs beside it to mean something, or to be in the better of its two cases."""

THOUGHTS = "thoughts sliced"
PARSER = Thinking(0, 1, streamed=Count.SUMMED, whole=Count.UNMARKED, waits=True)
"""A reasoning parser of which all is known."""

INTRODUCTION = """\
# Compatibility

What works against the engine works against the gateway. Each parameter has one of four fates:

- **sliced**: the answer may be produced by several calls and be interrupted between tokens, and its client cannot
  tell.
- **one call**: a seam would change what the parameter means, so the request runs as one call: still queued and ordered
  by its predicted length, but not interrupted. With `X-Elis-Debug: 1` the answer says why in `X-Elis-Sliced`.
- **thoughts sliced**: of an answer that thinks first, the thoughts are sliced, however long; what follows them is one
  call, which begins inside them.
- **refused**: only what the engine itself refuses, with the engine's own status and text. The gateway validates what it
  reads itself (JSON, the model's name, `stream`) and relays everything else untouched: a parameter that is not in this
  table reaches the engine as it is, in one call, because nobody has shown that it survives a seam.

"""

NOTES = """
*vLLM*: upstreams that return token ids and take them as a prompt (0.32 and most versions before it). Log-probabilities
of chats are sliced where ids are taken as a chat's prompt too, which the gateway finds out by asking (0.32); elsewhere
they are one call. *reasoning chat*: a streamed chat of a vLLM (0.32) with a reasoning parser; of a chat that is not
streamed the thoughts are sliced. *llama.cpp*: its server,
by ids and texts mixed. *by text*: `continuation: text`, for servers that the operator trusts to continue a text; never
chosen by itself.

Any other server (SGLang, TGI, Ollama, hosted models) that neither tells token ids nor is trusted with text gets each
request as its client wrote it, in one call. `tests/gateway/test_other_engines.py` holds what is known of their habits.

## Parsers

A vLLM with `--reasoning-parser` or `--tool-call-parser` takes chats' answers apart. The gateway sees that by asking
(tools are refused without a tool parser; usage counts reasoning tokens only with a reasoning parser) and then continues
chats on the chat route, with the ids so far as the prompt, so that the engine parses every part.

- **Thoughts**: vLLM's parsers tell from the prompt whether an answer still thinks. Whether this one does is asked too
  (a prompt that ends inside a thought, one that ends after it); if not, chats are one call. Cut at every token and at
  random, streams of 28 of vLLM 0.32's reasoning parsers were those of one call in all of 8,852 comparisons; those of
  three were not (`inkling`, `minimax_m2_append_think`, `olmo3`), which the probe refuses; seven could not be made for
  the tokenizer used (`benchmarks/parser_seams.py`, `benchmarks/results/parser-seams.json`; the parsers alone, without a
  model). What a parser holds back at a seam, such as a blank or the beginning of a mark, is worked out from the tokens
  and put in front of what follows. One call remain: stop strings (they may stand in marks, which no delta shows),
  log-probabilities and token ids (a token whose text is held back has been told and cannot be taken back), special
  tokens shown, running usage, hidden reasoning.
- **After the thoughts**: where tools may be called, where a grammar is to be followed, and of whole documents, the
  thoughts are sliced and the rest is one call that begins inside them, at the last token that was kept: tool parsers
  and grammars, which begin when thoughts end, see all that is theirs. That this engine's grammars wait for the end of
  the thoughts is asked as well. Cut at each place inside the thoughts, streams and documents of the same 28 parsers
  were those of one call in all of 4,602 comparisons, tool calls included (`tails` in `parser-seams.json`). Answers that
  do not think are one call.
- **Usage**: an engine counts `reasoning_tokens` over the tokens of one call. Either by the marks in the answer, which
  is ours to repeat (3 parsers), or by its parser's state, whose counts add up over calls that begin inside the thoughts
  (28; `counts` in `parser-seams.json`). Which one is seen in a forced answer, whole and its second half; from a parser
  that does neither, streams with usage are one call, and documents too.
- **Tools** that are not offered, or not to be called: sliced, parser or not.
- **Tools that may be called**, without a reasoning parser: one call. A parser's state in the middle of a call cannot be
  had or set, and parsers judge a text by how it begins: a text cut before a bracket would become a call.
  `--enable-scale-out` offers render, generate and derender; asked on a real engine, derender left the end token in the
  text (`<|im_end|>`) where the chat route does not, and told no reasoning tokens: its documents are not the engine's.
- **Structured outputs**, without a reasoning parser: one call. Grammars advance over the tokens of one call; neither
  the OpenAI routes nor `/inference/v1/generate` take tokens that were generated before, and a grammar begins anew with
  every call.

## Other routes

- `/v1/responses` and `/v1/messages`: queued and ordered by predicted length, one call each, relayed as they come; an
  engine that lacks them says so itself.
- Everything else under `/v1/`, such as embeddings, audio and files: relayed in both directions as it comes, without a
  slot, uploads unbuffered, to an upstream that serves the model it names (in JSON, or in a form before the file).
  Headers of one hop and the engine's own scheduling headers stay behind.

## What is exact, and where it ends

- At temperature 0 and in float32 a sliced answer has the tokens of one call. In bfloat16 any two calls may differ at
  near-ties, sliced or not, because prefill and decode round differently.
- Above temperature 0 the distribution is the same, but for characters of several tokens that begin just before a seam:
  those survive it with less than their probability (see `wire/continuation.py`).
- `seed` above temperature 0: the engine's generator starts again in each call. Such a request is one call, so the same
  seed gives the same answer as without the gateway.
- `frequency_penalty`: what earlier calls said is taken off by `logit_bias`, the rest by the engine: the same sum, in
  another order of float32 additions. A bias ends at 100, a penalty does not: a token said so often that the limit
  matters is not drawn either way. `presence_penalty` cannot be done like this: the engine would take it off once more
  when a token comes again.
- `stop`: text is held back only while it may still become a stop string, so a stream is never later than the engine's
  own, which holds back as many characters as the longest stop string has.
- `usage.prompt_tokens_details` is that of the call that read the client's prompt. A call that was interrupted never
  says what it found in the cache; then only a later call's word is left, limited to the prompt.
- `n` and lists of prompts: each choice is queued and sliced by itself, and counts as a request where requests are
  counted. Choices of a stream may start at different times; if one is refused or fails, the whole request is. A request
  of more than 64 choices, or one whose choices could not be sliced, is one call.
- The number of chunks in a stream, ids and timestamps are not promised.

## Compared

`benchmarks/conformance.py` sends the surface to a real vLLM 0.32 (CPU build, float32, SmolLM2-135M) directly and via
the gateway, and compares every field of every document and of every stream's joined events, ids, timestamps, cached
tokens aside, log-probabilities within 0.002. Answers of 10 tokens, on a machine busy with other work:

- 44 prompts (8 each in English, Korean, Chinese, with emoji and of code, 4 mixed), completions and chats, streamed and
  not, at windows of 1, 7 and 50 tokens and elastic with forced preemptions, answers of 12 to 70 tokens
  (`make test-engine-full`, 2026-11-22; `engine-exact.json`): on vLLM text, finish reason and usage of all 704 answers
  are the engine's; in 156 of the 176 elastic ones `cached_tokens` differ, which an interrupted call never tells.
- All 321 requests at windows of 3 tokens (`benchmarks/results/conformance-vllm.json`): 310 equal; 4 equal when asked
  again with nothing else in the engine's batch (which of several near-impossible tokens it lists beside a chosen one
  depends on its neighbours); 7 differ on purpose: an unknown model is refused in the gateway's words, and five refusals
  that vLLM puts into a stream that has begun come with their status.
- 84 of them, those of continuous integration, at windows of 1, 3, 50 tokens and elastic with 192 preemptions
  (`conformance-vllm-subset.json`): 336 of 336 equal.
- A vLLM with a reasoning parser (`deepseek_r1`) and a tool parser (`hermes`), nothing configured: 23 chats at the same
  four settings, elastic with 41 preemptions (`conformance-parsers.json`): 92 of 92 equal. That was before documents,
  usage, tools and grammars after thoughts were sliced; of the requests that have come for these, the 19 whose thoughts
  end were compared at windows of 3 tokens on a busy machine and were equal (not stored).
  Known to differ: with the parser `qwen3`, an answer whose content says `<|im_start|>` itself goes on after a seam as
  thoughts (3 of 43 requests to a small model); where that can happen, `chat_parser: true` keeps chats whole.
- All 321 again on elastic windows of three tokens, two slots, 224 preemptions (`conformance-vllm-elastic.json`): 307
  equal, 5 equal when asked again alone, the 7 that differ on purpose, and 2 that were a fault, mended since: a seed
  beyond 64 bits was quoted as a float in the engine's refusal.
- llama.cpp's server, 294 requests at windows of 3 (`conformance-llama.json`; without those that it answers to the end
  of its context): 282 equal, 2 equal when asked again alone. Of the other 10, 4 draw at random, 2 name a model that the
  server does not look at and the gateway does, 2 end inside a character, of which whole answers show a part and streams
  do not, one stream ends with text that the server holds back for a stop string and never sends, and one document lacks
  the count of cached tokens. Those of continuous integration at windows of 1 and 3 (`conformance-llama-subset.json`):
  152 of 152 equal.
- Sampled at temperature 1 (`benchmarks/sampling.py`, `sampling-vllm.json`): the token right after a seam, 640 answers
  in windows of two tokens against 640 of one call, chi-square over the four commonest tokens and the rest: p = 0.64.
  The test finds a shift of 0.2 (Cohen's w) with a probability of 0.83, and found temperature 1.3 (p < 0.00001).
- The official Python and JavaScript clients, LangChain's, LlamaIndex's and litellm, unmodified, on answers with a seam
  at every seventh token: `benchmarks/clients.py`, `benchmarks/results/clients.json`.
- The official Python client's helpers (`parse`, `stream` and their asynchronous forms, structured answers, tools on
  offer, required and named, `responses`) against the real vLLM with a tool parser, directly and through the gateway:
  18 of 18 equal, what they raise included: `benchmarks/clients_tools.py`, `clients-tools.json`.
- vLLM's own serving benchmark, unmodified, chat and completions: nothing fails, as many tokens come as from the engine
  alone; `hey` 0.1.4 (Debian's), 200 streamed chats of 20 clients at once, windows of 50 tokens: 200 of 200 succeed, as
  at the engine alone: `benchmarks/load_generators.py`, `load-generators.jsonl`.
- What a chunk costs, against the tree before: `benchmarks/wire_speed.py`, `benchmarks/results/wire-speed.json`.
"""


def fate(row: Parameter, chat: bool, way: Way) -> str:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body |= {"model": "m", row.name: VALUES.get(row.name, "x")} | BESIDE.get(row.name, {})
    if way is Way.THOUGHTS:
        body.setdefault("stream", True)
    if not chat:
        body.pop("tool_choice", None)
        if "logprobs" in body:
            body["logprobs"] = 2
    if way not in (Way.TEXT, Way.LLAMA):
        body.pop("n", None)  # split into jobs before anything else is asked (wire/several.py)
    if unsliceable(body, chat, way, PARSER):
        return "one call"
    return THOUGHTS if way is Way.THOUGHTS and alone_at_last(body) else "sliced"


def fates(row: Parameter) -> list[str]:
    return ["–" if not known(row, chat) else fate(row, chat, way) for _, chat, way in COLUMNS]


def known(row: Parameter, chat: bool) -> bool:
    """Does the route have it? What vLLM has on neither is other servers' and may be sent on both."""
    if not any(row.name in FIELDS[route] for route in FIELDS):
        return True
    return row.name in FIELDS["chat" if chat else "completions"]


def note(row: Parameter) -> str:
    words = row.why
    if row.idle_words:
        words += f"; sliced where it is {row.idle_words}"
    return words


def page() -> str:
    rows: Mapping[str, list[str]] = {name: fates(row) for name, row in PARAMETERS.items()}
    lines = [INTRODUCTION.rstrip(), "", "| | " + " | ".join(title for title, *_ in COLUMNS) + " |"]
    lines.append("|---|" + "---|" * len(COLUMNS))
    for word in ("sliced", THOUGHTS, "one call"):
        counts = (str(sum(row[column] == word for row in rows.values())) for column in range(len(COLUMNS)))
        lines += [f"| **{word}** | " + " | ".join(counts) + " |"]
    lines += ["", "| parameter | " + " | ".join(title for title, *_ in COLUMNS) + " | how, or why not |"]
    lines.append("|---|" + "---|" * (len(COLUMNS) + 1))
    lines += [f"| `{name}` | " + " | ".join(row) + f" | {note(PARAMETERS[name])} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n" + NOTES


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
