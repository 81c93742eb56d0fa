import numpy as np
import onnx
import onnxruntime
import pytest
from distill.export import cpu, observation
from distill.export.bundle import ExportOptions
from distill.export.draft import Draft
from distill.export.observation import dynamic_uint8, moments, products
from distill.export.quantization import Setting, quantize, spell_products
from distill.export.rounding import (
    DAMPING,
    PAIR,
    bias_of,
    pair_steps,
    round_pairs,
    round_together,
    round_weights,
)
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from distill import export_student
from distill.errors import DistillError

CHANNELS = 150  # more than a block


def _correlated(rows=400, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(rows, 20))
    mixed = hidden @ random.normal(size=(20, CHANNELS))
    return (mixed + 0.1 * random.normal(size=mixed.shape)).astype(np.float32)


@pytest.fixture
def matrix():
    return np.random.default_rng(1).normal(size=(CHANNELS, 7)).astype(np.float32)


def _steps(matrix, limit=15):
    return np.abs(matrix).max(axis=0).astype(np.float64) / limit


def _error(matrix, kept, second):
    return np.trace((matrix - kept).T @ second @ (matrix - kept))


def _one_by_one(matrix, steps, second, limit):
    """Optimal brain quantization's update, with the inverse of what is left computed anew for each row."""
    order = list(np.argsort(-np.diag(second), kind="stable"))
    damped = second + DAMPING * np.diag(second).mean() * np.eye(len(second))
    left, found = matrix.astype(np.float64), np.zeros_like(matrix, dtype=np.float64)
    while order:
        row, *behind = order
        found[row] = np.clip(np.rint(left[row] / steps), -limit, limit)
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        error = (left[row] - found[row] * steps) / inverse[0, 0]
        left[behind] -= np.outer(inverse[1:, 0], error)
        order = behind
    return found


def test_rounding_follows_the_formula(matrix):
    rows = _correlated()
    second = (rows.T @ rows / len(rows)).astype(np.float64)
    found = round_together(matrix, _steps(matrix), second, -15, 15)
    expected = _one_by_one(matrix, _steps(matrix), second, 15)
    # A weight half-way between two steps may go either way.
    assert (found != expected).mean() < 0.01
    error = _error(matrix, found * _steps(matrix), second)
    assert error == pytest.approx(_error(matrix, expected * _steps(matrix), second), rel=0.05)


def test_products_are_nearer_than_with_each_weight_rounded_for_itself(matrix):
    rows = _correlated()
    second = (rows.T @ rows / len(rows)).astype(np.float64)
    steps = _steps(matrix)
    together = round_together(matrix, steps, second, -15, 15) * steps
    alone = np.rint(matrix / steps) * steps
    assert _error(matrix, together, second) < 0.2 * _error(matrix, alone, second)


def test_inputs_that_do_not_vary_together_leave_each_weight_to_itself(matrix):
    steps = _steps(matrix)
    nothing = np.zeros((CHANNELS, CHANNELS))
    for second in (nothing, nothing - 1e-10 * np.eye(CHANNELS), np.diag(np.arange(1.0, CHANNELS + 1))):
        np.testing.assert_array_equal(round_together(matrix, steps, second, -15, 15), np.rint(matrix / steps))


def test_a_zero_that_is_not_0_and_one_step_for_all(matrix):
    step, zero = np.asarray(np.abs(matrix).max() / 100), np.asarray(120.0)
    found = round_together(matrix, step, np.zeros((CHANNELS, CHANNELS)), 0, 255, zero)
    np.testing.assert_array_equal(found, np.clip(np.rint(matrix / step + zero), 0, 255))


def test_a_covariance_that_is_none_gets_more_damping(matrix):
    second = np.diag(np.where(np.arange(CHANNELS) == 3, -2.0, 1.0))
    assert np.isfinite(round_together(matrix, _steps(matrix), second, -15, 15)).all()


def _largest_pair(rounded):
    pairs = np.pad(rounded.astype(int), ((0, len(rounded) % 2), (0, 0))).reshape(-1, 2, rounded.shape[1])
    same = np.sign(pairs[:, 0]) * np.sign(pairs[:, 1]) >= 0
    return np.abs(np.where(same, pairs.sum(axis=1), 0)).max()


@pytest.mark.parametrize("channels", [CHANNELS, CHANNELS - 1])
def test_neighbours_never_overflow_16_bits_and_keep_more_bits_than_7(matrix, channels):
    matrix = matrix[:channels]
    matrix[4:6] *= 2  # two large neighbours
    rows = _correlated()[:, :channels]
    second = (rows.T @ rows / len(rows)).astype(np.float64)
    steps = pair_steps(matrix)
    alone = round_pairs(matrix, steps)
    together = round_together(matrix, steps, second, -127, 127, paired=True)
    for found in (alone, together):
        assert _largest_pair(found) <= PAIR and 255 * PAIR < 2**15
        assert np.abs(found).max() > 64
    # As exact as a step allows; one that is at the bound with its neighbour may give way by another.
    assert np.abs(matrix - alone * steps).max() <= 1.5 * steps.max()
    assert (np.abs(matrix - alone * steps) <= 0.51 * steps).mean() > 0.99
    seven = np.abs(matrix).max(axis=0) / 63
    assert (steps <= seven).all() and steps.mean() < 0.85 * seven.mean()
    bits7 = round_together(matrix, seven, second, -64, 64) * seven
    assert _error(matrix, together * steps, second) < 0.7 * _error(matrix, bits7, second)


def test_products_of_bounded_pairs_are_exact_on_every_cpu(matrix, tmp_path):
    matrix[4:6] = 3.0
    model = _model([helper.make_node("MatMul", ["x", "w"], ["y"], name="y")], {"w": matrix}, ["y"])
    onnx.save(model, tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", Setting())
    rows = np.abs(_correlated(rows=64))
    for rounded in (False, True):
        graph = onnx.load(tmp_path / "int8.onnx")
        if rounded:
            round_weights(graph, products(model), moments([("x", rows)], dynamic_uint8))
        stored = next(entry for entry in graph.graph.initializer if entry.name == "w_quantized")
        weights = numpy_helper.to_array(stored)
        assert np.abs(weights.astype(int)).max() > 64 and _largest_pair(weights) <= PAIR
        path = tmp_path / f"{rounded}.onnx"
        onnx.save(graph, path)
        run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run
        exact = ReferenceEvaluator(graph).run(None, {"x": rows})[0]
        np.testing.assert_allclose(run(None, {"x": rows})[0], exact, rtol=1e-4, atol=1e-3)


def test_a_gemm_is_spelt_as_a_product_and_an_addition(matrix):
    bias = np.ones(7, dtype=np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "bias"], ["a"], transB=1),
        helper.make_node("Gemm", ["x", "v", "bias"], ["b"]),
        helper.make_node("Gemm", ["x", "v", "bias"], ["c"], alpha=2.0),
        helper.make_node("Gemm", ["x", "v"], ["d"]),
    ]
    constants = {"w": np.ascontiguousarray(matrix.T), "v": matrix, "bias": bias}
    model = _model(nodes, constants, ["a", "b", "c", "d"])
    spelt = onnx.ModelProto()
    spelt.CopyFrom(model)
    spell_products(spelt)
    assert [node.op_type for node in spelt.graph.node] == ["MatMul", "Add", "MatMul", "Add", "Gemm", "Gemm"]
    rows = _correlated(rows=5)
    sides = (ReferenceEvaluator(one).run(None, {"x": rows}) for one in (model, spelt))
    for wanted, found in zip(*sides, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_moments_that_are_no_numbers_leave_each_weight_to_itself(matrix):
    steps = _steps(matrix)
    found = round_together(matrix, steps, np.full((CHANNELS, CHANNELS), np.nan), -15, 15)
    np.testing.assert_array_equal(found, np.rint(matrix / steps))


def test_a_file_is_rounded_once_though_settings_are_chosen_twice(chain, tmp_path, monkeypatch):
    def times(self, files, provider="cpu"):
        return {setting: 1.2 if setting.fused else 1.0 for setting in files}

    def choose_twice(candidates, *rest):
        found = original(candidates, *rest)
        calls.append(found)
        if len(calls) == 1:
            raise DistillError("none holds")
        return found

    def note(quantized, *rest):
        assert not any("shifted" in entry.name for entry in quantized.graph.initializer)
        rounded.append(quantized.SerializeToString(deterministic=True))
        round_weights(quantized, *rest)

    calls, rounded, original = [], [], cpu.choose
    monkeypatch.setattr(Draft, "latency", times)
    monkeypatch.setattr(cpu, "choose", choose_twice)
    monkeypatch.setattr(cpu, "round_weights", note)
    export_student(ExportOptions(chain.student, tmp_path / "b", int8=True, max_drop=100.0))
    assert len(calls) == 2 and len(rounded) == len(set(rounded)) > 0
    onnx.checker.check_model(onnx.load(tmp_path / "b" / "onnx" / "model_quantized.onnx"))


def test_moments_are_those_of_all_rows_whatever_the_mean():
    rows = _correlated(rows=3000) + np.where(np.arange(CHANNELS) == 5, 1e3, 0).astype(np.float32)
    texts = np.split(rows, range(50, 3000, 50))
    found = moments((("x", text) for text in texts), lambda name, text: text + 1)["x"]
    np.testing.assert_allclose(found.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(found.quantized_mean, found.mean + 1, rtol=1e-6)
    expected = np.cov(rows.astype(np.float64).T, bias=True)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((found.covariance - expected) / scale).max() < 1e-4
    assert found.second()[5, 5] > 1e6


def test_no_more_tokens_are_observed_than_are_needed(chain, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(observation, "TOKENS", 20)
    original = observation.channel_ranges

    def count(observed):
        observed = list(observed)
        seen.append([len(rows) for name, rows in observed if name == observed[0][0]])
        return original(observed)

    monkeypatch.setattr(cpu, "channel_ranges", count)
    export_student(ExportOptions(chain.student, tmp_path / "b", int8=True, max_drop=100.0))
    assert seen
    for rows in seen:
        assert sum(rows) >= 20 > sum(rows[:-1])


def test_dynamic_steps_are_the_operators():
    rows = _correlated(rows=6)
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    model = _model([node, back], {}, ["y"])
    for values in (rows, np.abs(rows), -np.abs(rows), np.zeros_like(rows)):
        expected = ReferenceEvaluator(model).run(None, {"x": values})[0]
        np.testing.assert_allclose(dynamic_uint8("x", values), expected, rtol=1e-5, atol=1e-6)


def _model(nodes, constants, outputs):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", CHANNELS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("setting", [Setting(), Setting(False, False, "QUInt8")])
def test_the_mean_of_a_product_is_kept_and_a_shared_bias_is_corrected_for_each(matrix, tmp_path, setting):
    """Two products with one bias, and a third with none."""
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"], name="a"),
        helper.make_node("Add", ["a", "bias"], ["left"], name="left"),
        helper.make_node("MatMul", ["x", "second"], ["b"], name="b"),
        helper.make_node("Add", ["bias", "b"], ["right"], name="right"),
        helper.make_node("MatMul", ["x", "third"], ["bare"], name="c"),
    ]
    bias = np.linspace(-1, 1, 7).astype(np.float32)
    constants = {"first": matrix, "second": matrix[::-1].copy(), "third": -matrix, "bias": bias}
    model = _model(nodes, constants, ["left", "right", "bare"])
    onnx.save(model, tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", setting)
    rows = np.abs(_correlated(rows=64))  # none is left out, and zero is far off
    plain = onnx.load(tmp_path / "int8.onnx")
    rounded = onnx.load(tmp_path / "int8.onnx")
    round_weights(rounded, products(model), moments([("x", rows)], dynamic_uint8))
    onnx.checker.check_model(rounded)
    expected = ReferenceEvaluator(model).run(None, {"x": rows})
    before, after = (ReferenceEvaluator(graph).run(None, {"x": rows}) for graph in (plain, rounded))
    for wanted, old, new in zip(expected, before, after, strict=True):
        assert np.square(new - wanted).mean() < np.square(old - wanted).mean()
    for wanted, new in zip(expected[:2], after[:2], strict=True):
        np.testing.assert_allclose(new.mean(axis=0), wanted.mean(axis=0), atol=1e-3)
    assert "bias" not in {entry.name for entry in rounded.graph.initializer}


@pytest.mark.parametrize(
    ("kind", "inputs", "place"),
    [
        ("Add", ["a", "row"], 1),
        ("Add", ["row", "a"], 0),
        ("Add", ["a", "one"], 1),
        ("Add", ["a", "other"], None),
        ("Add", ["a", "rows"], None),
        ("Mul", ["a", "row"], None),
        ("BiasGelu", ["a", "row"], 1),
        ("SkipLayerNormalization", ["a", "x", "gamma", "beta", "row"], 4),
        ("SkipLayerNormalization", ["x", "a", "gamma", "beta", "row"], 4),
        ("SkipLayerNormalization", ["a", "x", "gamma", "row"], None),
    ],
)
def test_a_bias_is_where_the_operator_has_it(kind, inputs, place):
    reader = helper.make_node(kind, inputs, ["y"], name="reader")
    rows = {"row": (7,), "one": (1,), "other": (5,), "rows": (2, 7), "gamma": (7,), "beta": (7,)}
    product = helper.make_node("MatMul", ["x", "w"], ["a"])
    constants = {name: np.ones(shape, dtype=np.float32) for name, shape in rows.items()}
    found = bias_of(_model([product, reader], constants, ["y"]).graph, "a", 7)
    assert found == (None if place is None else (reader, place))


@pytest.mark.parametrize("kind", ["Attention", "QAttention"])
def test_the_bias_of_an_attention_is_its_own_input(kind):
    node = helper.make_node(kind, ["x", "w", "row", "mask"], ["y"])
    constants = {"row": np.ones(21, dtype=np.float32)}
    after = helper.make_node("Add", ["y", "row"], ["z"])
    assert bias_of(_model([node, after], constants, ["z"]).graph, "y", 21) == (node, 2)


def test_what_others_read_too_has_no_bias():
    add = helper.make_node("Add", ["a", "row"], ["y"])
    constants = {"row": np.ones(7, dtype=np.float32)}
    other = helper.make_node("Neg", ["a"], ["b"])
    assert bias_of(_model([add, other], constants, ["y", "b"]).graph, "a", 7) is None
    assert bias_of(_model([add], constants, ["y", "a"]).graph, "a", 7) is None


def test_moments_that_are_no_numbers_leave_the_bias_as_it_is(matrix, tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="a"),
        helper.make_node("Add", ["a", "row"], ["y"], name="y"),
    ]
    model = _model(nodes, {"w": matrix, "row": np.ones(7, dtype=np.float32)}, ["y"])
    onnx.save(model, tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", Setting())
    graph = onnx.load(tmp_path / "int8.onnx")
    rows = np.full((3, CHANNELS), np.nan, dtype=np.float32)
    round_weights(graph, products(model), moments([("x", rows)], lambda name, values: values))
    kept = {entry.name: numpy_helper.to_array(entry) for entry in graph.graph.initializer}
    np.testing.assert_array_equal(kept["row"], 1)
    assert not any("shifted" in name for name in kept)


def test_a_matrix_that_two_products_share_is_rounded_once_for_both(matrix, tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="a"),
        helper.make_node("Neg", ["x"], ["turned"]),
        helper.make_node("MatMul", ["turned", "w"], ["b"], name="b"),
    ]
    model = _model(nodes, {"w": matrix}, ["a", "b"])
    onnx.save(model, tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", Setting())
    rows = _correlated(rows=64)
    rounded = onnx.load(tmp_path / "int8.onnx")
    observed = [("x", rows), ("turned", -rows)]
    round_weights(rounded, products(model), moments(observed, dynamic_uint8))
    a, b = ReferenceEvaluator(rounded).run(None, {"x": rows})
    expected = rows @ matrix
    for found in (a, -b):
        assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()


def test_the_bundle_says_how_far_its_int8_logits_are_off(chain, tmp_path):
    found = export_student(ExportOptions(chain.student, tmp_path / "b", int8=True, max_drop=100.0)).details[
        "int8"
    ]
    chosen = next(trial for trial in found["trials"] if trial["setting"] == found["setting"])
    # None where rounding together, on the few texts of a test, brings nothing.
    assert (found["rounded_logit_difference"] or 0.0) < chosen["mean_logit_difference"]
    assert not (tmp_path / "b" / "onnx" / "observed.onnx").exists()
