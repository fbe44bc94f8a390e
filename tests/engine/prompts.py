"""Prompts for the comparisons on real engines, written for this project: plain text, other scripts, characters that
take several tokens, code. The order mixes the kinds, so that any prefix of the list is a fair subset."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["PROMPTS", "Prompt", "chosen"]


class Prompt(NamedTuple):
    name: str
    text: str


_ENGLISH = (
    "Explain in three sentences why the sky is blue.",
    "List five things to pack for a rainy weekend in the mountains.",
    "Who wrote the first program for a mechanical computer, and what did it compute?",
    "Write the opening paragraph of a story about a lighthouse keeper who collects clocks.",
    "Summarise how bread rises, for a child of eight.",
    "Give me a polite email that moves a meeting from Tuesday to Thursday.",
    "What is the difference between weather and climate? Use an example with numbers: 3.14, 42, -7.",
    "Answer with one word: what colour is snow?",
)
_KOREAN = (
    "한국의 사계절을 짧게 설명해 주세요.",
    "김치찌개를 만드는 방법을 세 단계로 알려 주세요.",
    "다음 문장을 이어서 써 주세요: 옛날 옛적에 깊은 산속에 호랑이가 살고 있었습니다.",
    "서울에서 하루를 보내는 좋은 방법은 무엇인가요?",
    "'뷁'과 '쀍' 같은 드문 글자를 넣어 짧은 문장을 써 보세요.",
    "인공지능이 무엇인지 초등학생에게 설명해 주세요.",
    "봄비에 대한 짧은 시를 써 주세요.",
    "숫자를 하나부터 열까지 한글로 세어 주세요.",
)
_CHINESE = (
    "请用两句话介绍一下长城。",
    "写一首关于月亮的短诗。",
    "请把下面的句子翻译成英文：知识就是力量。",
    "龘、靐、齉这些字怎么读？请逐个解释。",
    "请列出三种健康的早餐，并说明理由。",
    "用简单的语言解释什么是光合作用。",
    "请从一数到二十，用汉字写。",
    "日本語で自己紹介をしてください。名前は田中です。",
)
_EMOJI = (
    "Answer only with emoji: what do you eat for breakfast? 🥐🍳🥑",
    "Write one sentence in Korean and some rare emoji: 🦣🪿",
    "Repeat after me, ten times: 🎉🎊🥳",
    "Tell a story using only these: 🐉🏰👑⚔️🧙‍♂️",
    "What do these flags have in common? 🇰🇷🇯🇵🇨🇳🇺🇸🇫🇷",
    "Rate these from best to worst and keep the symbols: 👨‍👩‍👧‍👦 👩🏽‍🚀 🧑🏿‍🔬",
    "Continue the pattern: 🌑🌒🌓🌔🌕🌖🌗🌘🌑🌒",
    "Translate into emoji: I love rainy days, coffee and my old typewriter.",
)
_CODE = (
    "Write a Python function that reverses a string, with a docstring.",
    "Write a SQL query that finds the ten customers with the largest total of orders.",
    "Fix this line of C: for (int i = 0; i <= n; i++) sum += a[i];",
    "Show an HTML page with a heading, a paragraph and a list of three items.",
    "Write a bash one-liner that counts the lines of all *.py files.",
    'Complete this JSON: {"name": "Ada", "born": 1815, "skills": [',
    "def fibonacci(n: int) -> int:\n",
    "Explain the regular expression ^[a-z0-9._%+-]+@[a-z0-9.-]+\\.[a-z]{2,}$ step by step.",
)
_MIXED = (
    "∑, ∫, √, ∞, ≠, ≤: write an equation with each of these symbols.",
    "Traduis en français et en grec: «The café is closed», puis ajoute ñ, ß, ø, ж, ש, ع.",
    "Write the word hello in as many scripts as you can: Привет, नमस्ते, สวัสดี, 你好, 안녕,",
    "Draw a small table with ┌─┬─┐ and fill it with 1, 2, 3.",
)

_KINDS = {
    "english": _ENGLISH,
    "korean": _KOREAN,
    "chinese": _CHINESE,
    "emoji": _EMOJI,
    "code": _CODE,
    "mixed": _MIXED,
}

PROMPTS = tuple(
    Prompt(f"{kind}-{row + 1}", texts[row])
    for row in range(max(map(len, _KINDS.values())))
    for kind, texts in _KINDS.items()
    if row < len(texts)
)


def chosen() -> tuple[Prompt, ...]:
    """As many as ``ELIS_ENGINE_PROMPTS`` says: a number (default 10) or ``all``."""
    wanted = os.environ.get("ELIS_ENGINE_PROMPTS", "10")
    return PROMPTS if wanted == "all" else PROMPTS[: int(wanted)]
