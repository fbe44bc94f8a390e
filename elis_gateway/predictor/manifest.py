"""A model folder's description: what is in it, which version, and whether it is what it says it is.

A folder holds ``manifest.json``, a head and perhaps a projection; the encoder may lie beside it (``../encoder/``), so
that several folders share one. Knows: the manifest's shape and how a folder is checked before anybody uses it. Never:
training, onnxruntime, numpy.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import features

__all__ = ["FILE", "SCHEMA", "Encoder", "File", "Head", "Manifest", "Source", "digest", "folder_of", "load", "locate"]

FILE = "manifest.json"
SCHEMA = 1
"""Raised when a field changes its meaning or goes."""

_Positive = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    """Frozen; what it does not know it refuses, so that a newer manifest is not half understood."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class File(_Part):
    """One file of the model and its SHA-256, in hexadecimal digits."""

    file: str
    """Relative to the folder; may lead to a neighbour folder (``../encoder/encoder.onnx``) and no further."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Encoder(File):
    """Token ids in, one vector out: inputs ``input_ids`` and ``attention_mask`` (int64 [n, tokens]), output
    ``embedding`` (float32 [n, hidden]), pooled and of length 1."""

    tokenizer: File
    """A ``tokenizer.json``, used without its special tokens: they are named here."""
    prefix: tuple[int, ...]
    """Ids before the text, as [CLS]."""
    separator: tuple[int, ...]
    """Ids between prompt and answer."""
    suffix: tuple[int, ...]
    """Ids behind the text, as [SEP]."""
    max_tokens: Annotated[int, Field(ge=8, le=8192)]
    """Longest sequence, special ids included; ``features.prompt_ids`` and ``paper_ids`` cut to it."""
    pooling: Literal["cls", "mean", "last"]
    hidden: _Positive
    source: str
    """Whose weights these are."""
    licence: str
    quantized: bool


class Head(File):
    """The part that is retrained. Inputs: ``embedding`` (float32 [n, hidden]; zeros: not there yet); for
    ``encode-once`` also ``features`` (float32 [n, features]) and, where models are listed, ``model`` (int64 [n])."""

    inputs: tuple[Literal["embedding", "features", "model"], ...]
    output: Literal["log_remaining", "remaining"]
    """Natural log of the remaining tokens, or their number; float32 [n]."""
    unit: str
    """The tokenizer whose tokens are counted."""
    unit_ratio: dict[str, Annotated[float, Field(gt=0)]] = {}
    """How many of them went to one of the tokens that the gateway works out from characters (``units``), by script, in
    the training data; 1 for scripts not named."""
    quantized: bool


class Source(_Part):
    """Data the head was trained on."""

    name: str
    licence: str
    answers: _Positive
    """Distinct answers; each gives a pair for every window it lasted."""


class Manifest(_Part):
    """``manifest.json``."""

    schema_version: Literal[1]
    name: Annotated[str, Field(min_length=1)]
    architecture: Literal["encode-once", "elis-paper"]
    """``encode-once``: the prompt, once per job. ``elis-paper``: prompt and partial answer, at every window."""
    encoder: Encoder
    head: Head
    projection: File | None
    """float32 [1 + d, hidden] as ``.npy``: the mean of training embeddings, then d principal components."""
    features_version: int | None
    """The version of ``features`` the head was trained with; None: it takes none."""
    window: _Positive
    """Answer tokens between two of the pairs it was trained on."""
    models: tuple[str, ...]
    """Served models whose identity the head knows, from index 1; 0: any other. Empty: it knows none."""
    sources: tuple[Source, ...]
    metrics: dict[str, float]
    """Figures of ``predictor evaluate`` on held-out groups, by name."""
    created: str
    versions: dict[str, str]
    """Of the software that made it."""

    def model_index(self, model: str) -> int:
        """What to feed as ``model``."""
        try:
            return self.models.index(model) + 1
        except ValueError:
            return 0


def folder_of(path: str | Path | None) -> Path:
    """A model folder by path, or by the name of a shipped one; None: the default."""
    name = "encode-once" if path is None else str(path)
    if path is None or (Path(name).name == name and not Path(name).exists()):
        shipped = Path(str(files("elis_gateway.predictor"))) / "models" / name
        if path is None or shipped.is_dir():
            return shipped
    return Path(name)


def load(folder: Path) -> Manifest:
    """Read and check a model folder: schema, features version, presence and hashes of its files.

    Raises ``ConfigError`` naming the file and what is wrong with it. Reads every file once: about 0.1 s for 45 MB.
    """
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from None
    _agree(path, manifest)
    for part in (manifest.encoder, manifest.encoder.tokenizer, manifest.head, manifest.projection):
        if part is not None:
            _intact(folder, part)
    return manifest


def locate(folder: Path, part: File) -> Path:
    """Where a file of the model lies. Raises ``ConfigError`` where that is outside the models' common folder."""
    root = folder.resolve().parent
    path = (folder / part.file).resolve()
    if Path(part.file).is_absolute() or not path.is_relative_to(root):
        raise ConfigError(f"{folder / FILE}: {part.file!r} lies outside {root}")
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _agree(path: Path, manifest: Manifest) -> None:
    """What the parts must say alike."""
    wants = manifest.head.inputs
    if "embedding" not in wants:
        raise ConfigError(f"{path}: head.inputs: expected `embedding` among them, got {list(wants)}")
    if manifest.architecture == "elis-paper" and wants != ("embedding",):
        raise ConfigError(f"{path}: head.inputs: elis-paper takes `embedding` alone, got {list(wants)}")
    if ("model" in wants) != bool(manifest.models):
        raise ConfigError(f"{path}: head.inputs: `model` is an input exactly where `models` lists some")
    if ("features" in wants) != (manifest.features_version is not None):
        raise ConfigError(f"{path}: head.inputs: `features` is an input exactly where `features_version` is set")
    if manifest.features_version not in (None, features.VERSION):
        raise ConfigError(
            f"{path}: features_version: trained with version {manifest.features_version}, this gateway makes version"
            f" {features.VERSION}: retrain the head (elis-gateway predictor train), or install the release it is for"
        )


def _intact(folder: Path, part: File) -> None:
    path = locate(folder, part)
    try:
        found = digest(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error} (named by {folder / FILE})") from None
    if found != part.sha256:
        raise ConfigError(
            f"{path}: not the file that {folder / FILE} describes: SHA-256 {found[:12]}…, expected {part.sha256[:12]}…"
        )


def _first(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])
