"""The frozen workload: who arrives when, asking what, and how long the answer is. A JSON file with a hash.

Knows: the file, the shipped data, how to draw from it. Arrivals, lengths and prompts have seeds of their own, so
that one can be varied while the others stand still. Never: a clock, how requests are sent.
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import json
import random
import zlib
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from elis_gateway.errors import ConfigError
from loadtest import arrivals

__all__ = ["Answered", "Request", "Seeds", "Workload", "around", "azure", "pool", "trace"]

VERSION = 2
DATA = Path(__file__).parent / "data"
CAP = 1000
"""Answers of the shipped pool and trace stop here."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload. ``at``: seconds after the start. ``tokens``: length of ``answer`` in tokens."""

    id: str
    at: float
    prompt: str
    prompt_tokens: int
    answer: str
    tokens: int
    app: str = ""
    """What kind of request it is; a client would say so in X-Elis-App."""
    max_tokens: int = CAP
    turns: tuple[tuple[str, str], ...] = ()
    """(role, text) of what was said before the prompt, a system message included."""
    forced: bool = False
    """The engine is told to make exactly ``tokens`` (``ignore_eos``), whatever the text would have been."""


@dataclass(frozen=True, slots=True)
class Seeds:
    arrivals: int = 0
    lengths: int = 0
    prompts: int = 0

    @classmethod
    def all(cls, seed: int) -> Seeds:
        return cls(seed, seed, seed)


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, and how they were made."""

    requests: tuple[Request, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """Names the work: equal hashes, equal requests at equal times."""
        body = json.dumps([asdict(request) for request in self.requests], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(body.encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        return sum(request.tokens for request in self.requests)

    def save(self, path: str | Path) -> None:
        rows = [asdict(request) for request in self.requests]
        data = {"version": VERSION, "hash": self.hash, "about": self.about, "requests": rows}
        Path(path).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Workload:
        """Read a file written by ``save``. Raises ConfigError where it was changed since, or is none of ours."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise ConfigError(f"{path}: workload version {data['version']}, expected {VERSION}")
            loaded = cls(tuple(_request(row) for row in data["requests"]), data["about"])
            stored = data["hash"]
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a workload file: {error}") from error
        if loaded.hash != stored:
            raise ConfigError(f"{path}: its requests hash to {loaded.hash}, not {stored}: it was changed")
        return loaded


def _request(row: dict[str, Any]) -> Request:
    return Request(**{**row, "turns": tuple((role, text) for role, text in row["turns"])})


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt of the pool with its recorded answer."""

    prompt: str
    kind: str
    answer: str
    tokens: int
    prompt_tokens: int


@cache
def pool() -> tuple[Answered, ...]:
    """The shipped pool, by length. Answers that ran in circles are left out: they say nothing about lengths."""
    rows = []
    for line in DATA.joinpath("pool.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row.pop("finish_reason")
        answered = Answered(**row)
        if not _loops(answered.answer):
            rows.append(answered)
    return tuple(sorted(rows, key=lambda row: (row.tokens, row.prompt)))


def _loops(text: str) -> bool:
    """A long text that compresses to a tenth repeats itself."""
    raw = text[-3000:].encode()
    return len(raw) > 500 and len(zlib.compress(raw)) < len(raw) / 10


@cache
def trace() -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """The shipped sample of Azure's conversation trace: gaps by block, and answer lengths."""
    blocks: dict[str, list[float]] = {}
    lengths = []
    with DATA.joinpath("azure_conv_sample.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            blocks.setdefault(row["block"], []).append(float(row["gap_s"]))
            lengths.append(int(row["generated_tokens"]))
    return tuple(map(tuple, blocks.values())), tuple(lengths)


@cache
def _matched(longest: int, nearest: int) -> tuple[list[Answered], list[int], dict[int, list[int]], float]:
    """Answers of the pool and lengths of the trace up to ``longest``, which answers are near each length, and the mean
    length that comes of it."""
    answers = [answered for answered in pool() if answered.tokens <= longest]
    sizes = [answered.tokens for answered in answers]
    lengths = [length for length in trace()[1] if length <= longest]
    nearby = {length: around(sizes, length, nearest) for length in set(lengths)}
    mean = sum(sum(sizes[i] for i in nearby[x]) / len(nearby[x]) for x in lengths) / len(lengths)
    return answers, lengths, nearby, mean


def azure(n: int, *, load: float, capacity: float, seeds: Seeds, longest: int = CAP, nearest: int = 5) -> Workload:
    """``n`` requests with the arrivals and answer lengths of Azure's conversation trace, and texts of the pool.

    ``load``: offered tokens as a share of ``capacity`` (tokens/s with every slot at work), in expectation over the
    trace's lengths; one draw of few requests offers more or less. ``longest``: the trace's longer answers are left
    out, so that a slow real engine can be done in time. Each request takes one of the ``nearest`` answers of the pool
    around the drawn length.
    """
    blocks, _ = trace()
    answers, lengths, nearby, mean = _matched(longest, nearest)
    gaps = arrivals.replayed(n, load * capacity / mean, blocks, random.Random(f"arrivals {seeds.arrivals}"))
    draw_length, draw_prompt = random.Random(f"lengths {seeds.lengths}"), random.Random(f"prompts {seeds.prompts}")
    requests = []
    for i, at in enumerate(arrivals.times(gaps)):
        chosen = answers[draw_prompt.choice(nearby[draw_length.choice(lengths)])]
        requests.append(
            Request(
                id=f"r{i:05d}",
                at=round(at, 6),
                prompt=chosen.prompt,
                prompt_tokens=chosen.prompt_tokens,
                answer=chosen.answer,
                tokens=chosen.tokens,
                app=chosen.kind,
            )
        )
    about = {
        "source": "azure_conv_sample.csv (Azure Public Dataset, CC BY 4.0), pool.jsonl (SmolLM2-135M-Instruct)",
        "load": load,
        "capacity": capacity,
        "expected_tokens": round(mean, 1),
        "seeds": asdict(seeds),
    }
    return Workload(tuple(requests), about)


def around(sizes: list[int], length: int, n: int) -> list[int]:
    """Indices of the ``n`` entries of a sorted list nearest to ``length``."""
    n = min(n, len(sizes))
    middle = bisect.bisect_left(sizes, length)
    candidates = range(max(0, middle - n), min(len(sizes), middle + n))
    return sorted(sorted(candidates, key=lambda i: (abs(sizes[i] - length), i))[:n])
