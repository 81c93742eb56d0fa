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
