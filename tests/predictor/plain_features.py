"""The counters of an answer, counted plainly: all of its text anew at every window, one thing after the other.

What ``features`` keeps from window to window, and how it looks things up, must not change a single bit of this. Changes
of meaning belong in both, and raise ``features.VERSION``.
"""

from __future__ import annotations

import re
from math import log1p

from elis_gateway.predictor import features as f

__all__ = ["features"]

_LIMIT, _TAIL = 16_384, 240
_NUMBERED = re.compile(r"\n[ \t]*(?:\*\*|#{1,4} )?(\d{1,3})[.)]")
_BULLET = re.compile(r"\n[ \t]*[-*•][ \t]")
_HEADING = re.compile(r"\n(?:#{1,6} |\*\*[^*\n]{1,80}\*\*:?\n|Step \d)")
_ENDS = (".", "!", "?", "。", "”", '"', "다.", "）", ")")


def features(prompt: str, answer: str, attained: int) -> list[float]:
    asked = f._Prompt(prompt)
    size, text = len(answer), "\n" + answer[:_LIMIT]
    tail = answer[-_TAIL:]
    end, ended, parts = tail.lower(), tail.rstrip(), tail.split()
    announced, refusal, opening = f._head(answer[:_TAIL])
    numbered, bullets = list(_NUMBERED.finditer(text)), list(_BULLET.finditer(text))
    last_number = int(numbered[-1][1]) if numbered else 0
    last_start = max((found.start() for found in (*numbered, *bullets)), default=-1)
    items = (last_number if last_number <= len(numbered) + 2 else len(numbered)) or len(bullets)
    wanted = asked.items or announced
    per_item = attained / items if items else 0.0
    left = max(wanted - items, 0)
    paragraphs, fences = text.count("\n\n"), text.count("```")
    words = answer.count(" ")
    closing = [at for phrase in f._CLOSING if (at := end.rfind(phrase)) >= 0]
    return [
        *asked.values,
        log1p(attained),
        log1p(size),
        min(size / attained, 12.0) if attained else 0.0,
        f._foreign(tail) if not answer.isascii() else 0.0,
        log1p(text.count("\n") - 1),
        log1p(paragraphs),
        log1p(size / (paragraphs + 1)),
        log1p(max(size - (answer.rfind("\n\n") + 2 if paragraphs else 0), 0)),
        log1p(size - (answer.rfind("\n") + 1)),
        log1p(len(numbered)),
        log1p(last_number),
        log1p(len(bullets)),
        log1p(len(_HEADING.findall(text))),
        log1p(text.count("**") / 2),
        log1p(fences),
        float(fences % 2),
        log1p(max(text.count("{") - text.count("}"), 0)),
        log1p(per_item),
        min(items / wanted, 2.0) if wanted else -1.0,
        log1p(left * (per_item or 30.0)) if wanted else -1.0,
        min(words / asked.words, 2.0) if asked.words else -1.0,
        log1p(max(asked.words - words, 0)) if asked.words else -1.0,
        float(ended.endswith(_ENDS)),
        float(tail.endswith("\n")),
        float(ended.endswith("```") and not fences % 2),
        log1p(len(closing)),
        log1p(len(end) - max(closing)) if closing else 0.0,
        float(any(phrase in end for phrase in f._CONCLUDING)),
        refusal,
        opening,
        1.0 - len(set(parts)) / len(parts) if parts else 0.0,
        log1p(len(tail) - max(tail.rfind(". "), tail.rfind(".\n"), 0)),
        log1p(len(text) - last_start) if last_start >= 0 else 0.0,
    ]
