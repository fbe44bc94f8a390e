"""How good is a model folder, on answers whose groups it never saw, beside what it has to beat.

Every estimator is judged on the same pairs: answers still running at k windows, k = 0..7. Intervals come from drawing
groups, not rows. Knows: model folders through onnxruntime, as serving has them. Never: torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import learner as learning
from elis_gateway.predictor import manifest
from onnx_export import pairs
from onnx_export.encode import Spec, Texts
from onnx_export.figures import Values, draws, edges, figures, tau
from onnx_export.pairs import Floats, Pairs
from onnx_export.records import Answer, DataSet

__all__ = ["Report", "Scorer", "evaluate"]


class Scorer:
    """A model folder's estimates of many pairs."""

    def __init__(self, folder: Path, cache: Path | None = None, *, max_tokens: int | None = None) -> None:
        import onnxruntime

        self.manifest = manifest.load(folder)
        encoder = self.manifest.encoder
        spec = Spec(
            encoder.source, encoder.licence, encoder.pooling, encoder.max_tokens, encoder.hidden, encoder.prefix,
            encoder.separator, encoder.suffix, encoder.quantized, 1.0,
        )  # fmt: skip
        self.texts = Texts(
            manifest.locate(folder, encoder),
            manifest.locate(folder, encoder.tokenizer),
            spec,
            cache,
            max_tokens=max_tokens,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._head = onnxruntime.InferenceSession(
            str(manifest.locate(folder, self.manifest.head)), options, providers=["CPUExecutionProvider"]
        )
        self.projection: Floats | None = None
        if self.manifest.projection is not None:
            self.projection = np.load(manifest.locate(folder, self.manifest.projection))

    def embeddings(self, answers: Sequence[Answer], made: Pairs, progress: Any = iter) -> Floats:
        """One row per pair: of the prompt, or of prompt and answer so far, as the architecture has it."""
        if self.manifest.architecture == "encode-once":
            return self.texts.prompts((answer.prompt for answer in answers), progress)[made.answer]
        spans = [dict(answer.cuts) for answer in answers]
        return self.texts.windows(
            (
                (answers[at].prompt, answers[at].answer[: spans[at][attained]])
                for at, attained in zip(made.answer.tolist(), made.attained.tolist(), strict=True)
            ),
            progress,
        )

    def __call__(self, answers: Sequence[Answer], made: Pairs, embedding: Floats) -> Floats:
        """Remaining tokens, at least 1, per pair."""
        feed: dict[str, Any] = {"embedding": embedding.astype(np.float32)}
        if "features" in self.manifest.head.inputs:
            feed["features"] = made.features
        if "model" in self.manifest.head.inputs:
            index = np.array([self.manifest.model_index(answer.model) for answer in answers], dtype=np.int64)
            feed["model"] = index[made.answer]
        said = np.asarray(self._head.run(None, feed)[0], dtype=np.float64)
        if self.manifest.head.output == "log_remaining":
            said = np.exp(np.minimum(said, 13.0))
        return np.maximum(said, 1.0)


# ---- what it has to beat ---------------------------------------------------------------------------------------


def baselines(train: Sequence[Answer], test: Sequence[Answer], made: Pairs, window: int) -> dict[str, Values]:
    """Estimates for ``made`` by what needs no model: fitted to the training split of the same data.

    ``history``: the mean of what remained, by served model and window. ``trees on counters``: gradient-boosted trees
    (L1) on the features alone, told the served model and nothing of the prompt's embedding."""
    known = pairs.make(train, window=window)
    names = sorted({answer.model for answer in (*train, *test)})
    number = {name: at for at, name in enumerate(names)}
    before = np.array([number[a.model] for a in train])[known.answer]
    now = np.array([number[a.model] for a in test])[made.answer]
    lengths = np.array([a.tokens for a in train], dtype=np.float64)
    of_model = np.array([number[a.model] for a in train])
    mean = float(lengths.mean())
    by_model = np.array(
        [lengths[of_model == at].mean() if (of_model == at).any() else mean for at in range(len(names))]
    )
    windows = np.full(pairs.FIRST[-1] + 1, mean)
    for k in pairs.FIRST:
        if (known.window == k).any():
            windows[k] = known.remaining[known.window == k].mean()
    history = np.zeros((len(names), len(windows)))
    for at in range(len(names)):
        for k in pairs.FIRST:
            rows = (before == at) & (known.window == k)
            # Five answers' worth of everybody's: a cell may be empty.
            history[at, k] = (known.remaining[rows].sum() + 5 * windows[k]) / (int(rows.sum()) + 5)
    return {
        "global mean": np.maximum(mean - made.attained, 1.0),
        "mean by model": np.maximum(by_model[now] - made.attained, 1.0),
        "history": history[now, made.window],
        "trees on counters": _counters(known, before, made, now, history),
    }


def _counters(known: Pairs, before: Values, made: Pairs, now: Values, history: Values) -> Values:
    import lightgbm

    def rows(part: Pairs, model: Values) -> Values:
        return np.column_stack([part.features, np.log(history[model, part.window]), model])

    options = {
        "objective": "l1", "learning_rate": 0.06, "num_leaves": 24, "min_data_in_leaf": min(80, 2 + len(known) // 40),
        "feature_fraction": 0.4, "bagging_fraction": 0.7, "bagging_freq": 1, "num_threads": 1, "seed": 0, "verbose": -1,
    }  # fmt: skip
    grown = lightgbm.train(
        options, lightgbm.Dataset(rows(known, before), np.log(known.remaining), params={"max_bin": 63}), 250
    )
    said: Values = np.exp(np.asarray(grown.predict(rows(made, now), num_threads=1)))
    return said


# ---- after some answers of the served model --------------------------------------------------------------------


def learned(
    scorer: Scorer,
    train: Sequence[Answer],
    test: Sequence[Answer],
    made: Pairs,
    said: Floats,
    *,
    answers: int,
    window: int,
    by_app: bool,
    unseen: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Values, Values]:
    """Estimates for ``made`` after ``answers`` answers, to other prompts, of the served model: what the gateway's
    learner makes of the head's, and what history alone says then.

    One server per served model; or, ``by_app``, one server in front of all, its applications mixed; ``unseen`` ones
    have not asked it anything so far."""
    rng = np.random.default_rng(seed)
    out, past = np.zeros(len(made)), np.zeros(len(made))
    asked = _Asked(scorer, test, made, said, by_app)
    for name in ["all"] if by_app else sorted({answer.model for answer in test}):
        own = [a for a in train if (by_app or a.model == name) and a.app not in unseen]
        chosen = [own[at] for at in rng.permutation(len(own))[:answers]]
        mind = learning.Learner(made.features.shape[1], 0 if scorer.projection is None else len(scorer.projection) - 1)
        if chosen:
            _teach(mind, scorer, chosen, window, by_app)
        for at, answer in enumerate(test):
            if by_app or answer.model == name:
                for row, prediction in asked(mind, at):
                    out[row], past[row] = prediction.median, np.exp(prediction.anchor)
    return out, past


def _teach(mind: learning.Learner, scorer: Scorer, answers: Sequence[Answer], window: int, by_app: bool) -> None:
    """Let a learner see answers as serving would: estimates first, the truth afterwards."""
    made = pairs.make(answers, pairs.WINDOWS, window=window)
    asked = _Asked(scorer, answers, made, scorer(answers, made, scorer.embeddings(answers, made)), by_app)
    for at, answer in enumerate(answers):
        seen = [prediction for _, prediction in asked(mind, at)]
        mind.learn(answer.model, asked.key(answer), seen, answer.tokens, complete=answer.complete)


class _Asked:
    """What a learner says of an answer, window after window."""

    def __init__(self, scorer: Scorer, answers: Sequence[Answer], made: Pairs, said: Floats, by_app: bool) -> None:
        self._answers, self._made, self._by_app = answers, made, by_app
        self._shipped = np.log(said)
        self._reduced = _reduced(scorer, scorer.embeddings(answers, made))
        self._starts = np.searchsorted(made.answer, np.arange(len(answers) + 1))

    def key(self, answer: Answer) -> str:
        """The application, as the learner knows it."""
        return answer.app if self._by_app else ""

    def __call__(self, mind: learning.Learner, at: int) -> list[tuple[int, learning.Prediction]]:
        """(row, prediction) for every pair of one answer; later ones know the first, as in serving."""
        answer, made = self._answers[at], self._made
        seen: list[tuple[int, learning.Prediction]] = []
        for row in range(int(self._starts[at]), int(self._starts[at + 1])):
            sight = learning.Sight(
                int(made.attained[row]),
                None,
                float(self._shipped[row]),
                made.features[row].tolist(),
                None if self._reduced is None else self._reduced[row],
                seen[0][1].whole if seen else None,
            )
            seen.append((row, mind.predict(answer.model, self.key(answer), sight)))
        return seen


def _reduced(scorer: Scorer, embedding: Floats) -> Any:
    if scorer.projection is None:
        return None
    mean, components = scorer.projection[0], scorer.projection[1:]
    return ((embedding - mean) @ components.T).astype(np.float64)


# ---- the report ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """Everything measured, as it goes to JSON."""

    data: dict[str, Any]
    pooled: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Estimator -> figures over k = 0..7, with intervals."""
    windows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Estimator -> k -> figures."""
    models: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    apps: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    domains: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    calibration: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)
    """Estimator -> (mean estimate, mean truth, pairs) by tenth of the estimate."""

    def markdown(self) -> str:
        """The tables for people."""
        data = self.data
        lines = [
            f"{data['pairs']} pairs of {data['answers']} answers in {data['groups']} groups"
            f" ({', '.join(data['apps'])}; split: {data['split']}); windows of {data['window']} tokens, k = 0..7;"
            " 90 % intervals by drawing groups.",
            "",
            "| estimator | tau | tau within model | tau lead over history | MAE | RMSE | R² | pairwise | bias |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in self.pooled.items():
            lines.append(
                f"| {name} | {_with(row, 'tau', 3)} | {_with(row, 'tau_within', 3)} | {_with(row, 'lead', 3)} |"
                f" {_with(row, 'mae', 0)} | {_with(row, 'rmse', 0)} | {_with(row, 'r2', 2)} |"
                f" {_with(row, 'pairwise', 3)} | {_with(row, 'bias', 0)} |"
            )
        lines += ["", "By window, tau (interval) / MAE:", ""]
        lines += _grid(self.windows, "k")
        for title, part in (
            ("By served model", self.models), ("By application", self.apps), ("By domain", self.domains),
        ):  # fmt: skip
            lines += ["", f"{title}, tau (interval) / MAE:", "", *_grid(part, "")]
        return "\n".join(lines) + "\n"


def _with(row: dict[str, Any], name: str, digits: int) -> str:
    low, high = row["intervals"][name]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def _grid(part: dict[str, dict[str, dict[str, Any]]], corner: str) -> list[str]:
    keys = list(dict.fromkeys(key for row in part.values() for key in row))
    lines = [f"| {corner} | " + " | ".join(part) + " |", "|---" * (len(part) + 1) + "|"]
    for key in keys:
        cells = [f"{_with(row[key], 'tau', 2)} / {row[key]['mae']:.0f}" if key in row else "" for row in part.values()]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def evaluate(
    data: DataSet,
    folders: Sequence[Path],
    *,
    split: str = "test",
    apps: Sequence[str] = (),
    after: Sequence[int] = (),
    by_app: bool = False,
    unseen: Sequence[str] = (),
    cache: Path | None = None,
    max_tokens: int | None = None,
    limit: int | None = None,
    samples: int = 200,
    seed: int = 0,
    progress: Any = iter,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Report, dict[str, Values], Values]:
    """Judge model folders on a split of ``data``; ``apps``: only these applications. ``after``: also what the gateway's
    learner makes of the first encode-once folder after so many answers; ``unseen``: none of them of these.
    ``limit``: so many answers, drawn by group.
    Returns the report, every estimator's estimates, and the truth."""
    chosen = [a for a in data.answers if not apps or a.app in apps]
    test = [a for a in chosen if a.split == split]
    train = [a for a in chosen if a.split == "train" and a.complete]
    if not test or not train:
        raise ConfigError(f"nothing to evaluate: {len(train)} answers to fit baselines to, {len(test)} to judge by")
    if limit is not None and len(test) > limit:
        test = _by_group(test, limit, seed)
    made = pairs.make(test, window=data.window)
    said: dict[str, Values] = {}
    say("baselines")
    said |= baselines(train, test, made, data.window)
    for folder in folders:
        say(f"{folder}")
        scorer = Scorer(folder, cache, max_tokens=max_tokens)
        if scorer.manifest.window != data.window:
            raise ConfigError(f"{folder}: trained for windows of {scorer.manifest.window}, the data has {data.window}")
        if scorer.manifest.head.unit != data.unit:
            say(f"counts tokens of {scorer.manifest.head.unit}, the data {data.unit}: errors include the ratio")
        own = scorer(test, made, scorer.embeddings(test, made, progress))
        said[scorer.manifest.name] = own
        if scorer.manifest.architecture == "encode-once":
            absent = np.zeros((len(made), scorer.manifest.encoder.hidden), dtype=np.float32)
            said[f"{scorer.manifest.name}, no embedding"] = scorer(test, made, absent)
            for number in after:
                say(f"after {number} answers")
                both = learned(
                    scorer, train, test, made, own,
                    answers=number, window=data.window, by_app=by_app, unseen=unseen, seed=seed,
                )  # fmt: skip
                said[f"{scorer.manifest.name} after {number}"], said[f"history after {number}"] = both
    return report(data, test, made, said, split, samples, seed), said, made.remaining


def _by_group(test: list[Answer], limit: int, seed: int) -> list[Answer]:
    names = sorted({a.group for a in test})
    kept: set[str] = set()
    for at in np.random.default_rng(seed).permutation(len(names)):
        if sum(a.group in kept for a in test) >= limit:
            break
        kept.add(names[at])
    return [a for a in test if a.group in kept]


def report(
    data: DataSet, test: Sequence[Answer], made: Pairs, said: dict[str, Values], split: str, samples: int, seed: int
) -> Report:
    """All figures of all estimators."""
    truth = made.remaining
    model = np.array([a.model for a in test])[made.answer]
    app = np.array([a.app for a in test])[made.answer]
    domain = np.array([a.domain or a.app for a in test])[made.answer]
    group = np.array([a.group for a in test])[made.answer]
    out = Report(
        {
            "split": split, "window": data.window, "unit": data.unit, "answers": len(test), "pairs": len(made),
            "groups": len(set(group.tolist())), "apps": sorted({a.app for a in test}), "samples": samples, "seed": seed,
        }
    )  # fmt: skip
    everything, samples_of = np.arange(len(truth)), list(draws(group, samples, seed))
    for name, values in said.items():
        after = name.rpartition(" after ")[2]
        against = said.get(f"history after {after}", said["history"])

        def judged(rows: Values, values: Values = values, against: Values = against) -> dict[str, float]:
            row = figures(truth[rows], values[rows], model[rows])
            return row | {"lead": row["tau"] - tau(truth[rows], against[rows])}

        row: dict[str, Any] = judged(everything)
        drawn = [judged(rows) for rows in samples_of]
        row["intervals"] = {name: edges([each[name] for each in drawn]) for name in row if name != "pairs"}
        out.pooled[name] = row
        for table, of in ((out.windows, made.window), (out.models, model), (out.apps, app), (out.domains, domain)):
            table[name] = _each(truth, values, model, of, samples_of)
        out.calibration[name] = _calibration(truth, values)
    return out


def _each(
    truth: Values, said: Values, model: Values, of: Values, samples: Sequence[Values]
) -> dict[str, dict[str, Any]]:
    """Figures of every part, and where tau and the mean error lie as other groups are drawn."""
    made: dict[str, dict[str, Any]] = {}
    for part in np.unique(of):
        here = of == part
        if here.sum() < 10:
            continue
        row: dict[str, Any] = figures(truth[here], said[here], model[here])
        drawn = [rows[here[rows]] for rows in samples]
        row["intervals"] = {
            "tau": edges([tau(truth[rows], said[rows]) for rows in drawn]),
            "mae": edges([float(np.abs(said[rows] - truth[rows]).mean()) for rows in drawn if len(rows)]),
        }
        made[str(part)] = row
    return made


def _calibration(truth: Values, said: Values) -> list[tuple[float, float, int]]:
    """By tenth of the estimate: its mean, the mean of the truth, and how many pairs."""
    tenths = np.array_split(np.argsort(said, kind="stable"), 10)
    return [(float(said[rows].mean()), float(truth[rows].mean()), len(rows)) for rows in tenths if len(rows)]


def write(made: Report, said: dict[str, Values], truth: Values, out: Path) -> None:
    """``evaluation.json``, ``evaluation.md`` and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {
        name: getattr(made, name) for name in ("data", "pooled", "windows", "models", "apps", "domains", "calibration")
    }
    (out / "evaluation.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "evaluation.md").write_text(made.markdown(), encoding="utf-8")
    _plot(made, said, truth, out)


def _plot(made: Report, said: dict[str, Values], truth: Values, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 5))
    last = next(reversed(said))
    left.scatter(truth, said[last], s=4, alpha=0.25)
    longest = float(max(truth.max(), said[last].max()))
    left.plot([1, longest], [1, longest], color="grey", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="remaining tokens", ylabel="estimate", title=last)
    for name, row in made.windows.items():
        middle.plot([int(k) for k in row], [cell["mae"] for cell in row.values()], marker="o", markersize=3, label=name)
    middle.set(xlabel="window k", ylabel="mean absolute error (tokens)")
    middle.legend(fontsize=7)
    for name, tenths in made.calibration.items():
        right.plot([t[0] for t in tenths], [t[1] for t in tenths], marker="o", markersize=3, label=name)
    right.plot([0, longest / 4], [0, longest / 4], color="grey", linewidth=1)
    right.set(xlabel="mean estimate", ylabel="mean of the truth", title="calibration, by tenth of the estimate")
    figure.tight_layout()
    figure.savefig(out / "evaluation.png", dpi=100)
    pyplot.close(figure)
