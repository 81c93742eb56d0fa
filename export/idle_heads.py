"""Leave out of an ONNX graph the attention heads that add nothing (student/heads.py)."""

from typing import Any

import numpy as np
import onnx
from distill.export.pooling import Graph
from distill.export.surgery import attributes, replace_nodes
from numpy.typing import NDArray


def drop_idle_heads(model: onnx.ModelProto) -> bool:
    """Cut heads whose values are all zero out of every fused Attention, in place; False if there are none.

    Args:
        model: an fp32 graph with Attention as `fuse` leaves it.
    """
    graph = Graph(model.graph)
    by_identity = {id(node): node for node in model.graph.node}
    constants: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        if not graph.is_self_attention(node):
            continue
        readers = [by_identity.get(one) for one in graph.readers[node.output[0]]]
        if len(readers) != 1 or readers[0] is None or not _is_product(graph, readers[0]):
            continue
        heads = attributes(node)["num_heads"]
        weight, bias, outgoing = (graph.values[name] for name in (*node.input[1:3], readers[0].input[1]))
        by_head = weight.reshape(len(weight), 3, heads, -1)
        bias_by_head = bias.reshape(3, heads, -1)
        kept = np.flatnonzero(by_head[:, 2].any(axis=(0, 2)) | bias_by_head[2].any(axis=1))
        if not 0 < len(kept) < heads:
            continue
        size = by_head.shape[-1]
        name = node.output[0]
        cut = {
            f"{name}_weight": by_head[:, :, kept].reshape(len(weight), -1),
            f"{name}_bias": bias_by_head[:, kept].reshape(-1),
            f"{name}_outgoing": outgoing.reshape(heads, size, -1)[kept].reshape(len(kept) * size, -1),
        }
        given = next(one for one in node.attribute if one.name == "num_heads")
        given.i = len(kept)
        node.input[1], node.input[2], readers[0].input[1] = cut
        constants |= {one: np.ascontiguousarray(value) for one, value in cut.items()}
    if constants:
        del model.graph.value_info[:]
        replace_nodes(model.graph, model.graph.node, constants)
    return bool(constants)


def _is_product(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether it multiplies what it reads with a constant matrix."""
    return (
        node.op_type == "MatMul" and node.input[1] in graph.values and graph.values[node.input[1]].ndim == 2
    )
