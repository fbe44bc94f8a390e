"""Text encoders: any ``AutoModel`` folder or hub id, pooled into one vector of length 1, and its ONNX export.

Knows: torch, transformers, onnxruntime. Texts are cut by ``elis_gateway.predictor.features``, so training sees the
token ids that serving will. Embeddings are kept on disk by encoder and token ids: a second run costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import features, manifest
from onnx_export.pairs import Floats

__all__ = ["ENCODER", "Pooling", "Session", "Spec", "Texts", "export_encoder", "export_module", "pool"]

Pooling = Literal["cls", "mean", "last"]
ENCODER = "encoder.json"
"""Beside an exported encoder: its ``Spec``, from which manifests are written."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a manifest says of an encoder, files apart."""

    source: str
    licence: str
    pooling: Pooling
    max_tokens: int
    hidden: int
    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    suffix: tuple[int, ...]
    quantized: bool
    parity: float
    """Smallest cosine between the exported encoder's vectors and the training framework's, on probe texts."""

    @classmethod
    def read(cls, folder: Path) -> Spec:
        """Of a folder written by ``export_encoder``. Raises ``ConfigError``."""
        try:
            data = json.loads((folder / ENCODER).read_text(encoding="utf-8"))
            return cls(**{**data, **{name: tuple(data[name]) for name in ("prefix", "separator", "suffix")}})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder / ENCODER}: {error}") from None


# ---- pooling ---------------------------------------------------------------------------------------------------


def pool(hidden: torch.Tensor, mask: torch.Tensor, how: Pooling, *, normalize: bool = True) -> torch.Tensor:
    """One vector (of length 1) per sequence; ``hidden`` [n, tokens, width], ``mask`` [n, tokens], padded at the end."""
    if how == "cls":
        vector = hidden[:, 0]
    elif how == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        vector = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
    else:
        last = mask.sum(1) - 1
        vector = hidden[torch.arange(hidden.shape[0]), last]
    return torch.nn.functional.normalize(vector, dim=-1) if normalize else vector


class _Pooled(torch.nn.Module):
    """What is exported: ids and mask in, vectors out; token types inside."""

    def __init__(self, model: torch.nn.Module, how: Pooling, normalize: bool) -> None:
        super().__init__()
        self.model = model
        self.how: Pooling = how
        self.normalize = normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool(hidden, attention_mask, self.how, normalize=self.normalize)


# ---- exporting -------------------------------------------------------------------------------------------------

_PROBES = (
    "Hello",
    "Write a Python function that reverses a string, and explain every line of it.",
    "What is the capital of France? Answer in one word.",
    "List ten things to remember when planning a school trip to the mountains in winter, each with a reason.",
    "한국의 수도는 어디인가요?",
    "Explain how a refrigerator works. " * 12,
)


def export_encoder(
    source: str,
    out: Path,
    *,
    pooling: Pooling = "cls",
    max_tokens: int = 256,
    licence: str = "unknown",
    quantize: bool = True,
    tolerance: float = 1e-4,
    tolerance_int8: float = 0.98,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    normalize: bool = True,
) -> Spec:
    """Write ``encoder.onnx``, ``tokenizer.json`` and ``encoder.json`` into ``out``.

    ``source``: a folder or hub id for ``AutoModel`` (``model`` and ``tokenizer`` instead, where they were made
    already). ``normalize`` False keeps the vectors' lengths, for heads trained so. ``tolerance``: largest difference of
    any value between ONNX in float32 and torch; ``tolerance_int8``: smallest cosine after quantisation. Raises
    ``ConfigError``, and leaves nothing behind, where they disagree more.
    """
    from transformers import AutoModel, AutoTokenizer

    with _quiet():
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source)
        if model is None:
            model = AutoModel.from_pretrained(source, attn_implementation="eager", dtype=torch.float32)
    prefix, separator, suffix = _special(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    work = out / "encoder.part"
    work.mkdir(exist_ok=True)
    try:
        tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))
        pooled = _Pooled(model, pooling, normalize).eval()
        ids = [
            features.prompt_ids(
                tokenizer(text, add_special_tokens=False)["input_ids"], max_tokens, prefix=prefix, suffix=suffix
            )
            for text in _PROBES
        ]
        with torch.no_grad():
            wanted = np.concatenate([pooled(*_batch([row])).numpy() for row in ids])
        file = work / "float32.onnx"
        sample = _batch([ids[0], ids[1]])
        export_module(
            pooled, sample, file, ["input_ids", "attention_mask"], ["embedding"], {"input_ids": 2, "attention_mask": 2}
        )
        got = _run(file, ids)
        worst = float(np.abs(got - wanted).max())
        if not worst <= tolerance:
            raise ConfigError(
                f"encoder {source}: ONNX and torch differ by {worst:.2g}, more than {tolerance:g}: not written"
            )
        parity = _cosine(got, wanted)
        if quantize:
            file, parity = _quantized(file, work, ids, wanted, tolerance_int8, source)
        spec = Spec(
            Path(source).name,  # of a folder its name, not where it lay
            licence, pooling, max_tokens, int(wanted.shape[1]), prefix, separator, suffix, quantize, round(parity, 5),
        )  # fmt: skip
        file.replace(out / "encoder.onnx")
        (work / "tokenizer.json").replace(out / "tokenizer.json")
        (out / ENCODER).write_text(json.dumps(asdict(spec), indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return spec


def export_module(
    module: torch.nn.Module,
    sample: Sequence[torch.Tensor],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    dynamic: dict[str, int],
) -> None:
    """Trace a module into ONNX with a free batch axis. ``dynamic``: of each input the axes that are free, from 0."""
    axes: dict[str, dict[int, str]] = {name: dict(enumerate(("n", "t")[:free])) for name, free in dynamic.items()}
    axes |= {name: {0: "n"} for name in outputs}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            tuple(sample),
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )


def quantize(source: Path, target: Path) -> None:
    """int8 weights, one scale per output channel, activations quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(
            str(prepared),
            str(target),
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        )
    prepared.unlink()


def _quantized(
    file: Path, work: Path, ids: Sequence[Sequence[int]], wanted: Floats, tolerance: float, source: str
) -> tuple[Path, float]:
    target = work / "int8.onnx"
    quantize(file, target)
    parity = _cosine(_run(target, ids), wanted)
    if not parity >= tolerance:
        raise ConfigError(
            f"encoder {source}: int8 vectors have a cosine of {parity:.4f} to float32's, less than {tolerance:g}:"
            " not written (--no-int8 keeps float32)"
        )
    return target, parity


def _special(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Ids before a text, between two, and behind: read off what the tokenizer makes of one word."""
    plain = list(tokenizer("hello", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("hello")["input_ids"])
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            suffix = tuple(whole[at + len(plain) :])
            return tuple(whole[:at]), suffix[:1], suffix
    raise ConfigError(f"the tokenizer makes {whole} of a word whose own ids are {plain}: no special ids to be read off")


def _run(path: Path, ids: Sequence[Sequence[int]]) -> Floats:
    session = Session(path)
    return np.concatenate([session(row) for row in ids])


def _cosine(one: Floats, other: Floats) -> float:
    sizes = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / np.maximum(sizes, 1e-12)).min())


def _batch(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    return ids, mask


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing and loading say much that nobody can act on."""
    from transformers.utils import logging as said

    root = logging.getLogger()
    before, bars, level = root.level, said.is_progress_bar_enabled(), said.get_verbosity()
    said.disable_progress_bar()
    said.set_verbosity_error()
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before)
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()


# ---- using an exported one -------------------------------------------------------------------------------------


class Session:
    """An exported encoder on one core."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, ids: Sequence[int]) -> Floats:
        """[1, hidden]"""
        row = np.array([ids], dtype=np.int64)
        return np.asarray(
            self._session.run(None, {"input_ids": row, "attention_mask": np.ones_like(row)})[0], dtype=np.float32
        )


class Texts:
    """Texts to vectors with an exported encoder, cached on disk."""

    def __init__(
        self, encoder: Path, tokenizer: Path, spec: Spec, cache: Path | None = None, *, max_tokens: int | None = None
    ) -> None:
        """``cache``: a file that keeps vectors. ``max_tokens``: cut shorter than the encoder allows."""
        self.spec = spec
        self.max_tokens = min(max_tokens or self.spec.max_tokens, self.spec.max_tokens)
        self._path = encoder
        self._session: Session | None = None
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._cache = cache
        self._key = manifest.digest(self._path).encode()

    @classmethod
    def of(cls, folder: Path, cache: Path | None = None) -> Texts:
        """With a folder of ``export_encoder``."""
        return cls(folder / "encoder.onnx", folder / "tokenizer.json", Spec.read(folder), cache)

    def prompts(self, prompts: Iterable[str], progress: Callable[[list[Any]], Iterable[Any]] = iter) -> Floats:
        """One row per prompt; equal prompts are encoded once."""
        spec = self.spec
        texts = [features.prompt_text(prompt) for prompt in prompts]
        rows = [
            features.prompt_ids(ids, self.max_tokens, prefix=spec.prefix, suffix=spec.suffix)
            for ids in self._ids(texts)
        ]
        return self._vectors(rows, progress)

    def windows(
        self, windows: Iterable[tuple[str, str]], progress: Callable[[list[Any]], Iterable[Any]] = iter
    ) -> Floats:
        """One row per (prompt, answer so far), in one sequence as the published method has it."""
        spec = self.spec
        both = list(windows)
        prompts = self._ids([features.prompt_text(prompt) for prompt, _ in both])
        answers = self._ids([features.answer_text(answer) for _, answer in both])
        rows = [
            features.paper_ids(
                prompt, answer, self.max_tokens, prefix=spec.prefix, separator=spec.separator, suffix=spec.suffix
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return self._vectors(rows, progress)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        unique = list(dict.fromkeys(texts))
        encoded = self._tokenizer.encode_batch(unique, add_special_tokens=False)
        ids = {text: row.ids for text, row in zip(unique, encoded, strict=True)}
        return [ids[text] for text in texts]

    def _vectors(self, rows: Sequence[Sequence[int]], progress: Callable[[list[Any]], Iterable[Any]]) -> Floats:
        names = [hashlib.sha256(self._key + np.array(row, dtype=np.int64).tobytes()).digest()[:16] for row in rows]
        wanted = dict(zip(names, rows, strict=True))
        known: dict[bytes, Floats] = {}
        with closing(_open(self._cache)) as store:
            for name in wanted:
                found = store.execute("SELECT vector FROM vectors WHERE name = ?", (name,)).fetchone()
                if found is not None:
                    known[name] = np.frombuffer(found[0], dtype=np.float32)
            missing = [name for name in wanted if name not in known]
            for done, name in enumerate(progress(missing), 1):
                if self._session is None:
                    self._session = Session(self._path)
                vector = self._session(wanted[name])[0]
                known[name] = vector
                store.execute("INSERT OR REPLACE INTO vectors VALUES (?, ?)", (name, vector.tobytes()))
                if done % 200 == 0:
                    store.commit()  # an interrupted run goes on from here
            store.commit()
        return np.stack([known[name] for name in names]) if names else np.zeros((0, self.spec.hidden), np.float32)


def _open(cache: Path | None) -> sqlite3.Connection:
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
    store = sqlite3.connect(":memory:" if cache is None else str(cache), timeout=60)
    store.execute("PRAGMA journal_mode = WAL")  # several runs may share it
    store.execute("CREATE TABLE IF NOT EXISTS vectors (name BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
    return store
