"""What every change of an ONNX graph needs."""

from collections.abc import Iterable, Mapping
from typing import Any

import onnx
from onnx import numpy_helper


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def in_order(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Each node after those that it reads."""
    missing = {name for node in nodes for name in node.output}
    ordered: list[onnx.NodeProto] = []
    while nodes:
        later = []
        for node in nodes:
            if missing.intersection(node.input):
                later.append(node)
            else:
                ordered.append(node)
                missing.difference_update(node.output)
        nodes = later
    return ordered


def replace_nodes(
    graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], constants: Mapping[str, Any]
) -> None:
    """Set a graph's nodes, add the new constants, and drop those that nobody reads any more."""
    nodes = list(nodes)
    read = {name for node in nodes for name in node.input}
    weights = [entry for entry in graph.initializer if entry.name in read]
    weights += [numpy_helper.from_array(value, name) for name, value in constants.items() if name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
