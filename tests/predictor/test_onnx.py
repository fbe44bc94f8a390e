"""Model folders: what runs, and what is refused before anybody relies on it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import features, onnx
from elis_gateway.predictor.onnx import Model
from tests.predictor import tiny


def test_runs(tmp_path: Path) -> None:
    model = Model(tiny.build(tmp_path))
    long, short, empty = model.encode([("long long tale", ""), ("short", ""), ("", "")])
    assert np.linalg.norm(long) == pytest.approx(1.0, abs=1e-5)
    assert long[0] > long[1]
    assert short[1] > short[0]
    rows = [features.features("long tale", "", 0), features.features("short", "", 0)]
    said = model.head(np.stack([long, short]), rows, "any model")
    assert said[0] > said[1]
    assert model.reduce(long).shape == (2,)
    assert np.isfinite(empty).all()


def test_batches_change_nothing(tmp_path: Path) -> None:
    """Rows of different lengths are padded; the padding must not be seen."""
    model = Model(tiny.build(tmp_path))
    texts = [("long", ""), ("short tale hello long long hello tale", ""), ("", "")]
    together = model.encode(texts)
    alone = np.concatenate([model.encode([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5


def test_text_that_is_none_is_encoded_all_the_same(tmp_path: Path) -> None:
    model = Model(tiny.build(tmp_path))
    assert model.encode([("\ud800 long \udfff", "")]).shape == (1, tiny.HIDDEN)


def test_the_published_method_reads_prompt_and_answer(tmp_path: Path) -> None:
    model = Model(tiny.build(tmp_path, paper=True))
    before, after = model.encode([("long", ""), ("long", "short short short")])
    assert after[1] > before[1]
    assert np.exp(model.head(after[None, :], [[]], "m")[0]) < np.exp(model.head(before[None, :], [[]], "m")[0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path)
    (folder / "head.onnx").unlink()
    with pytest.raises(ConfigError, match=r"head\.onnx"):
        Model(folder)


def test_a_file_that_changed_is_named(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path)
    path = folder / "head.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ConfigError, match=r"head\.onnx: not the file"):
        Model(folder)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path)
    (folder / "head.onnx").write_bytes(b"not a model")
    folder = _described_again(folder)
    with pytest.raises(ConfigError, match=r"head\.onnx: onnxruntime cannot load it"):
        Model(folder)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """The head of the published method where one that reads counters is described."""
    folder, paper = tiny.build(tmp_path), tiny.build(tmp_path, paper=True)
    (folder / "head.onnx").write_bytes((paper / "head.onnx").read_bytes())
    with pytest.raises(ConfigError, match="expected inputs"):
        Model(_described_again(folder))


def test_a_projection_of_another_encoder_is_refused(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path)
    np.save(folder / "projection.npy", np.zeros((3, tiny.HIDDEN + 1), dtype=np.float32))
    with pytest.raises(ConfigError, match=r"projection\.npy: expected finite rows of 4"):
        Model(_described_again(folder))


def test_cuda_where_there_is_none_is_the_cpu_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if "CUDAExecutionProvider" in onnx.onnxruntime.get_available_providers():
        pytest.skip("there is one")
    with caplog.at_level(logging.WARNING):
        model = Model(tiny.build(tmp_path), device="cuda")
    assert model.device == "cpu"
    assert caplog.text.count("no CUDA here") == 1


def test_cuda_is_chosen_where_it_is_and_the_cpu_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[list[str]] = []
    real = onnx.onnxruntime.InferenceSession

    class Session:
        def __init__(self, path: str, options: object, *, providers: list[str]) -> None:
            asked.append(providers)
            if "CUDAExecutionProvider" in providers and broken:
                raise onnx.state.EPFail("no driver")
            self._real = real(path, options, providers=["CPUExecutionProvider"])
            self._providers = providers
            self.run, self.get_inputs = self._real.run, self._real.get_inputs

        def get_providers(self) -> list[str]:
            return self._providers

    monkeypatch.setattr(onnx.onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(
        onnx.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    folder = tiny.build(tmp_path)
    broken = False
    assert Model(folder, device="auto").device == "cuda"
    assert asked == [["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]]  # the head: never
    assert Model(folder, device="cpu").device == "cpu"
    broken = True
    assert Model(folder, device="auto").device == "cpu"
    assert "no driver" in caplog.text


def _described_again(folder: Path) -> Path:
    """The manifest brought up to date with files that were exchanged."""
    import json

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for part in (manifest["head"], manifest["projection"]):
        if part is not None:
            part["sha256"] = tiny.digest(folder / part["file"])
    path.write_text(json.dumps(manifest))
    return folder
