from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from distill.export import quantization
from distill.export.quantization import Setting, choose, quantize, settings
from onnx import TensorProto, helper, numpy_helper

from distill.errors import DistillError

FAST, MIDDLE, SLOW = Setting(), Setting(per_channel=False), Setting(weight_type="QUInt8")
NEAR = Setting(smooth=True)
LATENCY = {FAST: 1.0, NEAR: 1.05, MIDDLE: 2.0, SLOW: 3.0}
DIFFERENCE = {FAST: 0.08, NEAR: 0.02, MIDDLE: 0.01, SLOW: 0.01}


@pytest.fixture
def candidates(tmp_path):
    paths = {setting: tmp_path / f"{number}.onnx" for number, setting in enumerate(LATENCY)}
    for path in paths.values():
        path.write_text("x")
    return paths


def _choose(candidates, scores, max_drop=1.0, reference=0.80):
    settings = {path: setting for setting, path in candidates.items()}
    asked = []

    def macro_f1_of(path: Path) -> float:
        asked.append(settings[path])
        return scores[settings[path]]

    chosen, trials = choose(
        candidates, LATENCY, lambda path: DIFFERENCE[settings[path]], macro_f1_of, reference, max_drop
    )
    return chosen, trials, asked


def test_the_fastest_setting_within_the_margin_is_kept_and_slower_ones_are_not_scored(candidates):
    chosen, trials, asked = _choose(candidates, {FAST: 0.70, NEAR: 0.70, MIDDLE: 0.795, SLOW: 0.80})
    assert chosen == MIDDLE
    assert asked == [NEAR, FAST, MIDDLE]
    assert [trial.setting for trial in trials] == [FAST, NEAR, MIDDLE, SLOW]
    assert trials[3].macro_f1 is None


def test_of_settings_about_as_fast_the_one_nearest_to_fp32_is_kept(candidates):
    chosen, trials, asked = _choose(candidates, {FAST: 0.80, NEAR: 0.795})
    assert chosen == NEAR
    assert asked == [NEAR]
    assert [trial.mean_logit_difference for trial in trials] == [0.08, 0.02, None, None]


def test_the_nearest_to_fp32_is_not_kept_where_it_loses_too_much(candidates):
    chosen, _, asked = _choose(candidates, {FAST: 0.795, NEAR: 0.70})
    assert chosen == FAST
    assert asked == [NEAR, FAST]


def test_a_better_score_than_the_reference_is_no_drop(candidates):
    assert _choose(candidates, {FAST: 0.85, NEAR: 0.79}, max_drop=0.0)[0] == FAST
    assert _choose(candidates, {FAST: 0.80, NEAR: 0.85}, max_drop=0.0)[0] == NEAR


def test_when_no_setting_holds_the_error_says_by_how_much(candidates):
    with pytest.raises(DistillError, match=r"--max-drop 1: .*loses 4\.00 points .*0\.8000 to 0\.7600"):
        _choose(candidates, {FAST: 0.70, NEAR: 0.70, MIDDLE: 0.76, SLOW: 0.75})


def test_settings_differ_and_are_of_graphs_that_there_are():
    assert len(settings(True)) == len(set(settings(True)))
    assert not any(setting.fused for setting in settings(fusion=False))


@pytest.mark.parametrize("setting", settings(fusion=False), ids=str)
def test_every_setting_quantizes_the_embedding_table_too(chain, tmp_path, setting, monkeypatch):
    monkeypatch.setattr(quantization, "MIN_ROWS", 20)
    quantize(chain.export / "onnx" / "model.onnx", tmp_path / "q.onnx", setting)
    weights = onnx.load(tmp_path / "q.onnx").graph.initializer
    large = [w for w in weights if len(w.dims) == 2 and w.dims[0] * w.dims[1] >= 512]
    assert large and all(w.data_type != onnx.TensorProto.FLOAT for w in large)


def test_a_row_of_an_embedding_table_is_exact_to_half_a_step_of_its_own(monkeypatch):
    monkeypatch.setattr(quantization, "MIN_ROWS", 4)
    table = np.array([[1.0, -0.3], [100.0, 3.0], [0.001, 0.0004], [0.0, 0.0]], dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    quantization._quantize_tables(model)
    assert {e.name: e.data_type for e in model.graph.initializer}["table_int8"] == TensorProto.INT8
    found = onnx.reference.ReferenceEvaluator(model).run(None, {"ids": np.arange(4)[None]})[0][0]
    steps = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - table) <= steps / 2 + 1e-9).all()


def test_a_gather_of_columns_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(quantization, "MIN_ROWS", 4)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "ids"], ["y"], axis=1)],
            "g",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.ones((8, 4), dtype=np.float32), "table")],
        )
    )
    quantization._quantize_tables(model)
    assert [node.op_type for node in model.graph.node] == ["Gather"]


def test_every_runtime_computes_the_same_whatever_it_fuses(chain):

    path = str(chain.export / "onnx" / "model_quantized.onnx")
    few = onnxruntime.InferenceSession(path, disabled_optimizers=["SkipLayerNormFusion"])
    every = onnxruntime.InferenceSession(path)
    ids = np.arange(5, 25, dtype=np.int64)[None]
    feeds = {node.name: np.ones_like(ids) for node in few.get_inputs()} | {"input_ids": ids}
    np.testing.assert_array_equal(few.run(None, feeds)[0], every.run(None, feeds)[0])
