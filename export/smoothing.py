"""Outlier channels of activations, taken out before quantization (SmoothQuant, Xiao et al. 2022).

A few channels of a transformer are ten times as large as the others, and with one scale a tensor they leave
few INT8 steps to the rest. Dividing each channel j by s_j, and multiplying row j of the weights by it, leaves
the product as it is and spreads the difficulty (https://arxiv.org/abs/2211.10438, formula 4):

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from distill.export.observation import products
from distill.export.surgery import replace_nodes
from numpy.typing import NDArray
from onnx import helper

ALPHA = 0.9  # weights that are rounded together bear much of the difficulty
OUTLIERS = 2.5  # a tensor has some where its largest channel is so many times the median one


def smoothing_scales(ranges: NDArray[np.float32], matrices: Iterable[NDArray[Any]]) -> NDArray[np.float32]:
    """s_j of the formula, shape (channels,), with a geometric mean of 1.

    Args:
        ranges: least and largest x_j, shape (2, channels).
        matrices: all that multiply x, each (channels, any).
    """
    maxima = np.abs(ranges).max(axis=0)
    weights = np.max([np.abs(matrix).max(axis=1) for matrix in matrices], axis=0)
    scales = np.maximum(maxima, 1e-5) ** ALPHA / np.maximum(weights, 1e-5) ** (1 - ALPHA)
    return np.asarray(scales / np.exp(np.log(scales).mean()), dtype=np.float32)


def smooth(model: onnx.ModelProto, ranges: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto | None:
    """Copy a graph with a Mul before the products of tensors that have outliers; None where none has.

    Args:
        model: an fp32 graph.
        ranges: its `channel_ranges`.
    """
    maxima = {name: np.abs(found).max(axis=0) for name, found in ranges.items()}
    wanted = {name for name, found in maxima.items() if found.max() > OUTLIERS * np.median(found)}
    if not wanted:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    readers: dict[str, list[tuple[onnx.NodeProto, NDArray[Any]]]] = defaultdict(list)
    for node, matrix in products(copy):
        if node.input[0] in wanted:
            readers[node.input[0]].append((node, matrix))
    before: dict[str, onnx.NodeProto] = {}
    constants = {}
    for name, users in readers.items():
        scales = smoothing_scales(ranges[name], [matrix for _, matrix in users])
        constants[f"{name}_smoothing"] = 1 / scales
        before[users[0][0].output[0]] = helper.make_node(
            "Mul", [name, f"{name}_smoothing"], [f"{name}_smooth"]
        )
        for node, matrix in users:
            constants[f"{node.output[0]}_weight"] = matrix * scales[:, None]
            node.input[0], node.input[1] = f"{name}_smooth", f"{node.output[0]}_weight"
    nodes = [
        one
        for node in copy.graph.node
        for one in ([before[node.output[0]], node] if node.output[0] in before else [node])
    ]
    replace_nodes(copy.graph, nodes, constants)
    return copy
