"""Store the equal rows of an embedding table once: tokens that share one (student/vocabulary.py)."""

from typing import Any

import numpy as np
import onnx
from distill.export.surgery import attributes, replace_nodes
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MOST = 0.75  # of the rows; leaving out fewer is not worth another lookup
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
        if table is not None and len(table.dims) == 2 and attributes(node).get("axis", 0) == 0:
            distinct, numbers = _distinct(numpy_helper.to_array(table))
            if len(distinct) <= MOST * len(numbers):
                smaller |= {f"{table.name}_distinct": distinct, f"{table.name}_row": numbers}
                rows = f"{node.output[0]}_row"
                nodes.append(helper.make_node("Gather", [f"{table.name}_row", node.input[ids]], [rows]))
                node.input[place], node.input[ids] = f"{table.name}_distinct", rows
        nodes.append(node)
    if smaller:
        replace_nodes(model.graph, nodes, smaller)
    return bool(smaller)


def _distinct(table: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """The distinct rows, in the order of their first, and for every row which of them it is."""
    numbers: dict[bytes, int] = {}
    found = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in table], dtype=np.int32)
    return table[np.unique(found, return_index=True)[1]], found
