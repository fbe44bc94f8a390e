"""The models inside the package: sound, small, of permissive sources, and sensible on prompts nobody trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elis_gateway.predictor import features, manifest

MODELS = Path(manifest.__file__).parent / "models"


@pytest.mark.parametrize("name", ["encode-once", "elis-paper"])
def test_a_shipped_folder_is_sound_and_of_sources_that_may_be_sold(name: str) -> None:
    sheet = manifest.load(MODELS / name)
    assert sheet.architecture == name
    assert sheet.encoder.licence == "MIT"
    assert sheet.sources
    assert {"tau", "tau_within", "mae", "r2", "history_tau", "history_mae"} <= set(sheet.metrics)
    for source in sheet.sources:
        assert {part.strip() for part in source.licence.split(",")} <= {"Apache-2.0", "MIT"}, source


def test_everything_shipped_stays_under_45_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*")) < 45_000_000


def test_the_default_head_orders_what_anybody_would() -> None:
    """Told the prompt, it expects less of one word than of an essay, and less of a list's end than of its beginning."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [cpu]")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [cpu]")
    folder = MODELS / "encode-once"
    sheet = manifest.load(folder)
    encoder, head = (
        onnxruntime.InferenceSession(str(manifest.locate(folder, part)), providers=["CPUExecutionProvider"])
        for part in (sheet.encoder, sheet.head)
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(manifest.locate(folder, sheet.encoder.tokenizer)))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def said(prompt: str, answer: str = "", attained: int = 0, *, encoded: bool = True) -> float:
        spec = sheet.encoder
        ids = tokenizer.encode(features.prompt_text(prompt), add_special_tokens=False).ids
        row = np.array([features.prompt_ids(ids, spec.max_tokens, prefix=spec.prefix, suffix=spec.suffix)])
        (vector,) = encoder.run(None, {"input_ids": row, "attention_mask": np.ones_like(row)})
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-3)
        seen = np.array([features.features(prompt, answer, attained)], dtype=np.float32)
        (log,) = head.run(None, {"embedding": vector if encoded else np.zeros_like(vector), "features": seen})
        return float(np.exp(log[0]))

    for encoded in (True, False):
        short = said("What is the capital of France? Answer in one word.", encoded=encoded)
        long = said("Write a detailed essay about the history of France, in 1000 words.", encoded=encoded)
        assert 1 < short < 0.5 * long < 3000
    prompt = "Give me ten tips for baking bread"
    items = [f"{n}. Knead the dough well, and then let it rest for a while before you go on.\n" for n in range(1, 11)]
    assert said(prompt, "".join(items[:9]), 180) < said(prompt, "".join(items[:2]), 40)
    assert 10 < said("한국의 역사를 자세히 설명해 주세요.") < 5000
