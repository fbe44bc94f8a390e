"""``elis-gateway predictor``: the sub-commands. What they need is imported inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from elis_gateway.errors import ConfigError, MissingExtra

__all__ = ["cli"]

_FOLDER = click.Path(path_type=Path, file_okay=False)
_EXISTING = click.Path(path_type=Path, exists=True)


@click.group()
def cli() -> None:
    """The length predictor: collect answers, train a head, evaluate it, export it for serving.

    \b
    elis-gateway predictor collect traffic.jsonl* --out answers.jsonl.gz
    elis-gateway predictor train answers.jsonl.gz --encoder models/encoder --out runs/mine
    elis-gateway predictor export runs/mine --out models/mine
    """


@cli.command()
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="JSONL, .gz compresses it.")
@click.option("--window", default=50, show_default=True, help="Answer tokens between two pairs.")
@click.option("--tokenizer", type=_EXISTING, help="A tokenizer.json to count with; default: the source's own counts.")
@click.option("--split-digits/--byte-level", default=True, help="--byte-level: whatever the tokenizer says of digits.")
@click.option(
    "--group-by",
    type=click.Choice(["auto", "source", "prompt"]),
    default="auto",
    show_default=True,
    help="What must not be parted: the source's groups, equal and near-equal prompts, or both.",
)
@click.option(
    "--licence", "licences", multiple=True, metavar="APP=NAME", help="Of an application's answers; repeatable."
)
@click.option("--app", help="Call the application of all records so.")
@click.option("--ask", "url", metavar="URL", help="First let this OpenAI-compatible server answer SOURCES (one file).")
@click.option("--model", default="", help="With --ask: the model to ask for.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="With --ask.  [env: OPENAI_API_KEY]")
@click.option("--max-tokens", default=2048, show_default=True, help="With --ask: answers are cut off there.")
@click.option("--temperature", default=0.7, show_default=True, help="With --ask.")
@click.option("--concurrency", default=4, show_default=True, help="With --ask: requests at once.")
@click.option("--answers", type=click.Path(path_type=Path, dir_okay=False), help="With --ask: where answers are kept.")
def collect(
    sources: tuple[Path, ...],
    out: Path,
    window: int,
    tokenizer: Path | None,
    split_digits: bool,
    group_by: str,
    licences: tuple[str, ...],
    app: str | None,
    url: str | None,
    model: str,
    api_key: str | None,
    max_tokens: int,
    temperature: float,
    concurrency: int,
    answers: Path | None,
) -> None:
    """Turn prompt/answer records into a data set split by group.

    SOURCES are files or folders of: rows with `prompt` and `answer`; the gateway's traffic log (written with
    logging.prompts: full); OpenAI or ShareGPT conversations; rows of `input_prompt`, `output_prompt`,
    `number_of_output_tokens`, `remaining_tokens`. With --ask: one file of prompts.
    """
    modules = _modules("records", "collect", "ask")
    records, collecting = modules["records"], modules["collect"]
    paths = records.sources(sources)
    if url is not None:
        if len(paths) != 1 or not model:
            raise ConfigError("--ask: expected one file of prompts, and --model")
        kept = answers or out.with_name(out.name + ".answers.jsonl")
        with _Bar("asking") as told:
            modules["ask"].ask(
                url, paths[0], kept, model=model, api_key=api_key, max_tokens=max_tokens, temperature=temperature,
                concurrency=concurrency, done=told,
            )  # fmt: skip
        paths = [kept]
    if not paths:
        raise ConfigError("nothing to collect from: name files or folders")
    raws = [raw for path in paths for raw in records.read(path)]
    if app is not None:
        for raw in raws:
            raw.app = app
    tokens = collecting.Tokens(tokenizer, split_digits=split_digits)
    made = collecting.collect(
        raws, tokens, window=window, group_by=group_by, licences=_licences(licences), progress=click.echo
    )
    records.save(out, made, unit=tokens.name, window=window)
    counts = {name: sum(answer.split == name for answer in made) for name in records.SPLITS}
    groups = len({answer.group for answer in made})
    pairs = sum(len(answer.cuts) for answer in made)
    click.echo(
        f"{out}: {len(made)} answers ({', '.join(f'{n} {name}' for name, n in counts.items())}) in {groups} groups,"
        f" {pairs} pairs, {sum(not answer.complete for answer in made)} cut off; tokens of {tokens.name}"
    )


def _licences(given: Iterable[str]) -> dict[str, str]:
    made = {}
    for item in given:
        app, equals, name = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--licence: expected APP=NAME, got {item!r}")
        made[app] = name
    return made


@cli.command()
@click.argument("data", nargs=-1, required=True, type=_EXISTING)
@click.option(
    "--encoder",
    required=True,
    help="A folder with encoder.onnx, made before; or a folder or hub id for AutoModel, exported into OUT first.",
)
@click.option("--out", required=True, type=_FOLDER, help="The run: an interrupted one goes on where it was.")
@click.option("--without", multiple=True, metavar="APP", help="Leave this application out; repeatable.")
@click.option("--pooling", type=click.Choice(["cls", "mean", "last"]), default="cls", show_default=True)
@click.option("--max-tokens", default=256, show_default=True, help="Longest text the encoder reads.")
@click.option("--encoder-licence", default="unknown", help="Of the encoder's weights, for the manifest.")
@click.option("--int8/--no-int8", default=True, show_default=True, help="Quantise an encoder exported here.")
@click.option(
    "--architecture", type=click.Choice(["encode-once", "elis-paper"]), default="encode-once", show_default=True
)
@click.option("--learner", type=click.Choice(["trees", "network"]), help="Default: trees; elis-paper is a network.")
@click.option(
    "--loss",
    help="Default: log-l1; elis-paper: mse. Others: l1, huber, log-huber, log-mse, listmle, pairwise, quantiles.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--rounds", type=int, help="Trees, or epochs, at most. Default: 600 trees, 60 epochs.")
@click.option("--patience", type=int, help="Rounds without improvement before it stops. Default: 40 trees, 6 epochs.")
@click.option(
    "--rate", type=float, help="Learning rate. Default: 0.08 for trees, 0.001 for networks, 0.0003 for elis-paper."
)
@click.option("--batch", default=256, show_default=True, help="Pairs per step of a network.")
@click.option("--identity", is_flag=True, help="Let the head learn the served models by name.")
@click.option(
    "--pairs", type=int, help="Train on so many pairs drawn at random: encoding them is what elis-paper costs."
)
@click.option("--threads", default=1, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path, dir_okay=False), help="Of embeddings; default: beside OUT.")
def train(
    data: tuple[Path, ...],
    encoder: str,
    out: Path,
    without: tuple[str, ...],
    pooling: Any,
    max_tokens: int,
    encoder_licence: str,
    int8: bool,
    architecture: Any,
    learner: Any,
    loss: str | None,
    seed: int,
    rounds: int | None,
    patience: int | None,
    rate: float | None,
    batch: int,
    identity: bool,
    pairs: int | None,
    threads: int,
    cache: Path | None,
) -> None:
    """Train a head on frozen embeddings of a data set made by `collect`."""
    modules = _modules("records", "encode", "train")
    encode, training = modules["encode"], modules["train"]
    learner = learner or ("network" if architecture == "elis-paper" else "trees")
    trees = learner == "trees"
    options = training.Options(
        architecture=architecture,
        learner=learner,
        loss=loss or ("mse" if architecture == "elis-paper" else "log-l1"),
        seed=seed,
        rounds=rounds or (600 if trees else 60),
        patience=patience or (40 if trees else 6),
        rate=rate or (0.08 if trees else 0.0003 if architecture == "elis-paper" else 0.001),
        batch=batch,
        identity=identity,
        pairs=pairs,
        threads=threads,
    )
    options.check()
    whole = modules["records"].load(data)
    whole.answers = [answer for answer in whole.answers if answer.app not in without]
    folder = Path(encoder)
    if not (folder / encode.ENCODER).exists():
        folder = out / "encoder"
        if not (folder / encode.ENCODER).exists():
            click.echo(f"exporting the encoder {encoder}")
            spec = encode.export_encoder(
                encoder, folder, pooling=pooling, max_tokens=max_tokens, licence=encoder_licence, quantize=int8
            )
            click.echo(f"{folder}: smallest cosine to the training framework's vectors {spec.parity:.4f}")
    run = training.train(
        whole, folder, out, options, cache=cache or out.parent / "embeddings.sqlite", progress=_progress, say=click.echo
    )
    best = next(row for row in run.history if row["round"] == run.best)
    click.echo(
        f"{out}: best after {run.best} rounds: validation {best['validation']:.4f}, tau {best['tau']:.3f};"
        f" {run.seconds:.0f} s; next: elis-gateway predictor export {out} --out FOLDER"
    )


@cli.command()
@click.argument("data", type=_EXISTING)
@click.argument("models", nargs=-1)
@click.option("--out", required=True, type=_FOLDER, help="For evaluation.json, evaluation.md and plots.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--app", "apps", multiple=True, help="Only this application (source) of the data; repeatable.")
@click.option("--after", multiple=True, type=int, help="Also after so many answers of the served model; repeatable.")
@click.option("--mixed", is_flag=True, help="With --after: one server in front of all models and applications.")
@click.option("--unseen", multiple=True, metavar="APP", help="With --mixed: this one asked nothing before; repeatable.")
@click.option("--limit", type=int, help="Judge by so many answers, drawn by group.")
@click.option("--cut", type=int, help="Let encoders read so many tokens only.")
@click.option("--samples", default=200, show_default=True, help="Of the bootstrap, by group.")
@click.option("--seed", default=0, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path, dir_okay=False), help="Of embeddings.")
def evaluate(
    data: Path,
    models: tuple[str, ...],
    out: Path,
    split: str,
    apps: tuple[str, ...],
    after: tuple[int, ...],
    mixed: bool,
    unseen: tuple[str, ...],
    limit: int | None,
    cut: int | None,
    samples: int,
    seed: int,
    cache: Path | None,
) -> None:
    """Judge model folders (or shipped ones' names) beside what they have to beat: means, history, trees on counters."""
    modules = _modules("records", "evaluate")
    judged, said, truth = modules["evaluate"].evaluate(
        modules["records"].load([data]),
        [_folder(name) for name in models],
        split=split,
        apps=apps,
        after=after,
        by_app=mixed,
        unseen=unseen,
        cache=cache,
        max_tokens=cut,
        limit=limit,
        samples=samples,
        seed=seed,
        progress=_progress,
        say=click.echo,
    )
    modules["evaluate"].write(judged, said, truth, out)
    click.echo(judged.markdown())


@cli.command()
@click.argument("source", type=_EXISTING)
@click.option("--out", required=True, type=_FOLDER, help="The model folder.")
@click.option("--name", help="Default: the folder's name.")
@click.option(
    "--int8/--no-int8", default=None, help="Quantise the head. Default: elis-paper's, which is 27 MB without."
)
@click.option("--evaluation", type=_EXISTING, help="An evaluation.json whose figures go into the manifest.")
@click.option("--tokenizer", help="For a checkpoint: folder or hub id of the BGE model it was trained from.")
@click.option("--max-tokens", default=512, show_default=True, help="For a checkpoint: longest text it reads.")
def export(
    source: Path,
    out: Path,
    name: str | None,
    int8: bool | None,
    evaluation: Path | None,
    tokenizer: str | None,
    max_tokens: int,
) -> None:
    """Make a model folder of a training run, or of a checkpoint with `model_state_dict`.

    Refuses where ONNX and the training framework disagree. The encoder lies beside the folder, so that retraining
    replaces only the small head.
    """
    exporting = _modules("export")["export"]
    called = name or out.name
    if source.is_file():
        if tokenizer is None:
            raise ConfigError("a checkpoint holds no tokenizer: name the BGE folder or hub id with --tokenizer")
        exporting.export_checkpoint(
            source, out, tokenizer=tokenizer, name=called, max_tokens=max_tokens, int8=bool(int8)
        )
    else:
        metrics = exporting.figures_of(evaluation, called) if evaluation is not None else None
        exporting.export_run(source, out, name=called, int8=int8, metrics=metrics)
    click.echo(_describe(out))


@cli.command()
@click.argument("folder", required=False)
def show(folder: str | None) -> None:
    """Print a model folder's manifest and figures, after checking its files.

    FOLDER may also be a shipped one's name, as in the configuration. Default: the one in use by default.
    """
    click.echo(_describe(_folder(folder)))


def _folder(name: str | None) -> Path:
    from elis_gateway.predictor.manifest import folder_of

    return folder_of(name)


def _describe(folder: Path) -> str:
    """Needs nothing that an extra brings."""
    from onnx_export.show import describe

    return describe(folder)


def _modules(*names: str) -> dict[str, Any]:
    """The package's modules, or the pip command that brings what they import."""
    from importlib import import_module

    try:
        return {name: import_module(f"onnx_export.{name}") for name in names}
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("elis_gateway", "onnx_export"):
            raise
        raise MissingExtra("train", "elis-gateway predictor") from error


def _progress(items: list[Any]) -> Iterable[Any]:
    """A progress bar over ``items``; silent where there are none, or no terminal."""
    if not items:
        return
    with click.progressbar(items, show_pos=True, show_eta=True) as bar:
        yield from bar


class _Bar:
    """A progress bar that is told how far it is."""

    def __init__(self, label: str) -> None:
        self._bar: Any = click.progressbar(length=0, label=label, show_pos=True)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.__enter__()
        return self._told

    def __exit__(self, *raised: Any) -> None:
        self._bar.__exit__(*raised)

    def _told(self, done: int, of: int) -> None:
        self._bar.length = of
        self._bar.update(done - self._bar.pos)
