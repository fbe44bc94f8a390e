"""Heads as ONNX graphs, written node by node where no framework has to trace them. Knows: ONNX. Never: training.

A tree head reads ``embedding`` and ``features``. From the embedding it makes the centred principal components and the
scores of linear models on it, all zero where there is no embedding yet, and a mark that says so; the trees see these
behind the features. ``inputs_of`` does the same in numpy: training calls it, so both see the same columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_export.pairs import Floats
from onnx_export.trees import ensemble

__all__ = ["Lens", "inputs_of", "tree_head"]

OPSET = 17
IR_VERSION = 9


@dataclass(slots=True)
class Lens:
    """What a head makes of an embedding: row by row ``(embedding - mean) @ columns``, then a mark of presence."""

    mean: Floats
    """[hidden]"""
    columns: Floats
    """[hidden, d]: principal components, then linear scores."""

    def __call__(self, embedding: Floats) -> Floats:
        """[n, d + 1]; all zero for embeddings that are all zero."""
        here = (np.abs(embedding).sum(axis=1, keepdims=True) > 0).astype(np.float32)
        return np.concatenate([((embedding - self.mean) * here) @ self.columns, here], axis=1).astype(np.float32)


def inputs_of(lens: Lens, embedding: Floats, features: Floats, model: Any = None, models: int = 0) -> Floats:
    """The columns a tree head decides by: features, what the lens shows, and one column per served model known."""
    parts = [features, lens(embedding)]
    if models:
        parts.append((np.asarray(model)[:, None] == np.arange(1, models + 1)[None]).astype(np.float32))
    return np.concatenate(parts, axis=1).astype(np.float32)


def tree_head(
    boosters: list[Any], lens: Lens, n_features: int, models: int = 0, *, scale: float = 1.0, shift: float = 0.0
) -> onnx.ModelProto:
    """The mean of ``boosters`` as a head of ``encode-once``; ``scale`` and ``shift`` make its output of their own."""
    hidden = len(lens.mean)
    constants: dict[str, npt.NDArray[Any]] = {
        "mean": lens.mean.astype(np.float32),
        "columns": lens.columns.astype(np.float32),
        "zero": np.zeros(1, dtype=np.float32),
        "axis": np.array([1], dtype=np.int64),
        "share": np.array([scale / len(boosters)], dtype=np.float32),
        "shift": np.array([shift], dtype=np.float32),
    }
    nodes = [
        helper.make_node("Abs", ["embedding"], ["absolute"]),
        helper.make_node("ReduceSum", ["absolute", "axis"], ["size"], keepdims=1),
        helper.make_node("Greater", ["size", "zero"], ["present"]),
        helper.make_node("Cast", ["present"], ["here"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["embedding", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "here"], ["masked"]),
        helper.make_node("MatMul", ["masked", "columns"], ["seen"]),
    ]
    columns = ["features", "seen", "here"]
    inputs = [_value("embedding", TensorProto.FLOAT, hidden), _value("features", TensorProto.FLOAT, n_features)]
    if models:
        constants["names"] = np.arange(1, models + 1, dtype=np.int64)
        nodes += [
            helper.make_node("Unsqueeze", ["model", "axis"], ["model_column"]),
            helper.make_node("Equal", ["model_column", "names"], ["is_model"]),
            helper.make_node("Cast", ["is_model"], ["identity"], to=TensorProto.FLOAT),
        ]
        columns.append("identity")
        inputs.append(helper.make_tensor_value_info("model", TensorProto.INT64, ["n"]))
    nodes.append(helper.make_node("Concat", columns, ["row"], axis=1))
    for number, booster in enumerate(boosters):
        nodes.append(ensemble(booster, "row", f"trees_{number}"))
    nodes += [
        helper.make_node("Sum", [f"trees_{number}" for number in range(len(boosters))], ["sum"]),
        helper.make_node("Mul", ["sum", "share"], ["average"]),
        helper.make_node("Add", ["average", "shift"], ["shifted"]),
        helper.make_node("Squeeze", ["shifted", "axis"], ["log_remaining"]),
    ]
    graph = helper.make_graph(
        nodes,
        "encode-once",
        inputs,
        [helper.make_tensor_value_info("log_remaining", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 3)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model


def _value(name: str, kind: int, width: int) -> Any:
    return helper.make_tensor_value_info(name, kind, ["n", width])
