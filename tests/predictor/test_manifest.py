"""A model folder is checked before anybody uses it: round trips, and every way in which it can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import features, manifest


def folder(root: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A model folder whose files are no models: a manifest does not look into them."""
    encoder, head = root / "encoder", root / "mine"
    for path, content in (
        (encoder / "encoder.onnx", b"encoder"),
        (encoder / "tokenizer.json", b"{}"),
        (head / "head.onnx", b"head"),
        (head / "projection.npy", b"projection"),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    data: dict[str, Any] = {
        "schema_version": manifest.SCHEMA,
        "name": "mine",
        "architecture": "encode-once",
        "encoder": {
            "file": "../encoder/encoder.onnx",
            "sha256": manifest.digest(encoder / "encoder.onnx"),
            "tokenizer": {
                "file": "../encoder/tokenizer.json",
                "sha256": manifest.digest(encoder / "tokenizer.json"),
            },
            "prefix": [101],
            "separator": [102],
            "suffix": [102],
            "max_tokens": 256,
            "pooling": "cls",
            "hidden": 384,
            "source": "bge-small-en-v1.5",
            "licence": "MIT",
            "quantized": True,
        },
        "head": {
            "file": "head.onnx",
            "sha256": manifest.digest(head / "head.onnx"),
            "inputs": ["embedding", "features", "model"],
            "output": "log_remaining",
            "unit": "SmolLM2",
            "quantized": False,
        },
        "projection": {"file": "projection.npy", "sha256": manifest.digest(head / "projection.npy")},
        "features_version": features.VERSION,
        "window": 50,
        "models": ["a", "b"],
        "sources": [{"name": "own", "licence": "Apache-2.0", "answers": 480}],
        "metrics": {"tau": 0.4},
        "created": "2026-01-01",
        "versions": {"torch": "2.13.0"},
    }
    if change is not None:
        change(data)
    (head / manifest.FILE).write_text(json.dumps(data), encoding="utf-8")
    return head


def test_a_sound_folder_is_read_and_says_what_it_holds(tmp_path: Path) -> None:
    made = manifest.load(folder(tmp_path))
    assert made.architecture == "encode-once"
    assert made.encoder.max_tokens == 256
    assert [made.model_index(name) for name in ("a", "b", "never seen")] == [1, 2, 0]
    assert manifest.locate(tmp_path / "mine", made.encoder) == (tmp_path / "encoder" / "encoder.onnx").resolve()
    again = manifest.Manifest.model_validate_json(made.model_dump_json())
    assert again == made


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            data = data[parent]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("schema_version", 2, "schema_version"),
        ("architecture", "transformer", "architecture"),
        ("features_version", features.VERSION + 1, "retrain the head"),
        ("features_version", None, "features_version"),
        ("models", [], "models"),
        ("head.inputs", ["features"], "head.inputs"),
        ("head.output", "seconds", "head.output"),
        ("head.file", "other.onnx", "other.onnx"),
        ("head.sha256", "0" * 64, "not the file"),
        ("head.sha256", "short", "head.sha256"),
        ("encoder.hidden", 0, "encoder.hidden"),
        ("encoder.file", "../../outside.onnx", "outside"),
        ("encoder.file", "/etc/passwd", "outside"),
        ("encoder.tokenizer.sha256", "f" * 64, "tokenizer.json"),
        ("metrics", {"tau": "good"}, "metrics.tau"),
        ("surprise", 1, "surprise"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, path: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        manifest.load(folder(tmp_path, _set(path, value)))
    assert str(tmp_path) in str(caught.value)


def test_an_elis_paper_head_takes_the_embedding_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedding"):
        manifest.load(folder(tmp_path, _set("architecture", "elis-paper")))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / manifest.FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        manifest.load(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        manifest.load(tmp_path / "nowhere")


def test_a_file_changed_behind_the_manifests_back(tmp_path: Path) -> None:
    made = folder(tmp_path)
    (tmp_path / "encoder" / "encoder.onnx").write_bytes(b"poisoned")
    with pytest.raises(ConfigError, match=r"encoder\.onnx: not the file"):
        manifest.load(made)
