"""A synthetic tokenizer whose text betrays careless handling of token streams.

Knows: the vocabulary, text to ids, ids to text, and an incremental detokenizer. Never: which token comes next
(``sim.language``), HTTP, time.

Tokens are pieces of bytes. They split characters (every Hangul, CJK and emoji character can arrive in two or three
tokens, some tokens hold the end of one character and the start of the next), and their merges overlap (`` t`` + ``he``
and `` the`` are the same text), so text joined at a token boundary can be broken, and tokenizing a model's text again
gives other ids than the model produced. Both are true of real byte-level BPE vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

__all__ = [
    "CHARACTERS", "END", "LENGTH", "LENGTHS", "PIECES", "START", "VOCABULARY", "Detokenizer", "decode", "encode",
    "incomplete", "piece", "tail",
]  # fmt: skip

START = 1
"""Begins a chat turn."""
END = 2
"""Ends a chat turn, and an answer: the end-of-sequence token."""
_BYTES = 3
"""The 256 single bytes follow."""
LENGTH = 100_000
"""``LENGTH + n``: "the answer that starts here has n tokens". See ``sim.language``."""
LENGTHS = 1 << 20
VOCABULARY = LENGTH + LENGTHS
"""Ids lie below this; those between the pieces and ``LENGTH`` do not exist."""

_HANGUL = "안녕하세요가나다라마바사아자차파한국어말은는을에서도시간사람좋고것이"
_CJK = "的一是不了人我在有他这中大来上国到说们时你好世界学生天地日本語あいうのを"
_LATIN = "éñüßø"
_EMOJI = "😀😂🎉🚀👩💻🔥👍🏽🇰🇷🦣"
_JOINERS = "\u200d\ufe0f❤"
CHARACTERS = tuple(dict.fromkeys(_HANGUL + _CJK + _LATIN + _EMOJI + _JOINERS))
"""The characters that the language writes in pieces of bytes; everything else it writes is ASCII."""

_SUBWORDS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic"
    " ne ea ra ce li ch ll be ma si om ur the and ing ion ent her tha nth int ere tio ter est ers ati hat ate all eth"
    " hes ver his oft ith fth sth oth res ont that ther tion with ment ions this here ould ting"
)
_WORDS = (
    "the of and to in is that it for on with as are be this was by an at or from have not you but all can which will"
    " one their there more when time out up other about than into only some could these two may then first new model"
    " token order short wait queue slot seam window answer"
)
_MARKS = (
    ".", ",", "!", "?", ":", "\n", "\n\n", ". ", ", ", " (", ")", "\n- ", "```", "**", "0", "1", "12", "2026", "'s"
)  # fmt: skip


def _pieces() -> list[bytes]:
    """Every multi-byte piece, in a fixed order: an id is a position here, so the order is the vocabulary."""
    found: dict[bytes, None] = {}
    for word in _WORDS.split():
        for text in (word, f" {word}", f" {word[:1]}", f" {word[:2]}", word[1:], word[2:]):
            found[text.encode()] = None
    subwords = _SUBWORDS.split()
    for text in (*subwords, *(f" {sub}" for sub in subwords), *_MARKS):
        found[text.encode()] = None
    for position, character in enumerate(CHARACTERS):
        raw = character.encode()
        follower = CHARACTERS[(position * 7 + 3) % len(CHARACTERS)].encode()
        if position % 4 == 0:
            found[raw] = None
        for cut in range(1, len(raw)):
            found[raw[:cut]] = None
            found[raw[cut:]] = None
            if cut < len(raw) - 1:
                found[raw[cut : cut + 1]] = None
        found[raw[-1:] + follower[:2]] = None
        found[raw[-1:] + b" the"] = None
        found[b" " + raw[:2]] = None
        if position % 5 == 0:
            found[raw + follower] = None
    return [text for text in found if len(text) > 1]


PIECES: tuple[bytes, ...] = (b"", b"", b"", *(bytes([value]) for value in range(256)), *_pieces())
"""Bytes of every ordinary id. The three special tokens have no text, as with ``skip_special_tokens``."""

_IDS: dict[bytes, int] = {text: token for token, text in enumerate(PIECES) if token >= _BYTES}


def _by_first_byte() -> tuple[tuple[int, ...], ...]:
    lengths: list[set[int]] = [set() for _ in range(256)]
    for text in _IDS:
        lengths[text[0]].add(len(text))
    return tuple(tuple(sorted(found, reverse=True)) for found in lengths)


_LENGTHS = _by_first_byte()


def piece(token: int) -> bytes:
    """Bytes of one token; empty for special ones. Raises ValueError for an id that does not exist."""
    if 0 <= token < len(PIECES):
        return PIECES[token]
    if LENGTH <= token < VOCABULARY:
        return b""
    raise ValueError(f"Token id {token} is out of vocabulary")


def encode(text: str) -> list[int]:
    """Ids of a text: the longest piece first, at every position. Special tokens are never produced from text."""
    return list(_encode(text))


@lru_cache(maxsize=4096)
def _encode(text: str) -> tuple[int, ...]:
    data = text.encode("utf-8", "replace")
    ids = []
    position, size = 0, len(data)
    while position < size:
        for length in _LENGTHS[data[position]]:
            token = _IDS.get(data[position : position + length])
            if token is not None:
                ids.append(token)
                position += length
                break
    return tuple(ids)


def decode(ids: Iterable[int]) -> str:
    """Text of all these ids together; bytes that are no character become U+FFFD."""
    return b"".join(map(piece, ids)).decode("utf-8", "replace")


def incomplete(data: bytes) -> bytes:
    """The bytes at the end that begin a character and do not finish it."""
    for back in range(1, min(4, len(data) + 1)):
        lead = data[-back]
        if lead >= 0xC0:
            need = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return data[-back:] if back < need else b""
        if lead < 0x80:
            return b""
    return b""


def tail(ids: Sequence[int], piece: Callable[[int], bytes] = piece) -> bytes:
    """``incomplete`` of these ids' bytes, without joining all of them."""
    return incomplete(_last_bytes(ids, piece))


def _last_bytes(ids: Sequence[int], piece: Callable[[int], bytes]) -> bytes:
    """Enough of the last bytes to hold a whole character."""
    data = b""
    for token in reversed(ids):
        data = piece(token) + data
        if len(data) >= 4:
            break
    return data


class Detokenizer:
    """Text of a growing answer, as vLLM's fast detokenizer gives it (the decode stream of ``tokenizers``, compared).

    While the text so far ends inside a character, everything since the last whole boundary is held back, whole
    characters too: a token that ends one character and begins the next gives no text. So a token *with* text is always
    a place where the text is complete. What is held back at the end of a call is lost; ``rest`` gives it, with U+FFFD,
    for engines that flush.

    Where the prompt itself ends inside a character, the stream has emitted nothing yet, and the first text of the call
    is the *whole prompt's* with that character finished: continuing from inside a character repeats text.
    """

    __slots__ = ("_held", "_piece")

    def __init__(self, prompt: Sequence[int] = (), piece: Callable[[int], bytes] = piece) -> None:
        self._piece = piece
        self._held = b""
        if _last_bytes(prompt, piece).decode("utf-8", "replace").endswith("\ufffd"):
            self._held = b"".join(map(piece, prompt))

    def feed(self, token: int) -> str:
        """The text that this token makes complete; may be empty."""
        data = self._piece(token)
        if not data:
            return ""
        if self._held:
            data = self._held + data
        text = data.decode("utf-8", "replace")
        if text[-1] == "\ufffd":
            self._held = data
            return ""
        self._held = b""
        return text

    def rest(self) -> str:
        """What is held back."""
        text, self._held = self._held.decode("utf-8", "replace"), b""
        return text
