"""A model folder of a few kilobytes, built on the spot: words have vectors, heads are sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from elis_gateway.predictor import features
from elis_gateway.predictor.manifest import digest

HIDDEN = 4
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "short", "long", "hello", "tale")
SHORT, LONG = 40.0, 800.0


def build(root: Path, *, paper: bool = False, bias: float = 5.0, name: str = "tiny", **manifest: Any) -> Path:
    """A folder under ``root`` beside its encoder. The first dimension of an embedding says how many "long" there were
    among the words, the second how many "short"; the head answers e^(bias + 2 x (first - second)) tokens."""
    (root / "encoder").mkdir(parents=True, exist_ok=True)
    folder = root / ("elis-paper" if paper else "encode-once")
    folder.mkdir(exist_ok=True)
    encoder, tokenizer = root / "encoder" / "encoder.onnx", root / "encoder" / "tokenizer.json"
    onnx.save(_encoder(), str(encoder))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tokenizer))
    onnx.save(_head(paper, bias), str(folder / "head.onnx"))
    np.save(folder / "projection.npy", np.vstack([np.zeros(HIDDEN), np.eye(HIDDEN)[:2]]).astype(np.float32))
    described: dict[str, Any] = {
        "schema_version": 1,
        "name": name,
        "architecture": "elis-paper" if paper else "encode-once",
        "encoder": {
            "file": "../encoder/encoder.onnx",
            "sha256": digest(encoder),
            "tokenizer": {"file": "../encoder/tokenizer.json", "sha256": digest(tokenizer)},
            "prefix": [1],
            "separator": [2],
            "suffix": [2],
            "max_tokens": 32,
            "pooling": "mean",
            "hidden": HIDDEN,
            "source": "made up",
            "licence": "none",
            "quantized": False,
        },
        "head": {
            "file": "head.onnx",
            "sha256": digest(folder / "head.onnx"),
            "inputs": ["embedding"] if paper else ["embedding", "features"],
            "output": "remaining" if paper else "log_remaining",
            "unit": "words",
            "quantized": False,
        },
        "projection": None if paper else {"file": "projection.npy", "sha256": digest(folder / "projection.npy")},
        "features_version": None if paper else features.VERSION,
        "window": 50,
        "models": [],
        "sources": [],
        "metrics": {},
        "created": "2026-01-01",
        "versions": {},
    }
    (folder / "manifest.json").write_text(json.dumps({**described, **manifest}))
    return folder


def _encoder() -> onnx.ModelProto:
    table = np.full((len(WORDS), HIDDEN), 0.05, dtype=np.float32)
    table[WORDS.index("long")] = (1.0, 0.0, 0.0, 0.0)
    table[WORDS.index("short")] = (0.0, 1.0, 0.0, 0.0)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["vectors", "wide"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "tokens"], ["sums"], keepdims=0),
        helper.make_node("LpNormalization", ["sums"], ["embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", HIDDEN])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([2]), "last"),
            numpy_helper.from_array(np.array([1]), "tokens"),
        ],
    )
    return _model(graph)


def _head(paper: bool, bias: float) -> onnx.ModelProto:
    weights = np.array([[2.0], [-2.0], [0.0], [0.0]], dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["embedding", "weights"], ["products"]),
        helper.make_node("Squeeze", ["products", "last"], ["flat"]),
        helper.make_node("Add", ["flat", "bias"], ["plain"]),
    ]
    inputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", HIDDEN])]
    constants = [
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.array([1]), "last"),
        numpy_helper.from_array(np.array(bias, dtype=np.float32), "bias"),
    ]
    if paper:
        nodes.append(helper.make_node("Exp", ["plain"], ["said"]))
    else:
        size = len(features.FEATURES)
        inputs.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", size]))
        nodes += [
            helper.make_node("ReduceSum", ["features", "last"], ["counted"], keepdims=0),
            helper.make_node("Mul", ["counted", "nothing"], ["silent"]),
            helper.make_node("Add", ["plain", "silent"], ["said"]),
        ]
        constants.append(numpy_helper.from_array(np.array(0.0, dtype=np.float32), "nothing"))
    return _model(
        helper.make_graph(
            nodes, "head", inputs, [helper.make_tensor_value_info("said", TensorProto.FLOAT, ["n"])], constants
        )
    )


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
