"""What a head sees besides the prompt's embedding, and how text is cut for the encoder: ONE definition.

Training (``onnx_export``) and serving read it from here, so a feature cannot mean two things. Knows: text and token
counts. Never: onnxruntime, torch, tokenizers, jobs. Standard library only.

The counters of a prompt are made once per job (``Reading``), and so are those of the lines of its answer that are
complete: every window costs what is new in it, some 20 microseconds. Every feature is finite and small (counts are
log(1 + n)), so that the same numbers suit trees and networks. A change of meaning, order or number of the features
raises ``VERSION``; a model folder names the version it was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from math import log1p
from typing import NamedTuple

__all__ = [
    "ANSWER_FEATURES", "FEATURES", "PROMPT_FEATURES", "VERSION", "Reading", "answer_text", "features", "paper_ids",
    "prompt_ids", "prompt_text",
]  # fmt: skip

VERSION = 1

_TEXT_LIMIT = 8192
"""Characters of a prompt or of an answer that are looked at; of longer ones the ends."""
_TAIL = 240
"""Characters at the end of the answer in which closing phrases and repetition are looked for."""

# ---- the prompt ------------------------------------------------------------------------------------------------


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NUMBERS = {
    word: number
    for number, words in enumerate(
        (
            "", "one 하나 한 一", "two couple 두 둘 两 二", "three 세 셋 三", "four 네 四", "five 다섯 五",
            "six 여섯 六", "seven 일곱 七", "eight 여덟 八", "nine 아홉 九", "ten 열 十", "eleven", "twelve dozen",
            "thirteen", "fourteen", "fifteen",
        )
    )
    for word in words.split()
} | {"twenty": 20, "thirty": 30, "fifty": 50, "hundred": 100}  # fmt: skip
_THINGS = _set(
    "tip tips way ways idea ideas example examples reason reasons step steps thing things question questions fact "
    "facts item items point points bullet bullets name names title titles book books movie movies song songs "
    "suggestions options benefits advantages disadvantages differences strategies methods lines keywords topics "
    "recipes places countries cities products headlines slogans quotes jokes activities features types kinds "
    "sections chapters stanzas verses columns rows hashtags tweets posts answers synonyms games exercises words "
    "companies brands people characters foods animals skills ingredients techniques tools apps websites stories"
)
_UNITS = {
    "words": ("word", "words", "단어"),
    "sentences": ("sentence", "sentences"),
    "paragraphs": ("paragraph", "paragraphs", "page", "pages", "stanza", "stanzas", "chapter", "chapters"),
}
_CJK_WORDS = re.compile(r"(\d{2,5})\s*(?:자|字|글자|단어)")
_CJK_ITEMS = re.compile(
    r"(\d{1,3}|[一二两三四五六七八九十]|한|두|세|네|다섯|여섯|일곱|여덟|아홉|열) ?(?:가지|개|단계|个|条|种|点|首)"
)
_WORD = re.compile(r"[a-z']+|\d+")

_ASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "write": ("write compose draft create generate", ("작성", "써 줘", "써줘", "写")),
    "essay": (
        "essay article blog report guide paper speech lesson proposal plan itinerary outline",
        ("에세이", "보고서", "계획", "文章"),
    ),
    "story": (
        "story stories tale novel scene dialogue script chapter fanfiction screenplay",
        ("이야기", "소설", "故事"),
    ),
    "poem": ("poem haiku limerick lyrics song rap verse rhyme sonnet", ("시를", "诗")),
    "mail": ("email mail letter tweet post caption slogan headline title tagline message", ("이메일", "편지", "邮件")),
    "list": (
        "list enumerate bullet ideas examples tips suggest suggestions recommend recommendations",
        ("ways to", "목록", "나열", "추천", "列出", "列举"),
    ),
    "code": (
        "code function program script python javascript typescript java sql html css regex api class algorithm "
        "implement bash excel react rust php linux",
        ("```", "c++", "c#", "def ", "import ", "코드", "함수", "代码"),
    ),
    "explain": (
        "explain describe discuss elaborate analyze analyse compare difference differences why",
        ("설명", "비교", "解释", "为什么"),
    ),
    "short": (
        "briefly brief short shortly concise concisely only just choose",
        ("one word", "single word", "yes or no", "true or false", "one line", "no explanation", "not explain",
         "t explain", "multiple choice", "which of", "짧게", "간단", "简短"),
    ),
    "long": (
        "detailed detail details comprehensive thorough thoroughly extensive extensively long complete full everything",
        ("in depth", "in-depth", "step by step", "step-by-step", "자세히", "상세", "详细"),
    ),
    "translate": (
        "translate translation translated",
        ("in french", "in spanish", "in german", "in korean", "in chinese", "in japanese", "번역", "翻译"),
    ),
    "shorten": (
        "summarize summarise summary tldr extract classify categorize identify label sentiment",
        ("tl;dr", "요약", "분류", "总结"),
    ),
    "change": (
        "rewrite rephrase paraphrase edit correct fix improve proofread convert reformat replace modify continue",
        ("고쳐", "수정", "修改"),
    ),
    "fact": ("who when where which whose", ("what is", "what are", "what's", "what was", "무엇", "什么", "누구")),
    "count": ("", ("how many", "how much", "how long", "how old", "how far", "얼마", "몇", "多少")),
    "how": ("", ("how can", "how do", "how does", "how to", "how should", "how would", "어떻게", "如何", "怎么")),
    "math": (
        "calculate compute solve equation probability prove integral percent total sum theorem derivative",
        ("계산", "구하", "计算", "\\frac"),
    ),
    "format": ("json xml csv yaml table markdown format", ("표로", "表格")),
    "reason": ("reasoning think justify steps reason", ("show your work", "step by step", "단계", "步骤")),
    "role": ("pretend imagine roleplay", ("you are", "act as", "take on the role", "role of", "당신은", "扮演")),
    "input": (
        "following below passage context input",
        ("text:", "article:", "sentence:", "question:", "다음", "以下"),
    ),
}  # fmt: skip
"""Kinds of request: whole words that betray them, and pieces of text that do."""
_ASK = tuple((_set(words), pieces) for words, pieces in _ASKS.values())
_LISTED = re.compile(r"\n[ \t]*(?:\d{1,3}[.)]|[-*•])[ \t]")

PROMPT_FEATURES: tuple[str, ...] = (
    "prompt_chars", "prompt_words", "prompt_lines", "prompt_foreign", "prompt_digits", "prompt_marks",
    "prompt_questions", "prompt_ends_question", "prompt_fences", "prompt_items", "prompt_first_line",
    "prompt_last_line", "wants_items", "wants_words", "wants_sentences", "wants_paragraphs",
    *(f"asks_{name}" for name in _ASKS),
)  # fmt: skip


class _Prompt:
    """The prompt's own counters, and what it says about the length of the answer."""

    __slots__ = ("items", "values", "words")

    def __init__(self, prompt: str) -> None:
        text = prompt_text(prompt)
        stripped = text.strip()
        lines = stripped.split("\n")
        lower = text.lower()
        parts = _WORD.findall(lower)
        known = frozenset(parts)
        self.items, self.words, sentences, paragraphs = _wanted(parts)
        if not lower.isascii():
            self.items = self.items or _wanted_items_cjk(lower)
            found = _CJK_WORDS.search(lower)
            self.words = self.words or (int(found[1]) if found else 0)
        size = max(len(text), 1)
        self.values = [
            log1p(len(prompt)),
            log1p(len(parts)),
            log1p(len(lines) - 1),
            _foreign(text),
            sum(map(text.count, "0123456789")) / size,
            sum(map(text.count, "{}[]()<>=;_")) / size,
            log1p(text.count("?") + text.count("？")),
            float(stripped.endswith(("?", "？"))),
            log1p(text.count("```")),
            log1p(len(_LISTED.findall(text))),
            log1p(len(lines[0])),
            log1p(len(lines[-1])),
            log1p(self.items),
            log1p(self.words),
            log1p(sentences),
            log1p(paragraphs),
            *(float(not known.isdisjoint(words) or any(piece in lower for piece in pieces)) for words, pieces in _ASK),
        ]


@lru_cache(maxsize=16)
def _prompt(prompt: str) -> _Prompt:
    return _Prompt(prompt)


def _wanted(parts: Sequence[str]) -> tuple[int, int, int, int]:
    """List items, words, sentences and paragraphs that a text in lower case asks for or announces; 0: it does not say.

    A number counts for what is named among the four words behind it ("five of the best ideas", "top 10" needs none).
    """
    items = words = sentences = paragraphs = 0
    for at, part in enumerate(parts):
        number = int(part[:6]) if part.isdecimal() else _NUMBERS.get(part, 0)
        if not number:
            continue
        behind = parts[at + 1 : at + 5]
        if any(word in _UNITS["words"] for word in behind[:2]):
            words = words or number
        elif any(word in _UNITS["sentences"] for word in behind[:2]):
            sentences = sentences or number
        elif any(word in _UNITS["paragraphs"] for word in behind[:2]):
            paragraphs = paragraphs or number
        elif 1 < number <= 200 and (not _THINGS.isdisjoint(behind) or (at and parts[at - 1] == "top")):
            items = items or number
    return items, min(words, 20_000), min(sentences, 200), min(paragraphs, 200)


def _wanted_items_cjk(text: str) -> int:
    found = _CJK_ITEMS.search(text)
    if not found:
        return 0
    return int(found[1]) if found[1].isdecimal() else _NUMBERS.get(found[1], 0)


def _foreign(text: str) -> float:
    """About the share of characters outside ASCII: it tells scripts with few characters per token from the others."""
    return (len(text.encode("utf-8", "surrogatepass")) - len(text)) / (2 * max(len(text), 1))


# ---- the answer so far -----------------------------------------------------------------------------------------

_ITEM = re.compile(r"\n[ \t]*(?:(?:\*\*|#{1,4} )?(\d{1,3})[.)]|[-*•][ \t])")
"""An item of a list; of a numbered one with its number."""
_HEADING = re.compile(r"\n(?:#{1,6} |\*\*[^*\n]{1,80}\*\*:?\n|Step \d)")
_CLOSING = (
    "in conclusion", "in summary", "to summar", "overall,", "ultimately", "in short", "hope this", "hope that",
    "hope you", "let me know", "feel free", "good luck", "enjoy", "remember", "please note", "note that",
    "by following", "with these", "sincerely", "regards", "the end",
    "요약", "결론", "마지막으로", "도움이", "总之", "希望",
)  # fmt: skip
_CLOSING_ASCII = tuple(phrase for phrase in _CLOSING if phrase.isascii())
_CONCLUDING = (
    "therefore", "thus,", "hence", "so the", "final answer", "answer is", '"answer"', "\\boxed", "따라서", "因此",
    "答案",
)  # fmt: skip
_CONCLUDING_ASCII = tuple(phrase for phrase in _CONCLUDING if phrase.isascii())
_REFUSAL = (
    "i'm sorry", "i am sorry", "i apolog", "i cannot", "i can't", "unable to", "as an ai", "language model",
    "i don't have", "i do not have", "please provide", "could you", "죄송", "抱歉",
)  # fmt: skip
_OPENING = (
    "sure",
    "certainly",
    "of course",
    "absolutely",
    "here is",
    "here are",
    "here's",
    "great",
    "물론",
    "当然",
    "好的",
)

ANSWER_FEATURES: tuple[str, ...] = (
    "attained", "chars", "chars_per_token", "foreign", "lines", "paragraphs", "paragraph_chars", "last_paragraph",
    "last_line", "items", "last_number", "bullets", "headings", "bold", "fences", "open_fence", "open_brackets",
    "tokens_per_item", "items_share", "items_left", "words_share", "words_left", "ends_sentence", "ends_line",
    "ends_fence", "closing", "closing_last", "concluding", "refusal", "opening", "repetition", "sentence_chars",
    "since_item",
)  # fmt: skip

FEATURES: tuple[str, ...] = PROMPT_FEATURES + ANSWER_FEATURES
"""Names, in the order of the values."""


def features(prompt: str, answer: str, attained: int) -> list[float]:
    """What a head sees of a job, in the order of ``FEATURES``. ``attained``: answer tokens so far.

    ``answer`` may be empty although tokens were attained (text withheld): the counters are then those of no text.
    """
    return _features(_prompt(prompt), answer, attained, _Lines())


class Reading:
    """One job's text while it grows: ``features`` of it, for the price of what is new. Keeps numbers, no text."""

    __slots__ = ("_asked", "_lines")

    def __init__(self, prompt: str) -> None:
        self._asked = _Prompt(prompt)
        self._lines = _Lines()

    def __call__(self, answer: str, attained: int) -> list[float]:
        return _features(self._asked, answer, attained, self._lines)


@lru_cache(maxsize=1024)
def _head(start: str) -> tuple[int, float, float]:
    """What an answer's first characters say: list items announced, whether it refuses, whether it begins with a bow.
    They stay the same from the second window on."""
    lower = start.lower()
    refusal = any(phrase in lower for phrase in _REFUSAL)
    return _wanted(_WORD.findall(lower))[0], float(refusal), float(lower.lstrip().startswith(_OPENING))


class _Counts(NamedTuple):
    """What was counted in a part of an answer."""

    numbered: int = 0
    bullets: int = 0
    newlines: int = 0
    breaks: int = 0
    fences: int = 0
    bold: int = 0
    open: int = 0
    close: int = 0
    spaces: int = 0
    headings: int = 0
    last_number: int = 0
    last_start: int = -1
    """Of a list item, where it begins."""

    def further(self, text: str, at: int, end: int, headings: int) -> _Counts:
        """With those from ``at`` to ``end``, and so many headings."""
        numbered, bullets, last_number, last_start = self.numbered, self.bullets, self.last_number, self.last_start
        for found in _ITEM.finditer(text, at, end):
            last_start = found.start()
            if number := found[1]:
                numbered += 1
                last_number = int(number)
            else:
                bullets += 1
        return _Counts(
            numbered,
            bullets,
            self.newlines + text.count("\n", at, end),
            self.breaks + text.count("\n\n", at, end),
            self.fences + text.count("```", at, end),
            self.bold + text.count("**", at, end),
            self.open + text.count("{", at, end),
            self.close + text.count("}", at, end),
            self.spaces + text.count(" ", at, end),
            self.headings + headings,
            last_number,
            last_start,
        )

    def ended(self, text: str, at: int, line: int, headings: int) -> _Counts:
        """With those from ``at`` on, where there are newlines up to ``line`` and none beyond: ``further``, for less."""
        numbered, bullets, last_number, last_start = self.numbered, self.bullets, self.last_number, self.last_start
        if found := _ITEM.match(text, line):
            last_start = line
            if number := found[1]:
                numbered += 1
                last_number = int(number)
            else:
                bullets += 1
        newlines = line + 1 - at
        return _Counts(
            numbered,
            bullets,
            self.newlines + newlines,
            self.breaks + newlines // 2,
            self.fences + text.count("```", line),
            self.bold + text.count("**", line),
            self.open + text.count("{", line),
            self.close + text.count("}", line),
            self.spaces + text.count(" ", line),
            self.headings + headings,
            last_number,
            last_start,
        )


class _Lines:
    """What was counted in an answer up to the start of a line, where counting goes on when there is more of it.

    Nothing that is counted reaches across such a place, or across a run of newlines, which is not parted; but a heading
    may take in the newline there, with which the next one cannot begin then.
    """

    __slots__ = ("_at", "_before", "_counts", "_heading")

    def __init__(self) -> None:
        self._at = 0
        self._before = 0
        """By which the text is known again."""
        self._counts = _Counts()
        self._heading = 0
        """Where the next heading may begin."""

    def read(self, text: str) -> _Counts:
        """The counts of all of ``text``; those of its complete lines are kept."""
        if self._at and _mark(text, self._at) != self._before:
            self._at, self._counts, self._heading = 0, _Counts(), 0  # another text: from the beginning
        line = end = text.rfind("\n")
        while end > 0 and text[end - 1] == "\n":
            end -= 1
        if end > self._at:
            headings = 0
            for found in _HEADING.finditer(text, self._heading, end + 1):
                headings += 1
                self._heading = found.end()
            self._heading = max(self._heading, end)
            self._counts = self._counts.further(text, self._at, end, headings)
            self._at, self._before = end, _mark(text, end)
        return self._counts.ended(text, end, line, len(_HEADING.findall(text, self._heading)))


_KNOWN = 24


def _mark(text: str, at: int) -> int:
    """By which a text is known again: its characters before this place, and the newline there. Answers only grow; this
    is for callers who would ask of another one under the same name."""
    return hash(text[max(at - _KNOWN, 0) : at + 1])


def _features(asked: _Prompt, answer: str, attained: int, lines: _Lines) -> list[float]:
    return asked.values + _answer(asked, answer, attained, lines)


def _answer(asked: _Prompt, answer: str, attained: int, lines: _Lines) -> list[float]:
    size = len(answer)
    limited = size > 2 * _TEXT_LIMIT
    text = "\n" + (answer[: 2 * _TEXT_LIMIT] if limited else answer)
    tail = answer[-_TAIL:]
    end = tail.lower()
    announced, refusal, opening = _head(answer[:_TAIL])
    seen = lines.read(text)
    last_number = seen.last_number
    items = (last_number if last_number <= seen.numbered + 2 else seen.numbered) or seen.bullets
    wanted = asked.items or announced
    per_item = attained / items if items else 0.0
    left = max(wanted - items, 0)
    paragraphs, fences = seen.breaks, seen.fences
    words = answer.count(" ") if limited else seen.spaces
    last_line = size - (answer.rfind("\n") + 1)
    last_paragraph = size - (answer.rfind("\n\n") + 2 if paragraphs else 0)
    ended = tail.rstrip()
    parts = tail.split()
    plain = end.isascii()
    closing, closed = 0, 0
    # Whether it is there at all is asked first: that takes half of what looking for its place does.
    for phrase in _CLOSING_ASCII if plain else _CLOSING:
        if phrase in end:
            closing += 1
            closed = max(closed, end.rfind(phrase))
    concluding = 0.0
    for phrase in _CONCLUDING_ASCII if plain else _CONCLUDING:
        if phrase in end:
            concluding = 1.0
            break
    return [
        log1p(attained),
        log1p(size),
        min(size / attained, 12.0) if attained else 0.0,
        _foreign(tail) if not answer.isascii() else 0.0,
        log1p(seen.newlines - 1),
        log1p(paragraphs),
        log1p(size / (paragraphs + 1)),
        log1p(max(last_paragraph, 0)),
        log1p(last_line),
        log1p(seen.numbered),
        log1p(last_number),
        log1p(seen.bullets),
        log1p(seen.headings),
        log1p(seen.bold / 2),
        log1p(fences),
        float(fences % 2),
        log1p(max(seen.open - seen.close, 0)),
        log1p(per_item),
        min(items / wanted, 2.0) if wanted else -1.0,
        log1p(left * (per_item or 30.0)) if wanted else -1.0,
        min(words / asked.words, 2.0) if asked.words else -1.0,
        log1p(max(asked.words - words, 0)) if asked.words else -1.0,
        float(ended.endswith((".", "!", "?", "。", "”", '"', "다.", "）", ")"))),
        float(tail.endswith("\n")),
        float(ended.endswith("```") and not fences % 2),
        log1p(closing),
        log1p(len(end) - closed) if closing else 0.0,
        concluding,
        refusal,
        opening,
        1.0 - len(set(parts)) / len(parts) if parts else 0.0,
        log1p(len(tail) - max(tail.rfind(". "), tail.rfind(".\n"), 0)),
        log1p(len(text) - seen.last_start) if seen.last_start >= 0 else 0.0,
    ]


# ---- text for the encoder --------------------------------------------------------------------------------------


def prompt_text(prompt: str) -> str:
    """The prompt as it goes to the tokenizer: of a very long one its beginning and its end."""
    if len(prompt) <= _TEXT_LIMIT:
        return prompt
    half = _TEXT_LIMIT // 2
    return f"{prompt[:half]}\n{prompt[-half:]}"


def answer_text(answer: str) -> str:
    """The answer so far as it goes to the tokenizer: of a very long one its end."""
    return answer[-_TEXT_LIMIT:]


def prompt_ids(
    ids: Sequence[int], max_tokens: int, *, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> list[int]:
    """Token ids of a prompt, made without special tokens, as the encoder reads them: at most ``max_tokens`` with the
    special ones. Of a longer prompt two thirds of the room go to its beginning and one to its end."""
    room = max_tokens - len(prefix) - len(suffix)
    if len(ids) > room:
        end = room // 3
        ids = [*ids[: room - end], *ids[len(ids) - end :]]
    return [*prefix, *ids, *suffix]


def paper_ids(
    prompt: Sequence[int],
    answer: Sequence[int],
    max_tokens: int,
    *,
    prefix: Sequence[int] = (),
    separator: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> list[int]:
    """Prompt and answer so far in one sequence, for the method as published: the head of the prompt and the tail of
    the answer. Each has half of the room, and what one does not need goes to the other."""
    room = max_tokens - len(prefix) - len(separator) - len(suffix)
    ours = min(len(prompt), max(room - len(answer), room // 2))
    theirs = min(len(answer), room - ours)
    return [*prefix, *prompt[:ours], *separator, *answer[len(answer) - theirs :], *suffix]
