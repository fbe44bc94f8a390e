"""What a benchmark found: shown, and appended to the file of its results; runs that resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["by_question", "document", "run_missing", "save", "show", "stored"]

Row = dict[str, Any]


def save(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a file of JSON Lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def show(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a result, and keep it where ``output`` names a file."""
    print(json.dumps(result, indent=2))
    if output is not None:
        save(output, result)


def document(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a result, and make it all that the file ``output`` says, where one is named."""
    text = json.dumps(result, indent=1)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    print(text)


def stored(path: Path) -> list[Row]:
    """Every row of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_missing(
    path: Path,
    question: Mapping[str, Any],
    stamp: Mapping[str, Any],
    names: Sequence[str],
    seeds: int,
    tries: int,
    measure: Callable[[str, int], Row],
    tell: Callable[[Row], None],
) -> None:
    """Measure each setting with each seed, forwards and backwards in turn, and store the row, unless a valid one of the
    same question and code is there; what came out invalid is tried ``tries`` times."""
    done = {
        (row["setting"], row["seed"])
        for row in stored(path)
        if row["valid"] and row["question"] == question and row["code"] == stamp["code"]
    }
    for seed in range(seeds):
        for name in names if seed % 2 == 0 else names[::-1]:
            for _ in range(tries if (name, seed) not in done else 0):
                row = {"question": question, "setting": name, "seed": seed, **measure(name, seed), **stamp}
                save(path, row)
                tell(row)
                if row["valid"]:
                    break


def by_question(path: Path) -> dict[tuple[str, str], list[Row]]:
    """The rows of a file by question, as JSON, and code."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in stored(path):
        groups.setdefault((json.dumps(row["question"]), row["code"]), []).append(row)
    return groups
