"""Does learning ever cost anything? One server in front of a mix of applications, from its first answers on.

    python -m benchmarks.predictor_mix all.jsonl.gz elis_gateway/predictor/models/encode-once \
        --out benchmarks/results/predictor-mix.json

Answers of the validation split, which the head was not fitted to (it was told by them when to stop): every source is an
application, every recorded model a served one. In three parts by group of prompts, each judged by a learner taught so
many answers, drawn from the other two, over all applications together. Beside what was learned: the shipped model
alone, and the learner's own history. *Error*: the mean of |log(said / true)|. Intervals of the
differences draw groups. The learner's few constants were chosen on these prompts. Budget: some two minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import document
from onnx_export import evaluate, pairs, records
from onnx_export.figures import Values, intervals, tau

PARTS = 3


def error(truth: Values, said: Values) -> float:
    return float(np.abs(np.log(said / truth)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--after", type=int, nargs="+", default=[10, 30, 100, 300, 1000, 2000])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = records.load([args.data])
    answers = [a for a in data.answers if a.split == "validation" and a.complete]
    groups = sorted({a.group for a in answers})
    part = dict(zip(groups, (np.random.default_rng(11).permutation(len(groups)) % PARTS).tolist(), strict=True))
    scorer = evaluate.Scorer(args.model, args.cache)
    truth, group, raw = [], [], []
    said: dict[int, list[tuple[Values, Values]]] = {count: [] for count in args.after}
    for number in range(PARTS):
        test = [a for a in answers if part[a.group] == number]
        taught = [a for a in answers if part[a.group] != number]
        made = pairs.make(test, window=data.window)
        shipped = scorer(test, made, scorer.embeddings(test, made))
        truth.append(made.remaining)
        group.append(np.array([a.group for a in test])[made.answer])
        raw.append(shipped)
        for count in args.after:
            said[count].append(
                evaluate.learned(
                    scorer, taught, test, made, shipped, answers=count, window=data.window, by_app=True, seed=number
                )
            )
        print(f"part {number + 1} of {PARTS}", flush=True)
    true, of, plain = np.concatenate(truth), np.concatenate(group), np.concatenate(raw)
    result: dict[str, Any] = {"answers": len(answers), "groups": len(groups), "pairs": len(true)}
    for count in args.after:
        ours, history = (np.concatenate([each[i] for each in said[count]]) for i in (0, 1))
        others = {"shipped": plain, "history": history}
        ahead = {
            f"{what} ahead of {name}": lambda at, how=how, other=other, ours=ours: (
                how(true[at], ours[at]) - how(true[at], other[at])
            )
            for what, how in (("tau", tau), ("error", error))
            for name, other in others.items()
        }
        everything = np.arange(len(true))
        result[f"after {count}"] = {
            name: {"tau": tau(true, each), "error": error(true, each), "mae": float(np.abs(each - true).mean())}
            for name, each in {"learned": ours, **others}.items()
        } | {
            "differences": {name: difference(everything) for name, difference in ahead.items()},
            "intervals": intervals(of, ahead, samples=args.samples),
        }
    document(result, args.out)


if __name__ == "__main__":
    main()
