import json

import numpy as np
import pytest
import torch
from conftest import make_configs, make_tokenizer
from distill.export import bundle, cpu
from distill.export.bundle import ExportOptions
from distill.export.draft import Draft
from distill.export.onnx import default_exporter
from distill.export.verification import compare, require_parity
from export.graphs import export_tiny, run_graph

from distill import Classifier, export_student
from distill.artifact import read_manifest, verify
from distill.errors import DistillError
from distill.predictions import read_predictions

FILES = {
    "README.md", "config.json", "distill.json", "onnx/model.onnx", "onnx/model_quantized.onnx",
    "predictions.parquet", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
if default_exporter() == "optimum":  # transformers 5 has it in tokenizer_config.json
    FILES.add("special_tokens_map.json")


def test_the_bundle_holds_what_the_hub_and_optimum_expect_and_nothing_else(chain):
    found = {path.relative_to(chain.export).as_posix() for path in chain.export.rglob("*") if path.is_file()}
    assert found == FILES
    manifest = read_manifest(chain.export, "export")
    verify(chain.export, manifest)
    assert set(manifest.files) == FILES - {"distill.json"}


def test_the_manifest_holds_parity_settings_and_no_training_text(chain):
    manifest = read_manifest(chain.export, "export")
    assert manifest.details["parity"]["max_logit_difference"] < 1e-3
    assert manifest.details["parity"]["label_agreement"] == 1.0
    assert manifest.details["parity"]["texts"] == 30
    assert len(manifest.details["int8"]["trials"]) >= 4
    assert "findings" not in manifest.data
    assert json.loads((chain.export / "config.json").read_text())["id2label"]["0"] == "negative"


def test_saved_predictions_are_what_the_classifier_answers(chain):
    from distill.data import load_data

    texts = list(load_data(str(chain.data), quiet=True).splits["test"]["text"])
    saved = read_predictions(chain.export, "test")
    assert list(saved) == ["onnx-fp32", "int8"]
    np.testing.assert_allclose(
        Classifier(chain.export).predict_logits(texts), saved["int8"].logits, atol=1e-6
    )
    fp32 = Classifier(chain.export, file="onnx/model.onnx").predict_logits(texts)
    np.testing.assert_allclose(fp32, saved["onnx-fp32"].logits, atol=1e-6)


def test_without_int8_the_cpu_gets_the_fp32_file(chain, tmp_path):
    manifest = export_student(ExportOptions(student=chain.student, output=tmp_path / "b"))
    assert manifest.details["files"]["cpu"] == "onnx/model.onnx"
    assert not (tmp_path / "b" / "onnx" / "model_quantized.onnx").exists()
    assert Classifier(tmp_path / "b").predict(["lovely"])


def test_an_export_that_loses_too_much_fails_and_leaves_nothing(chain, tmp_path, monkeypatch):
    scores = iter([0.9] + [0.5] * 50)
    monkeypatch.setattr(Draft, "macro_f1", lambda self, logits: next(scores))
    with pytest.raises(DistillError, match=r"loses 40\.00 points"):
        export_student(ExportOptions(student=chain.student, output=tmp_path / "b", int8=True))
    assert list(tmp_path.iterdir()) == []


def test_of_the_slower_order_of_fusion_and_quantization_one_setting_alone_is_made(
    chain, tmp_path, monkeypatch
):
    def times(self, files, provider="cpu"):
        return {setting: 1.0 if setting.fused else 1.2 for setting in files}

    monkeypatch.setattr(Draft, "latency", times)
    options = ExportOptions(student=chain.student, output=tmp_path / "b", int8=True, max_drop=100.0)
    trials = export_student(options).details["int8"]["trials"]
    assert [trial["setting"]["fused"] for trial in trials if "latency_ms" in trial].count(False) == 1
    assert sum(trial["setting"]["fused"] for trial in trials) >= 3


def test_the_other_settings_of_the_slower_order_are_made_where_none_of_the_faster_one_holds(
    chain, tmp_path, monkeypatch
):
    def times(self, files, provider="cpu"):
        return {setting: 1.2 if setting.fused else 1.0 for setting in files}

    def choose(candidates, *rest):
        if [setting.fused for setting in candidates].count(True) == 1:
            raise DistillError("none holds")
        return original(candidates, *rest)

    original = cpu.choose
    monkeypatch.setattr(Draft, "latency", times)
    monkeypatch.setattr(cpu, "choose", choose)
    options = ExportOptions(student=chain.student, output=tmp_path / "b", int8=True, max_drop=100.0)
    trials = [trial["setting"]["fused"] for trial in export_student(options).details["int8"]["trials"]]
    assert trials.count(True) >= 3 and trials.count(False) >= 3


@pytest.mark.parametrize("step", ["export_fp32", "write_int8", "write_predictions"])
def test_an_interrupted_export_leaves_nothing(chain, tmp_path, monkeypatch, step):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_student(ExportOptions(student=chain.student, output=tmp_path / "b", int8=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_of_the_shortest_texts_is_exported(family, tmp_path):
    config = make_configs(2)[family]
    config.max_position_embeddings = 8 + (2 if family == "roberta" else 0)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    graph, model = export_tiny(config, tmp_path, tokenizer)
    for length in (3, 8):
        ids = np.arange(5, 5 + length)[None]
        with torch.no_grad():
            expected = model(torch.tensor(ids)).logits
        np.testing.assert_allclose(run_graph(graph, ids, np.ones_like(ids))[0], expected, atol=1e-4)


def test_a_graph_that_differs_from_pytorch_is_refused():
    reference, labels = np.zeros((4, 2), dtype=np.float32), np.zeros(4, dtype=np.int64)
    require_parity(compare(reference, reference + 1e-4, labels))
    with pytest.raises(DistillError, match=r"by 0\.5 in a logit"):
        require_parity(compare(reference, reference + 0.5, labels))
    with pytest.raises(DistillError):
        require_parity(compare(reference, reference * np.nan, labels))
