"""Gradient-boosted trees as a head: LightGBM's ensemble written as one ONNX node. Knows: both dump formats.

The conversion is ours: it needs no further package, and thresholds are rounded *down* to float32, so that comparing
float32 features in ONNX decides as LightGBM does on the same numbers (rounding to nearest flips equal values).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

__all__ = ["ensemble"]


def ensemble(booster: Any, input_name: str, output_name: str) -> onnx.NodeProto:
    """A ``TreeEnsembleRegressor`` node: float32 [n, features] in, float32 [n, 1] out, the sum over the trees.

    ``booster``: a lightgbm.Booster without categorical splits. Raises ValueError where a split is of another kind.
    """
    made: dict[str, Any] = {
        name: []
        for name in (
            "nodes_treeids", "nodes_nodeids", "nodes_featureids", "nodes_modes", "nodes_values", "nodes_truenodeids",
            "nodes_falsenodeids", "nodes_missing_value_tracks_true", "target_treeids", "target_nodeids", "target_ids",
            "target_weights",
        )
    }  # fmt: skip
    for number, tree in enumerate(booster.dump_model()["tree_info"]):
        _Tree(number, made).add(tree["tree_structure"])
    return helper.make_node(
        "TreeEnsembleRegressor",
        [input_name],
        [output_name],
        domain="ai.onnx.ml",
        n_targets=1,
        aggregate_function="SUM",
        post_transform="NONE",
        **made,
    )


class _Tree:
    def __init__(self, number: int, made: dict[str, Any]) -> None:
        self._number = number
        self._made = made
        self._next = 0

    def add(self, node: dict[str, Any]) -> int:
        """The node and all below it; its id."""
        made, own = self._made, self._next
        self._next += 1
        leaf = "leaf_value" in node
        if not leaf and node["decision_type"] != "<=":
            raise ValueError(f"cannot write a split of kind {node['decision_type']!r} to ONNX")
        made["nodes_treeids"].append(self._number)
        made["nodes_nodeids"].append(own)
        made["nodes_modes"].append("LEAF" if leaf else "BRANCH_LEQ")
        made["nodes_featureids"].append(0 if leaf else node["split_feature"])
        made["nodes_values"].append(0.0 if leaf else _down(node["threshold"]))
        made["nodes_missing_value_tracks_true"].append(0)
        at = len(made["nodes_truenodeids"])
        made["nodes_truenodeids"].append(0)
        made["nodes_falsenodeids"].append(0)
        if leaf:
            made["target_treeids"].append(self._number)
            made["target_nodeids"].append(own)
            made["target_ids"].append(0)
            made["target_weights"].append(float(node["leaf_value"]))
        else:
            made["nodes_truenodeids"][at] = self.add(node["left_child"])
            made["nodes_falsenodeids"][at] = self.add(node["right_child"])
        return own


def _down(threshold: float) -> float:
    """The largest float32 that is not above ``threshold``."""
    near = np.float32(threshold)
    return float(np.nextafter(near, np.float32(-np.inf))) if float(near) > threshold else float(near)
