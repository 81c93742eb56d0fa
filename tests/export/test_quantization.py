from pathlib import Path

import pytest
from distill.export.quantization import Setting, choose, quantize, settings

from distill.errors import DistillError

FAST, MIDDLE, SLOW = Setting(), Setting(per_channel=False), Setting(weight_type="QUInt8")
LATENCY = {FAST: 1.0, MIDDLE: 2.0, SLOW: 3.0}


@pytest.fixture
def candidates(tmp_path):
    paths = {setting: tmp_path / f"{number}.onnx" for number, setting in enumerate(LATENCY)}
    for path in paths.values():
        path.write_text("x")
    return paths


def _choose(candidates, scores, max_drop=1.0, reference=0.80):
    asked = []

    def macro_f1_of(path: Path) -> float:
        setting = next(s for s, p in candidates.items() if p == path)
        asked.append(setting)
        return scores[setting]

    chosen, trials = choose(
        candidates, lambda c: {s: LATENCY[s] for s in c}, macro_f1_of, reference, max_drop
    )
    return chosen, trials, asked


def test_the_fastest_setting_within_the_margin_is_kept_and_slower_ones_are_not_scored(candidates):
    chosen, trials, asked = _choose(candidates, {FAST: 0.70, MIDDLE: 0.795, SLOW: 0.80})
    assert chosen == MIDDLE
    assert asked == [FAST, MIDDLE]
    assert [trial.setting for trial in trials] == [FAST, MIDDLE, SLOW]
    assert trials[2].macro_f1 is None


def test_a_better_score_than_the_reference_is_no_drop(candidates):
    assert _choose(candidates, {FAST: 0.85}, max_drop=0.0)[0] == FAST


def test_when_no_setting_holds_the_error_says_by_how_much(candidates):
    with pytest.raises(DistillError, match=r"--max-drop 1: .*loses 4\.00 points .*0\.8000 to 0\.7600"):
        _choose(candidates, {FAST: 0.70, MIDDLE: 0.76, SLOW: 0.75})


def test_reduced_range_is_tried_only_where_the_cpu_lacks_vnni():
    assert not any(setting.reduce_range for setting in settings(fusion=True, vnni=True))
    assert any(setting.reduce_range for setting in settings(fusion=True, vnni=False))
    assert len(settings(True)) == len(set(settings(True)))
    assert not any(setting.fused for setting in settings(fusion=False))


@pytest.mark.parametrize("setting", settings(fusion=False, vnni=False), ids=str)
def test_every_setting_quantizes_the_embedding_table_too(chain, tmp_path, setting):
    import onnx

    quantize(chain.export / "onnx" / "model.onnx", tmp_path / "q.onnx", setting)
    weights = onnx.load(tmp_path / "q.onnx").graph.initializer
    large = [w for w in weights if len(w.dims) == 2 and w.dims[0] * w.dims[1] >= 512]
    assert large and all(w.data_type != onnx.TensorProto.FLOAT for w in large)


def test_every_runtime_computes_the_same_whatever_it_fuses(chain):
    import numpy as np
    import onnxruntime

    path = str(chain.export / "onnx" / "model_quantized.onnx")
    few = onnxruntime.InferenceSession(path, disabled_optimizers=["SkipLayerNormFusion"])
    every = onnxruntime.InferenceSession(path)
    ids = np.arange(5, 25, dtype=np.int64)[None]
    feeds = {node.name: np.ones_like(ids) for node in few.get_inputs()} | {"input_ids": ids}
    np.testing.assert_array_equal(few.run(None, feeds)[0], every.run(None, feeds)[0])
