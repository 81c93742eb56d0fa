"""Let the last attention compute one query: that of the first token, where no other is read.

ONNX Runtime's Attention gives as many rows as it is given. Two graphs give one row:

- For CUDA, MultiHeadAttention, which takes query, key and value apart.
- For the CPU, products that need no keys and values. With the states X (tokens, width) and the query q of a
  head (1, size), its keys X W_k + b_k and its values X W_v + b_v,

      softmax(q (X W_k + b_k)^T / sqrt(size)) (X W_v + b_v) = softmax((q W_k^T / sqrt(size)) X^T) X W_v + b_v

  since q b_k^T is the same number for every token, which softmax drops, and the weights of the tokens sum to
  one. So the matrices meet one row in place of every token's, as in the "absorbed" projections of
  DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.1.2), and with a width of 384, 12 heads and 32
  tokens a sixteenth of the work is left.
"""

from typing import Any

import numpy as np
import onnx
from distill.export.pooling import SUFFIX, Graph
from distill.export.surgery import attributes, in_order, replace_nodes
from numpy.typing import NDArray
from onnx import helper

CONTRIB = "com.microsoft"
MASKED = -10_000.0  # what ONNX Runtime's attention adds to the score of padding


def attend_from_first_token(model: onnx.ModelProto, provider: str) -> bool:
    """Let the last fused Attention, of which the first token alone is read, compute one query.

    Args:
        model: a graph that went through `keep_first_token`, changed in place.
        provider: "cpu" or "cuda": whose form it gets, as `fuse` gave its masks: for the CPU one of zeros and
            ones, shape (texts, tokens).
    """
    graph = Graph(model.graph)
    for pooling in model.graph.node:
        attention = graph.producer.get(pooling.input[0]) if pooling.input else None
        if (
            attention is not None
            and graph.takes_first_token(pooling)
            and graph.readers[pooling.input[0]] == [id(pooling)]
            and graph.is_self_attention(attention)
        ):
            form = _absorbed if provider == "cpu" else _split
            nodes, constants = form(graph, attention, pooling)
            row = attention.input[0] + SUFFIX
            if row not in graph.producer:
                taken = [attention.input[0], pooling.input[1]]
                nodes.append(helper.make_node("Gather", taken, [row], axis=1))
            gone = {attention.output[0], pooling.output[0]}
            nodes += [node for node in model.graph.node if not gone.intersection(node.output)]
            del model.graph.value_info[:]
            replace_nodes(model.graph, in_order(nodes), constants)
            return True
    return False


Form = tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]


def _split(graph: Graph, attention: onnx.NodeProto, pooling: onnx.NodeProto) -> Form:
    """MultiHeadAttention with its three projections."""
    name, (tokens, weight, bias, *mask) = attention.output[0], attention.input
    axis = f"{name}_axis"
    nodes, constants = [], {axis: np.array([1])}
    parts = {}
    for part, source, matrix, vector in zip(
        ("query", "key", "value"),
        (tokens + SUFFIX, tokens, tokens),
        np.split(graph.values[weight], 3, axis=1),
        np.split(graph.values[bias], 3),
        strict=True,
    ):
        parts[part] = f"{name}_{part}"
        nodes += _linear(source, matrix, vector, parts[part], constants)
    inputs = [f"{name}_query_row", parts["key"], parts["value"], "", *mask]
    nodes += [
        helper.make_node("Unsqueeze", [parts["query"], axis], [f"{name}_query_row"]),
        helper.make_node(
            "MultiHeadAttention", inputs, [f"{name}_row"], domain=CONTRIB, **attributes(attention)
        ),
        helper.make_node("Squeeze", [f"{name}_row", axis], [pooling.output[0]]),
    ]
    return nodes, constants


def _absorbed(graph: Graph, attention: onnx.NodeProto, pooling: onnx.NodeProto) -> Form:
    """The right-hand side of the formula, of all heads at once."""
    name, (tokens, weight, bias, *mask) = attention.output[0], attention.input
    given = attributes(attention)
    query, key, value = np.split(graph.values[weight], 3, axis=1)
    query_bias, _, value_bias = np.split(graph.values[bias], 3)
    heads: int = given["num_heads"]
    width, size = key.shape[0], key.shape[1] // heads
    scale = given.get("scale") or size**-0.5
    constants: dict[str, NDArray[Any]] = {
        f"{name}_key_weight": np.ascontiguousarray((scale * key).T.reshape(heads, size, width)),
        f"{name}_value_weight": np.ascontiguousarray(value.reshape(width, heads, size).swapaxes(0, 1)),
        f"{name}_value_bias": value_bias,
        f"{name}_queries": np.array([0, heads, 1, size]),
        f"{name}_rows": np.array([0, heads, width]),
        f"{name}_mixtures": np.array([0, heads, 1, width]),
        f"{name}_joined": np.array([0, heads * size]),
    }
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, inputs: list[str], output: str, **settings: Any) -> str:
        output = f"{name}_{output}"
        nodes.append(helper.make_node(operator, inputs, [output], output, **settings))
        return output

    def head_by_head(row: str, shape: str, matrices: str) -> str:
        """Rows of shape (texts, heads, 1, any) times one matrix a head."""
        split = add("Reshape", [row, f"{name}_{shape}"], f"{shape}_split")
        return add("MatMul", [split, f"{name}_{matrices}"], f"{shape}_product")

    nodes += _linear(tokens + SUFFIX, query, query_bias, f"{name}_query", constants)
    absorbed = head_by_head(f"{name}_query", "queries", "key_weight")
    rows = add("Reshape", [absorbed, f"{name}_rows"], "absorbed")
    scores = add("FusedMatMul", [rows, tokens], "scores", transB=1, domain=CONTRIB)
    if any(mask):
        constants[f"{name}_masked"] = np.array([given.get("mask_filter_value", MASKED), 0], dtype=key.dtype)
        constants[f"{name}_axis"] = np.array([1])
        penalty = add("Gather", [f"{name}_masked", mask[0]], "penalty")  # of shape (texts, tokens)
        scores = add(
            "Add", [scores, add("Unsqueeze", [penalty, f"{name}_axis"], "penalties")], "masked_scores"
        )
    mixture = add("MatMul", [add("Softmax", [scores], "attention", axis=-1), tokens], "mixture")
    values = head_by_head(mixture, "mixtures", "value_weight")
    joined = add("Reshape", [values, f"{name}_joined"], "values")
    nodes.append(helper.make_node("Add", [joined, f"{name}_value_bias"], [pooling.output[0]]))
    return nodes, constants


def _linear(
    source: str, matrix: NDArray[Any], bias: NDArray[Any], output: str, constants: dict[str, NDArray[Any]]
) -> list[onnx.NodeProto]:
    weight, vector, product = f"{output}_weight", f"{output}_bias", f"{output}_product"
    constants[weight], constants[vector] = np.ascontiguousarray(matrix), bias
    return [
        helper.make_node("MatMul", [source, weight], [product]),
        helper.make_node("Add", [product, vector], [output]),
    ]
