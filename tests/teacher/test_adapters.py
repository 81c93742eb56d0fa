import importlib.util
import json

import pytest
import torch
import transformers
from conftest import make_configs, make_tokenizer
from distill.explain.report import ReportOptions
from distill.export.bundle import ExportOptions
from distill.student.options import StudentOptions
from distill.teacher import adapters
from distill.teacher.adapters import add_adapters, in_four_bits, merge_adapters
from distill.teacher.training import TeacherOptions, train_teacher
from transformers import AutoModelForSequenceClassification

from distill import export_student, train_student, write_report
from distill.artifact import read_manifest
from distill.callbacks import ProgressCallback
from distill.errors import DistillError
from distill.models import load_model
from distill.predictions import read_predictions
from distill.trainer import is_new

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "num_labels": 3, "pad_token_id": 0}  # fmt: skip
DECODERS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gemma": transformers.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8),
    "gpt2": transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0
    ),
}
FAMILIES = {**make_configs(2), **DECODERS}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def _classifier(kind):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(FAMILIES[kind]).eval()


def _move(model):
    """As if it had been trained: every adapter adds something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def _logits(model):
    torch.manual_seed(2)
    with torch.no_grad():
        return model(torch.randint(5, 60, (4, 9))).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_start_as_nothing_and_merge_into_what_they_compute(kind):
    model = _classifier(kind)
    names, before = set(model.state_dict()), _logits(model)
    adapted = add_adapters(model, rank=4)
    torch.testing.assert_close(_logits(adapted), before, rtol=0, atol=1e-6)
    _move(adapted)
    expected = _logits(adapted)
    assert (expected - before).abs().max() > 1e-4
    merged = merge_adapters(adapted)
    torch.testing.assert_close(_logits(merged), expected, rtol=0, atol=1e-5)
    assert set(merged.state_dict()) == names
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_trained_is_the_whole_head_and_an_adapter_of_every_layer_below(kind):
    model = _classifier(kind)
    prefix = model.base_model_prefix
    head = sum(p.numel() for name, p in model.named_parameters() if is_new(name, prefix))
    matrices = sum(p.dim() == 2 and not is_new(name, prefix) and "emb" not in name and "wte" not in name
                   and "wpe" not in name and "relative" not in name for name, p in model.named_parameters())  # fmt: skip
    adapted = add_adapters(model, rank=4)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(p.numel() for name, p in trained.items() if ".lora_" not in name) == head
    assert sum(".lora_A" in name for name in trained) == matrices > 0
    assert all(is_new(name, prefix) for name in trained)


def _options(folder, data_file, checkpoint, **changes):
    common = {
        "epochs": 6,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "batch_size": 16,
        "lora": True,
        "lora_rank": 4,
    }
    return TeacherOptions(output=folder / "runs" / "t", data=str(data_file), model=str(checkpoint), **{**common, **changes})  # fmt: skip


def _to_the_report(folder):
    """Student, bundle and report of a teacher; the macro-F1 of every version."""
    places = {name: folder / "runs" / name for name in ("student", "export", "report")}
    common = {"learning_rate": 3e-3, "precision": "fp32", "batch_size": 16}
    train_student(
        StudentOptions(output=places["student"], teacher=folder / "runs" / "t", layers=2, epochs=4, **common)
    )
    export_student(
        ExportOptions(student=places["student"], output=places["export"], int8=True, max_drop=100.0)
    )
    report = write_report(
        ReportOptions(teacher=folder / "runs" / "t", student=places["student"], export=places["export"],
                      output=places["report"], texts=5, explain=0)
    )  # fmt: skip
    return {row["version"]: row["scores"]["macro_f1"] for row in report["versions"]}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_a_teacher_trained_with_adapters_is_an_ordinary_checkpoint(tmp_path, data_file, checkpoint, more):
    manifest = train_teacher(_options(tmp_path, data_file, checkpoint, **more))
    assert manifest.metrics["test"]["macro_f1"] > 0.5
    folder = tmp_path / "runs" / "t"
    assert not any("adapter" in name for name in manifest.files)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    again = train_teacher_logits(folder, manifest)
    kept = read_predictions(folder, "test")["teacher"].logits
    torch.testing.assert_close(again, torch.tensor(kept), rtol=0, atol=1e-4)
    if not more:
        scores = _to_the_report(tmp_path)
        assert scores.keys() == {"teacher", "student", "onnx-fp32", "int8"} and min(scores.values()) > 0.5


def train_teacher_logits(folder, manifest):
    from distill.data import reload_data
    from distill.models import load_tokenizer
    from distill.training import predict_logits

    data = reload_data(manifest.data, manifest.labels)
    model = load_model(str(folder), manifest.labels)
    tokenizer = load_tokenizer(str(folder), manifest.max_length)
    return torch.tensor(predict_logits(model, tokenizer, data.splits["test"], "cpu", "fp32"))


@pytest.mark.slow
def test_an_interrupted_training_of_adapters_resumes_and_ends_the_same(
    tmp_path, data_file, checkpoint, monkeypatch
):
    whole = train_teacher(_options(tmp_path / "whole", data_file, checkpoint))
    original = ProgressCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == state.max_steps // 2 + 2:
            raise KeyboardInterrupt

    options = _options(tmp_path / "half", data_file, checkpoint)
    monkeypatch.setattr(ProgressCallback, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(options)
    monkeypatch.setattr(ProgressCallback, "on_step_end", original)
    resumed = train_teacher(TeacherOptions(**{**vars(options), "resume": True}))
    assert resumed.metrics == whole.metrics


def test_a_model_without_linear_layers_is_refused():
    class Empty(torch.nn.Module):
        base_model_prefix = "body"
        config = transformers.BertConfig()

    with pytest.raises(DistillError, match="no linear layer to adapt"):
        add_adapters(Empty(), rank=4)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["bert", "mpnet", "llama"])
def test_adapters_on_four_bit_weights_merge_into_fp32_weights_that_compute_the_same(kind, tmp_path):
    _classifier(kind).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = load_model(
        str(tmp_path), ["a", "b", "c"], further=lambda config: in_four_bits(config, "cpu", "fp32")
    )
    adapted = add_adapters(model, rank=4).eval()
    _move(adapted)
    expected = _logits(adapted)
    merged = merge_adapters(adapted)
    torch.testing.assert_close(_logits(merged), expected, rtol=0, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    torch.testing.assert_close(
        _logits(load_model(str(tmp_path / "merged"), ["a", "b", "c"])), _logits(merged)
    )


def test_layers_that_have_no_four_bit_form_are_refused():
    with pytest.raises(DistillError, match="a gpt2 have no 4-bit form; use --lora"):
        in_four_bits(FAMILIES["gpt2"], "cpu", "fp32")


@needs_bitsandbytes
@pytest.mark.slow
def test_a_teacher_trained_in_four_bits_is_an_ordinary_checkpoint(tmp_path, data_file, checkpoint):
    train_teacher(_options(tmp_path, data_file, checkpoint, lora=False, qlora=True))
    folder = tmp_path / "runs" / "t"
    manifest = read_manifest(folder, "train-teacher")
    assert manifest.metrics["test"]["macro_f1"] > 0.5
    kept = read_predictions(folder, "test")["teacher"].logits
    torch.testing.assert_close(train_teacher_logits(folder, manifest), torch.tensor(kept), rtol=0, atol=1e-4)
    assert min(_to_the_report(tmp_path).values()) > 0.5


def test_four_bits_without_bitsandbytes_are_refused_in_one_line(tmp_path, data_file, checkpoint, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(DistillError, match=r"distill-onnx\[qlora\]"):
        train_teacher(_options(tmp_path, data_file, checkpoint, qlora=True))
    assert not (tmp_path / "runs").exists()
