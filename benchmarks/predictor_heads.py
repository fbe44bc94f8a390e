"""Which loss and which head order best, and by how much: the shipped way of training, one thing changed at a time.

    python -m benchmarks.predictor_heads TRAIN.jsonl.gz JUDGE.jsonl.gz --encoder FOLDER --work build/heads \
        --cache embeddings.sqlite --out benchmarks/results/predictor-heads.json

Trains each head on the same pairs of TRAIN (a data set of ``predictor collect``), exports it and judges the exported
folder on the test split of TRAIN (known sources, other prompts) and the validation split of JUDGE (a source nothing was
trained on), windows 0 to 7. Differences are to the first head, with 90 % intervals by drawing groups: all heads see the
same draws. Resumable: a head that lies in the work folder is not trained again. Budget: one to three minutes per head
with 40,000 pairs on one core, and the encoding of the prompts once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import document
from elis_gateway.predictor.manifest import FILE
from onnx_export import export, pairs, records, train
from onnx_export.evaluate import Scorer
from onnx_export.figures import figures, intervals, tau, tau_within

HEADS: dict[str, dict[str, Any]] = {
    "trees, log-L1 (shipped)": {},
    "trees, log-Huber": {"loss": "log-huber"},
    "trees, log-MSE": {"loss": "log-mse"},
    "trees, L1": {"loss": "l1"},
    "trees, MSE": {"loss": "mse"},
    "trees, pairwise": {"loss": "pairwise"},
    "network, log-L1": {"learner": "network"},
    "network, pairwise": {"learner": "network", "loss": "pairwise"},
    "network, ListMLE": {"learner": "network", "loss": "listmle"},
    "network, quantiles": {"learner": "network", "loss": "quantiles"},
}


class Judge:
    """One set of pairs that every head is judged by."""

    def __init__(self, data: records.DataSet, split: str) -> None:
        self.answers = [answer for answer in data.split(split) if answer.complete]
        self.made = pairs.make(self.answers, window=data.window)
        self.model = np.array([answer.model for answer in self.answers])[self.made.answer]
        self.group = np.array([answer.group for answer in self.answers])[self.made.answer]

    def asked(self, scorer: Scorer, *, embedded: bool = True) -> Any:
        embedding = scorer.embeddings(self.answers, self.made)
        return scorer(self.answers, self.made, embedding if embedded else np.zeros_like(embedding))

    def table(self, said: dict[str, Any], samples: int) -> dict[str, Any]:
        truth, first = self.made.remaining, next(iter(said.values()))
        rows = {}
        for name, values in said.items():
            row = figures(truth, values, self.model)
            off = intervals(
                self.group,
                {
                    "tau": lambda at, v=values: tau(truth[at], v[at]) - tau(truth[at], first[at]),  # type: ignore[misc]
                    "tau_within": lambda at, v=values: (  # type: ignore[misc]
                        tau_within(truth[at], v[at], self.model[at]) - tau_within(truth[at], first[at], self.model[at])
                    ),
                    "mae": lambda at, v=values: float(  # type: ignore[misc]
                        np.abs(v[at] - truth[at]).mean() - np.abs(first[at] - truth[at]).mean()
                    ),
                },
                samples=samples,
            )
            rows[name] = {"tau": row["tau"], "tau_within": row["tau_within"], "mae": row["mae"], "difference": off}
        return {"pairs": len(self.made), "groups": len(set(self.group.tolist())), "heads": rows}


def made_of(name: str, data: records.DataSet, args: argparse.Namespace) -> Path:
    """The exported folder of a head, trained where it is not there yet."""
    short = name.replace(", ", "-").replace(" ", "-").replace("(", "").replace(")", "").lower()
    folder: Path = args.work / "models" / short
    if not (folder / FILE).exists():
        print(f"training {name}", flush=True)
        changed = HEADS[name]
        network = changed.get("learner") == "network"
        options = train.Options(
            pairs=args.pairs, rounds=40 if network else args.rounds, patience=6 if network else 40,
            rate=0.001 if network else 0.08, batch=256 if network else 512, **changed,
        )  # fmt: skip
        run = args.work / "runs" / short
        train.train(data, args.encoder, run, options, cache=args.cache)
        export.export_run(run, folder, name=short)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=300, help="trees at most")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = records.load([args.train])
    judges = {"known sources": Judge(data, "test"), "new source": Judge(records.load([args.judge]), "validation")}
    said: dict[str, dict[str, Any]] = {where: {} for where in judges}
    for name in args.heads:
        scorer = Scorer(made_of(name, data, args), args.cache)
        for where, judge in judges.items():
            said[where][name] = judge.asked(scorer)
            if name == next(iter(HEADS)):
                said[where]["the same, prompt not encoded"] = judge.asked(scorer, embedded=False)
    result = {"about": {"pairs": args.pairs, "rounds": args.rounds, "samples": args.samples}}
    result |= {where: judge.table(said[where], args.samples) for where, judge in judges.items()}
    document(result, args.out)


if __name__ == "__main__":
    main()
