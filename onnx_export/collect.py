"""From records to a data set: tokens counted, windows cut, groups made, splits given. Never: models, torch.

The only split that means anything for a request not served before is by group: the same prompt answered by several
models, the turns of a conversation, near-duplicates and prompts from one template stay on one side. Split by row or
by (answer, window) pair, the same features report an R² three times as high.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from elis_gateway.errors import ConfigError
from onnx_export.records import SPLITS, Answer, Raw

__all__ = ["Tokens", "collect", "grouped", "split_of"]

_TEMPLATE = 80
"""Prompts that begin with the same so many characters are taken for one template's."""
_SIMILAR = 0.85
"""Cosine of two prompts' character 4-grams from which they are near-duplicates."""
_FEWEST_GROUPS = 10


class Tokens:
    """Counts an answer's tokens and finds where its windows end, with a ``tokenizer.json``; without one, in proportion
    to the characters of an answer whose tokens the source counted."""

    def __init__(self, path: Path | None = None, *, split_digits: bool = True) -> None:
        """``split_digits`` False: byte-level splitting alone, whatever the file says about digits."""
        self.name = path.parent.name if path is not None else "as counted by the source"
        self._tokenizer = None
        if path is not None:
            from tokenizers import Tokenizer, pre_tokenizers

            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if not split_digits:
                self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
                self.name += ", byte-level splitting"

    def cut(self, raws: Sequence[Raw], window: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """Tokens of each answer, and (tokens, characters) at the start and at every window's end it went beyond."""
        if self._tokenizer is None:
            return [_in_proportion(raw, window) for raw in raws]
        made = []
        for encoded in self._tokenizer.encode_batch([raw.answer for raw in raws], add_special_tokens=False):
            total = len(encoded.ids)
            ends = encoded.offsets
            made.append((total, [(0, 0), *((at, ends[at - 1][1]) for at in range(window, total, window))]))
        return made


def _in_proportion(raw: Raw, window: int) -> tuple[int, list[tuple[int, int]]]:
    if raw.tokens is None:
        raise ConfigError(f"{raw.where}: no count of tokens: name a tokenizer (--tokenizer FILE)")
    if raw.cuts:
        return raw.tokens, list(raw.cuts)
    size = len(raw.answer)
    return raw.tokens, [(at, round(size * at / raw.tokens)) for at in range(0, raw.tokens, window)]


def collect(
    raws: Iterable[Raw],
    tokens: Tokens,
    *,
    window: int = 50,
    group_by: str = "auto",
    shares: tuple[float, float] = (0.1, 0.1),
    licences: dict[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """A data set of the records. ``group_by``: ``source`` (each record must bring its group), ``prompt`` (equal and
    near-equal prompts), or ``auto``: both. ``shares``: of validation and test. Raises ``ConfigError`` where no
    honest split can be made."""
    rows = [raw for raw in raws if raw.answer and raw.prompt]
    if not rows:
        raise ConfigError("no prompt with an answer was found")
    progress(f"{len(rows)} answers; looking for prompts that belong together")
    groups = grouped(rows, group_by)
    splits = _splits(rows, groups, shares)
    progress(f"{len(set(groups))} groups; counting tokens")
    answers = []
    for raw, group, split, (total, cuts) in zip(rows, groups, splits, tokens.cut(rows, window), strict=True):
        if total < 1:
            continue
        licence = raw.licence or (licences or {}).get(raw.app, "unknown")
        answers.append(
            Answer(
                raw.prompt, raw.answer, raw.model, raw.app, raw.domain, licence, group, split, total, raw.complete, cuts
            )
        )
    return answers


def _splits(rows: Sequence[Raw], groups: Sequence[str], shares: tuple[float, float]) -> list[str]:
    """The source's split where every record of it has one; else by a hash of the group."""
    given = [raw.split for raw in rows]
    if all(split in SPLITS for split in given):
        seen: dict[str, str] = {}
        clash = sum(seen.setdefault(group, str(split)) != split for group, split in zip(groups, given, strict=True))
        if clash:
            raise ConfigError(
                f"{clash} records are in another split than records they belong with (same group or near-duplicate"
                " prompt): regroup the source, or drop its column `split`"
            )
        return [str(split) for split in given]
    counts = Counter(groups)
    if len(counts) < _FEWEST_GROUPS:
        raise ConfigError(
            f"{len(counts)} groups among {len(rows)} answers: a split by group needs {_FEWEST_GROUPS} or more."
            " Prompts that share their first 80 characters count as one template's: if that is a preamble all have,"
            " give each record its `group`"
        )
    return [split_of(group, shares) for group in groups]


def split_of(group: str, shares: tuple[float, float]) -> str:
    """train, validation or test, by a hash of the group's name: it stays when data is added."""
    at = int.from_bytes(hashlib.sha256(f"split:{group}".encode()).digest()[:8]) / 2**64
    if at < shares[1]:
        return "test"
    return "validation" if at < shares[0] + shares[1] else "train"


# ---- groups ----------------------------------------------------------------------------------------------------


def grouped(rows: Sequence[Raw], group_by: str = "auto") -> list[str]:
    """A group for every record. Raises ``ConfigError`` where ``source`` is wanted and a record has none."""
    if group_by == "source":
        for raw in rows:
            if not raw.group:
                raise ConfigError(
                    f"{raw.where}: no group: expected `group`, `group_id` or `conversation_id` in every record"
                    " (or --group-by prompt, which finds equal and near-equal prompts)"
                )
        return [str(raw.group) for raw in rows]
    if group_by not in ("auto", "prompt"):
        raise ConfigError(f"group_by: expected auto, source or prompt, got {group_by!r}")
    own = group_by == "auto" and all(raw.group for raw in rows)
    if own:
        return [str(raw.group) for raw in rows]
    join = _Union()
    names = [f"prompt:{_normal(raw.prompt)}" for raw in rows]
    starts: dict[str, str] = {}
    for raw, name in zip(rows, names, strict=True):
        join.add(name)
        start = _normal(raw.prompt)[:_TEMPLATE]
        if len(start) == _TEMPLATE:
            join.unite(name, starts.setdefault(start, name))
        if raw.group and group_by == "auto":
            join.unite(name, f"group:{raw.group}")
    prompts = sorted(set(names))
    for a, b in _near_duplicates([name[len("prompt:") :] for name in prompts]):
        join.unite(prompts[a], prompts[b])
    return [hashlib.sha256(join.root(name).encode()).hexdigest()[:16] for name in names]


def _normal(prompt: str) -> str:
    return re.sub(r"\s+", " ", prompt.lower()).strip()


class _Union:
    """Which names belong together; a set is called by the smallest of them, whatever the order of joining."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def add(self, name: str) -> None:
        self._parent.setdefault(name, name)

    def root(self, name: str) -> str:
        parent = self._parent
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    def unite(self, one: str, other: str) -> None:
        self.add(one)
        self.add(other)
        first, second = sorted((self.root(one), self.root(other)))
        self._parent[second] = first


def _near_duplicates(prompts: Sequence[str], block: int = 1000) -> Iterable[tuple[int, int]]:
    """Pairs of prompts whose character 4-grams have a cosine of at least ``_SIMILAR``."""
    import numpy as np
    from sklearn.feature_extraction.text import HashingVectorizer

    vectors = HashingVectorizer(analyzer="char", ngram_range=(4, 4), n_features=2**18, alternate_sign=False)
    grams = vectors.transform([prompt[:2000] for prompt in prompts]).tocsr()
    for start in range(0, grams.shape[0], block):
        like = (grams[start : start + block] @ grams.T).tocoo()
        close = like.data >= _SIMILAR
        for a, b in zip(np.asarray(like.row)[close] + start, np.asarray(like.col)[close], strict=True):
            if a < b:
                yield int(a), int(b)
