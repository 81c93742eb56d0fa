"""The files for the CUDA provider: FP16 with fused operators, and INT8 of which every node has a CUDA kernel.

What ONNX Runtime's dynamic quantization writes has no CUDA kernels and would run on the CPU. Two forms of
INT8 have them: static ranges of activations, as QuantizeLinear -> MatMulInteger -> Cast -> Mul, which
multiplies in INT8; and INT8 weights in blocks of 32 (MatMulNBits), which saves memory and multiplies in FP16.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from distill.export.observation import products
from distill.export.pooling import Graph
from distill.export.rounding import Moments, bias_of, round_together, shift_bias
from distill.export.smoothing import smoothing_scales
from distill.export.surgery import attributes, replace_nodes
from numpy.typing import NDArray
from onnx import TensorProto, helper

BLOCK = 32
ALIGNED = 16  # INT8 products on tensor cores want such multiples; smaller ones stay in FP16
CONTRIB = "com.microsoft"


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert weights and activations; the logits stay fp32, so that readers need not know."""
    from onnxruntime.transformers.onnx_model import OnnxModel

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    wrapped = OnnxModel(copy)
    wrapped.convert_float_to_float16(keep_io_types=True, use_symbolic_shape_infer=False)
    return wrapped.model


def _aligned(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, NDArray[Any]]]:
    """The products to quantize; those of an Attention that could not be taken apart are left alone."""
    return [
        (node, matrix)
        for node, matrix in products(model)
        if node.op_type == "MatMul" and not any(size % ALIGNED for size in matrix.shape)
    ]


def separate_attention(fused: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a fused fp32 graph with attention's own weights in a MatMul, so that they can be quantized."""
    copy = onnx.ModelProto()
    copy.CopyFrom(fused)
    graph = Graph(copy.graph)
    constants: dict[str, Any] = {}
    replaced = {}
    for node in copy.graph.node:
        if not graph.is_self_attention(node):
            continue
        name, (tokens, weight, bias, *mask) = node.output[0], node.input
        constants[f"{name}_parts"] = np.array([graph.values[weight].shape[1] // 3] * 3)
        projected = [f"{name}_{part}" for part in ("query", "key", "value")]
        replaced[name] = [
            helper.make_node("MatMul", [tokens, weight], [f"{name}_product"]),
            helper.make_node("Add", [f"{name}_product", bias], [f"{name}_projected"]),
            helper.make_node("Split", [f"{name}_projected", f"{name}_parts"], projected, axis=2),
            helper.make_node(
                "MultiHeadAttention", [*projected, "", *mask], [name], domain=CONTRIB, **attributes(node)
            ),
        ]
    _replace(copy.graph, replaced, constants)
    return copy


@dataclass(frozen=True)
class Grid:
    """The INT8 steps of a tensor.

    Attributes:
        scales: of each channel, shape (channels,), FP16.
        zero: the integer that stands for 0.
    """

    scales: NDArray[np.float16]
    zero: int

    def values(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """What QuantizeLinear leaves of values, both of shape (any, channels)."""
        scales = self.scales.astype(np.float32)
        return (np.clip(np.rint(rows / scales) + self.zero, -128, 127) - self.zero) * scales


def static_grids(separated: onnx.ModelProto, ranges: Mapping[str, NDArray[np.float32]]) -> dict[str, Grid]:
    """Choose the steps of the tensors that the products read, by name.

    Scales are those of `smoothing`, a step each: QuantizeLinear divides by them anyway, so they cost nothing.
    Where values are nearly all positive (GELU) zero is moved.

    Args:
        separated: a graph of `separate_attention`.
        ranges: its `channel_ranges`.
    """
    readers: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for node, matrix in products(separated):
        readers[node.input[0]].append(matrix)
    grids = {}
    for name, matrices in readers.items():
        smoothing = smoothing_scales(ranges[name], matrices)
        low, high = (ranges[name] / smoothing).min(), (ranges[name] / smoothing).max()
        step, zero = max(-low, high) / 127, 0
        if -low < high / 2:
            step = (high - low) / 255
            zero = round(-128 - low / step)
        grids[name] = Grid(np.maximum(smoothing * step, 1e-7).astype(np.float16), zero)
    return grids


def quantize_static(
    separated: onnx.ModelProto, grids: Mapping[str, Grid], moments: Mapping[str, Moments]
) -> onnx.ModelProto:
    """Quantize to INT8 products with static ranges: activations and weights per channel.

    The weights' rows are multiplied by the scales of the activations, and rounded together (`rounding`). The
    sums, up to 127 * 127 * input channels, do not fit FP16, so they are scaled in fp32. What a moved zero
    adds to them, a constant, is taken off again.

    Args:
        separated: a graph of `separate_attention`.
        grids: its `static_grids`.
        moments: `moments` of what its products read, on these.
    """
    model = to_fp16(separated)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    aligned = {node.output[0] for node, _ in _aligned(model)}
    matrices = {}
    for node, matrix in products(separated):
        if node.output[0] in aligned:
            readers[node.input[0]].append(node)
            matrices[node.output[0]] = matrix
    constants: dict[str, Any] = {}
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for name, users in readers.items():
        scales = grids[name].scales
        constants[f"{name}_scale"] = scales
        constants[f"{name}_zero"] = np.full(len(scales), grids[name].zero, dtype=np.int8)
        inputs = [name, f"{name}_scale", f"{name}_zero"]
        nodes = [helper.make_node("QuantizeLinear", inputs, [f"{name}_int8"], domain=CONTRIB, axis=-1)]
        for node in users:
            product = node.output[0]
            weights, steps = _rounded(model, product, matrices[product], scales, moments[name])
            replaced[product] = nodes + _integer_product(
                f"{name}_int8", product, weights, steps, grids[name].zero, constants
            )
            nodes = []  # one QuantizeLinear serves all products of a tensor
    _replace(model.graph, replaced, constants)
    return model


def _rounded(
    model: onnx.ModelProto, product: str, matrix: NDArray[Any], scales: NDArray[np.float16], moments: Moments
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights in INT8 for inputs on a `Grid`, and their steps; the product's bias makes up for their mean."""
    inputs = scales.astype(np.float64)
    rows = matrix * inputs[:, None]
    steps = (np.maximum(np.abs(rows).max(axis=0), 1e-12) / 127).astype(np.float32)
    bias = bias_of(model.graph, product, matrix.shape[1])
    second = moments.covariance if bias else moments.second()
    weights = round_together(rows, steps, second / np.outer(inputs, inputs), -127, 127)
    if bias:
        shift_bias(model.graph, bias, moments, matrix, weights * steps / inputs[:, None])
    return weights.astype(np.int8), steps


def _integer_product(
    activation: str,
    product: str,
    weights: NDArray[np.int8],
    steps: NDArray[np.float32],
    zero: int,
    constants: dict[str, Any],
) -> list[onnx.NodeProto]:
    """The nodes from an INT8 activation to its product with `weights` in FP16."""
    constants[f"{product}_int8_weight"] = weights
    constants[f"{product}_scale"] = steps
    nodes = [
        helper.make_node("MatMulInteger", [activation, f"{product}_int8_weight"], [f"{product}_int32"]),
        helper.make_node("Cast", [f"{product}_int32"], [f"{product}_sum"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{product}_sum", f"{product}_scale"], [f"{product}_scaled"]),
    ]
    if zero:
        constants[f"{product}_offset"] = (-zero * weights.sum(axis=0, dtype=np.int64) * steps).astype(
            np.float32
        )
        inputs = [f"{product}_scaled", f"{product}_offset"]
        nodes.append(helper.make_node("Add", inputs, [f"{product}_fp32"]))
    last = nodes[-1].output[0]
    return [*nodes, helper.make_node("Cast", [last], [product], to=TensorProto.FLOAT16)]


def quantize_weights(separated: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize weights alone to INT8, symmetric in blocks of 32 input channels; activations stay FP16."""
    model = to_fp16(separated)
    constants: dict[str, Any] = {}
    replaced = {}
    for node, matrix in _aligned(model):
        rows, columns = matrix.shape
        if rows % BLOCK:
            continue
        name = node.output[0]
        blocks = matrix.T.astype(np.float32).reshape(columns, rows // BLOCK, BLOCK)
        steps = np.maximum(np.abs(blocks).max(axis=2), 1e-7) / 127
        packed = (np.rint(blocks / steps[..., None]) + 128).astype(np.uint8)  # 128 stands for 0
        constants[f"{name}_int8_weight"] = packed
        constants[f"{name}_scales"] = steps.astype(np.float16).ravel()
        replaced[name] = [
            helper.make_node(
                "MatMulNBits", [node.input[0], f"{name}_int8_weight", f"{name}_scales"], [name],
                domain=CONTRIB, K=rows, N=columns, bits=8, block_size=BLOCK,
            )
        ]  # fmt: skip
    _replace(model.graph, replaced, constants)
    return model


def _replace(
    graph: onnx.GraphProto, replaced: Mapping[str, list[onnx.NodeProto]], constants: Mapping[str, Any]
) -> None:
    """Put nodes in the place of the one that makes a tensor."""
    nodes = [one for node in graph.node for one in replaced.get(node.output[0], [node])]
    replace_nodes(graph, nodes, constants)
