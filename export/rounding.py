"""INT8 weights that make up for each other's rounding, and biases that make up for what is left.

Rounding each weight to the nearest step is not what is best for the products: errors of one input channel can
be undone in the next ones, as far as the channels vary together. GPTQ (Frantar et al. 2023,
https://arxiv.org/abs/2210.17323) rounds channel by channel and spreads the error of each over those that
are left, by the inverse of the inputs' covariance. What INT8 then shifts on average, activations included, is
a constant that is taken off the bias (Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2). Both
cost nothing when the model runs.

A CPU without VNNI adds the products of two neighbouring input channels in 16 bits, which 255 * 127 * 2 do not
fit (onnxruntime#6545), and a file may be opened on another CPU than the one that made it. Weights of 7 bits
are the usual way out; but it is enough that no two neighbours, of the same sign, come to more than 128 steps
together. Few weights are so large, so that steps need not be twice as long.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

DAMPING = 0.01  # of the mean variance, added to each, so that the covariance has an inverse
PAIR = 128  # steps that two neighbours may have together: 255 * 128 fits 16 bits
BLOCK = 128  # channels whose errors are spread over the ones behind them at once
Values = NDArray[np.float64]
Products = list[tuple[onnx.NodeProto, NDArray[Any]]]


@dataclass(frozen=True)
class Moments:
    """Of what a product reads.

    Attributes:
        mean: before quantization, shape (channels,).
        quantized_mean: of the values that INT8 stands for, shape (channels,).
        covariance: of those, shape (channels, channels).
    """

    mean: Values
    quantized_mean: Values
    covariance: Values

    def second(self) -> Values:
        """E[q qᵀ], shape (channels, channels)."""
        return self.covariance + np.outer(self.quantized_mean, self.quantized_mean)


def pair_steps(matrix: NDArray[Any]) -> NDArray[np.float32]:
    """Steps for INT8 weights whose neighbours stay within `PAIR`, shape (output channels,).

    Args:
        matrix: shape (input, output channels).
    """
    padded = np.pad(matrix, ((0, len(matrix) % 2), (0, 0)))
    together = [np.maximum(side[0::2], 0) + np.maximum(side[1::2], 0) for side in (padded, -padded)]
    steps = np.maximum(np.max(together, axis=(0, 1)) / PAIR, np.abs(matrix).max(axis=0) / 127)
    return np.maximum(steps, 1e-12).astype(np.float32)


def round_pairs(matrix: NDArray[Any], steps: NDArray[Any]) -> NDArray[np.int8]:
    """Round each weight for itself, with neighbours within `PAIR`.

    Args:
        matrix: shape (input, output channels).
        steps: its `pair_steps`.
    """
    rounded = np.clip(np.rint(matrix / steps), -127, 127)
    behind = rounded[1::2]
    behind[:] = np.clip(behind, *_beside(rounded[0::2][: len(behind)], -127, 127))
    return rounded.astype(np.int8)


def _beside(neighbour: NDArray[Any], low: int, high: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Least and largest integer that may stand beside others."""
    least = np.maximum(low, -PAIR - np.minimum(neighbour, 0))
    largest = np.minimum(high, PAIR - np.maximum(neighbour, 0))
    return least, largest


def round_together(
    matrix: NDArray[Any],
    steps: NDArray[Any],
    second: Values,
    low: int,
    high: int,
    zero: NDArray[Any] | int = 0,
    paired: bool = False,
) -> Values:
    """Round weights so that the products with their inputs stay near (GPTQ, with `act_order`).

    Formula: row i is rounded, and of its error e, in the order of falling variance, each row j behind it gets
    -e * U_ij / U_ii, where U is the upper Cholesky factor of the inverse of `second`.

    Args:
        matrix: shape (input, output channels).
        steps: the size of a step, shape (output channels,) or ().
        second: moments of the inputs, shape (input, input channels): of second order, or the covariance where
            a bias takes up the mean.
        low: the least integer.
        high: the largest.
        zero: the integer that stands for 0.
        paired: keep neighbours within `PAIR`; zero must be 0.

    Returns:
        Integers from `low` to `high`, as floats, in the shape of `matrix`.
    """
    order = np.argsort(-np.diag(second), kind="stable")
    left = np.asarray(matrix, dtype=np.float64)[order]
    factor = _inverse_factor(second[np.ix_(order, order)])
    found = np.zeros_like(left)  # a neighbour that is not rounded yet leaves all room
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = np.zeros((end - start, left.shape[1]))
        for row in range(start, end):
            channel, neighbour = order[row], order[row] ^ 1
            limits: tuple[Any, Any] = (low, high)
            if paired and neighbour < len(left):
                limits = _beside(found[neighbour], low, high)
            found[channel] = np.clip(np.rint(left[row] / steps + zero), *limits)
            errors[row - start] = (left[row] - (found[channel] - zero) * steps) / factor[row, row]
            left[row + 1 : end] -= np.outer(factor[row, row + 1 : end], errors[row - start])
        left[end:] -= factor[start:end, end:].T @ errors
    return found


def _inverse_factor(second: Values) -> Values:
    """The upper triangular U with UᵀU the inverse of a damped `second`; more damping where it takes that."""
    if not np.isfinite(second).all():  # says nothing: each weight for itself
        return np.eye(len(second))
    variance = max(float(np.diag(second).mean()), 1e-12)  # of constant inputs it may be less than 0
    damping = DAMPING
    while True:
        try:
            inverse = np.linalg.inv(second + damping * variance * np.eye(len(second)))
            return np.asarray(np.linalg.cholesky(inverse).T)
        except np.linalg.LinAlgError:
            damping *= 10


def bound_pairs(quantized: onnx.ModelProto, products: Products) -> None:
    """Give the weights of a dynamically quantized graph as many bits as `PAIR` leaves them.

    Args:
        quantized: the graph, with a scale for every output channel; changed in place.
        products: those of the fp32 graph that it was made from, and their matrices.
    """
    constants = {entry.name: entry for entry in quantized.graph.initializer}
    for node, matrix in products:
        name = node.input[1]
        if f"{name}_quantized" in constants:
            steps = pair_steps(matrix)
            for part, values in (("scale", steps), ("quantized", round_pairs(matrix, steps))):
                constants[f"{name}_{part}"].CopyFrom(numpy_helper.from_array(values, f"{name}_{part}"))


def round_weights(quantized: onnx.ModelProto, products: Products, found: Mapping[str, Moments]) -> None:
    """Round the weights of a dynamically quantized graph together, and correct the biases behind them.

    Signed ones stay within `PAIR`, as `bound_pairs` left them.

    Args:
        quantized: the graph, changed in place; scales stay as they are.
        products: those of the fp32 graph that it was made from, and their matrices.
        found: moments of what they read, by tensor.
    """
    constants = {entry.name: entry for entry in quantized.graph.initializer}
    users: dict[str, Products] = defaultdict(list)
    for node, matrix in products:
        if f"{node.input[1]}_quantized" in constants:
            users[node.input[1]].append((node, matrix))
    for name, nodes in users.items():
        parts = (constants[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point"))
        stored, scale, zero = map(numpy_helper.to_array, parts)
        matrix, steps, offset = nodes[0][1], scale.astype(np.float64), zero.astype(np.float64)
        paired = stored.dtype == np.int8
        low, high = (-127, 127) if paired else (int(stored.min()), int(stored.max()))
        biases = [bias_of(quantized.graph, node.output[0], matrix.shape[1]) for node, _ in nodes]
        seconds = [
            found[node.input[0]].covariance if bias else found[node.input[0]].second()
            for (node, _), bias in zip(nodes, biases, strict=True)
        ]
        second = np.asarray(sum(seconds) / len(seconds))
        rounded = round_together(matrix, steps, second, low, high, offset, paired)
        constants[f"{name}_quantized"].CopyFrom(
            numpy_helper.from_array(rounded.astype(stored.dtype), f"{name}_quantized")
        )
        for (node, _), bias in zip(nodes, biases, strict=True):
            if bias:
                shift_bias(quantized.graph, bias, found[node.input[0]], matrix, (rounded - offset) * steps)


def bias_of(graph: onnx.GraphProto, product: str, width: int) -> tuple[onnx.NodeProto, int] | None:
    """The node that adds a constant row to a product, and which of its inputs that is; None without one.

    Args:
        graph: where both are.
        product: what the product is called.
        width: its output channels.
    """
    constants = {entry.name for entry in graph.initializer if list(entry.dims) in ([1], [width])}
    if any(product == output.name for output in graph.output):
        return None
    for node in graph.node:
        if node.output[0] == product and node.op_type in ("Attention", "QAttention"):
            return (node, 2) if node.input[2] in constants else None
    readers = [node for node in graph.node if product in node.input]
    if len(readers) != 1:
        return None
    reader = readers[0]
    places = {"Add": 1 - list(reader.input).index(product), "BiasGelu": 1, "SkipLayerNormalization": 4}
    place = places.get(reader.op_type, len(reader.input))
    return (reader, place) if place < len(reader.input) and reader.input[place] in constants else None


def shift_bias(
    graph: onnx.GraphProto,
    bias: tuple[onnx.NodeProto, int],
    moments: Moments,
    matrix: NDArray[Any],
    kept: NDArray[Any],
) -> None:
    """Add to a bias what INT8 takes from its product on average; others that share the bias keep theirs.

    It stays as it is where the moments are no numbers.

    Args:
        graph: changed in place.
        bias: as `bias_of` gives it.
        moments: of what the product reads.
        matrix: the fp32 weights, shape (input, output channels).
        kept: those that INT8 stands for.
    """
    node, place = bias
    old = next(entry for entry in graph.initializer if entry.name == node.input[place])
    row = numpy_helper.to_array(old)
    lost = moments.mean @ matrix - moments.quantized_mean @ kept
    if not np.isfinite(lost).all():
        return
    name = f"{old.name}_shifted_for_{node.output[0]}"
    graph.initializer.append(numpy_helper.from_array((row + lost).astype(row.dtype), name))
    node.input[place] = name
    if not any(old.name in other.input for other in graph.node):
        graph.initializer.remove(old)
