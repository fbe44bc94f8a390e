"""A predictor trained on chat, asked about other traffic: how well it knows lengths, and what that costs.

    python -m benchmarks.studies.transfer --data ../shared/data --embeddings embeddings.npz
    python -m benchmarks.studies.transfer --show

Real answers of many models (``DOMAINS``), parted by groups of prompts: trained on the training part, asked on the test
part, answers that look cut off or looping left out. Gradient-boosted trees read the counters of prompt and answer so
far and, where ``--embeddings`` names the file that ``benchmarks.predictor_gain`` keeps, 32 principal components of the
prompt's embedding; the shipped model is such trees. Nothing is learned while serving: the gateway's learner mends much
of this after some hundred answers (docs/predictor.md).

*Accuracy*: Kendall's tau of estimate and truth over the pairs at 0, 50, ... 350 tokens, and at arrival alone; mean
absolute error in tokens. *Completion time*: virtual time, 4 slots, load 0.95, a seam of 1.5 tokens, gamma arrivals of
shape 0.8, no aging; 1,000 jobs, the first 150 dropped; mean over first come's, and the share of perfect knowledge's
gain that is reached, over workload seeds. Five minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

from benchmarks.predictor_gain import Answer, read
from benchmarks.rows import save
from benchmarks.studies.harness import RESULTS, table
from benchmarks.tail import RATE, about, scheduler
from elis_gateway.core.job import Estimate
from elis_gateway.predictor.base import View, clamp
from elis_gateway.predictor.baselines import Instant, NoisyOracle
from elis_gateway.predictor.features import features
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate
from loadtest.stats import interval

Floats = npt.NDArray[np.float32]

PATH = RESULTS / "study-transfer.jsonl"
FILES = ("alpaca_eval", "chat_extra", "math_code", "synthetic", "multiturn", "korean")
DOMAINS = {
    "chat": ("alpaca_eval", "arena_hard_v0.1", "arena_hard_v2.0"),
    "code": ("zeroeval_crux", "gpteacher_codegen"),
    "maths": ("zeroeval_gsm8k",),
    "multi-turn": ("mt_bench_en", "moss_multiturn"),
    "Korean": ("ko_arena_hard", "mt_bench_ko"),
}
MIX = "mix"
WINDOW, FIRST, LAST = 50, 8, 40
"""Windows are of so many tokens; the first ones are judged, and none later than the last is scored."""
TRAINED = 6000
"""Answers a predictor is trained on, at most."""
JOBS, DROPPED, SLOTS, LOAD, SEAM = 1000, 150, 4, 0.95, 1.5
SETTINGS = {"SJF": "sjf:order=mean", "ISRTF": "isrtf:order=mean"}
ONCE = "ISRTF, first estimate only"
"""Counted down instead of made anew at every window."""


class Data:
    """Recorded answers by domain and part, and what a head sees of them."""

    def __init__(self, folder: Path, embeddings: Path | None) -> None:
        self._by: dict[tuple[str, str], list[Answer]] = {}
        home = {source: domain for domain, sources in DOMAINS.items() for source in sources}
        for answer in read(folder, FILES):
            if (domain := home.get(answer.source)) is not None:
                self._by.setdefault((domain, answer.split), []).append(answer)
        self._vectors: dict[str, Floats] = {}
        if embeddings is not None:
            with np.load(embeddings) as stored:
                vectors = stored["embedding"] - stored["embedding"].mean(axis=0)
                _, _, axes = np.linalg.svd(vectors[:: max(len(vectors) // 4000, 1)], full_matrices=False)
                self._vectors = dict(zip(stored["prompt_id"].tolist(), vectors @ axes[:32].T, strict=True))

    def answers(self, domain: str, split: str, most: int) -> list[Answer]:
        """In random order; of a mix equally many of every domain."""
        if domain == MIX:
            share = most // len(DOMAINS)
            return [answer for name in DOMAINS for answer in self.answers(name, split, share)]
        found = list(self._by[domain, split])
        random.Random(f"{domain} {split}").shuffle(found)
        return found[:most]

    def seen(self, answer: Answer, window: int) -> list[float]:
        attained = window * WINDOW
        row = features(answer.prompt, answer.so_far(attained), attained)
        if self._vectors:
            row += self._vectors[answer.prompt_id].tolist()
        return row

    def pairs(self, answers: Sequence[Answer], last: int) -> tuple[Floats, Floats, Floats]:
        """Features, remaining tokens and window of every answer at every window that it reached."""
        at = [(a, w) for a in answers for w in range(last) if w * WINDOW < a.tokens]
        seen = np.array([self.seen(answer, window) for answer, window in at], dtype=np.float32)
        left = np.array([answer.tokens - window * WINDOW for answer, window in at], dtype=np.float32)
        return seen, left, np.array([window for _, window in at], dtype=np.float32)


def trained(data: Data, domain: str) -> lightgbm.Booster:
    seen, left, _ = data.pairs(data.answers(domain, "train", TRAINED), LAST)
    options = {
        "objective": "regression", "num_leaves": 31, "learning_rate": 0.05, "min_data_in_leaf": 40,
        "feature_fraction": 0.7, "num_threads": 1, "seed": 0, "verbosity": -1,
    }  # fmt: skip
    return lightgbm.train(options, lightgbm.Dataset(seen, np.log(left)), num_boost_round=300)


def accuracy(data: Data, head: lightgbm.Booster, answers: Sequence[Answer]) -> dict[str, float]:
    seen, left, window = data.pairs(answers, FIRST)
    said = np.exp(head.predict(seen))
    first = window == 0
    counted = np.maximum(
        np.repeat(said[first], np.diff(np.append(np.flatnonzero(first), len(left)))) - window * WINDOW, 1
    )
    return {
        "pairs": len(left),
        "tau": float(kendalltau(said, left).statistic),
        "tau_first": float(kendalltau(said[first], left[first]).statistic),
        "mae": float(np.abs(said - left).mean()),
        "mae_once": float(np.abs(counted - left).mean()),
    }


class Said(Instant):
    """A head's estimates of recorded answers, worked out beforehand."""

    def __init__(self, tables: dict[str, list[float]]) -> None:
        """``tables``: remaining tokens by window, for each job."""
        self._tables = tables

    def instant(self, view: View) -> Estimate | None:
        known = self._tables[view.job_id]
        window = min(view.attained // WINDOW, len(known) - 1)
        return Estimate(clamp(known[window] - (view.attained - window * WINDOW), view.allowed), None, "head")


def estimates(data: Data, head: lightgbm.Booster, answers: Sequence[Answer]) -> list[list[float]]:
    """By answer and window."""
    seen, _, window = data.pairs(answers, LAST)
    said = iter(np.exp(head.predict(seen)).tolist())
    found: list[list[float]] = []
    for number in window:
        if not number:
            found.append([])
        found[-1].append(next(said))
    return found


def jobs(answers: Sequence[Answer], seed: int) -> list[tuple[SimJob, int]]:
    """A workload, and which answer each job is."""
    draw, gaps = random.Random(f"transfer {seed}"), random.Random(f"transfer arrivals {seed}")
    chosen = draw.choices(range(len(answers)), k=JOBS)
    rate = LOAD * SLOTS * RATE / (fmean(answers[i].tokens for i in chosen) + SEAM)
    now, made = 0.0, []
    for number, i in enumerate(chosen):
        now += gaps.gammavariate(0.8, 1 / (0.8 * rate))
        made.append((SimJob(f"{number}", now, 0, answers[i].tokens), i))
    return made


def completion(work: Sequence[tuple[SimJob, int]], setting: str, tables: Sequence[list[float]] | None) -> float:
    """Mean completion time; ``tables`` None: every length is known."""
    asked = [job for job, _ in work]
    known = (
        NoisyOracle({job.id: job.output_tokens for job in asked}, 0.0)
        if tables is None
        else Said({job.id: tables[i] for job, i in work})
    )
    engine = Engine(EngineModel(SLOTS, ((1, RATE),), seam_tokens=SEAM))
    core, in_hand = scheduler(setting)
    result = simulate(asked, core, {"engine": engine}, known, overcommit=in_hand)
    return fmean(record.jct for record in result.records[DROPPED:])


def served(data: Data, heads: dict[str, lightgbm.Booster], domain: str, seeds: int) -> Iterator[dict[str, Any]]:
    """Everything about one domain: a row for each head, and one for perfect knowledge."""
    answers = data.answers(domain, "test", 10_000)
    if domain == MIX:
        least = min(len(data.answers(name, "test", 10_000)) for name in DOMAINS)
        answers = data.answers(MIX, "test", least * len(DOMAINS))
    works = [jobs(answers, seed) for seed in range(seeds)]
    base = [completion(work, "fcfs", None) for work in works]
    for name in ("perfect", *(head for head in heads if head in ("chat", MIX, domain))):
        tables = None if name == "perfect" else estimates(data, heads[name], answers)
        ratios = {
            order: [completion(work, setting, tables) / first for work, first in zip(works, base, strict=True)]
            for order, setting in SETTINGS.items()
        }
        if tables is not None:
            once = [known[:1] for known in tables]
            ratios[ONCE] = [
                completion(work, SETTINGS["ISRTF"], once) / first for work, first in zip(works, base, strict=True)
            ]
        known = {} if name == "perfect" else accuracy(data, heads[name], answers)
        yield {"served": domain, "trained": name, "answers": len(answers), "accuracy": known, "ratios": ratios}


def show(rows: Sequence[dict[str, Any]]) -> None:
    by = {(row["served"], row["trained"]): row for row in rows}
    body = []
    for served, trained in by:
        if trained == "perfect":
            continue
        row, best = by[served, trained], by[served, "perfect"]
        known = row["accuracy"]
        cells = [served, f"{row['answers']}", trained, f"{known['tau']:.2f} / {known['tau_first']:.2f}"]
        cells.append(f"{known['mae']:.0f} / {known['mae_once']:.0f}")
        for order in (*SETTINGS, ONCE):
            ratio, half = interval(row["ratios"][order])
            share = (1 - ratio) / (1 - fmean(best["ratios"][order.partition(",")[0]]))
            cells.append(f"{ratio:.2f} ± {half:.2f} ({share:.0%})")
        body.append(cells)
    heads = ["served", "test answers", "trained on", "tau / at arrival", "MAE / first only",
             "SJF (share of perfect's gain)", "ISRTF (share)", f"{ONCE} (share)"]  # fmt: skip
    print(table(heads, body))
    print()
    perfect = [[served, *("{:.2f} ± {:.2f}".format(*interval(row["ratios"][order])) for order in SETTINGS)]
               for (served, trained), row in by.items() if trained == "perfect"]  # fmt: skip
    print(table(["perfect knowledge", *SETTINGS], perfect))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of recorded answers (responses_*.jsonl.gz)")
    parser.add_argument("--embeddings", type=Path, help="prompts' embeddings, as benchmarks.predictor_gain keeps them")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--show", action="store_true", help="print the newest stored rows, run nothing")
    given = parser.parse_args()
    stored = [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []
    if given.show:
        show([row for row in stored if row["code"] == stored[-1]["code"]])
        return
    stamp = about() | {"seeds": given.seeds, "embeddings": given.embeddings is not None}
    stamp["code"] = hashlib.sha256(stamp["code"].encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    done = {row["served"] for row in stored if all(row[key] == stamp[key] for key in ("code", "seeds", "embeddings"))}
    data = Data(given.data, given.embeddings)
    heads = {domain: trained(data, domain) for domain in (*DOMAINS, MIX)}
    for domain in (*DOMAINS, MIX):
        if domain not in done:
            # A domain is stored when it is whole, so that a stopped study begins it anew.
            for row in list(served(data, heads, domain, given.seeds)):
                save(PATH, {**stamp, **row})
    rows = [json.loads(line) for line in PATH.read_text().splitlines()]
    show([row for row in rows if all(row[key] == stamp[key] for key in ("code", "seeds", "embeddings"))])


if __name__ == "__main__":
    main()
