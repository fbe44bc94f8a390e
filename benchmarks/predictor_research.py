"""How far can the length of an answer be foreseen, with every source at hand? Research only: nothing of it is shipped.

    elis-gateway predictor collect DATA... --out all.jsonl.gz ...
    python -m benchmarks.predictor_research all.jsonl.gz --encoder FOLDER --work runs/research [--final]

Trained on everything, non-commercial sources included; judged on AlpacaEval, the served model known by name. Choices
were made on the validation split; ``--final`` looks at the test split, once. Budget: about 12 minutes of one core;
what was computed before is kept in ``--work``.

Beside the counters and the frozen BGE embedding it uses scores of answer-level models (ridge and nearest neighbours on
the embedding, over all and per served model; ridge on word and character n-grams of the prompt) and of one pair-level
model (ridge on n-grams of the prompt, of the answer's first 200 and last 250 characters). Every score is out-of-fold
by group for training rows: no row, nor any answer of another model to its prompt, has seen itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import scipy.sparse as sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import Ridge

from onnx_export import pairs, records
from onnx_export.encode import Texts
from onnx_export.figures import figures, intervals, tau, tau_within

TARGET = "alpaca_eval"
CHAT = (TARGET, "just_eval", "arena_hard_v0.1", "arena_hard_v2.0", "mt_bench_en", "moss_multiturn")
WINDOWS = (*pairs.FIRST, 9, 11)
"""Those trained on; the first eight are judged."""
FOLDS = 5
Array = np.ndarray[Any, Any]


class Data:
    """Answers and pairs as arrays."""

    def __init__(self, path: Path, encoder: Path, cache: Path) -> None:
        self.answers = records.load([path]).answers
        self.embedding = Texts.of(encoder, cache).prompts(answer.prompt for answer in self.answers)
        self.app = np.array([a.app for a in self.answers])
        self.model = np.array([a.model for a in self.answers])
        self.split = np.array([a.split for a in self.answers])
        self.group = np.array([a.group for a in self.answers])
        self.chat = np.isin(self.app, CHAT)
        complete = np.array([a.complete for a in self.answers])
        self.fit = (self.split == "train") & self.chat & complete
        self.log = np.log([a.tokens for a in self.answers])
        self.fold = np.array([int(hashlib.sha256(f"f{g}".encode()).hexdigest(), 16) % FOLDS for g in self.group])
        texts = [a.prompt for a in self.answers]
        unique, self.prompt = np.unique(texts, return_inverse=True)
        self.first = np.zeros(len(unique), dtype=int)
        self.first[self.prompt[::-1]] = np.arange(len(texts))[::-1]
        self.texts = [str(text) for text in unique]
        chosen = np.flatnonzero(self.chat).tolist()
        made = pairs.make([self.answers[at] for at in chosen], WINDOWS)
        made.answer = np.array(chosen)[made.answer]
        self.pairs = made

    def relative(self, mask: Array, values: Array, of: Array) -> tuple[Array, Array]:
        """``values`` less the mean of their kind ``of`` in the rows ``mask``; and those means."""
        names, which = np.unique(of, return_inverse=True)
        total = np.bincount(which[mask], values[mask], len(names))
        count = np.bincount(which[mask], minlength=len(names))
        mean = np.where(count > 0, total / np.maximum(count, 1), values[mask].mean())[which]
        return values - mean, mean


def solve(rows: Array, wanted: Array, weight: Array, penalty: float) -> Callable[[Array], Array]:
    mean, level = np.average(rows, axis=0, weights=weight), np.average(wanted, weights=weight)
    centred = rows - mean
    left = (centred * weight[:, None]).T @ centred + penalty * np.eye(rows.shape[1])
    line = np.linalg.solve(left, (centred * weight[:, None]).T @ (wanted - level))
    return lambda other: (other - mean) @ line + level


def answer_scores(data: Data) -> dict[str, Array]:
    """Scores of log length relative to the source's and served model's mean; one per answer."""
    kind = np.char.add(np.char.add(data.app, "|"), data.model)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, max_features=60000)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=5, sublinear_tf=True, max_features=80000)
    by_word = words.fit_transform([text[:3000] for text in data.texts]).tocsr()
    by_letter = letters.fit_transform([text[:800] for text in data.texts]).tocsr()
    shifted = data.embedding - data.embedding[data.fit].mean(0)
    shifted /= np.linalg.norm(shifted, axis=1, keepdims=True)
    prompts = data.first

    def means(mask: Array) -> tuple[Array, Array, Array]:
        """Prompts answered in ``mask``, the mean relative length of their answers, and how many there are."""
        off, _ = data.relative(mask, data.log, kind)
        total = np.bincount(data.prompt[mask], off[mask], len(prompts))
        count = np.bincount(data.prompt[mask], minlength=len(prompts))
        known = count > 0
        return known, (total / np.maximum(count, 1))[known], count[known]

    def ridge(penalty: float) -> Callable[[Array, Array], Array]:
        def made(mask: Array, rows: Array) -> Array:
            known, wanted, count = means(mask)
            line = solve(data.embedding[prompts[known]], wanted, np.sqrt(count), penalty)
            return line(data.embedding[rows])

        return made

    def grams(matrix: Any, penalty: float) -> Callable[[Array, Array], Array]:
        def made(mask: Array, rows: Array) -> Array:
            known, wanted, count = means(mask)
            model = Ridge(alpha=penalty, solver="sparse_cg", max_iter=200, tol=1e-3)
            model.fit(matrix[known], wanted, sample_weight=np.sqrt(count))
            return np.asarray(model.predict(matrix)[data.prompt[rows]])

        return made

    def neighbours(number: int) -> Callable[[Array, Array], Array]:
        def made(mask: Array, rows: Array) -> Array:
            known, wanted, _ = means(mask)
            asked = np.unique(data.prompt[rows])
            close = shifted[prompts[asked]] @ shifted[prompts[known]].T
            same = data.group[prompts[asked]][:, None] == data.group[prompts[known]][None]
            out = np.zeros(len(prompts))
            out[asked] = _nearest(np.where(same, -9.0, close), wanted, number)
            return out[data.prompt[rows]]

        return made

    def own(near: bool) -> Callable[[Array, Array], Array]:
        """The same for each served model alone."""

        def made(mask: Array, rows: Array) -> Array:
            off, _ = data.relative(mask, data.log, kind)
            out = np.zeros(len(data.log))
            for model in np.unique(data.model[rows]):
                before, now = np.flatnonzero(mask & (data.model == model)), np.flatnonzero(rows & (data.model == model))
                if len(before) < 150:
                    continue
                if near:
                    close = shifted[now] @ shifted[before].T
                    close[data.group[now][:, None] == data.group[before][None]] = -9.0
                    out[now] = _nearest(close, off[before], 25)
                else:
                    out[now] = solve(data.embedding[before], off[before], np.ones(len(before)), 2.0)(
                        data.embedding[now]
                    )
            return out[rows]

        return made

    kinds = {
        "ridge1": ridge(1.0), "ridge4": ridge(4.0), "words": grams(by_word, 2.0), "letters": grams(by_letter, 3.0),
        "near20": neighbours(20), "near60": neighbours(60), "ridge_own": own(False), "near_own": own(True),
    }  # fmt: skip
    out = {}
    for name, made in kinds.items():
        score = np.zeros(len(data.log))
        training = data.split == "train"
        for fold in range(FOLDS):
            rows = training & (data.fold == fold)
            score[rows] = made(data.fit & (data.fold != fold), rows)
        score[~training] = made(data.fit, ~training)
        out[name] = score
    return out


def _nearest(close: Array, wanted: Array, number: int) -> Array:
    at = np.argpartition(-close, number, axis=1)[:, :number]
    weight = np.exp(np.take_along_axis(close, at, 1) / 0.1)
    return np.asarray((weight * wanted[at]).sum(1) / weight.sum(1))


def text_score(data: Data) -> Array:
    """Log remaining tokens, relative to the mean by source, model and window, by ridge on n-grams; one per pair."""
    made = data.pairs
    cuts = [dict(a.cuts) for a in data.answers]
    spots = list(zip(made.answer.tolist(), made.attained.tolist(), strict=True))
    ends = [data.answers[at].answer[: cuts[at][n]][-250:] for at, n in spots]
    starts = [data.answers[at].answer[: min(cuts[at][n], 200)] for at, n in spots]
    token = r"(?u)\b\w+\b|[^\w\s]|\n\n|\n"
    of_text = HashingVectorizer(
        ngram_range=(1, 2), n_features=2**17, alternate_sign=False, norm="l2", binary=True, token_pattern=token
    )
    of_prompt = HashingVectorizer(ngram_range=(1, 2), n_features=2**17, alternate_sign=False, norm="l2", binary=True)
    unique, which = np.unique(starts, return_inverse=True)
    prompts = of_prompt.transform([text[:2000] for text in data.texts]).tocsr()
    rows = sparse.hstack(
        [of_text.transform(ends), of_text.transform(unique).tocsr()[which], prompts[data.prompt[made.answer]]]
    ).tocsr()
    rows = rows.astype(np.float32)
    log = np.log(made.remaining)
    fit, fold = data.fit[made.answer], data.fold[made.answer] % 4
    training = data.split[made.answer] == "train"
    kind = cells(data)
    out = np.zeros(len(made))
    for number in (0, 1, 2, 3, None):
        mask = fit if number is None else fit & (fold != number)
        asked = ~training if number is None else training & (fold == number)
        off = log - shrunk(log, kind, mask)
        model = Ridge(alpha=4.0, solver="sparse_cg", max_iter=60, tol=1e-3).fit(rows[mask], off[mask])
        out[asked] = model.predict(rows[asked])
    return out


def cells(data: Data) -> Array:
    """Source, served model and window of each pair, as one number."""
    made = data.pairs
    names = [f"{data.app[at]}|{data.model[at]}|{k}" for at, k in zip(made.answer, made.window, strict=True)]
    return np.unique(names, return_inverse=True)[1]


def shrunk(values: Array, kind: Array, mask: Array) -> Array:
    """The mean by kind in ``mask``, leaning on the mean of all as on five rows of it."""
    total = np.bincount(kind[mask], values[mask], kind.max() + 1)
    count = np.bincount(kind[mask], minlength=kind.max() + 1)
    return np.asarray(((total + 5 * values[mask].mean()) / (count + 5))[kind])


def grow(data: Data, columns: Array, loss: str, seed: int = 0, rounds: int = 500) -> Array:
    """Trees; behind the features come two columns that are categories. Log tokens, or scores for ``pairwise``."""
    made = data.pairs
    fit = data.fit[made.answer]
    log = np.log(made.remaining)
    weight = np.where(np.isin(data.app[made.answer], CHAT[:2]), 1.0, 0.4)[fit]
    wanted = log[fit]
    rng = np.random.default_rng(seed)

    def pairwise(said: Array, _: Any) -> tuple[Array, Array]:
        slope, bend = np.zeros(len(said)), np.zeros(len(said))
        for _round in range(4):
            other = rng.permutation(len(said))
            apart = wanted - wanted[other]
            size, sign = np.minimum(np.abs(apart), 2.0), np.sign(apart)
            sure = 1 / (1 + np.exp((said - said[other]) * sign))
            pull, stiff = -sign * size * sure, size * sure * (1 - sure)
            slope += pull
            bend += stiff
            np.add.at(slope, other, -pull)
            np.add.at(bend, other, stiff)
        return slope * weight, bend * weight + 1e-3

    parameters = {
        "objective": pairwise if loss == "pairwise" else loss, "learning_rate": 0.06, "num_leaves": 24,
        "min_data_in_leaf": 80, "feature_fraction": 0.4, "bagging_fraction": 0.7, "bagging_freq": 1, "num_threads": 1,
        "verbose": -1, "seed": seed, "cat_smooth": 20, "max_bin": 63,
    }  # fmt: skip
    width = made.features.shape[1]
    rows = lightgbm.Dataset(
        columns[fit], wanted, weight=weight, categorical_feature=[width, width + 1],
        params={"max_bin": 63},
    )  # fmt: skip
    return np.asarray(lightgbm.train(parameters, rows, rounds).predict(columns, num_threads=1))


def kept(path: Path, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """What ``make`` gives, from disk where it was made before."""
    if not path.exists():
        np.savez(path, **make())  # type: ignore[arg-type]
    with np.load(path) as file:
        return dict(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="of embeddings")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--final", action="store_true", help="look at the test split")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = Data(args.data, args.encoder, args.cache or args.work / "embeddings.sqlite")
    made = data.pairs
    print(f"{len(data.answers)} answers, {len(made)} pairs of chat sources", flush=True)
    scores = kept(args.work / "answers.npz", lambda: answer_scores(data))
    text = kept(args.work / "text.npz", lambda: {"text": text_score(data)})["text"]

    unique = np.unique(data.embedding[data.fit], axis=0)
    mean = unique.mean(0)
    components = np.linalg.svd(unique - mean, full_matrices=False)[2][:64]
    projected = ((data.embedding - mean) @ components.T).astype(np.float32)[made.answer]
    kind = cells(data)
    history = shrunk(np.log(made.remaining), kind, data.fit[made.answer])[:, None]
    named = np.column_stack([np.unique(of, return_inverse=True)[1][made.answer] for of in (data.model, data.app)])
    answers = np.column_stack([scores[name][made.answer] for name in scores])
    base = [made.features, named, history]
    n_grams = text[:, None]
    blocks = {
        "counters": base,
        "counters + BGE": [*base, projected],
        "counters + BGE + scores of the prompt": [*base, projected, answers],
        "all: the same + n-grams of the text so far": [*base, projected, answers, n_grams],
        "all without components": [*base, answers, n_grams],
    }
    whole, lean = list(blocks)[-2:]
    said: dict[str, Array] = {}
    for name, loss in [*((name, "l1") for name in blocks), (whole, "pairwise")]:
        columns = np.column_stack(blocks[name]).astype(np.float32)
        file = args.work / f"{hashlib.sha256(f'{name}{loss}'.encode()).hexdigest()[:10]}.npz"
        said[f"{name}, {loss}"] = kept(file, lambda c=columns, o=loss: {"said": grow(data, c, o)})["said"]  # type: ignore[misc]
        print(f"{name}, {loss}", flush=True)

    of = data.app[made.answer] == TARGET
    check = of & (data.split[made.answer] == "validation") & (made.window < 8)
    log = np.log(made.remaining)
    for name, values in said.items():
        if "pairwise" in name:  # scores: scale and shift of the validation split make log tokens of them
            scale = float(np.polyfit(values[check], log[check], 1)[0])
            said[name] = scale * values + float(np.median(log[check] - scale * values[check]))
    said["ensemble of the last three"] = np.mean(
        [said[f"{whole}, l1"], said[f"{lean}, l1"], said[f"{whole}, pairwise"]], axis=0
    )
    tokens = {name: np.exp(values) for name, values in said.items()}
    found = {}
    for split in ("validation", "test") if args.final else ("validation",):
        judged = of & (data.split[made.answer] == split) & (made.window < 8)
        print(f"\n{split}: {int(judged.sum())} pairs")
        found[split] = report(data, tokens, judged)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def report(data: Data, said: dict[str, Array], judged: Array) -> dict[str, Any]:
    """Figures of every estimator on the pairs ``judged``, beside history."""
    made = data.pairs.take(judged)
    truth, model, group = made.remaining, data.model[made.answer], data.group[made.answer]
    cell = np.char.add(np.char.add(model, "|"), made.window.astype(str))
    known = data.pairs
    fit = data.fit[known.answer] & (data.app[known.answer] == TARGET)
    before = np.char.add(np.char.add(data.model[known.answer], "|"), known.window.astype(str))
    everything = float(known.remaining[fit].mean())
    by_cell = {name: known.remaining[fit & (before == name)] for name in np.unique(cell)}
    past = np.array([by_cell[name].mean() if len(by_cell[name]) else everything for name in cell])
    rows: dict[str, Any] = {}
    for name, values in {"mean by model and k (history)": past, **{n: v[judged] for n, v in said.items()}}.items():
        row: dict[str, Any] = {k: round(v, 4) for k, v in figures(truth, values, model).items()}
        drawn = intervals(
            group,
            {
                "tau": lambda at, v=values: tau(truth[at], v[at]),  # type: ignore[misc]
                "mae": lambda at, v=values: float(np.abs(v[at] - truth[at]).mean()),  # type: ignore[misc]
                "tau_within": lambda at, v=values: tau_within(truth[at], v[at], model[at]),  # type: ignore[misc]
            },
        )
        row["intervals"] = {key: [round(edge, 4) for edge in value] for key, value in drawn.items()}
        start = made.window == 0
        row["tau_at_arrival"] = round(tau(truth[start], values[start]), 4)
        rows[name] = row
        low, high = drawn["tau"]
        best, worst = drawn["mae"]
        print(
            f"{name:50} tau {row['tau']:.3f} ({low:.2f} … {high:.2f})  within {row['tau_within']:.3f}"
            f"  k=0 {row['tau_at_arrival']:.3f}  MAE {row['mae']:.1f} ({best:.0f} … {worst:.0f})  R2 {row['r2']:.2f}",
            flush=True,
        )
    return {"pairs": int(judged.sum()), "groups": len(set(group.tolist())), "estimators": rows}


if __name__ == "__main__":
    main()
