"""Store the equal rows of an embedding table once: tokens that share one (student/vocabulary.py)."""

from hashlib import blake2b
from typing import Any

import numpy as np
import onnx
from distill.export.surgery import attributes, replace_nodes
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

MOST = 0.75  # of the rows; leaving out fewer is not worth another lookup
ROW = "_row"  # ends the name of a table of row numbers
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
LOOKUPS = {"Gather": (0, 1), "EmbedLayerNormalization": (2, 0)}  # which inputs are the table and the ids


def store_equal_rows_once(model: onnx.ModelProto) -> bool:
    """Look rows up in a table of distinct ones, by number, in place; False if no table has many equal rows.

    Args:
        model: a graph in floating point.
    """
    constants = {entry.name: entry for entry in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    smaller: dict[str, Any] = {}
    for node in model.graph.node:
        place, ids = LOOKUPS.get(node.op_type, (0, 0))
        table = constants.get(node.input[place]) if node.op_type in LOOKUPS else None
        floats = table is not None and table.data_type in FLOATS and len(table.dims) == 2
        if table is not None and floats and attributes(node).get("axis", 0) == 0:
            values = numpy_helper.to_array(table)
            numbers, first = _distinct(values)
            if len(first) <= MOST * len(values):
                smaller |= {f"{table.name}_distinct": values[first], f"{table.name}{ROW}": numbers}
                rows = f"{node.output[0]}{ROW}"
                nodes.append(helper.make_node("Gather", [f"{table.name}{ROW}", node.input[ids]], [rows]))
                node.input[place], node.input[ids] = f"{table.name}_distinct", rows
        nodes.append(node)
    if smaller:
        replace_nodes(model.graph, nodes, smaller)
    return bool(smaller)


def _distinct(table: NDArray[Any]) -> tuple[NDArray[np.int32], list[int]]:
    """For every row the number of the one it equals, in the order of their first places; and those places."""
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    found = np.empty(len(table), dtype=np.int32)
    for place, row in enumerate(table):
        found[place] = numbers.setdefault(blake2b(row.tobytes(), digest_size=16).digest(), len(first))
        if found[place] == len(first):
            first.append(place)
    return found, first
