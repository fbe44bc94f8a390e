"""From a training run, or the public re-implementation's checkpoint, to a model folder that the gateway serves.

Writes nothing where ONNX and the training framework disagree beyond a stated tolerance. Knows: both sides. Never: the
serving code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from elis_gateway import __version__
from elis_gateway.errors import ConfigError
from elis_gateway.predictor import manifest
from elis_gateway.predictor.features import FEATURES
from onnx_export import graphs, networks, train
from onnx_export.encode import Spec, export_encoder, export_module, quantize
from onnx_export.train import Options, Run

__all__ = ["TOLERANCE", "TOLERANCE_INT8", "export_checkpoint", "export_run", "figures_of"]

TOLERANCE = 1e-3
"""Largest difference of a head in ONNX from the training framework's: of log tokens, or relative to tokens."""
TOLERANCE_INT8 = 0.05
"""The same, its mean, for a head whose weights are quantised to int8."""
_PROBES = 256


def export_run(
    out: Path,
    target: Path,
    *,
    name: str,
    int8: bool | None = None,
    metrics: Mapping[str, float] | None = None,
    created: str | None = None,
    tolerance: float = TOLERANCE,
    tolerance_int8: float = TOLERANCE_INT8,
) -> manifest.Manifest:
    """Write the model folder ``target`` of the run ``out``; its encoder must lie beside ``target`` or inside it, or is
    copied beside it as ``encoder``. ``int8``: of the head; None: where it is elis-paper's. Raises ``ConfigError``."""
    run = Run.load(out)
    if not run.done:
        raise ConfigError(f"{out}: the run is not complete: train again with the same options to go on with it")
    options = Options(**{key: value for key, value in run.options.items() if key != "key"})
    if int8 is None:
        int8 = options.architecture == "elis-paper"
    if int8 and options.learner == "trees":
        raise ConfigError("trees are compared, not multiplied: int8 does not apply to them")
    encoder = Path(run.encoder)
    spec = Spec.read(encoder)
    target.mkdir(parents=True, exist_ok=True)
    part = target / "head.part.onnx"
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(_PROBES, spec.hidden)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    embedding[::5] = 0.0
    features = np.abs(rng.normal(2.0, 2.0, size=(_PROBES, len(FEATURES)))).astype(np.float32)
    feed: dict[str, Any] = {"embedding": embedding}
    if options.architecture == "encode-once":
        feed["features"] = features
        if run.models:
            feed["model"] = rng.integers(0, len(run.models) + 1, _PROBES)
    if options.learner == "trees":
        wanted = _write_trees(out, run, options, feed, part)
    else:
        wanted = _write_network(out, run, options, spec, feed, part)
    quantized, worst = _checked(part, feed, wanted, options.architecture, int8, tolerance, tolerance_int8)
    beside = _beside(encoder, target)
    projection = None
    if options.architecture == "encode-once" and options.projection:
        with np.load(out / train.LENS) as lens:
            rows = np.concatenate([lens["mean"][None], lens["components"][: options.projection]])
        np.save(target / "projection.npy", rows.astype(np.float32))
        projection = manifest.File(file="projection.npy", sha256=manifest.digest(target / "projection.npy"))
    part.replace(target / "head.onnx")
    made = manifest.Manifest(
        schema_version=1,
        name=name,
        architecture=options.architecture,
        encoder=_encoder(beside, target, spec),
        head=manifest.Head(
            file="head.onnx",
            sha256=manifest.digest(target / "head.onnx"),
            inputs=tuple(feed),  # type: ignore[arg-type]
            output="remaining" if _says_tokens(options) else "log_remaining",
            unit=run.unit,
            unit_ratio=run.unit_ratio,
            quantized=quantized,
        ),
        projection=projection,
        features_version=run.features_version if "features" in feed else None,
        window=run.window,
        models=tuple(run.models),
        sources=tuple(manifest.Source(**source) for source in run.sources),
        metrics={"parity": worst, **(metrics or {})},
        created=created or datetime.now(UTC).strftime("%Y-%m-%d"),
        versions=_versions(),
    )
    (target / manifest.FILE).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest.load(target)


def _says_tokens(options: Options) -> bool:
    return options.loss in networks.ON_TOKENS


def _write_trees(out: Path, run: Run, options: Options, feed: dict[str, Any], part: Path) -> Any:
    import lightgbm

    booster = lightgbm.Booster(model_file=str(out / train.TREES))
    lens = train.read_lens(out, options.components)
    models = len(run.models)
    onnx.save(graphs.tree_head([booster], lens, len(FEATURES), models, scale=run.scale, shift=run.shift), part)
    rows = graphs.inputs_of(lens, feed["embedding"], feed["features"], feed.get("model"), models)
    return np.asarray(booster.predict(rows)) * run.scale + run.shift


def _write_network(out: Path, run: Run, options: Options, spec: Spec, feed: dict[str, Any], part: Path) -> Any:
    head = train.build(options, spec.hidden, len(run.models))
    head.load_state_dict(torch.load(out / train.NETWORK, weights_only=True))
    with torch.no_grad():
        head.scale.copy_(torch.tensor([run.scale, run.shift]))
    head.eval()
    return _trace(head, feed, part, "remaining" if _says_tokens(options) else "log_remaining")


def _trace(head: torch.nn.Module, feed: dict[str, Any], part: Path, output: str) -> Any:
    sample = [torch.from_numpy(value) for value in feed.values()]
    with torch.no_grad():
        wanted = head(*sample).numpy()
    export_module(head, [row[:3] for row in sample], part, list(feed), [output], dict.fromkeys(feed, 1))
    return wanted


def _checked(
    part: Path,
    feed: dict[str, Any],
    wanted: Any,
    architecture: str,
    int8: bool,
    tolerance: float,
    tolerance_int8: float,
) -> tuple[bool, float]:
    """Whether it was quantised, and how far ONNX is off. Raises ``ConfigError``, removing the file, where too far."""
    worst = float(_off(_answers(part, feed), wanted, architecture).max())
    if not worst <= tolerance:
        part.unlink()
        raise ConfigError(f"head: ONNX and the training framework differ by {worst:.2g}, more than {tolerance:g}")
    if not int8:
        return False, worst
    small = part.with_suffix(".int8.onnx")
    quantize(part, small)
    off = float(_off(_answers(small, feed), wanted, architecture).mean())
    if not off <= tolerance_int8:
        part.unlink()
        small.unlink()
        raise ConfigError(f"head: int8 differs by {off:.2g} in the mean, more than {tolerance_int8:g}: use --no-int8")
    small.replace(part)
    return True, off


def _answers(path: Path, feed: dict[str, Any]) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def _off(got: Any, wanted: Any, architecture: str) -> Any:
    if got.shape != wanted.shape:
        return np.array([np.inf])
    size = np.maximum(np.abs(wanted), 10.0) if architecture == "elis-paper" else 1.0
    off = np.abs(got - wanted) / size
    return np.where(np.isfinite(off), off, np.inf)


def _beside(encoder: Path, target: Path) -> Path:
    """The encoder's folder as ``target`` may name it: where it is, if that is near enough, or a copy."""
    if encoder.resolve().is_relative_to(target.resolve().parent):
        return encoder
    copy = target.parent / "encoder"
    if not (copy / "encoder.onnx").exists():
        shutil.copytree(encoder, copy, dirs_exist_ok=True)
    elif manifest.digest(copy / "encoder.onnx") != manifest.digest(encoder / "encoder.onnx"):
        raise ConfigError(f"{copy}: holds another encoder than the one the head was trained with ({encoder})")
    return copy


def _encoder(folder: Path, target: Path, spec: Spec) -> manifest.Encoder:
    def of(name: str) -> dict[str, str]:
        path = folder / name
        return {
            "file": os.path.relpath(path.resolve(), target.resolve()).replace(os.sep, "/"),
            "sha256": manifest.digest(path),
        }

    return manifest.Encoder(
        **of("encoder.onnx"),
        tokenizer=manifest.File(**of("tokenizer.json")),
        prefix=spec.prefix,
        separator=spec.separator,
        suffix=spec.suffix,
        max_tokens=spec.max_tokens,
        pooling=spec.pooling,
        hidden=spec.hidden,
        source=spec.source,
        licence=spec.licence,
        quantized=spec.quantized,
    )


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "transformers", "onnx", "onnxruntime", "lightgbm")}
    return {"elis-gateway": __version__, **found}


def figures_of(evaluation: Path, name: str) -> dict[str, float]:
    """What a manifest says of the model called ``name`` in an ``evaluation.json``. Raises ``ConfigError``."""
    try:
        pooled = json.loads(evaluation.read_text(encoding="utf-8"))["pooled"]
        return {
            f"{kind}{key}": float(pooled[estimator][key])
            for estimator, kind in ((name, ""), ("history", "history_"))
            for key in ("tau", "tau_within", "mae", "r2")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{evaluation}: no figures of {name!r}: {type(error).__name__}: {error}") from None


# ---- the public re-implementation's checkpoint -----------------------------------------------------------------


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    *,
    tokenizer: str,
    name: str,
    licence: str = "unknown",
    max_tokens: int = 512,
    int8: bool = False,
    tolerance: float = TOLERANCE,
) -> manifest.Manifest:
    """A model folder of a checkpoint with ``model_state_dict``: ``bge_model.*`` and ``predictor.{0,2,...,14}.*``.

    ``tokenizer``: folder or hub id of the BGE model it was trained from (its tokenizer; and its configuration, where it
    has one). Mean pooling. Only tensors are read from the file, never code. Raises ``ConfigError``."""
    from transformers import AutoTokenizer

    weights = _weights(checkpoint)
    head = _public_head(checkpoint, weights)
    encoder = target.parent / f"{target.name}-encoder"
    spec = export_encoder(
        tokenizer,
        encoder,
        pooling="mean",
        max_tokens=max_tokens,
        licence=licence,
        quantize=int8,
        model=_public_encoder(checkpoint, weights, tokenizer),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        normalize=False,
    )
    target.mkdir(parents=True, exist_ok=True)
    part = target / "head.part.onnx"
    feed = {"embedding": np.random.default_rng(0).normal(size=(_PROBES, spec.hidden)).astype(np.float32) * 0.5}
    wanted = _trace(head, feed, part, "remaining")
    quantized, worst = _checked(part, feed, wanted, "elis-paper", int8, tolerance, TOLERANCE_INT8)
    part.replace(target / "head.onnx")
    made = manifest.Manifest(
        schema_version=1,
        name=name,
        architecture="elis-paper",
        encoder=_encoder(encoder, target, spec),
        head=manifest.Head(
            file="head.onnx",
            sha256=manifest.digest(target / "head.onnx"),
            inputs=("embedding",),
            output="remaining",
            unit="not stated by the checkpoint",
            quantized=quantized,
        ),
        projection=None,
        features_version=None,
        window=50,
        models=(),
        sources=(),
        metrics={"parity": worst},
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions=_versions(),
    )
    (target / manifest.FILE).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest.load(target)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
        weights = whole["model_state_dict"]
        return {str(key).removeprefix("module."): value.float() for key, value in weights.items()}
    except Exception as error:  # noqa: BLE001 - torch raises whatever pickle, zip or the file made of it
        raise ConfigError(f"{path}: not a checkpoint with `model_state_dict`: {error}") from None


def _public_head(path: Path, weights: dict[str, torch.Tensor]) -> networks.PaperHead:
    numbers = sorted({int(found[1]) for key in weights if (found := re.match(r"predictor\.(\d+)\.weight$", key))})
    if numbers != list(range(0, 2 * len(numbers), 2)) or len(numbers) < 2:
        raise ConfigError(f"{path}: expected Linear layers predictor.0, .2, … .14, found {numbers}")
    width, hidden = weights["predictor.0.weight"].shape
    head = networks.PaperHead(hidden, width, len(numbers))
    own = {key.removeprefix("predictor."): value for key, value in weights.items() if key.startswith("predictor.")}
    try:
        head.layers.load_state_dict(own)
    except RuntimeError as error:
        raise ConfigError(f"{path}: predictor: {error}") from None
    with torch.no_grad():
        head.scale.copy_(torch.tensor([1.0, 0.0]))
    return head.eval()


def _public_encoder(path: Path, weights: dict[str, torch.Tensor], source: str) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    own = {key.removeprefix("bge_model."): value for key, value in weights.items() if key.startswith("bge_model.")}
    try:
        vocabulary, hidden = own["embeddings.word_embeddings.weight"].shape
        layers = 1 + max(int(found[1]) for key in own if (found := re.match(r"encoder\.layer\.(\d+)\.", key)))
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=_heads(source, hidden),
            intermediate_size=own["encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_position_embeddings=own["embeddings.position_embeddings.weight"].shape[0],
            type_vocab_size=own["embeddings.token_type_embeddings.weight"].shape[0],
        )
        config._attn_implementation = "eager"
        model = BertModel(config, add_pooling_layer=False)
        missing, surplus = model.load_state_dict(own, strict=False)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: bge_model: not a BERT: {error}") from None
    surplus = [key for key in surplus if not key.startswith("pooler.") and not key.endswith("position_ids")]
    if missing or surplus:
        raise ConfigError(f"{path}: bge_model: missing {missing[:3]}, not known {surplus[:3]}")
    return model


def _heads(source: str, hidden: int) -> int:
    """Attention heads are not to be seen in the weights: the configuration says, or BGE's habit."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(source).num_attention_heads)
    except (OSError, ValueError, AttributeError):
        return hidden // 32 if hidden == 384 else hidden // 64
