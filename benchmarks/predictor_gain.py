#!/usr/bin/env python3
"""What the predictor knows, and what that is worth in completion time, cold and after learning.

    python -m benchmarks.predictor_gain --data ../shared/data --model FOLDER --embeddings embeddings.npz \
        --output benchmarks/results/predictor-gain.json

Answers are real ones (many models' answers to AlpacaEval, Arena-Hard, GSM8K, CRUXEval and GPTeacher's prompts), parted
by groups of prompts: what a gateway would have served before comes from the training part, what is asked of it from the
test part, so no prompt was seen before. Answers marked as cut off or looping are left out.

*Order*: one application, one served model at a time (13 models). After 0, 30, 100 and 500 finished answers, Kendall's
tau within the model of every estimate at 0, 50, ... 350 tokens with the truth, and the mean absolute error in tokens;
intervals resample groups of prompts. ``own`` is the learner without the shipped model, ``counters`` without embeddings.

*Completion time*: the scheduler in virtual time, 4 slots, load 0.95, elastic windows, a seam of 1.5 tokens, Poisson
arrivals, no aging: one application (mean over 13 served models), and six applications on one server (chat, hard chat,
maths, code reading, snippets, role play; equally many requests each; mean over seeds, each of which draws who answers
in each). What was learned is frozen during a run. Share: how much of perfect knowledge's gain over first-come is
reached, with an interval by jackknife over models or seeds. Learned answers are counted over all applications together.

*The published method* (``--published``, on its own, since every window of every answer has to be encoded: tens of
milliseconds each): fixed windows, prompt and partial answer re-scored after each, 30 ms of virtual time every time;
beside it fixed windows with perfect knowledge, and its model's estimates under elastic windows. What it said is kept in
a file, so that an interrupted run goes on; the output says which workloads are in it so far.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import platform
import random
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from math import exp, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import kendalltau

from elis_gateway.core.policy import Aging, make_policy
from elis_gateway.core.scheduler import Scheduler, SchedulerConfig
from elis_gateway.predictor import features
from elis_gateway.predictor.base import Estimate, View, clamp
from elis_gateway.predictor.learner import Learner, Prediction, Sight
from elis_gateway.predictor.manifest import folder_of
from elis_gateway.predictor.onnx import Model
from elis_gateway.sim.engine import Engine, EngineModel
from elis_gateway.sim.simulator import SimJob, simulate

ROOT = Path(__file__).resolve().parent.parent
FILES = ("alpaca_eval", "chat_extra", "math_code", "synthetic")
WINDOW, WINDOWS = 50, 8
LEARNED = (0, 30, 100, 500)
MIX = {
    "chat": ("alpaca_eval",),
    "hard chat": ("arena_hard_v0.1", "arena_hard_v2.0"),
    "maths": ("zeroeval_gsm8k",),
    "code reading": ("zeroeval_crux",),
    "snippets": ("gpteacher_codegen",),
    "role play": ("gpteacher_roleplay",),
}
RATE, SLOTS, LOAD, SEAM = 30.0, 4, 0.95, 1.5
LATENCY = 0.03
"""Seconds that re-scoring takes with the published method's model; the others answer at once."""


class Answer(NamedTuple):
    """One recorded answer."""

    prompt_id: str
    group: str
    prompt: str
    text: str
    tokens: int
    model: str
    source: str
    split: str

    def so_far(self, attained: int) -> str:
        """Its first ``attained`` tokens, nearly: tokens are taken as equally long."""
        return self.text[: round(len(self.text) * attained / self.tokens)]


def read(folder: Path, files: Sequence[str] = FILES) -> list[Answer]:
    found = []
    for name in files:
        with gzip.open(folder / f"responses_{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["n_tokens"] >= 1 and not row["cut"] and not row["loop"]:
                    keys = ("prompt_id", "group_id", "prompt", "response", "n_tokens", "model", "source", "split")
                    found.append(Answer(*(row[key] for key in keys)))
    return found


class Shipped:
    """The model folder's view of recorded answers; prompts are encoded once and kept in a file."""

    def __init__(self, folder: Path, embeddings: Path) -> None:
        self.model = Model(folder)
        self._file = embeddings
        self._vectors: dict[str, Any] = {}
        if embeddings.exists():
            with np.load(embeddings) as stored:
                self._vectors = dict(zip(stored["prompt_id"].tolist(), stored["embedding"], strict=True))
        self._seen: dict[tuple[str, str, int], tuple[float, list[float], Any]] = {}

    def encode(self, answers: Sequence[Answer]) -> None:
        missing = {a.prompt_id: a.prompt for a in answers if a.prompt_id not in self._vectors}
        for number, (key, prompt) in enumerate(missing.items()):
            self._vectors[key] = self.model.encode([(prompt, "")])[0]
            if number % 200 == 0:
                print(f"\rencoding prompts: {number}/{len(missing)}", end="", flush=True)
        if missing:
            print()
            np.savez(self._file, prompt_id=list(self._vectors), embedding=np.stack(list(self._vectors.values())))

    def sight(self, answer: Answer, attained: int) -> Sight:
        key = answer.prompt_id, answer.model, attained
        found = self._seen.get(key)
        if found is None:
            vector = self._vectors[answer.prompt_id]
            row = features.features(answer.prompt, answer.so_far(attained), attained)
            [said] = self.model.head(vector[None, :], np.array([row], dtype=np.float32), [answer.model])
            found = self._seen[key] = said, row, self.model.reduce(vector)
        return Sight(attained, None, *found)


VARIANTS = ("full", "own", "counters")


def seen_as(variant: str, sight: Sight) -> Sight:
    if variant == "own":
        return sight._replace(shipped=None)
    return sight._replace(shipped=None, reduced=None) if variant == "counters" else sight


def teach(learner: Learner, shipped: Shipped, answers: Sequence[tuple[Answer, str]], variant: str = "full") -> None:
    """``answers``: with the application that asked; all of them of the served model "m"."""
    for answer, app in answers:
        marks = range(0, answer.tokens, WINDOW)
        made = life(learner, app, [seen_as(variant, shipped.sight(answer, at)) for at in list(marks)[:20]])
        learner.learn("m", app, made, answer.tokens, complete=True)


def life(learner: Learner, app: str, sights: Sequence[Sight]) -> list[Prediction]:
    """One job's predictions, from its arrival on."""
    first = learner.predict("m", app, sights[0])
    return [first, *(learner.predict("m", app, sight._replace(first=first.whole)) for sight in sights[1:])]


def fresh(shipped: Shipped) -> Learner:
    return Learner(shipped.model.features, shipped.model.reduced, layout=shipped.model.layout)


# ---- order ----------------------------------------------------------------------------------------------------------


def order(shipped: Shipped, answers: Sequence[Answer], split: str, seeds: int) -> dict[str, Any]:
    models = sorted({a.model for a in answers if a.source == "alpaca_eval"})
    table: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    leads: dict[int, list[list[float]]] = defaultdict(list)
    for model in models:
        own = [a for a in answers if a.source == "alpaca_eval" and a.model == model]
        asked = [a for a in own if a.split == split]
        taught = [a for a in own if a.split == "train"]
        for seed in range(seeds):
            rows = random.Random(seed).sample(taught, max(LEARNED))
            for variant in VARIANTS:
                learner, done = fresh(shipped), 0
                for count in LEARNED:
                    teach(learner, shipped, [(a, "") for a in rows[done:count]], variant)
                    done = count
                    said = judge(learner, shipped, asked, variant)
                    for name, figures in said.items():
                        if variant == "full" or name == "learned":
                            table[str(count)][name if variant == "full" else variant].append(figures[:5])
                    if variant == "full" and count and seed == 0:
                        leads[count].append(lead(learner, shipped, asked))
        print(f"order: {model} done", flush=True)
    columns = ("tau", "tau at arrival", "mae", "mae of median", "rows")
    result: dict[str, Any] = {
        count: {
            name: dict(zip(columns, (round(float(x), 4) for x in np.array(runs).mean(axis=0)), strict=True))
            for name, runs in rows.items()
        }
        for count, rows in table.items()
    }
    result["lead over history, 90 % interval"] = {
        str(count): [round(float(x), 3) for x in np.array(runs).mean(axis=0)] for count, runs in leads.items()
    }
    return result


def estimates(learner: Learner, shipped: Shipped, asked: Sequence[Answer], variant: str) -> Any:
    rows = []
    for number, answer in enumerate(asked):
        marks = range(0, min(answer.tokens, WINDOW * WINDOWS), WINDOW)
        sights = [seen_as(variant, shipped.sight(answer, at)) for at in marks]
        for at, sight, said in zip(marks, sights, life(learner, "", sights), strict=True):
            old = learner.history.instant(View("", "m", "", "", "", at, None))
            history = learner.history.median("m", "", at) if old is None else old.remaining
            raw = exp(sight.shipped) if sight.shipped is not None else 0.0
            rows.append((number, at, answer.tokens - at, history, raw, said.mean, said.median))
    return np.array(rows)


def judge(learner: Learner, shipped: Shipped, asked: Sequence[Answer], variant: str) -> dict[str, list[float]]:
    rows = estimates(learner, shipped, asked, variant)
    true, first = rows[:, 2], rows[:, 1] == 0
    found = {}
    for name, column, median in (("history", 3, 3), ("shipped, raw", 4, 4), ("learned", 5, 6)):
        said = rows[:, column]
        at_arrival = 0.0 if np.ptp(said[first]) == 0 else kendalltau(said[first], true[first]).statistic
        found[name] = [
            kendalltau(said, true).statistic,
            at_arrival,
            float(np.abs(said - true).mean()),
            float(np.abs(rows[:, median] - true).mean()),
            len(rows),
        ]
    return found


def lead(learner: Learner, shipped: Shipped, asked: Sequence[Answer], times: int = 60) -> list[float]:
    """(lead, 5 %, 95 %) of tau over history's, resampling prompts."""
    rows = estimates(learner, shipped, asked, "full")
    parts = [rows[rows[:, 0] == number] for number in range(len(asked))]

    def ahead(some: Any) -> float:
        true = some[:, 2]
        return float(kendalltau(some[:, 5], true).statistic - kendalltau(some[:, 3], true).statistic)

    rng = random.Random(1)
    drawn = sorted(ahead(np.concatenate(rng.choices(parts, k=len(parts)))) for _ in range(times))
    return [ahead(rows), drawn[int(0.05 * times)], drawn[int(0.95 * times) - 1]]


# ---- completion time ------------------------------------------------------------------------------------------------


class Published:
    """The published method's model on recorded answers."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self._model = Model(folder)
        self._kept = kept
        self._said: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}

    def __call__(self, answer: Answer, attained: int) -> float:
        key = f"{answer.prompt_id} {answer.model} {attained}"
        if key not in self._said:
            vectors = self._model.encode([(answer.prompt, answer.so_far(attained))])
            [said] = self._model.head(vectors, np.zeros((1, 0), dtype=np.float32), [answer.model])
            self._said[key] = round(exp(said), 2)
        return self._said[key]

    def save(self) -> None:
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        self._kept.write_text(json.dumps(self._said))


Says = Callable[[Answer, int], float]


class Frozen:
    """A predictor for simulations whose jobs are recorded answers; learns nothing while it runs."""

    reads_text = False

    def __init__(
        self,
        kind: str,
        jobs: dict[str, Answer],
        learner: Learner | None = None,
        shipped: Shipped | None = None,
        published: Says | None = None,
    ) -> None:
        self._kind, self._jobs, self._learner, self._shipped = kind, jobs, learner, shipped
        self._published = published
        self.refines = kind == "published"
        self._made: dict[tuple[str, str, int], Prediction] = {}

    def instant(self, view: View) -> Estimate | None:
        if self.refines:
            return None
        answer, at = self._jobs[view.job_id], view.attained
        if self._kind == "perfect":
            return Estimate(float(max(answer.tokens - at, 1)))
        assert self._learner is not None
        assert self._shipped is not None
        if self._kind == "history":
            return self._learner.history.instant(view)
        if self._kind == "raw":
            said = self._shipped.sight(answer, at).shipped
            return Estimate(clamp(exp(said or 0.0), None))
        key = answer.prompt_id + answer.model, view.app, at
        made = self._made.get(key)
        if made is None:
            sight = self._shipped.sight(answer, at)
            if at:
                start = self._made.get((*key[:2], 0)) or self._learner.predict(
                    "m", view.app, self._shipped.sight(answer, 0)
                )
                sight = sight._replace(first=start.whole)
            made = self._made[key] = self._learner.predict("m", view.app, sight)
        return Estimate(made.mean, made.gittins, "bge")

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        assert self._published is not None
        return [Estimate(clamp(self._published(self._jobs[view.job_id], view.attained), None)) for view in views]

    def learn(self, view: View, *, complete: bool) -> None: ...

    def save(self) -> None: ...


ARMS = {
    "perfect, ISRTF": ("isrtf", "mean", "perfect"),
    "perfect, SJF": ("sjf", "mean", "perfect"),
    "history, ISRTF, Gittins": ("isrtf", "gittins", "history"),
    "history, SJF": ("sjf", "mean", "history"),
    "shipped raw, ISRTF": ("isrtf", "mean", "raw"),
    "predictor, ISRTF, number": ("isrtf", "mean", "learned"),
    "predictor, ISRTF, Gittins": ("isrtf", "gittins", "learned"),
    "predictor, SJF, number": ("sjf", "mean", "learned"),
    "predictor, SJF, Gittins": ("sjf", "gittins", "learned"),
}


PUBLISHED = {
    "perfect, ISRTF": ("perfect", "elastic"),
    "perfect, fixed windows": ("perfect", "fixed"),
    "published method": ("published", "fixed"),
    "published method's model, elastic windows": ("published", "elastic"),
}


def mean_jct(
    policy: str, order_by: str, jobs: list[SimJob], predictor: Frozen, dropped: int, mode: Any = "elastic"
) -> float:
    options: dict[str, Any] = {} if policy == "fcfs" else {"order": order_by, "aging": Aging("none")}
    chosen = make_policy(policy, **options)
    rescore: Any = "always" if mode == "fixed" else "contended"
    core = Scheduler(SchedulerConfig(seconds_per_token=1 / RATE, seam_cost=SEAM, mode=mode, rescore=rescore), chosen)
    engine = Engine(EngineModel(SLOTS, ((1, RATE),), seam_tokens=SEAM))
    result = simulate(jobs, core, {"engine": engine}, predictor, latency=LATENCY)
    return fmean(record.jct for record in result.records[dropped:])


def workload(pools: dict[str, list[Answer]], count: int, seed: str) -> tuple[list[SimJob], dict[str, Answer]]:
    """Equally many requests per application, drawn from its test answers."""
    rng = random.Random(seed)
    drawn = [(app, rng.choice(pools[app])) for _ in range(count // len(pools)) for app in pools]
    rng.shuffle(drawn)
    mean = fmean(answer.tokens for _, answer in drawn)
    now, jobs, answers = 0.0, [], {}
    for number, (app, answer) in enumerate(drawn):
        now += rng.expovariate(LOAD * SLOTS * RATE / (mean + SEAM))
        jobs.append(SimJob(f"{number}", now, 0, answer.tokens, "m", app))
        answers[f"{number}"] = answer
    return jobs, answers


Units = dict[str, tuple[dict[str, list[Answer]], dict[str, list[Answer]]]]
"""By name, the answers learned from and those asked, by application."""


def completion(shipped: Shipped, units: Units, learned: Sequence[int], jobs_per_run: int, what: str) -> dict[str, Any]:
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, (taught, asked) in units.items():
        jobs, answers = workload(asked, jobs_per_run, f"{what} {name}")
        dropped = jobs_per_run // 6
        rng = random.Random(f"taught {name}")
        lessons = [(answer, app) for app, pool in taught.items() for answer in rng.sample(pool, len(pool))]
        by_app = {app: [lesson for lesson in lessons if lesson[1] == app] for app in taught}
        turns = [
            by_app[app][i] for i in range(max(map(len, by_app.values()))) for app in by_app if i < len(by_app[app])
        ]
        learner, done = fresh(shipped), 0
        base = mean_jct("fcfs", "mean", jobs, Frozen("perfect", answers, learner, shipped), dropped)
        for count in learned:
            teach(learner, shipped, turns[done:count])
            done = count
            for arm, (policy, order_by, kind) in ARMS.items():
                if kind in ("perfect", "raw") and count:
                    continue
                predictor = Frozen(kind, answers, learner, shipped)
                ratios[str(count)][arm].append(mean_jct(policy, order_by, jobs, predictor, dropped) / base)
        print(f"{what}: {name} done", flush=True)
    perfect = ratios["0"]["perfect, ISRTF"]
    return {count: summary(arms, perfect) for count, arms in ratios.items()}


def published(units: Units, said: Says, jobs_per_run: int, what: str, done: Callable[[dict[str, Any]], None]) -> None:
    """The same workloads as ``completion``'s, which has the other arms; ``done`` is given what is known after each."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for name, (_, asked) in units.items():
        jobs, answers = workload(asked, jobs_per_run, f"{what} {name}")
        dropped = jobs_per_run // 6
        base = mean_jct("fcfs", "mean", jobs, Frozen("perfect", answers), dropped)
        for arm, (kind, mode) in PUBLISHED.items():
            predictor = Frozen(kind, answers, published=said)
            ratios[arm].append(mean_jct("isrtf", "mean", jobs, predictor, dropped, mode) / base)
        print(f"{what}: {name} done: {', '.join(f'{arm} {runs[-1]:.2f}' for arm, runs in ratios.items())}", flush=True)
        done({"of": list(units)[: len(ratios["perfect, ISRTF"])], **summary(ratios, ratios["perfect, ISRTF"])})


def summary(arms: dict[str, list[float]], perfect: list[float]) -> dict[str, Any]:
    return {
        arm: {"mean over first-come": round(fmean(runs), 4), "share": share(runs, perfect)}
        for arm, runs in arms.items()
    }


def share(runs: list[float], perfect: list[float]) -> list[float]:
    """(share of the perfect gain, half of its 90 % interval by jackknife)."""

    def of(keep: Sequence[int]) -> float:
        return (1 - fmean(runs[i] for i in keep)) / (1 - fmean(perfect[i] for i in keep))

    everything = range(len(runs))
    value = of(everything)
    if len(runs) < 2:
        return [round(value, 3), 0.0]
    left_out = [of([i for i in everything if i != j]) for j in everything]
    return [round(value, 3), round(1.75 * stdev(left_out) * (len(runs) - 1) / sqrt(len(runs)), 3)]


def one_application(answers: Sequence[Answer], split: str) -> Any:
    units = {}
    for model in sorted({a.model for a in answers if a.source == "alpaca_eval"}):
        own = [a for a in answers if a.source == "alpaca_eval" and a.model == model]
        units[model] = ({"": [a for a in own if a.split == "train"]}, {"": [a for a in own if a.split == split]})
    return units


def six_applications(answers: Sequence[Answer], split: str, seeds: int) -> Any:
    units = {}
    for seed in range(seeds):
        rng = random.Random(f"who answers {seed}")
        taught, asked = {}, {}
        for app, sources in MIX.items():
            here = [a for a in answers if a.source in sources]
            model = rng.choice(sorted({a.model for a in here}))
            taught[app] = [a for a in here if a.model == model and a.split == "train"]
            asked[app] = [a for a in here if a.model == model and a.split == split]
        units[f"seed {seed}"] = (taught, asked)
    return units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the shipped encode-once)")
    parser.add_argument("--embeddings", type=Path, default=ROOT / "build/embeddings.npz")
    parser.add_argument("--split", default="test", help="validation, while anything is being chosen")
    parser.add_argument("--seeds", type=int, default=2, help="orders of learned answers; mixes: three times as many")
    parser.add_argument("--jobs", type=int, default=3000, help="per simulated run, the first sixth dropped")
    parser.add_argument("--parts", nargs="+", default=["order", "one", "six"], choices=["order", "one", "six"])
    parser.add_argument("--published", action="store_true", help="the published method, and nothing else")
    parser.add_argument("--kept", type=Path, default=ROOT / "build/published.json", help="what its model said")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    answers = read(asked.data)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result: dict[str, Any] = {
        "about": {
            "commit": commit.stdout.strip(),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}, shared",
            "split": asked.split,
            "seeds": asked.seeds,
            "jobs": asked.jobs,
        }
    }
    one, six = one_application(answers, asked.split), six_applications(answers, asked.split, 3 * asked.seeds)
    if asked.published:
        model = Published(folder_of(asked.model or "elis-paper"), asked.kept)

        def keep(name: str, found: dict[str, Any]) -> None:
            model.save()
            result[name] = found
            if asked.output:
                asked.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        for part, name, units in (("one", "one application", one), ("six", "six applications", six)):
            if part in asked.parts:
                published(units, model, asked.jobs, part, partial(keep, name))
        return
    shipped = Shipped(folder_of(asked.model), asked.embeddings)
    shipped.encode(answers)
    result["about"]["model"] = f"{shipped.model.manifest.name}, {shipped.model.manifest.created}"
    if "order" in asked.parts:
        result["order"] = order(shipped, answers, asked.split, asked.seeds)
    if "one" in asked.parts:
        result["one application"] = completion(shipped, one, LEARNED, asked.jobs, "one")
    if "six" in asked.parts:
        result["six applications"] = completion(shipped, six, (0, 100, 500, 2000), asked.jobs, "six")
    write(result, asked.output)


def write(result: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
