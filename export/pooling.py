"""Leave out what a classifier never reads: in the last layer, every token but the first.

A classifier that pools by the first token reads one row of the last hidden state. What follows the
attention of the last layer treats each token by itself, so it may run on that row alone; and of the last
attention that row needs one query, with the keys and values of all tokens. The answer is the same, and most
of a layer is saved. Everything before is needed, since attention mixes the tokens.
"""

from collections import defaultdict
from typing import Any

import onnx
from distill.export.surgery import attributes, in_order
from numpy.typing import NDArray

# Operators of which a row of the output depends on that row of the inputs alone, whatever their rank.
ROWWISE = {
    "Add", "BiasGelu", "Cast", "Div", "Erf", "FastGelu", "Gelu", "Identity", "LayerNormalization", "MatMul",
    "Mul", "Pow", "QuickGelu", "ReduceMean", "Relu", "Sigmoid", "SkipLayerNormalization", "Sqrt", "Sub",
    "Sum", "Tanh",
}  # fmt: skip
SUFFIX = "_first_token"


def keep_first_token(model: onnx.ModelProto) -> bool:
    """Move the choice of the first token up to the last attention; False where the graph does not pool so.

    Args:
        model: a classifier's fp32 graph, changed in place.
    """
    graph = Graph(model.graph)
    for pooling in model.graph.node:
        if graph.takes_first_token(pooling):
            moved, sources = graph.rowwise_above(pooling)
            if moved:
                _move(model.graph, pooling, moved, sources)
                return True
    return False


class Graph:
    """Who makes and who reads each tensor of a graph, and the values of constants."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.values: dict[str, NDArray[Any]] = {
            entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer
        }
        self.producer: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
            for name in node.output:
                self.producer[name] = node
            for name in node.input:
                self.readers[name].append(id(node))
        for output in graph.output:
            self.readers[output.name].append(id(graph))

    def takes_first_token(self, node: onnx.NodeProto) -> bool:
        """Whether it is a Gather of the first token."""
        if node.op_type != "Gather" or attributes(node).get("axis") != 1:
            return False
        index = self.values.get(node.input[1])
        return index is not None and index.shape == () and index == 0

    def is_rowwise(self, node: onnx.NodeProto | None) -> bool:
        """Whether each row of its output depends on that row of its inputs alone."""
        if node is None or node.op_type not in ROWWISE:
            return False
        constants = [self.values.get(name) for name in node.input]
        given = attributes(node)
        if node.op_type == "LayerNormalization":
            return given.get("axis", -1) == -1
        if node.op_type == "ReduceMean":
            axes = constants[1] if len(constants) > 1 else given.get("axes")
            return axes is not None and list(axes) == [-1] and given.get("keepdims", 1) == 1
        if node.op_type == "MatMul":
            return constants[0] is None and constants[1] is not None and constants[1].ndim == 2
        return all(constant is None or constant.ndim <= 1 for constant in constants)

    def is_self_attention(self, node: onnx.NodeProto) -> bool:
        """Whether it is fused, of one input with packed weights, and with nothing more than a mask."""
        known = {"num_heads", "mask_filter_value", "scale"}
        return (
            node.op_type == "Attention"
            and node.domain == "com.microsoft"
            and not set(attributes(node)) - known
            and not any(node.input[4:])
            and all(name in self.values for name in node.input[1:3])
            and self.values[node.input[1]].shape[1] % 3 == 0
        )

    def rowwise_above(self, pooling: onnx.NodeProto) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that may run on the first row alone, and the tensors of all rows that they start from."""
        moved: list[onnx.NodeProto] = []
        sources: set[str] = set()
        inside, pending = {id(pooling)}, {pooling.input[0]}
        # A tensor that is read elsewhere too is needed whole, so the others go first.
        while name := next((one for one in sorted(pending) if inside.issuperset(self.readers[one])), None):
            pending.remove(name)
            node = self.producer.get(name)
            if node is None or not self.is_rowwise(node):
                sources.add(name)
                continue
            inside.add(id(node))
            moved.append(node)
            pending.update(one for one in node.input if one and one not in self.values)
        return moved, sources | pending


def _move(
    graph: onnx.GraphProto, pooling: onnx.NodeProto, moved: list[onnx.NodeProto], sources: set[str]
) -> None:
    for node in moved:
        _rename(node, {name: name + SUFFIX for name in sources})
    index, hidden, pooled = pooling.input[1], pooling.input[0], pooling.output[0]
    nodes = [node for node in graph.node if node.output[0] != pooled]
    for node in nodes:
        _rename(node, {pooled: hidden})  # the row itself by now
    nodes += [
        onnx.helper.make_node("Gather", [name, index], [name + SUFFIX], axis=1) for name in sorted(sources)
    ]
    del graph.node[:], graph.value_info[:]  # shapes have changed
    graph.node.extend(in_order(nodes))


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for position, name in enumerate(node.input):
        node.input[position] = names.get(name, name)
