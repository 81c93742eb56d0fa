"""Does all that touches text run on the CUDA provider? Read off the graph, node by node, so no GPU is needed.

ONNX Runtime gives a node to CUDA where the provider has a kernel for its operator, the version of that
operator and its types; any other node runs on the CPU, with a copy there and back, and nothing fails.
Arithmetic on shapes (integers that come from a Shape) is put on the CPU on purpose, and costs nothing.

The kernels are those of onnxruntime 1.20, the oldest that `distill-onnx[gpu]` takes; later ones have more.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import onnx

from distill.errors import DistillError

# Inputs that CUDA kernels read in the host's memory, by position: an activation here is copied back.
HOST_INPUTS = {
    "ConstantOfShape": (0,), "Expand": (1,), "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2),
    "ReduceMax": (1,), "ReduceMean": (1,), "ReduceMin": (1,), "ReduceSum": (1,), "Reshape": (1,),
    "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1,), "Trilu": (1,), "Unsqueeze": (1,),
}  # fmt: skip
SHAPE_TYPES = ("int64", "int32", "bool")


def require_cuda(model: onnx.ModelProto, name: str) -> None:
    """Refuse a graph of which a node that touches activations would run on the CPU.

    Raises:
        DistillError: naming the first such node and how many there are.
    """
    found = off_cuda(model)
    if found:
        more = f" and {len(found) - 1} more nodes" if len(found) > 1 else ""
        raise DistillError(f"--provider cuda: {name} would not run on CUDA alone: {found[0]}{more}; "
                           "report the model's architecture, and use its fp32 file meanwhile")  # fmt: skip


def off_cuda(model: onnx.ModelProto) -> list[str]:
    """List the nodes that touch activations and that the CUDA provider would not run, with the reason."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    types = {entry.name: _name(entry.type.tensor_type.elem_type) for entry in model.graph.input}
    types |= {entry.name: _name(entry.data_type) for entry in model.graph.initializer}
    # What does not depend on the text: constants, and numbers that depend on its shape alone.
    constant = {entry.name for entry in model.graph.initializer}
    shapes: set[str] = set()
    found = []
    for node in model.graph.node:
        read = [name for name in node.input if name]
        given = [types.get(name, "") if name else None for name in node.input]
        made, reason = _kernel(node, given, opsets)
        types.update(zip(node.output, made, strict=False))
        if constant.issuperset(read):
            constant.update(node.output)
        elif node.op_type in ("Shape", "Size") or (
            (constant | shapes).issuperset(read) and all(one in SHAPE_TYPES for one in made)
        ):
            shapes.update(node.output)
        else:
            host = [node.input[at] for at in HOST_INPUTS.get(node.op_type, ()) if at < len(node.input)]
            if not reason and not (constant | shapes).issuperset(filter(None, host)):
                reason = "reads an activation in the host's memory"
            if reason:
                found.append(f"{node.op_type} ({node.name or node.output[0]}): {reason}")
    return found


@cache
def _kernels() -> Mapping[str, Any]:
    table = files("distill.export").joinpath("cuda_kernels.json").read_text(encoding="utf-8")
    return dict(json.loads(table)["operators"])


def _kernel(
    node: onnx.NodeProto, given: Sequence[str | None], opsets: Mapping[str, int]
) -> tuple[list[str], str]:
    """Types of a node's outputs ("" if unknown), and why CUDA has no kernel for it ("" if it has one)."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    entry = _kernels().get(f"{domain}.{node.op_type}" if domain else node.op_type)
    made = _outputs(node, given, opsets) if not domain else None
    if entry is None:
        return made or [""] * len(node.output), "CUDA has no kernel for it"
    version = 1 if domain else onnx.defs.get_schema(node.op_type, opsets[""]).since_version
    # An open range is that of one version, the newest that this release of ONNX Runtime knew.
    kernels = [
        types
        for low, high, types in entry["kernels"]
        if low == version or (high is not None and low <= version <= high)
    ]
    if not kernels:
        return made or [""] * len(node.output), f"CUDA has no kernel for version {version} of it"
    reason = ""
    for kernel in kernels:
        for inputs, outputs in entry["signatures"]:
            bound, reason = _bind(kernel, inputs, given)
            if not reason:
                types = [one if one.islower() else bound.get(one, "") for one in outputs]
                return made or types[: len(node.output)], ""
    return made or [""] * len(node.output), reason


def _bind(
    kernel: Mapping[str, list[str]], parameters: Sequence[str], given: Sequence[str | None]
) -> tuple[dict[str, str], str]:
    """Types of a kernel's type variables for these inputs; why they do not fit otherwise."""
    bound = {variable: allowed[0] for variable, allowed in kernel.items() if len(allowed) == 1}
    repeated = [parameters[-1]] * (len(given) - len(parameters))  # the last may stand for several
    for parameter, found in zip([*parameters, *repeated], given, strict=False):
        if not found:  # left out, or made by a node that was refused
            continue
        allowed = kernel.get(parameter, [parameter] if parameter.islower() else [found])
        if found not in allowed:
            return {}, f"CUDA takes {' or '.join(allowed)} there, not {found}"
        bound[parameter] = found
    return bound, ""


def _outputs(
    node: onnx.NodeProto, given: Sequence[str | None], opsets: Mapping[str, int]
) -> list[str] | None:
    """Types of the outputs of one of ONNX's own operators; None if they cannot be told."""
    if not all(one is None or one for one in given):
        return None
    kinds = {
        name: onnx.helper.make_tensor_type_proto(onnx.TensorProto.DataType.Value(kind.upper()), None)
        for name, kind in zip(node.input, given, strict=True)
        if kind
    }
    schema = onnx.defs.get_schema(node.op_type, opsets[""])
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        made = onnx.shape_inference.infer_node_outputs(schema, node, kinds, opset_imports=imports)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return None
    return [_name(made[name].tensor_type.elem_type) if name in made else "" for name in node.output]


def _name(kind: int) -> str:
    return str(onnx.TensorProto.DataType.Name(kind)).lower()
