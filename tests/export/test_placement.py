import numpy as np
import onnx
import pytest
from distill.export.placement import off_cuda, require_cuda
from onnx import TensorProto, helper, numpy_helper

from distill.errors import DistillError


def _graph(nodes, inputs=(("x", TensorProto.FLOAT),), constants=(), opset=17):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports)


def test_what_dynamic_quantization_writes_would_run_on_the_cpu(chain):
    model = onnx.load(chain.export / "onnx" / "model_quantized.onnx")
    found = off_cuda(model)
    kinds = {entry.split()[0] for entry in found}
    assert "DynamicQuantizeLinear" in kinds and "MatMulInteger" in kinds
    dynamic = sum(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
    assert sum("DynamicQuantizeLinear" in entry for entry in found) == dynamic > 2
    with pytest.raises(DistillError, match=r"x\.onnx would not run on CUDA alone: .* and \d+ more nodes"):
        require_cuda(model, "x.onnx")


def test_the_fp32_file_runs_on_cuda_alone(chain):
    assert off_cuda(onnx.load(chain.export / "onnx" / "model.onnx")) == []


@pytest.mark.parametrize(
    ("kind", "reason"), [(TensorProto.INT8, None), (TensorProto.UINT8, "CUDA takes int8 there, not uint8")]
)
def test_a_kernel_is_one_of_types_not_of_an_operator(kind, reason):
    nodes = [
        helper.make_node("Cast", ["x"], ["q"], to=kind),
        helper.make_node("MatMulInteger", ["q", "w"], ["y"]),
    ]
    found = off_cuda(_graph(nodes, constants=[("w", np.ones((2, 2), dtype=np.int8))]))
    assert found == ([] if reason is None else [f"MatMulInteger (y): {reason}"])


def test_the_types_of_half_precision_depend_on_the_version_of_the_operator():
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["h", "scale", "zero"], ["y"]),
    ]
    constants = [("scale", np.float16(1)), ("zero", np.int8(0))]
    assert off_cuda(_graph(nodes, constants=constants, opset=19)) == []
    assert "not float16" in off_cuda(_graph(nodes, constants=constants, opset=17))[0]


def test_a_node_that_holds_a_graph_is_never_taken_for_one_of_cuda():
    """Whatever it reads by name alone, its own nodes are not looked at."""
    branch = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["b"])], "b", [], [onnx.ValueInfoProto(name="b")]
    )
    nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)]
    found = off_cuda(_graph(nodes, constants=[("yes", np.array(True))]))
    assert found == ["If (y): holds a graph, which is not followed"]


def test_a_version_that_came_after_the_known_kernels_is_not_assumed():
    node = helper.make_node("Transpose", ["x"], ["y"])
    assert off_cuda(_graph([node], opset=17)) == []
    assert off_cuda(_graph([node], opset=23)) == ["Transpose (y): CUDA has no kernel for version 23 of it"]


def test_arithmetic_on_shapes_may_run_on_the_cpu_but_not_on_activations():
    size = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("BitwiseOr", ["shape", "one"], ["larger"]),
        helper.make_node("Reshape", ["x", "larger"], ["y"]),
    ]
    constants = [("one", np.array([1], dtype=np.int64))]
    assert off_cuda(_graph(size, constants=constants, opset=18)) == []
    ids = [helper.make_node("BitwiseOr", ["ids", "one"], ["y"])]
    found = off_cuda(_graph(ids, inputs=[("ids", TensorProto.INT64)], constants=constants, opset=18))
    assert found == ["BitwiseOr (y): CUDA has no kernel for it"]


def test_a_number_that_a_kernel_reads_on_the_host_must_not_come_from_the_text():
    nodes = [
        helper.make_node("NonZero", ["x"], ["found"]),
        helper.make_node("ReduceMax", ["found"], ["most"], keepdims=0),
        helper.make_node("Range", ["zero", "most", "one"], ["y"]),
    ]
    constants = [("zero", np.int64(0)), ("one", np.int64(1))]
    found = off_cuda(_graph(nodes, constants=constants))
    assert "Range (y): reads an activation in the host's memory" in found


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        # An input of the graph beside arithmetic on shapes goes to the CPU with it.
        (
            [
                helper.make_node("Shape", ["ids"], ["shape"]),
                helper.make_node("Gather", ["shape", "one"], ["length"]),
                helper.make_node("Less", ["ids", "length"], ["y"]),
            ],
            "Less (y): ONNX Runtime puts it on the CPU",
        ),
        # Limits are read on the host.
        (
            [
                helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
                helper.make_node("Clip", ["x", "", "most"], ["y"]),
            ],
            "Clip (y): reads an activation in the host's memory",
        ),
        # No kernel makes this type.
        ([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E4M3FN)], "not float8e4m3fn"),
        # What an operator makes that the table lacks is not known, so neither is the kernel of the next.
        (
            [
                helper.make_node("Unheard", ["x"], ["u"], domain="com.microsoft"),
                helper.make_node("MatMulInteger", ["u", "w"], ["y"]),
            ],
            "MatMulInteger (y): the type of what it reads is not known",
        ),
        # FP16 with the scale in fp32.
        (
            [
                helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
                helper.make_node("LayerNormalization", ["h", "scale"], ["y"]),
            ],
            "LayerNormalization (y): CUDA takes",
        ),
        (
            [
                helper.make_node(
                    "MatMulNBits", ["x", "packed", "scale"], ["y"], domain="com.microsoft",
                    K=32, N=1, bits=3, block_size=32,
                )
            ],
            "MatMulNBits (y): CUDA takes bits 4 or 8, not 3",
        ),
        # Operators of ONNX Runtime's own in the standard domain, or of nobody.
        ([helper.make_node("Unheard", ["x"], ["y"])], "Unheard (y): CUDA has no kernel for it"),
    ],
)  # fmt: skip
def test_what_would_not_run_on_cuda_is_found(nodes, reason):
    inputs = [("x", TensorProto.FLOAT), ("ids", TensorProto.INT64)]
    constants = [
        ("one", np.int64(1)),
        ("w", np.ones((2, 2), dtype=np.int8)),
        ("scale", np.ones(1, dtype=np.float32)),
        ("packed", np.ones((1, 1, 32), dtype=np.uint8)),
    ]
    found = off_cuda(_graph(nodes, inputs, constants, opset=19))
    assert any(reason in entry for entry in found), found


def test_arithmetic_on_shapes_may_use_floats_and_any_name_of_the_standard_domain():
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mod", ["f", "two"], ["half"], fmod=1),  # not in the table
        helper.make_node("Cast", ["half"], ["i"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["x", "i"], ["y"], domain="ai.onnx"),
    ]
    model = _graph(nodes, constants=[("two", np.float32(2))])
    model.opset_import[0].domain = "ai.onnx"
    assert off_cuda(model) == []
