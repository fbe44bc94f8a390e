"""Whose tokens? A shipped model counts in its training tokenizer's, an engine in its own, and they differ by script.

Knows: how many training tokens a text has, nearly; how many of the served model's tokens one of them has been. Never:
tokenizers, which model is shipped.

The training tokens of a text are estimated from its characters (median error 5 % on English answers, 2 % on Korean
ones): no tokenizer need run for it. The ratio is learned from usage by served model and script. Both tokenizers being
what they are, it moves little, so that old answers need not fade.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

__all__ = ["SCRIPTS", "Units", "script_of", "training_tokens"]

# Tokens per character of SmolLM2's vocabulary (49,152) under byte-level splitting, fitted by non-negative least squares
# to 9,000 answers of 40 models in English, Korean and Chinese.
_PLAIN = 0.181
_DIGIT, _MARK, _LINES = 1.322 - _PLAIN, 0.801 - _PLAIN, 1.408 - _PLAIN
"""What digits, ASCII punctuation and runs of newlines cost beyond a letter."""
_BREAKS = re.compile(r"\n+")
_DIGITS = b"0123456789"
_MARKS = bytes(code for code in range(128) if re.fullmatch(r"[^\w\s]", chr(code)))
_FOREIGN = {
    "hangul": (re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]"), 2.711 - _PLAIN),
    "kana": (re.compile("[\u3040-\u30ff]"), 1.689 - _PLAIN),
    "han": (re.compile("[\u3400-\u9fff\uf900-\ufaff]"), 1.645 - _PLAIN),
    "other": (re.compile("[\u0080-\u10ff\u1200-\u2fff\u3100-\u312f\ua000-\uabff\U00010000-\U0010ffff]"), 1.16 - _PLAIN),
}
_WIDE_MARKS = (re.compile("[\u3000-\u303f\uff00-\uffef]"), 2.512 - _PLAIN)

SCRIPTS = ("latin", *_FOREIGN)
"""What ratios are kept by. ``other``: Cyrillic, Arabic, emoji, everything that has no entry of its own."""
_BELIEVED = {"latin": 1.0, "hangul": 0.5, "kana": 0.6, "han": 0.5, "other": 0.7}
"""Served tokens per training token, before any were seen: larger vocabularies have words for what SmolLM2 spells."""
_WEIGHT = 200.0
"""Training tokens that this belief counts as."""
_SAMPLE = 400
_LONGEST = 4000
_MODELS = 1000
_LEAST, _MOST = 0.05, 20.0


def training_tokens(text: str) -> float:
    """About how many tokens of the training tokenizer a text has. Of long texts the beginning is looked at."""
    part = text[:_LONGEST]
    tokens = _PLAIN * len(part)
    # Deleting bytes counts them at a twentieth of what regular expressions take.
    raw = part.encode("utf-8", "surrogatepass")
    unmarked = raw.translate(None, _MARKS)
    tokens += _MARK * (len(raw) - len(unmarked)) + _DIGIT * (len(unmarked) - len(unmarked.translate(None, _DIGITS)))
    tokens += _LINES * (part.count("\n") - part.count("\n\n") if "\n\n\n" not in part else len(_BREAKS.findall(part)))
    if not part.isascii():
        for pattern, extra in (*_FOREIGN.values(), _WIDE_MARKS):
            tokens += extra * len(pattern.findall(part))
    return tokens * len(text) / len(part) if part else 0.0


def script_of(answer: str, prompt: str) -> str:
    """The script most of the answer's beginning is written in; of the prompt's end where there is no answer yet."""
    text = answer[:_SAMPLE] if len(answer) >= 16 else prompt[-_SAMPLE:]
    if text.isascii():
        return "latin"
    found = {name: len(pattern.findall(text)) for name, (pattern, _) in _FOREIGN.items()}
    most = max(found, key=found.__getitem__)
    # One such character stands for several letters.
    return most if 3 * found[most] > len(text) - found[most] else "latin"


class Units:
    """Served tokens per training token, by served model and script."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], list[float]] = OrderedDict()
        """[served, training] tokens."""

    def ratio(self, model: str, script: str) -> float:
        """Served tokens per training token."""
        served, training = self._seen.get((model, script), (0.0, 0.0))
        return (served + _BELIEVED[script] * _WEIGHT) / (training + _WEIGHT)

    def learn(self, model: str, answer: str, tokens: int) -> None:
        """An answer's text had ``tokens`` of the served model's."""
        training = training_tokens(answer)
        if training < 5.0 or not _LEAST < tokens / training < _MOST:
            return  # too short to tell, or the text is not all there was (withheld reasoning, say)
        # One answer counts as a thousand tokens at the most: a client's single endless one must not decide.
        share = min(1.0, 1000.0 / training)
        key = (model, script_of(answer, ""))
        sums = self._seen.setdefault(key, [0.0, 0.0])
        sums[0] += tokens * share
        sums[1] += training * share
        self._seen.move_to_end(key)
        if len(self._seen) > _MODELS:
            self._seen.popitem(last=False)

    def dump(self) -> list[list[Any]]:
        """Everything learned, as JSON can hold it."""
        return [[*key, *(round(number, 1) for number in sums)] for key, sums in self._seen.items()]

    def restore(self, rows: Iterable[Iterable[Any]]) -> None:
        """Take up what ``dump`` gave. Raises ValueError or TypeError for anything else."""
        for model, script, served, training in rows:
            if script not in SCRIPTS or not (0.0 <= float(served) < 1e15 and 0.0 <= float(training) < 1e15):
                raise ValueError(f"token units of {model!r}: {script!r} {served!r} {training!r}")
            self._seen[str(model), str(script)] = [float(served), float(training)]
