"""What reading fewer tokens of a prompt costs in Kendall's tau: the shipped head, raw, on one data set.

    python -m benchmarks.predictor_cut answers.jsonl.gz elis_gateway/predictor/models/encode-once \
        --cuts 64 128 256 --out benchmarks/results/predictor-cut.json

Budget: a few seconds per cut for 80 prompts. Intervals of the differences to the longest cut draw groups. Longer
prompts keep two thirds of the cut at their beginning and one at their end, as in serving.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from onnx_export import pairs, records
from onnx_export.evaluate import Scorer
from onnx_export.figures import figures, intervals, tau


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--app", action="append", help="only these applications")
    parser.add_argument("--cuts", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = records.load([args.data])
    answers = [a for a in data.split(args.split) if not args.app or a.app in args.app]
    made = pairs.make(answers, window=data.window)
    truth = made.remaining
    model = np.array([a.model for a in answers])[made.answer]
    group = np.array([a.group for a in answers])[made.answer]
    said: dict[int, Any] = {}
    tokens: dict[int, float] = {}
    for cut in sorted(args.cuts, reverse=True):
        scorer = Scorer(args.model, max_tokens=cut)
        said[cut] = scorer(answers, made, scorer.embeddings(answers, made))
        prompts = {a.prompt for a in answers}
        sizes = [len(ids) + 2 for ids in scorer.texts._ids(list(prompts))]
        tokens[cut] = float(np.mean(np.array(sizes) > cut))
    longest = max(said)
    start = made.window == 0
    rows = {}
    for cut, values in said.items():
        lost = intervals(
            group,
            {
                "all": lambda at, v=values: tau(truth[at], v[at]) - tau(truth[at], said[longest][at]),  # type: ignore[misc]
                "arrival": lambda at, v=values: (
                    tau(truth[at][start[at]], v[at][start[at]])
                    - tau(truth[at][start[at]], said[longest][at][start[at]])
                ),  # type: ignore[misc]
            },
            samples=60,
        )
        rows[cut] = {
            **{name: round(value, 4) for name, value in figures(truth, values, model).items()},
            "tau_at_arrival": round(tau(truth[start], values[start]), 4),
            "prompts_cut": round(tokens[cut], 3),
            "lost": {name: [round(edge, 4) for edge in pair] for name, pair in lost.items()},
        }
        print(cut, rows[cut])
    if args.out is not None:
        whole = {"split": args.split, "apps": sorted({a.app for a in answers}), "prompts": len(prompts), "cuts": rows}
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
