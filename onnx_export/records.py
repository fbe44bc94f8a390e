"""Prompt/answer records, whatever they come from, as one kind of row. Knows: the formats read. Never: models, torch.

An ``Answer`` is one finished (or cut off) answer with the places where its windows ended. Everything downstream works
on these; which pairs (text so far, tokens left) they stand for follows from the places.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from elis_gateway import traffic_log
from elis_gateway.errors import ConfigError

__all__ = [
    "SCHEMA",
    "SPLITS",
    "Answer",
    "DataSet",
    "Raw",
    "load",
    "open_text",
    "read",
    "read_prompts",
    "save",
    "sources",
]

SCHEMA = 1
SPLITS = ("train", "validation", "test")


@dataclass(slots=True)
class Raw:
    """A record as read: before tokens were counted and groups and splits given."""

    prompt: str
    answer: str
    model: str
    app: str
    group: str | None
    """Records that must not be parted, where the source says so: a conversation, a question and its translations."""
    where: str
    complete: bool = True
    """False: cut off; its length is a lower bound."""
    tokens: int | None = None
    """As the source counted them."""
    split: str | None = None
    domain: str = ""
    licence: str = ""
    cuts: tuple[tuple[int, int], ...] = ()
    """(tokens so far, characters so far) where the source gives windows itself."""


@dataclass(slots=True)
class Answer:
    """One row of a collected data set."""

    prompt: str
    answer: str
    model: str
    app: str
    domain: str
    licence: str
    group: str
    split: str
    tokens: int
    """Of the answer, in the unit named at the head of the file."""
    complete: bool
    cuts: list[tuple[int, int]] = field(default_factory=list)
    """(tokens so far, characters so far) at the start and at the end of every window that was passed."""


def sources(paths: Iterable[Path]) -> list[Path]:
    """Files named, and the JSONL files in folders named. Raises ``ConfigError`` where there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
            if not inside:
                raise ConfigError(f"{path}: no .jsonl or .jsonl.gz file in this folder")
            found += inside
        else:
            found.append(path)
    return found


def read(path: Path) -> Iterator[Raw]:
    """The records of a file, in any of the formats known. Raises ``ConfigError`` naming file and line."""
    partial: dict[str, list[tuple[int, int, str]]] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        try:
            if "input_prompt" in row:
                _window(row, partial)
            elif "schema" in row and "job_id" in row:
                yield from _logged(row, where)
            elif "messages" in row or "conversations" in row:
                yield from _conversation(row, where)
            else:
                yield _plain(row, where)
        except (KeyError, TypeError, ValueError) as error:
            shown = json.dumps(row, ensure_ascii=False)[:100]
            raise ConfigError(
                f"{where}: not a record that is known ({type(error).__name__}: {error}): {shown}"
            ) from None
    yield from _windows(partial, str(path))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open_text(path) as file:
            if path.suffix == ".json":
                whole = json.load(file)
                yield from enumerate(whole["data"] if isinstance(whole, dict) else whole, 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ConfigError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}")
                    yield number, row
    except (ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"{path}: not JSON Lines: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def open_text(path: Path, mode: str = "rt") -> IO[str]:
    """A text file, compressed where its name says so."""
    if path.suffix == ".gz":
        return gzip.open(path, mode, encoding="utf-8")  # type: ignore[return-value]
    return path.open(mode, encoding="utf-8")


def _plain(row: dict[str, Any], where: str) -> Raw:
    """``prompt`` and ``answer`` (or ``response``, ``completion``, ``output``), and what else the row says."""
    answer = _first(row, "answer", "response", "completion", "output")
    group = _first(row, "group", "group_id", "conversation_id", "conversation", default=None)
    tokens = _first(row, "n_tokens", "tokens", "completion_tokens", default=None)
    turn = int(row.get("turn") or 1)
    return Raw(
        prompt=_last_turn(str(row["prompt"])) if turn > 1 else str(row["prompt"]),
        answer=str(answer),
        model=str(row.get("model") or ""),
        app=str(_first(row, "app", "source", "kind", default="")),
        group=None if group is None else str(group),
        where=where,
        complete=not (row.get("cut") or row.get("loop") or row.get("finish_reason") == "length"),
        tokens=None if tokens is None else int(tokens),
        split=row.get("split"),
        domain=str(row.get("domain") or row.get("kind") or ""),
        licence=str(row.get("licence") or ""),
    )


def _last_turn(prompt: str) -> str:
    """Of a conversation written out as ``User: …`` and ``Assistant: …`` blocks what the gateway sees: the last turn."""
    at = prompt.rfind("\n\nUser: ")
    return prompt[at + len("\n\nUser: ") :] if at >= 0 else prompt


def _conversation(row: dict[str, Any], where: str) -> Iterator[Raw]:
    """OpenAI messages or ShareGPT turns: one record per answer, all in the conversation's group."""
    turns = [
        (str(turn.get("role") or turn.get("from")), str(turn.get("content") or turn.get("value") or ""))
        for turn in row.get("messages") or row["conversations"]
    ]
    name = _first(row, "conversation_id", "id", default=None)
    group = str(name) if name is not None else hashlib.sha256(turns[0][1].encode()).hexdigest()[:16]
    for (asker, prompt), (speaker, answer) in pairwise(turns):
        if asker in ("user", "human") and speaker in ("assistant", "gpt"):
            yield Raw(prompt, answer, str(row.get("model") or ""), str(row.get("source") or ""), group, where)


def _logged(row: dict[str, Any], where: str) -> Iterator[Raw]:
    """A job of the gateway's traffic log. Nothing comes of one that produced nothing."""
    if row["schema"] != traffic_log.SCHEMA:
        raise ConfigError(f"{where}: traffic log of schema {row['schema']}, expected {traffic_log.SCHEMA}")
    if row["completion_tokens"] < 1:
        return
    if row["prompt"] is None or row["answer"] is None:
        raise ConfigError(f"{where}: the log holds no text: it must be written with `logging.prompts: full`")
    yield Raw(
        prompt=row["prompt"],
        answer=row["answer"],
        model=row["model"],
        app=row["app"],
        group=None,  # only the last turn is logged: what belongs together is found by its text
        where=where,
        complete=row["outcome"] == "completed" and row["finish_reason"] != "length",
        tokens=row["completion_tokens"],
    )


def _window(row: dict[str, Any], partial: dict[str, list[tuple[int, int, str]]]) -> None:
    """A row of the public re-implementation: the text so far, its tokens, and how many were still to come."""
    so_far = (int(row["number_of_output_tokens"]), int(row["remaining_tokens"]), str(row["output_prompt"] or ""))
    partial.setdefault(str(row["input_prompt"]), []).append(so_far)


def _windows(partial: dict[str, list[tuple[int, int, str]]], where: str) -> Iterator[Raw]:
    """Rows that continue one another are windows of one answer: same prompt, same total, longer text."""
    for prompt, rows in partial.items():
        totals: dict[int, list[tuple[int, str]]] = {}
        for tokens, remaining, text in rows:
            totals.setdefault(tokens + remaining, []).append((tokens, text))
        for total, windows in totals.items():
            windows.sort()
            longest = windows[-1][1]
            cuts = tuple((tokens, len(text)) for tokens, text in windows if longest.startswith(text))
            yield Raw(prompt, longest, "", "", None, where, tokens=total, cuts=cuts)


def _first(row: dict[str, Any], *names: str, **default: Any) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    if "default" in default:
        return default["default"]
    raise KeyError(" or ".join(names))


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Prompts to be answered, each once: rows with ``prompt`` (what else they say is kept), ``input_prompt`` or
    strings, or one JSON object ``{"prompts": [...]}``. Raises ``ConfigError``."""
    try:
        text = path.read_text(encoding="utf-8") if path.suffix != ".gz" else open_text(path).read()
        try:
            whole = json.loads(text)
            rows = whole["prompts"] if isinstance(whole, dict) and "prompts" in whole else whole
            rows = rows if isinstance(rows, list) else [rows]
        except ValueError:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        made: dict[str, dict[str, Any]] = {}
        for row in rows:
            kept = {"prompt": row} if isinstance(row, str) else dict(row)
            kept["prompt"] = str(_first(kept, "prompt", "input_prompt"))
            made.setdefault(kept["prompt"], kept)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of prompts: {error}") from None
    return list(made.values())


# ---- collected data sets ---------------------------------------------------------------------------------------


def save(path: Path, answers: Iterable[Answer], *, unit: str, window: int) -> None:
    """Write a data set: a line that describes it, then one line per answer."""
    with open_text(path, "wt") as file:
        file.write(json.dumps({"elis_pairs": SCHEMA, "unit": unit, "window": window}) + "\n")
        for answer in answers:
            file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")


@dataclass(slots=True)
class DataSet:
    """What ``collect`` wrote."""

    answers: list[Answer]
    unit: str
    """The tokenizer whose tokens are counted."""
    window: int

    def split(self, name: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.split == name]


def load(paths: Iterable[Path]) -> DataSet:
    """Read data sets written by ``save``. Raises ``ConfigError`` where they are none, disagree, or part a group."""
    answers: list[Answer] = []
    head: dict[str, Any] | None = None
    for path in paths:
        rows = _rows(path)
        first = next(rows, (0, {}))[1]
        if first.get("elis_pairs") != SCHEMA:
            raise ConfigError(f"{path}: not a data set of `predictor collect` (or one of another version)")
        if head is not None and first != head:
            raise ConfigError(f"{path}: unit or window differ from the other file's: {first}, {head}")
        head = first
        try:
            answers += [Answer(**{**row, "cuts": [(a, b) for a, b in row["cuts"]]}) for _, row in rows]
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
    if head is None or not answers:
        raise ConfigError("no answers to train on")
    splits: dict[str, str] = {}
    for answer in answers:
        if splits.setdefault(answer.group, answer.split) != answer.split:
            raise ConfigError(f"group {answer.group!r} is in two splits: every figure would be too good; collect again")
    return DataSet(answers, str(head["unit"]), int(head["window"]))
