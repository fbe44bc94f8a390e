"""How far the shipped predictor leads history after some answers of a model, on all but the test split's prompts.

    python -m benchmarks.predictor_folds alpaca.jsonl.gz elis_gateway/predictor/models/encode-once \
        --out benchmarks/results/predictor-folds.json

The head was trained on other sources, so all groups of prompts of the training and validation splits can be judged by:
in five parts, each by learners that were taught answers to the other four parts' prompts (one server per served model).
The test split's 78 groups say little; these are eight times as many. Intervals draw groups, over all five parts. The
learner's constants were chosen on these prompts, a few numbers for all models. Budget: some two minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import document
from onnx_export import evaluate, pairs, records
from onnx_export.figures import intervals, tau, tau_within

PARTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--after", type=int, nargs="+", default=[30, 100, 500])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = records.load([args.data])
    answers = [a for a in data.answers if a.split != "test" and a.complete]
    groups = sorted({a.group for a in answers})
    part = dict(zip(groups, (np.random.default_rng(11).permutation(len(groups)) % PARTS).tolist(), strict=True))
    scorer = evaluate.Scorer(args.model, args.cache)
    columns: dict[str, list[Any]] = {name: [] for name in ("truth", "model", "group", "part")}
    said: dict[int, list[Any]] = {count: [] for count in args.after}
    for number in range(PARTS):
        test = [a for a in answers if part[a.group] == number]
        taught = [a for a in answers if part[a.group] != number]
        made = pairs.make(test, window=data.window)
        raw = scorer(test, made, scorer.embeddings(test, made))
        columns["truth"].append(made.remaining)
        columns["model"].append(np.array([a.model for a in test])[made.answer])
        columns["group"].append(np.array([a.group for a in test])[made.answer])
        columns["part"].append(np.full(len(made), number))
        for count in args.after:
            said[count].append(
                evaluate.learned(
                    scorer, taught, test, made, raw, answers=count, window=data.window, by_app=False, seed=number
                )
            )
        print(f"part {number + 1} of {PARTS}", flush=True)
    truth, model, group, where = (np.concatenate(columns[name]) for name in ("truth", "model", "group", "part"))
    result: dict[str, Any] = {"answers": len(answers), "groups": len(groups), "pairs": len(truth)}
    for count in args.after:
        ours, history = (np.concatenate([each[i] for each in said[count]]) for i in (0, 1))

        def lead(at: Any, ours: Any = ours, history: Any = history) -> float:
            return tau(truth[at], ours[at]) - tau(truth[at], history[at])

        def within(at: Any, ours: Any = ours, history: Any = history) -> float:
            return tau_within(truth[at], ours[at], model[at]) - tau_within(truth[at], history[at], model[at])

        everything = np.arange(len(truth))
        result[f"after {count}"] = {
            "tau": tau(truth, ours),
            "tau of history": tau(truth, history),
            "lead": lead(everything),
            "lead within model": within(everything),
            "mae": float(np.abs(ours - truth).mean()),
            "mae of history": float(np.abs(history - truth).mean()),
            "lead by part": [lead(np.flatnonzero(where == number)) for number in range(PARTS)],
            "intervals": intervals(group, {"lead": lead, "lead within model": within}, samples=args.samples),
        }
    document(result, args.out)


if __name__ == "__main__":
    main()
