"""Leave out of an ONNX graph the layers that add nothing (distill/idle_layers.py)."""

import onnx
from distill.export.surgery import replace_nodes
from onnx import numpy_helper


def drop_idle_layers(model: onnx.ModelProto) -> bool:
    """Drop additions of products with a matrix of zeros, and what only they need, in place; False if none.

    Args:
        model: the fp32 graph of a ModernBERT, whose layers add to what they read.
    """
    constants = {entry.name for entry in model.graph.initializer}
    zeros = {
        entry.name
        for entry in model.graph.initializer
        if len(entry.dims) == 2 and not numpy_helper.to_array(entry).any()
    }
    products = {
        node.output[0] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in zeros
    }
    needed = {output.name for output in model.graph.output}
    same: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        others = [name for name in node.input if name not in products]
        is_same = node.op_type == "Add" and len(others) == 1 and others[0] not in constants
        if is_same and node.output[0] not in needed:
            same[node.output[0]] = others[0]
        else:
            nodes.append(node)
    read = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            read.append(node)
    if same:
        replace_nodes(model.graph, reversed(read), {})
    return bool(same)
