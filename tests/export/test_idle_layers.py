import numpy as np
import onnx
from distill.export.idle_layers import drop_idle_layers
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def _graph(matrix, outputs=("y",)):
    """x + softmax(x m) w, negated."""
    nodes = [
        helper.make_node("MatMul", ["x", "m"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["product"]),
        helper.make_node("Add", ["x", "product"], ["sum"]),
        helper.make_node("Neg", ["sum"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in outputs],
        [
            numpy_helper.from_array(np.eye(4, dtype=np.float32), "m"),
            numpy_helper.from_array(matrix.astype(np.float32), "w"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _kinds(model):
    return [node.op_type for node in model.graph.node]


def test_what_adds_zero_is_dropped_with_all_that_leads_to_it():
    model = _graph(np.zeros((4, 4)))
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": rows})[0]
    assert drop_idle_layers(model)
    onnx.checker.check_model(model)
    assert _kinds(model) == ["Neg"] and not model.graph.initializer
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, {"x": rows})[0], expected)


def test_what_adds_something_stays():
    matrix = np.zeros((4, 4))
    matrix[2, 1] = 1e-20
    model = _graph(matrix)
    before = model.SerializeToString()
    assert not drop_idle_layers(model)
    assert model.SerializeToString() == before


def test_a_constant_row_never_takes_the_place_of_a_sum():
    model = _graph(np.zeros((4, 4)))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, dtype=np.float32), "row"))
    model.graph.node[3].input[0] = "row"
    assert not drop_idle_layers(model)


def test_a_sum_that_is_the_answer_stays():
    model = _graph(np.zeros((4, 4)), ["y", "sum"])
    assert not drop_idle_layers(model)
    assert _kinds(model) == ["MatMul", "Softmax", "MatMul", "Add", "Neg"]
