"""A model folder, ready to run: tokenizer, encoder, head, projection. Nothing else in the server knows onnxruntime.

Knows: onnxruntime sessions, tokenizers, which device runs what. Never: jobs, asyncio, the scheduler, learning.

The encoder runs in the batcher's worker thread, on CUDA where that is wanted and there; the head is so small (some ten
microseconds) that it runs on the CPU, wherever it is called. One thread per session unless told otherwise: on the
machine that also runs the event loop, two are worse than one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isfinite, log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from elis_gateway.errors import ConfigError, MissingExtra
from elis_gateway.predictor import features
from elis_gateway.predictor.manifest import Encoder, Head, Manifest, load, locate

try:
    import onnxruntime
    import tokenizers
    from onnxruntime.capi import onnxruntime_pybind11_state as state
except ModuleNotFoundError as error:
    raise MissingExtra("cpu", f"the predictor `bge` ({error.name})") from None

__all__ = ["Device", "Floats", "Model", "ModelError"]

Device = Literal["auto", "cpu", "cuda"]
Floats = npt.NDArray[np.float32]

ModelError: tuple[type[Exception], ...] = (
    ValueError,
    state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
    state.NotImplemented, state.RuntimeException, state.EPFail,
)  # fmt: skip
"""What running a model may raise: onnxruntime's errors, which have no common ancestor but Exception, and our own."""

_log = logging.getLogger("elis_gateway.predictor")
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Model:
    """One model folder, checked and loaded. Its methods may be called from any thread."""

    def __init__(self, folder: Path, *, device: Device = "cpu", threads: int = 1) -> None:
        """Checks hashes, opens the sessions and runs them once. Raises ConfigError naming the file that is wrong."""
        self.folder = folder
        self.manifest: Manifest = load(folder)
        encoder, head = self.manifest.encoder, self.manifest.head
        self.paper = self.manifest.architecture == "elis-paper"
        self._tokenizer = _tokenizer(locate(folder, encoder.tokenizer))
        self._encoder, self.device = _open(locate(folder, encoder), device, threads)
        self._head, _ = _open(locate(folder, head), "cpu", 1)
        self._mean, self._components = self._projection()
        self.features = 0 if self.paper else len(features.FEATURES)
        self.reduced = len(self._components)
        self._check(encoder, head)

    @property
    def layout(self) -> str:
        """What the learner's inputs mean under this model: its regression fits another one that says the same."""
        projection = self.manifest.projection
        return f"{self.manifest.features_version}:{projection.sha256[:16] if projection else ''}"

    # ---- running ------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[tuple[str, str]]) -> Floats:
        """One vector per (prompt, answer so far): pooled, of length 1. ``encode-once`` reads no answers."""
        encoder = self.manifest.encoder
        rows = [self._ids(prompt, answer) for prompt, answer in texts]
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        [vectors] = self._encoder.run(["embedding"], {"input_ids": ids, "attention_mask": mask})
        if vectors.shape != (len(rows), encoder.hidden) or not np.isfinite(vectors).all():
            raise ValueError(f"encoder: expected {len(rows)} finite vectors of {encoder.hidden}, got {vectors.shape}")
        return vectors  # type: ignore[no-any-return, unused-ignore]

    def head(self, embeddings: Floats, rows: Floats, models: Sequence[str]) -> list[float]:
        """Natural logs of the remaining training tokens, one per row. An embedding of zeros: not there yet. ``rows``:
        the features, where the head takes some; ``models``: who is served."""
        feed: dict[str, Any] = {}
        for name in self.manifest.head.inputs:
            if name == "embedding":
                feed[name] = embeddings
            elif name == "features":
                feed[name] = rows
            else:
                feed[name] = np.array([self.manifest.model_index(model) for model in models], dtype=np.int64)
        said: list[float] = self._head.run(None, feed)[0].reshape(-1).tolist()
        if len(said) != len(embeddings) or not all(map(isfinite, said)):
            raise ValueError(f"head: expected {len(embeddings)} finite numbers")
        if self.manifest.head.output == "remaining":
            said = [log(max(each, 1.0)) for each in said]
        return said

    def reduce(self, embedding: Floats) -> npt.NDArray[np.float64]:
        """The projection of one embedding that the learner's regression reads."""
        reduced: npt.NDArray[np.float64] = self._components @ (embedding - self._mean)
        return reduced

    # ---- loading ------------------------------------------------------------------------------------------------

    def _ids(self, prompt: str, answer: str) -> list[int]:
        encoder = self.manifest.encoder
        said = self._tokenize(features.prompt_text(prompt))
        if not self.paper:
            return features.prompt_ids(said, encoder.max_tokens, prefix=encoder.prefix, suffix=encoder.suffix)
        return features.paper_ids(
            said,
            self._tokenize(features.answer_text(answer)),
            encoder.max_tokens,
            prefix=encoder.prefix,
            separator=encoder.separator,
            suffix=encoder.suffix,
        )

    def _tokenize(self, text: str) -> list[int]:
        # A lone surrogate, which JSON can carry, is no text that can be tokenized.
        text = text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
        return self._tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def _projection(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        part, hidden = self.manifest.projection, self.manifest.encoder.hidden
        if part is None:
            return np.zeros(hidden), np.zeros((0, hidden))
        path = locate(self.folder, part)
        try:
            rows = np.load(path, allow_pickle=False).astype(np.float64)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
        if rows.ndim != 2 or len(rows) < 1 or rows.shape[1] != hidden or not np.isfinite(rows).all():
            raise ConfigError(f"{path}: expected finite rows of {hidden} numbers, got shape {rows.shape}")
        return rows[0], rows[1:]

    def _check(self, encoder: Encoder, head: Head) -> None:
        """Run everything once: what cannot work must not be found out by a job."""
        for session, part, wanted in (
            (self._encoder, encoder, {"input_ids", "attention_mask"}),
            (self._head, head, set(head.inputs)),
        ):
            found = {each.name for each in session.get_inputs()}
            if found != wanted:
                raise ConfigError(
                    f"{locate(self.folder, part)}: expected inputs {sorted(wanted)}, found {sorted(found)}"
                )
        try:
            vectors = self.encode([("Say hello.", "Hello"), ("", "")])
            rows = np.zeros((2, self.features), dtype=np.float32)
            self.head(np.zeros_like(vectors), rows, ["", ""])
            self.head(vectors[:1], rows[:1], [""])
        except ModelError as error:
            raise ConfigError(f"{self.folder}: does not run: {str(error)[:300]}") from None


def _tokenizer(path: Path) -> Any:
    try:
        made = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception for a bad file)
        raise ConfigError(f"{path}: not a tokenizer: {str(error)[:200]}") from None
    made.no_truncation()
    made.no_padding()
    return made


def _open(path: Path, device: Device, threads: int) -> tuple[Any, str]:
    """A session, and the device it runs on."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wants_cuda = device != "cpu" and _CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not wants_cuda:
        _log.warning("onnxruntime has no CUDA here (pip install 'elis-gateway[gpu]'): the encoder runs on the CPU")
    providers = [_CUDA, _CPU] if wants_cuda else [_CPU]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except ModelError as error:
        if not wants_cuda:
            raise ConfigError(f"{path}: onnxruntime cannot load it: {str(error)[:300]}") from None
        _log.warning("CUDA cannot be used (%s): the encoder runs on the CPU", str(error)[:200])
        return _open(path, "cpu", threads)
    on_cuda = _CUDA in session.get_providers()
    if wants_cuda and not on_cuda:
        _log.warning("CUDA cannot be used (onnxruntime fell back): the encoder runs on the CPU")
    return session, "cuda" if on_cuda else "cpu"
