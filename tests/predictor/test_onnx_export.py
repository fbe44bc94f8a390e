"""Training to serving: the same features, parity, refusals, round trips. Tiny encoders and data, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("transformers", reason="needs the extra [train]")

from elis_gateway.errors import ConfigError  # noqa: E402
from elis_gateway.predictor import features, manifest  # noqa: E402
from onnx_export import encode, evaluate, export, graphs, networks, pairs, records, show, train  # noqa: E402
from onnx_export.records import Answer  # noqa: E402

pytestmark = pytest.mark.timeout(600)  # importing torch and transformers takes minutes on a crowded machine

WORDS = ("bread", "glacier", "train", "river", "piano", "lamp", "stone", "cloud", "tiger", "paper", "green", "seven")
SHARED = Path(__file__).parents[3] / "shared"


def bert(root: Path) -> Path:
    """A BERT of two layers, with a tokenizer that knows our words, as an ordinary model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    folder = root / "bert"
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def answers(count: int = 120) -> list[Answer]:
    """Answers whose length hangs on the prompt's number and first word."""
    rng = random.Random(0)
    made = []
    for at in range(count):
        items = rng.randint(1, 12)
        first = rng.choice(WORDS)
        prompt = f"{first} {rng.choice(WORDS)}: give me {items} tips, number {at}"
        text = "".join(f"{n}. {first} {' '.join(rng.choices(WORDS, k=8))}.\n" for n in range(1, items + 1))
        tokens = 20 * items
        size = len(text)
        cuts = [(k, round(size * k / tokens)) for k in range(0, tokens, 50)]
        split = ("train", "train", "train", "validation", "test")[at % 5]
        made.append(
            Answer(prompt, text, f"m{at % 2}", "app", "chat", "MIT", f"g{at}", split, tokens, at % 17 != 0, cuts)
        )
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One encoder and one data set."""
    root = tmp_path_factory.mktemp("predictor")
    encoder = root / "models" / "encoder"
    spec = encode.export_encoder(str(bert(root)), encoder, max_tokens=32, licence="MIT", quantize=False)
    data = root / "data.jsonl.gz"
    records.save(data, answers(), unit="words", window=50)
    whole = records.load([data])
    return {"root": root, "encoder": encoder, "data": whole, "spec": spec}


OPTIONS = {
    "trees": train.Options(rounds=40, patience=30, components=4, projection=8, identity=True),
    "network": train.Options(learner="network", loss="quantiles", rounds=2, patience=3, rate=1e-3, projection=8),
    "paper": train.Options(
        architecture="elis-paper", learner="network", loss="mse", rounds=1, pairs=64, rate=3e-4, projection=0
    ),
}


def trained(made: dict[str, Any], kind: str) -> Path:
    """A run of one kind, trained when first asked for."""
    out: Path = made["root"] / kind
    train.train(made["data"], made["encoder"], out, OPTIONS[kind], cache=made["root"] / "cache.sqlite")
    return out


def test_an_encoder_reads_its_special_ids_off_the_tokenizer(made: dict[str, Any]) -> None:
    spec = made["spec"]
    assert (spec.prefix, spec.separator, spec.suffix) == ((2,), (3,), (3,))
    assert spec.parity == pytest.approx(1.0, abs=1e-4)
    assert encode.Spec.read(made["encoder"]) == spec


def test_equal_prompts_are_encoded_once_and_a_second_run_encodes_nothing(made: dict[str, Any], tmp_path: Path) -> None:
    texts = encode.Texts.of(made["encoder"], tmp_path / "cache.sqlite")
    counted: list[int] = []

    def progress(todo: list[Any]) -> list[Any]:
        counted.append(len(todo))
        return todo

    rows = texts.prompts(["bread", "river", "bread"], progress)
    assert np.array_equal(rows[0], rows[2])
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0, abs=1e-5)
    texts.prompts(["bread", "river"], progress)
    assert counted == [2, 0]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_ignores_padding(pooling: encode.Pooling) -> None:
    hidden = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    alone = encode.pool(hidden[:1, :3], mask[:1, :3], pooling)
    assert torch.allclose(encode.pool(hidden, mask, pooling)[0], alone[0], atol=1e-6)


def test_a_small_decoder_can_be_the_encoder(tmp_path: Path) -> None:
    """The ranker of arXiv 2408.15792 is a small OPT: last-token pooling."""
    from transformers import AutoTokenizer, OPTConfig, OPTModel

    source = bert(tmp_path)
    model = OPTModel(
        OPTConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
            max_position_embeddings=64, word_embed_proj_dim=16, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    spec = encode.export_encoder(
        "opt", tmp_path / "out", pooling="last", max_tokens=32, quantize=False, model=model,
        tokenizer=AutoTokenizer.from_pretrained(source),
    )  # fmt: skip
    assert (spec.pooling, spec.hidden) == ("last", 16)


def test_an_encoder_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = encode._run
    monkeypatch.setattr(encode, "_run", lambda path, ids: real(path, ids) + 0.01)
    with pytest.raises(ConfigError, match="differ by"):
        encode.export_encoder(str(bert(tmp_path)), tmp_path / "out", max_tokens=32, quantize=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_folder_says_what_its_tokens_are_to_the_gateway(made: dict[str, Any]) -> None:
    """Whichever tokenizer counted: a head that speaks the engine's own tokens is not to be converted once more."""
    from elis_gateway.predictor.units import training_tokens

    sheet = export.export_run(trained(made, "trees"), made["root"] / "models" / "units", name="units")
    rows = [a for a in made["data"].split("train") if a.complete]
    wanted = sum(a.tokens for a in rows) / sum(training_tokens(a.answer) for a in rows)
    assert abs(wanted - 1.0) > 0.05
    assert sheet.head.unit_ratio == {"latin": pytest.approx(wanted, rel=0.05)}


@pytest.mark.parametrize("kind", ["trees", "network", "paper"])
def test_a_run_becomes_a_model_folder_that_says_the_same(made: dict[str, Any], kind: str) -> None:
    root = made["root"]
    target = root / "models" / kind
    sheet = export.export_run(trained(made, kind), target, name=kind, int8=False, metrics={"tau": 0.5})
    assert manifest.load(target) == sheet
    assert sheet.encoder.file == "../encoder/encoder.onnx"
    assert sheet.sources == (manifest.Source(name="app", licence="MIT", answers=sheet.sources[0].answers),)
    assert sheet.models == (("m0", "m1") if kind == "trees" else ())
    rows = made["data"].split("test")
    some = pairs.make(rows)
    scorer = evaluate.Scorer(target)
    said = scorer(rows, some, scorer.embeddings(rows, some))
    assert (said >= 1).all()
    assert np.isfinite(said).all()
    text = show.describe(target)
    assert kind in text
    assert "files intact" in text


def test_the_trees_in_onnx_decide_as_lightgbm_does(made: dict[str, Any]) -> None:
    import lightgbm

    run = trained(made, "trees")
    target = made["root"] / "models" / "parity"
    export.export_run(run, target, name="parity")
    rows = made["data"].split("validation")
    some = pairs.make(rows)
    scorer = evaluate.Scorer(target)
    embedding = scorer.embeddings(rows, some)
    lens = train.read_lens(run, 4)
    index = np.array([scorer.manifest.model_index(a.model) for a in rows])[some.answer]
    grown = lightgbm.Booster(model_file=str(run / train.TREES))
    wanted = grown.predict(graphs.inputs_of(lens, embedding, some.features, index, 2))
    assert np.log(scorer(rows, some, embedding)) == pytest.approx(np.maximum(wanted, 0.0), abs=1e-4)
    # Without an embedding the head still answers, and otherwise.
    absent = scorer(rows, some, np.zeros_like(embedding))
    assert np.isfinite(absent).all()


def test_training_and_serving_call_the_same_features(made: dict[str, Any]) -> None:
    """One definition: what a pair was trained on is what the gateway makes of that job at that moment."""
    rows = made["data"].split("train")[:20]
    some = pairs.make(rows)
    for at in range(len(some)):
        answer = rows[some.answer[at]]
        attained = int(some.attained[at])
        text = answer.answer[: dict(answer.cuts)[attained]]
        assert some.features[at] == pytest.approx(features.features(answer.prompt, text, attained), rel=1e-6)
        assert some.remaining[at] == answer.tokens - attained


def test_a_head_that_disagrees_is_refused_and_leaves_nothing(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="differ by"):
        export.export_run(trained(made, "network"), tmp_path / "m" / "mine", name="mine", tolerance=-1.0)
    assert not list((tmp_path / "m" / "mine").glob("*.onnx"))
    with pytest.raises(ConfigError, match="int8 differs"):
        export.export_run(trained(made, "paper"), tmp_path / "m" / "mine", name="mine", int8=True, tolerance_int8=-1.0)
    assert not list((tmp_path / "m" / "mine").glob("*.onnx"))


def test_int8_makes_the_papers_head_a_quarter_as_large(made: dict[str, Any]) -> None:
    target = made["root"] / "models" / "small"
    sheet = export.export_run(trained(made, "paper"), target, name="small")
    assert sheet.head.quantized
    assert sheet.head.output == "remaining"
    assert 5e6 < (target / "head.onnx").stat().st_size < 8e6
    with pytest.raises(ConfigError, match="trees"):
        export.export_run(trained(made, "trees"), target, name="small", int8=True)


def test_an_interrupted_run_goes_on_and_other_options_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at(number: int) -> Any:
        def progress(items: list[Any]) -> Any:
            for at, item in enumerate(items):
                if isinstance(item, int) and at == number:
                    raise Stop
                yield item

        return progress

    options = train.Options(learner="network", loss="listmle", rounds=4, patience=9, rate=1e-3)
    with pytest.raises(Stop):
        train.train(made["data"], made["encoder"], tmp_path, options, progress=stop_at(2))
    assert [row["round"] for row in train.Run.load(tmp_path).history] == [1, 2]
    with pytest.raises(ConfigError, match="not complete"):
        export.export_run(tmp_path, tmp_path / "model", name="model")
    run = train.train(made["data"], made["encoder"], tmp_path, options)
    assert [row["round"] for row in run.history] == [1, 2, 3, 4]
    assert run.done
    assert (tmp_path / "curve.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="other options"):
        train.train(made["data"], made["encoder"], tmp_path, train.Options(seed=1))
    # Next month's answers: the old run is not what they teach.
    newer = records.DataSet(answers(125), "words", 50)
    with pytest.raises(ConfigError, match="other answers"):
        train.train(newer, made["encoder"], tmp_path, options)


def test_trees_that_were_interrupted_grow_on(made: dict[str, Any], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(items: list[Any]) -> Any:
        for item in items:
            if items == list(range(1, 61)) and item == 38:
                raise Stop
            yield item

    options = train.Options(rounds=60, patience=60, components=4, projection=8)
    with pytest.raises(Stop):
        train.train(made["data"], made["encoder"], tmp_path, options, progress=progress)
    before = train.Run.load(tmp_path)
    assert [row["round"] for row in before.history] == [5, 10, 15, 20, 25]
    run = train.train(made["data"], made["encoder"], tmp_path, options)
    assert run.history[:5] == before.history
    assert [row["round"] for row in run.history] == list(range(5, 61, 5))
    assert run.best > 25
    grown = (tmp_path / train.TREES).read_text()
    assert grown.count("\nTree=") == run.best
    assert export.export_run(tmp_path, tmp_path / "model", name="model").metrics["parity"] < 1e-3


@pytest.mark.parametrize("loss", networks.LOSSES)
def test_every_loss_falls_when_the_order_gets_right(loss: str) -> None:
    remaining = torch.tensor([10.0, 40.0, 160.0, 640.0] * 16)
    right = remaining.log() if loss in (*networks.ON_LOG, *networks.ORDERING) else remaining / networks.SCALE
    if loss == "quantiles":
        right = right[:, None].repeat(1, len(networks.LEVELS))
    weight = torch.ones(len(remaining))
    good = networks.loss(loss, right, remaining, weight)
    assert good < networks.loss(loss, right.flip(0), remaining, weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (train.Options(loss="cosine"), "loss"),
        (train.Options(architecture="elis-paper"), "network"),
        (train.Options(loss="listmle"), "trees cannot"),
        (train.Options(architecture="elis-paper", learner="network", loss="mse", identity=True), "identity"),
    ],
)
def test_options_that_do_not_go_together(options: train.Options, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options.check()


def test_the_paper_s_head_has_eight_linear_layers() -> None:
    head = networks.PaperHead(384)
    linear = [layer for layer in head.layers if isinstance(layer, torch.nn.Linear)]
    shapes = [(layer.in_features, layer.out_features) for layer in linear]
    assert shapes == [(384, 1024), *[(1024, 1024)] * 6, (1024, 1)]


def test_the_public_checkpoint_is_accepted(tmp_path: Path) -> None:
    from transformers import BertModel

    source = bert(tmp_path)
    model = BertModel.from_pretrained(source, attn_implementation="eager").eval()
    layers = [torch.nn.Linear(16, 24), *(torch.nn.Linear(24, 24) for _ in range(6)), torch.nn.Linear(24, 1)]
    weights = {f"bge_model.{key}": value for key, value in model.state_dict().items()}
    for at, layer in enumerate(layers):
        weights |= {f"predictor.{2 * at}.{key}": value for key, value in layer.state_dict().items()}
    torch.save({"model_state_dict": weights, "epoch": 3}, tmp_path / "best.pt")
    sheet = export.export_checkpoint(
        tmp_path / "best.pt", tmp_path / "models" / "theirs", tokenizer=str(source), name="theirs", max_tokens=32
    )
    assert (sheet.architecture, sheet.encoder.pooling, sheet.head.output) == ("elis-paper", "mean", "remaining")
    scorer = evaluate.Scorer(tmp_path / "models" / "theirs")
    rows = answers(6)
    some = pairs.make(rows, (0,))
    got = scorer(rows, some, scorer.embeddings(rows, some))
    tokenizer = scorer.texts._tokenizer
    for at, answer in enumerate(rows):
        ids = [2, *tokenizer.encode(answer.prompt, add_special_tokens=False).ids, 3, 3]
        with torch.no_grad():
            value = model(torch.tensor([ids])).last_hidden_state.mean(1)
            for number, layer in enumerate(layers):
                value = layer(value) if number == 7 else torch.relu(layer(value))
        assert got[at] == pytest.approx(max(float(value), 1.0), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("predictor.2.weight"), "predictor.0, .2"),
        (lambda w: w.pop("bge_model.embeddings.LayerNorm.weight"), "missing"),
        (lambda w: w.clear(), "predictor"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    from transformers import BertModel

    source = bert(tmp_path)
    weights = {f"bge_model.{k}": v for k, v in BertModel.from_pretrained(source).state_dict().items()}
    for at in range(8):
        layer = torch.nn.Linear(16 if at == 0 else 8, 1 if at == 7 else 8)
        weights |= {f"predictor.{2 * at}.{key}": value for key, value in layer.state_dict().items()}
    change(weights)
    torch.save({"model_state_dict": weights}, tmp_path / "bad.pt")
    with pytest.raises(ConfigError, match=says):
        export.export_checkpoint(tmp_path / "bad.pt", tmp_path / "out", tokenizer=str(source), name="bad")
    (tmp_path / "none.pt").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match=r"none\.pt"):
        export.export_checkpoint(tmp_path / "none.pt", tmp_path / "out", tokenizer=str(source), name="bad")


def test_evaluate_judges_everything_on_the_same_pairs(made: dict[str, Any], tmp_path: Path) -> None:
    root = made["root"]
    target = root / "models" / "judged"
    export.export_run(trained(made, "trees"), target, name="judged")
    judged, said, truth = evaluate.evaluate(made["data"], [target], after=[10], samples=20)
    assert set(said) >= {"global mean", "mean by model", "history", "trees on counters", "judged", "judged after 10"}
    assert all(len(values) == len(truth) for values in said.values())
    assert judged.pooled["global mean"]["tau"] < judged.pooled["judged"]["tau"]
    low, high = judged.pooled["judged"]["intervals"]["tau"]
    assert low <= judged.pooled["judged"]["tau"] + 0.05
    assert high >= judged.pooled["judged"]["tau"] - 0.05
    # Every figure of every table says how sure it is, and all groups are not far from that.
    for name in ("tau", "tau_within", "lead", "mae", "rmse", "r2", "pairwise", "bias"):
        low, high = judged.pooled["judged"]["intervals"][name]
        assert low - (high - low) < judged.pooled["judged"][name] < high + (high - low)
    for table in (judged.windows, judged.models, judged.apps, judged.domains):
        for cell in table["judged"].values():
            for name in ("tau", "mae"):
                low, high = cell["intervals"][name]
                assert low - (high - low) < cell[name] < high + (high - low)
    evaluate.write(judged, said, truth, tmp_path)
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["data"]["split"] == "test"
    assert set(export.figures_of(tmp_path / "evaluation.json", "judged")) >= {"tau", "history_tau", "mae"}
    with pytest.raises(ConfigError, match="no figures"):
        export.figures_of(tmp_path / "evaluation.json", "somebody")
    assert "| judged |" in (tmp_path / "evaluation.md").read_text()
    assert (tmp_path / "evaluation.png").exists()


def test_shuffled_estimates_lose_their_order(made: dict[str, Any]) -> None:
    """A figure that does not vanish when what it measures is broken measures something else."""
    from onnx_export.figures import pairwise_accuracy, tau

    rng = np.random.default_rng(0)
    truth = rng.lognormal(5, 1, 2000)
    said = truth * rng.lognormal(0, 0.5, 2000)
    assert tau(truth, said) > 0.6
    assert pairwise_accuracy(truth, said) == pytest.approx(0.5 + tau(truth, said) / 2, abs=1e-3)
    assert abs(tau(truth, rng.permutation(said))) < 0.05
    assert tau(truth, np.ones(2000)) == 0.0
    assert pairwise_accuracy(truth, np.ones(2000)) == 0.5


def test_shipped_and_shared_prompts_take_the_same_encoder(made: dict[str, Any]) -> None:
    """The real BGE folder, where it is: its special ids, and that Korean is cut like anything else."""
    source = SHARED / "models" / "bge-small-en-v1.5"
    if not source.exists():
        pytest.skip("needs ../shared/models")
    from transformers import AutoTokenizer

    assert encode._special(AutoTokenizer.from_pretrained(source)) == ((101,), (102,), (102,))


def test_three_commands_from_answers_to_a_model_folder(made: dict[str, Any], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from elis_gateway.cli import cli

    def run(*arguments: object, status: int = 0) -> str:
        done = CliRunner().invoke(cli, ["predictor", *map(str, arguments)])
        assert done.exit_code == status, done.output
        return done.output

    rows = [{"prompt": a.prompt, "answer": a.answer, "model": a.model, "app": "own", "n_tokens": a.tokens,
             "group": a.group} for a in answers(80)]  # fmt: skip
    source = tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = tmp_path / "set.jsonl.gz"
    assert "80 groups" in run("collect", source, "--out", data, "--licence", "own=MIT")
    encoder = made["encoder"]
    told = run("train", data, "--encoder", encoder, "--out", tmp_path / "run", "--rounds", 10, "--patience", 10)
    assert "best after" in told
    assert "complete" in run("train", data, "--encoder", encoder, "--out", tmp_path / "run", "--rounds", 10,
                             "--patience", 10)  # fmt: skip
    shown = run("export", tmp_path / "run", "--out", tmp_path / "mine")
    assert "own (MIT," in shown
    assert run("show", tmp_path / "mine") == shown
    assert "| mine |" in run("evaluate", data, tmp_path / "mine", "--out", tmp_path / "report", "--samples", 10)
    run("export", tmp_path / "run", "--out", tmp_path / "mine", "--evaluation",
        tmp_path / "report" / "evaluation.json")  # fmt: skip
    assert "history_tau" in run("show", tmp_path / "mine")
    assert "expected APP=NAME" in run("collect", source, "--out", data, "--licence", "MIT", status=2)
    assert "expected one file of prompts" in run("collect", "--ask", "http://127.0.0.1:1", "--out", data, status=2)
    assert "nothing to collect" in run("collect", "--out", data, status=2)
