"""Does all that touches text run on the CUDA provider? Read off the graph, node by node, so no GPU is needed.

ONNX Runtime gives a node to CUDA where the provider has a kernel for its operator, the version of that
operator and its types; any other node runs on the CPU, with a copy there and back, and nothing fails.
Arithmetic on shapes (what comes from a Shape) is put on the CPU on purpose, and costs nothing, unless it
drags an input of the graph along.

The kernels are those that onnxruntime 1.20 documents (docs/OperatorKernels.md), for the operators that a
transformer encoder can be made of; `distill-onnx[gpu]` takes later releases, which have them too. What is not
in the table, and what cannot be told, counts as not on CUDA.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import onnx

from distill.errors import DistillError

# Inputs that CUDA kernels read in the host's memory, by position: an activation here is copied back.
HOST_INPUTS = {
    "Clip": (1, 2), "ConstantOfShape": (0,), "CumSum": (1,), "Dropout": (1, 2), "Expand": (1,),
    "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceMin": (1,),
    "ReduceSum": (1,), "RelativePositionBias": (1, 2), "Reshape": (1,), "Slice": (1, 2, 3, 4), "Split": (1,),
    "Squeeze": (1,), "Tile": (1,), "Trilu": (1,), "Unsqueeze": (1,),
}  # fmt: skip
# Attributes of which a kernel takes some values alone.
ATTRIBUTES = {"MatMulNBits": {"bits": (4, 8), "block_size": (16, 32, 64, 128)}}
SMALL = 100  # elements of a constant that ONNX Runtime counts as arithmetic on shapes
HALF = ("float16", "bfloat16")
INTEGERS = ("int64", "int32", "bool")
SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


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
    opsets = {_domain(entry.domain): entry.version for entry in model.opset_import}
    inputs = {entry.name for entry in model.graph.input}
    types = {entry.name: _name(entry.type.tensor_type.elem_type) for entry in model.graph.input}
    types |= {entry.name: _name(entry.data_type) for entry in model.graph.initializer}
    # What does not depend on the text: constants, and numbers that depend on its shape alone, of which some
    # are on the CPU.
    constant = {entry.name for entry in model.graph.initializer}
    large = {entry.name for entry in model.graph.initializer if np.prod(entry.dims) > SMALL}
    numbers: set[str] = set()
    on_cpu: set[str] = set()
    found = []
    for node in model.graph.node:
        read = {name for name in node.input if name}
        if any(entry.type in SUBGRAPHS for entry in node.attribute):
            found.append(
                f"{node.op_type} ({node.name or node.output[0]}): holds a graph, which is not followed"
            )
            continue
        given = [types.get(name, "") if name else None for name in node.input]
        made, reason = _kernel(node, given, opsets)
        types.update(zip(node.output, made, strict=False))
        if constant.issuperset(read):
            constant.update(node.output)
            continue
        host = {node.input[at] for at in HOST_INPUTS.get(node.op_type, ()) if at < len(node.input)}
        # The rule of ONNX Runtime's GetCpuPreferredNodes.
        follows = (
            read & on_cpu
            and read <= on_cpu | (constant - large) | inputs
            and not any(kind in HALF for kind in given)
            and not host & on_cpu  # its kernel takes them from there
        )
        sizes = node.op_type in ("Shape", "Size")
        if sizes or read <= numbers | constant:
            numbers.update(node.output)
            if sizes or follows or reason:
                on_cpu.update(node.output)
            if sizes or follows or all(kind in INTEGERS for kind in made):
                reason = ""
        elif follows:
            reason = "ONNX Runtime puts it on the CPU, with the arithmetic on shapes that it reads"
        elif not reason and not host <= constant | numbers | {""}:
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
    domain = _domain(node.domain)
    unknown = [""] * len(node.output)
    entry = _kernels().get(f"{domain}.{node.op_type}" if domain else node.op_type)
    made, version = (None, 1) if domain else _standard(node, given, opsets)
    if entry is None or version is None:
        return made or unknown, "CUDA has no kernel for it"
    if made is None:  # what a kernel for any type would make
        parameters, results = entry["signatures"][0]
        bound, _ = _bind({}, parameters, given)
        unknown = [one if one.islower() else bound.get(one, "") for one in results][: len(unknown)]
    if "" in given:
        return made or unknown, "the type of what it reads is not known"
    for attribute in node.attribute:
        allowed = ATTRIBUTES.get(node.op_type, {}).get(attribute.name)
        if allowed and attribute.i not in allowed:
            reason = f"CUDA takes {attribute.name} {' or '.join(map(str, allowed))}, not {attribute.i}"
            return made or unknown, reason
    # An open range is that of one version, the newest that this release of ONNX Runtime knew.
    kernels = [
        types
        for low, high, types in entry["kernels"]
        if low == version or (high is not None and low <= version <= high)
    ]
    reason = f"CUDA has no kernel for version {version} of it"
    for kernel in kernels:
        for parameters, results in entry["signatures"]:
            bound, reason = _bind(kernel, parameters, given)
            types = made or [one if one.islower() else bound.get(one, "") for one in results][: len(unknown)]
            if not reason:
                reason = _bind(kernel, results, [types[0]])[1]
            if not reason:
                return types, ""
    return made or unknown, reason


def _bind(
    kernel: Mapping[str, list[str]], parameters: Sequence[str], given: Sequence[str | None]
) -> tuple[dict[str, str], str]:
    """Types of a kernel's type variables for these tensors; why they do not fit otherwise."""
    bound: dict[str, str] = {}
    repeated = [parameters[-1]] * (len(given) - len(parameters))  # the last may stand for several
    for parameter, found in zip([*parameters, *repeated], given, strict=False):
        if found is None:  # left out
            continue
        allowed = kernel.get(parameter, [parameter] if parameter.islower() else [found])
        if parameter in bound:  # the same for all tensors of this variable
            allowed = [bound[parameter]]
        if not found or found not in allowed:
            return {}, f"CUDA takes {' or '.join(allowed)} there, not {found or 'an unknown type'}"
        bound[parameter] = found
    single = {variable: allowed[0] for variable, allowed in kernel.items() if len(allowed) == 1}
    return single | bound, ""


def _standard(
    node: onnx.NodeProto, given: Sequence[str | None], opsets: Mapping[str, int]
) -> tuple[list[str] | None, int | None]:
    """Types of the outputs of one of ONNX's own operators, and its version; None where that is not known."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[""])
    except onnx.defs.SchemaError:  # one that ONNX Runtime knows alone
        return None, None
    if "" in given:
        return None, schema.since_version
    kinds = {
        name: onnx.helper.make_tensor_type_proto(onnx.TensorProto.DataType.Value(kind.upper()), None)
        for name, kind in zip(node.input, given, strict=True)
        if kind
    }
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        made = onnx.shape_inference.infer_node_outputs(schema, node, kinds, opset_imports=imports)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return None, schema.since_version
    types = [_name(made[name].tensor_type.elem_type) if name in made else "" for name in node.output]
    return types, schema.since_version


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _name(kind: int) -> str:
    return str(onnx.TensorProto.DataType.Name(kind)).lower()
