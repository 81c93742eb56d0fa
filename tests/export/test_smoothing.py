import numpy as np
import onnx
import pytest
from distill.export.observation import products
from distill.export.smoothing import ALPHA, smooth, smoothing_scales
from onnx import TensorProto, helper, numpy_helper


def _two_products(weights):
    """x through two matrices, as query and key of an attention are."""
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}_product"]) for name in weights]
    nodes.append(helper.make_node("Concat", [node.output[0] for node in nodes], ["y"], axis=-1))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    return {name: random.normal(size=(4, 3)).astype(np.float32) for name in ("query", "key")}


RANGES = np.array([[-1.0, -2.0, 0.0, -100.0], [0.5, 1.0, 1.5, 50.0]], dtype=np.float32)


def test_scales_are_those_of_the_formula(weights):
    scales = smoothing_scales(RANGES, weights.values())
    largest = np.max([np.abs(matrix).max(axis=1) for matrix in weights.values()], axis=0)
    expected = np.array([1.0, 2.0, 1.5, 100.0]) ** ALPHA / largest ** (1 - ALPHA)
    np.testing.assert_allclose(scales / scales[0], expected / expected[0], rtol=1e-5)
    assert np.log(scales).mean() == pytest.approx(0, abs=1e-6)


def test_a_smoothed_graph_computes_the_same_with_smaller_outliers(weights):
    model = _two_products(weights)
    smoothed = smooth(model, {"x": RANGES})
    assert [node.op_type for node in smoothed.graph.node] == ["Mul", "MatMul", "MatMul", "Concat"]
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32) * [1, 2, 1, 100]
    run = onnx.reference.ReferenceEvaluator
    given = {"x": x.astype(np.float32)}
    np.testing.assert_allclose(run(smoothed).run(None, given)[0], run(model).run(None, given)[0], rtol=1e-4)
    divided = next(e for e in smoothed.graph.initializer if e.name == "x_smoothing")
    magnitudes = np.abs(RANGES).max(axis=0) * numpy_helper.to_array(divided)
    assert magnitudes.max() / np.median(magnitudes) < 8 < 100 / 1.75
    assert {entry.name for entry in smoothed.graph.initializer} == {
        "x_smoothing", "query_product_weight", "key_product_weight",
    }  # fmt: skip


def test_without_outliers_there_is_nothing_to_smooth(weights):
    assert smooth(_two_products(weights), {"x": np.array([[-1.0] * 4, [1.0] * 4], np.float32)}) is None


def test_products_are_those_with_constant_matrices(weights):
    assert [node.output[0] for node, _ in products(_two_products(weights))] == [
        "query_product",
        "key_product",
    ]
