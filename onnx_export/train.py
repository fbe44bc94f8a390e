"""Training a head on frozen embeddings. Knows: data sets, an exported encoder, the two learners. Never: ONNX heads.

A run is a folder: ``run.json`` (what was asked, what came of it), the lens, the learner's own file, a checkpoint from
which an interrupted run goes on, and the training curve. ``export`` makes a model folder of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import manifest
from elis_gateway.predictor.features import FEATURES, VERSION
from elis_gateway.predictor.units import Units
from onnx_export import networks, pairs
from onnx_export.encode import Spec, Texts
from onnx_export.figures import tau
from onnx_export.graphs import Lens, inputs_of
from onnx_export.pairs import Floats, Ints, Pairs
from onnx_export.records import Answer, DataSet

__all__ = ["RUN", "Options", "Prepared", "Run", "prepare", "train"]

RUN = "run.json"
LENS = "lens.npz"
TREES = "trees.txt"
NETWORK = "network.pt"
CHECKPOINT = "checkpoint"

Progress = Callable[[list[Any]], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do."""

    architecture: Literal["encode-once", "elis-paper"] = "encode-once"
    learner: Literal["trees", "network"] = "trees"
    loss: str = "log-l1"
    seed: int = 0
    rounds: int = 600
    """Trees, or epochs of a network, at most."""
    patience: int = 40
    """Rounds without a better validation figure after which training stops."""
    rate: float = 0.08
    leaves: int = 31
    batch: int = 512
    components: int = 32
    """Principal components of the embedding that trees see."""
    projection: int = 64
    """Components written for learners outside the head."""
    identity: bool = False
    """Whether the head learns the served models by name."""
    drop: float = 0.25
    """Share of training rows whose embedding is left out, so that the head can do without."""
    pairs: int | None = None
    """Train on so many pairs, drawn at random; None: on all."""
    threads: int = 1

    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def check(self) -> None:
        """Raises ``ConfigError`` where the parts do not go together."""
        if self.loss not in networks.LOSSES:
            raise ConfigError(f"loss: expected one of {', '.join(networks.LOSSES)}, got {self.loss!r}")
        if self.architecture == "elis-paper" and self.learner != "network":
            raise ConfigError("elis-paper is a network: --learner trees does not apply")
        if self.architecture == "elis-paper" and self.loss == "quantiles":
            raise ConfigError("elis-paper says one number: quantiles do not apply")
        if self.architecture == "elis-paper" and self.identity:
            raise ConfigError("elis-paper sees text alone: --identity does not apply")
        if self.learner == "trees" and self.loss in ("listmle", "quantiles"):
            raise ConfigError(f"trees cannot be grown with {self.loss}: take pairwise or log-l1, or --learner network")


@dataclass(slots=True)
class Prepared:
    """Pairs with everything a head may see, in the rows of one split."""

    pairs: Pairs
    embedding: Floats
    model: Ints
    """Index of the served model; 0: not known by name."""
    name: np.ndarray[Any, Any]
    """The served model."""
    app: np.ndarray[Any, Any]
    group: np.ndarray[Any, Any]
    weight: Floats

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(slots=True)
class Run:
    """``run.json``."""

    options: dict[str, Any]
    encoder: str
    """Folder of the exported encoder."""
    unit: str
    window: int
    models: list[str]
    sources: list[dict[str, Any]]
    pairs: dict[str, int]
    scale: float = 1.0
    shift: float = 0.0
    """What makes log tokens of the learner's own scale."""
    best: int = 0
    """The round that was best on the validation split; the run keeps that one."""
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    features_version: int = VERSION
    data: str = ""
    """By which the answers and the encoder are known again."""
    unit_ratio: dict[str, float] = field(default_factory=dict)
    """Tokens of ``unit`` per token as the gateway works them out from characters, by script."""
    done: bool = False

    def save(self, out: Path) -> None:
        part = out / (RUN + ".part")
        part.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(out / RUN)

    @classmethod
    def load(cls, out: Path) -> Run:
        """Raises ``ConfigError`` where the folder holds no run."""
        try:
            return cls(**json.loads((out / RUN).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{out / RUN}: not a training run: {error}") from None


def prepare(
    answers: list[Answer],
    texts: Texts,
    options: Options,
    *,
    models: list[str],
    window: int,
    windows: Iterable[int],
    limit: int | None = None,
    progress: Progress = iter,
) -> Prepared:
    """The pairs of ``answers``, at most ``limit`` of them, encoded as the architecture has it."""
    made = pairs.make(answers, tuple(windows), window=window)
    if limit is not None and len(made) > limit:
        chosen = np.random.default_rng(options.seed).choice(len(made), limit, replace=False)
        made = made.take(np.sort(chosen))
    if options.architecture == "elis-paper":
        spans = [dict(answer.cuts) for answer in answers]
        embedding = texts.windows(
            (
                (answers[at].prompt, answers[at].answer[: spans[at][attained]])
                for at, attained in zip(made.answer.tolist(), made.attained.tolist(), strict=True)
            ),
            progress,
        )
    else:
        embedding = texts.prompts((answer.prompt for answer in answers), progress)[made.answer]
    known = {name: at for at, name in enumerate(models, 1)}
    apps = [answer.app for answer in answers]
    share = {app: 1.0 / np.sqrt(apps.count(app)) for app in set(apps)}
    weight = np.array([share[app] for app in apps], dtype=np.float32)[made.answer]
    return Prepared(
        made,
        embedding.astype(np.float32),
        np.array([known.get(answer.model, 0) for answer in answers], dtype=np.int64)[made.answer],
        np.array([answer.model for answer in answers])[made.answer],
        np.array(apps)[made.answer],
        np.array([answer.group for answer in answers])[made.answer],
        weight / max(float(weight.mean()), 1e-12) if len(weight) else weight,
    )


def train(
    data: DataSet,
    encoder: Path,
    out: Path,
    options: Options,
    *,
    cache: Path | None = None,
    progress: Progress = iter,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Train, or go on with an interrupted run of the same options on the same answers. Raises ``ConfigError``."""
    import time

    options.check()
    out.mkdir(parents=True, exist_ok=True)
    seen = _fingerprint(data, encoder)
    run = _resumed(out, options, seen)
    if run is not None and run.done:
        say(f"{out}: this run is complete")
        return run
    whole = {name: [a for a in data.split(name) if a.complete] for name in ("train", "validation")}
    for name, rows in whole.items():
        if not rows:
            raise ConfigError(f"no complete answers in the {name} split")
    models = sorted({a.model for a in whole["train"] if a.model}) if options.identity else []
    texts = Texts.of(encoder, cache)
    say("encoding (what was encoded before is taken from the cache)")
    parts = {
        name: prepare(
            rows, texts, options, models=models, window=data.window, windows=pairs.WINDOWS,
            limit=options.pairs if name == "train" or options.pairs is None else max(options.pairs // 5, 200),
            progress=progress,
        )
        for name, rows in whole.items()
    }  # fmt: skip
    if run is None:
        run = Run(
            {**asdict(options), "key": options.key()}, str(encoder), data.unit, data.window, models,
            _sources(whole["train"]), {name: len(part) for name, part in parts.items()},
            data=seen, unit_ratio=_unit_ratio(whole["train"]),
        )  # fmt: skip
        _write_lens(out, parts["train"], options)
        run.save(out)
    say(f"training on {len(parts['train'])} pairs, validating on {len(parts['validation'])}")
    started = time.monotonic()
    learn = _grow if options.learner == "trees" else _fit
    learn(out, run, options, parts["train"], parts["validation"], texts.spec, progress)
    run.seconds += round(time.monotonic() - started, 1)
    run.done = True
    run.save(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    curve(run, out / "curve.png")
    return run


def _fingerprint(data: DataSet, encoder: Path) -> str:
    """Of what a run is trained on. Last month's run is not this month's because its options are the same."""
    seen = hashlib.sha256(manifest.digest(encoder / "encoder.onnx").encode())
    for answer in data.answers:
        seen.update(repr(astuple(answer)).encode("utf-8", "surrogatepass"))
    return seen.hexdigest()[:16]


def _resumed(out: Path, options: Options, seen: str) -> Run | None:
    if not (out / RUN).exists():
        return None
    run = Run.load(out)
    if run.data not in ("", seen):
        raise ConfigError(f"{out}: holds a run on other answers or another encoder: name another folder, or remove it")
    if run.options["key"] != options.key():
        raise ConfigError(f"{out}: holds a run with other options: name another folder, or remove it")
    return run


def _sources(answers: list[Answer]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], int] = {}
    for answer in answers:
        key = (answer.app or "unnamed", answer.licence)
        found[key] = found.get(key, 0) + 1
    return [{"name": name, "licence": licence, "answers": n} for (name, licence), n in sorted(found.items())]


_TELLING = 1000.0
"""Tokens of a script from which they tell what a token is."""


def _unit_ratio(answers: list[Answer]) -> dict[str, float]:
    """What a token of the data is to the gateway, which has no tokenizer: learned there and here in the same way."""
    units = Units()
    for answer in answers:
        units.learn("", answer.answer, answer.tokens)
    return {script: round(units.ratio("", script), 4) for _, script, _, seen in units.dump() if seen >= _TELLING}


# ---- the lens --------------------------------------------------------------------------------------------------


_RIDGE = 4.0
_FOLDS = 5


def _write_lens(out: Path, part: Prepared, options: Options) -> None:
    """Mean and principal components of the training embeddings, each prompt counted once; and a ridge score.

    The score is the answer's log length, relative to what its application and served model usually give, by ridge
    regression on the embedding. For the training rows it is kept out-of-fold by group: fitted to the rows themselves
    it would look better to the trees than it is."""
    unique = np.unique(part.embedding, axis=0)
    mean = unique.mean(axis=0)
    rng = np.random.default_rng(options.seed)
    some = unique if len(unique) <= 8000 else unique[rng.choice(len(unique), 8000, replace=False)]
    components = np.linalg.svd(some - mean, full_matrices=False)[2]
    _, first = np.unique(part.pairs.answer, return_index=True)
    wanted = _relative(part, first)
    fold = np.array([int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) % _FOLDS for group in part.group[first]])
    centred = part.embedding[first] - mean
    of_answer = np.zeros(len(first))
    for number in range(_FOLDS):
        inside = fold == number
        of_answer[inside] = centred[inside] @ _ridge(centred[~inside], wanted[~inside])
    place = np.searchsorted(part.pairs.answer[first], part.pairs.answer)
    np.savez(
        out / LENS,
        mean=mean.astype(np.float32),
        components=components.astype(np.float32),
        score=_ridge(centred, wanted).astype(np.float32),
        out_of_fold=of_answer[place].astype(np.float32),
    )


def _relative(part: Prepared, rows: Ints) -> Floats:
    """Log length of an answer less the mean of its application and served model."""
    log = np.log(part.pairs.attained[rows] + part.pairs.remaining[rows])
    _, which = np.unique(np.char.add(np.char.add(part.app[rows], "|"), part.name[rows]), return_inverse=True)
    relative: Floats = log - (np.bincount(which, log) / np.bincount(which))[which]
    return relative


def _ridge(rows: Floats, wanted: Floats) -> Floats:
    left = rows.T.astype(np.float64) @ rows + _RIDGE * np.eye(rows.shape[1])
    found: Floats = np.linalg.solve(left, rows.T @ wanted)
    return found


def read_lens(out: Path, components: int) -> Lens:
    """The lens of a run, as far as trees see it: its components, and the ridge score."""
    with np.load(out / LENS) as kept:
        seen = np.concatenate([kept["components"][:components], kept["score"][None]])
        return Lens(kept["mean"], np.ascontiguousarray(seen.T))


# ---- trees -----------------------------------------------------------------------------------------------------


def columns(lens: Lens, part: Prepared, models: int) -> Floats:
    """What trees decide by."""
    return inputs_of(lens, part.embedding, part.pairs.features, part.model, models)


def _training_columns(out: Path, lens: Lens, part: Prepared, models: int, drop: Any) -> Floats:
    """The same for training: without an embedding in the rows ``drop``, with the out-of-fold score in the others."""
    rows = inputs_of(
        lens, np.where(drop[:, None], np.float32(0), part.embedding), part.pairs.features, part.model, models
    )
    with np.load(out / LENS) as kept:
        rows[:, part.pairs.features.shape[1] + lens.columns.shape[1] - 1] = np.where(drop, 0.0, kept["out_of_fold"])
    return rows


def _grow(
    out: Path, run: Run, options: Options, train: Prepared, check: Prepared, spec: Spec, progress: Progress
) -> None:
    import lightgbm

    lens, models = read_lens(out, options.components), len(run.models)
    rng = np.random.default_rng(options.seed)
    rows = _training_columns(out, lens, train, models, rng.random(len(train)) < options.drop)
    inside = columns(lens, check, models)
    target = _target(options.loss, train.pairs.remaining)
    parameters: dict[str, Any] = {
        "objective": _objective(options, train), "learning_rate": options.rate, "num_leaves": options.leaves,
        "min_data_in_leaf": min(60, max(2, len(train) // 50)), "feature_fraction": 0.5, "bagging_fraction": 0.8,
        "bagging_freq": 1, "num_threads": options.threads, "seed": options.seed, "verbose": -1,
        "deterministic": True, "force_row_wise": True,
    }  # fmt: skip
    if options.loss == "pairwise":
        parameters["boost_from_average"] = False
    data = lightgbm.Dataset(rows, target, weight=train.weight, free_raw_data=False)
    kept = out / CHECKPOINT
    before = int(run.history[-1]["round"]) if kept.exists() and run.history else 0
    watched = _Watch(run, options)
    ticks = iter(progress(list(range(before + 1, options.rounds + 1))))

    def passed(state: Any) -> None:
        """After every tree."""
        next(ticks, None)
        at = state.iteration + 1
        if at % 5 and at != options.rounds:
            return
        said = np.asarray(state.model.predict(inside, num_threads=options.threads))
        over = watched.add(at, _validation(options.loss, said, check), tau(check.pairs.remaining, said))
        if at % 25 == 0:
            state.model.save_model(str(kept))
            run.save(out)
        if over:
            raise lightgbm.callback.EarlyStopException(state.iteration, [])

    booster = lightgbm.train(
        parameters, data, options.rounds - before, init_model=str(kept) if before else None, callbacks=[passed]
    )
    booster.save_model(str(out / TREES), num_iteration=run.best)
    said = np.asarray(lightgbm.Booster(model_file=str(out / TREES)).predict(inside, num_threads=options.threads))
    _calibrate(run, options.loss, said, check)


def _objective(options: Options, part: Prepared) -> Any:
    if options.loss != "pairwise":
        return {"l1": "l1", "huber": "huber", "mse": "l2"}[options.loss.removeprefix("log-")]
    log = np.log(part.pairs.remaining)
    rng = np.random.default_rng(options.seed)

    def pairwise(said: Floats, _: Any) -> tuple[Floats, Floats]:
        """Logistic loss of each row against four others, weighted by how far apart they truly are."""
        slope, bend = np.zeros(len(said)), np.zeros(len(said))
        for _ in range(4):
            other = rng.permutation(len(said))
            apart = log - log[other]
            weight = np.minimum(np.abs(apart), 2.0)
            sure = 1.0 / (1.0 + np.exp((said - said[other]) * np.sign(apart)))
            pull, stiff = -np.sign(apart) * weight * sure, weight * sure * (1 - sure)
            slope += pull
            bend += stiff
            np.add.at(slope, other, -pull)
            np.add.at(bend, other, stiff)
        return (slope * part.weight).astype(np.float32), (bend * part.weight + 1e-3).astype(np.float32)

    return pairwise


def _target(kind: str, remaining: Ints) -> Floats:
    if kind in networks.ON_TOKENS:
        return (remaining / networks.SCALE).astype(np.float32)
    return np.log(remaining).astype(np.float32)


# ---- networks --------------------------------------------------------------------------------------------------


def build(options: Options, hidden: int, models: int) -> networks.PaperHead | networks.OnceHead:
    """The network of a run, untrained."""
    if options.architecture == "elis-paper":
        return networks.PaperHead(hidden)
    outputs = len(networks.LEVELS) if options.loss == "quantiles" else 1
    return networks.OnceHead(hidden, len(FEATURES), models, outputs=outputs)


def _fit(
    out: Path, run: Run, options: Options, train: Prepared, check: Prepared, spec: Spec, progress: Progress
) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    head = build(options, spec.hidden, len(run.models))
    with torch.no_grad():
        head.scale.copy_(torch.tensor([1.0, 0.0]))
        if isinstance(head, networks.OnceHead):
            head.spreads(torch.from_numpy(train.embedding), torch.from_numpy(train.pairs.features))
    learner = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=options.rate, weight_decay=0.01)
    kept = out / CHECKPOINT
    first, best = 1, {name: value.clone() for name, value in head.state_dict().items()}
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        head.load_state_dict(state["head"])
        learner.load_state_dict(state["learner"])
        best, first = state["best"], int(state["epoch"]) + 1
    watched = _Watch(run, options)
    rng = np.random.default_rng((options.seed, first))
    for epoch in progress(list(range(first, options.rounds + 1))):
        head.train()
        _epoch(head, learner, train, options, rng)
        said = _said(head, check)
        over = watched.add(epoch, _validation(options.loss, said, check), tau(check.pairs.remaining, said))
        if run.best == epoch:
            best = {name: value.clone() for name, value in head.state_dict().items()}
        torch.save({"head": head.state_dict(), "learner": learner.state_dict(), "best": best, "epoch": epoch}, kept)
        run.save(out)
        if over:
            break
    head.load_state_dict(best)
    _calibrate(run, options.loss, _said(head, check), check)
    torch.save(head.state_dict(), out / NETWORK)


def _epoch(head: Any, learner: Any, train: Prepared, options: Options, rng: np.random.Generator) -> None:
    order = rng.permutation(len(train))
    for start in range(0, len(order), options.batch):
        rows = order[start : start + options.batch]
        embedding = torch.from_numpy(train.embedding[rows])
        remaining = torch.from_numpy(train.pairs.remaining[rows]).float()
        if isinstance(head, networks.OnceHead):
            embedding = embedding * torch.from_numpy(rng.random((len(rows), 1)) >= options.drop).float()
            model = torch.from_numpy(train.model[rows] * (rng.random(len(rows)) >= 0.1))
            said = head.quantiles(embedding, torch.from_numpy(train.pairs.features[rows]), model)
            said = said if said.shape[1] > 1 else said[:, 0]
        else:
            said = head(embedding)
        value = networks.loss(options.loss, said, remaining, torch.from_numpy(train.weight[rows]))
        learner.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        learner.step()


def _said(head: Any, part: Prepared) -> Floats:
    head.eval()
    with torch.no_grad():
        embedding = torch.from_numpy(part.embedding)
        if isinstance(head, networks.OnceHead):
            said = head(embedding, torch.from_numpy(part.pairs.features), torch.from_numpy(part.model))
        else:
            said = head(embedding)
    return np.asarray(said.numpy(), dtype=np.float32)


# ---- both ------------------------------------------------------------------------------------------------------


class _Watch:
    """Keeps the history and says when to stop."""

    def __init__(self, run: Run, options: Options) -> None:
        self._run = run
        self._patience = options.patience
        values = [row["validation"] for row in run.history]
        self._best = min(values) if values else float("inf")

    def add(self, at: int, value: float, order: float) -> bool:
        run = self._run
        run.history.append({"round": at, "validation": round(value, 5), "tau": round(order, 4)})
        if value < self._best:
            self._best, run.best = value, at
        return at - run.best >= self._patience


def _validation(kind: str, said: Any, check: Prepared) -> float:
    """What early stopping makes small: the mean miss, or for losses on order alone 1 - tau."""
    if kind in networks.ORDERING:
        return 1.0 - tau(check.pairs.remaining, said)
    miss = said - _target(kind, check.pairs.remaining)
    if kind.endswith("mse"):
        miss = np.square(miss)
    return float((np.abs(miss) * check.weight).mean())


def _calibrate(run: Run, kind: str, said: Any, check: Prepared) -> None:
    """Scale and shift that make tokens, or their log, of what the learner says."""
    if kind in networks.ON_TOKENS:
        run.scale, run.shift = networks.SCALE, 0.0
    elif kind in networks.ORDERING:
        log = np.log(check.pairs.remaining)
        scale = float(np.polyfit(said, log, 1)[0])
        run.scale, run.shift = scale, float(np.median(log - scale * said))
    else:
        run.scale, run.shift = 1.0, 0.0


def curve(run: Run, path: Path) -> None:
    """The training curve as PNG: validation figure and tau by round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4))
    at = [row["round"] for row in run.history]
    left.plot(at, [row["validation"] for row in run.history], color="tab:blue", label="validation figure")
    left.axvline(run.best, color="grey", linestyle=":")
    left.set_xlabel("trees" if run.options["learner"] == "trees" else "epoch")
    left.set_ylabel(f"validation figure ({run.options['loss']})", color="tab:blue")
    right = left.twinx()
    right.plot(at, [row["tau"] for row in run.history], color="tab:orange")
    right.set_ylabel("Kendall's tau", color="tab:orange")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
