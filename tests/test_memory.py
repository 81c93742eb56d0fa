import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_configs
from distill.teacher.training import TeacherOptions, train_teacher
from transformers import AutoModelForSequenceClassification, BertConfig

from distill import memory, training
from distill.errors import DistillError
from distill.memory import Footprint, Plan, measure, plan, smaller
from distill.predictions import read_predictions
from distill.trainer import LossTrainer

GIB = 2**30
# Of a model of 110 million parameters at 256 tokens, about.
BASE = Footprint(weights=GIB // 2, trained=2**27, fixed=0, text=GIB // 4, layer=GIB // 48, outside=GIB // 64)


def _inputs(length):
    def batch(texts):
        ids = torch.arange(5, 5 + texts * length).reshape(texts, length) % 50
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return batch


@pytest.fixture(autouse=True)
def no_bitsandbytes(monkeypatch):
    monkeypatch.setattr(memory, "find_spec", lambda name: None)


@pytest.mark.parametrize("kind", make_configs(2))
def test_what_a_text_keeps_grows_with_it_and_leaves_the_model_as_it_was(kind):
    model = AutoModelForSequenceClassification.from_config(make_configs(2)[kind]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    short, long = measure(model, _inputs(8), "fp32"), measure(model, _inputs(32), "fp32")
    assert 0 < short.text < long.text
    assert 0 < long.outside + long.layer <= long.text
    assert not model.training and (torch.get_rng_state() == state).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_kept_is_what_autograd_keeps():
    """A linear layer keeps its input, and GELU its own: counted by hand."""

    class Small(torch.nn.Module):
        config = BertConfig(vocab_size=50)
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(50, 16)
            self.layer = torch.nn.Linear(16, 64)

        def forward(self, input_ids, attention_mask):
            return torch.nn.functional.gelu(self.layer(self.table(input_ids)))

    found = measure(Small(), _inputs(10), "fp32")
    ids, rows, hidden = 10 * 8, 10 * 16 * 4, 10 * 64 * 4
    assert found.text == ids + rows + hidden
    assert found.weights == (50 * 16 + 16 * 64 + 64) * 4 and found.trained == 50 * 16 + 16 * 64 + 64


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", ["2,128,32,0", "6,384,16,1"])
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(case):
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}
    shown = subprocess.run(
        [sys.executable, script, "--case", case], check=True, capture_output=True, text=True, cwd=script.parent,
        env={**os.environ, **allocator},
    )  # fmt: skip
    assert 0.8 < json.loads(shown.stdout)["ratio"] < 1.2


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (32, (32, 1, False, "adamw")),
        (8, (16, 2, False, "adamw")),
        (4.1, (8, 4, False, "adamw")),
        (3, (32, 1, True, "adamw")),
        (2.1, (2, 16, True, "adamw")),
    ],
)
def test_a_step_is_cut_as_little_as_the_memory_allows(gib, expected):
    found = plan(BASE, 32, 1, False, int(gib * GIB))
    assert (found.micro_batch, found.accumulation, found.recompute, found.optimizer) == expected
    assert found.peak <= gib * GIB


def test_an_8_bit_optimizer_is_the_last_resort_and_a_resumed_run_keeps_its_own(monkeypatch):
    monkeypatch.setattr(memory, "find_spec", lambda name: object())
    assert plan(BASE, 32, 1, False, 32 * GIB).optimizer == "adamw"
    assert plan(BASE, 32, 1, False, int(2.1 * GIB)).optimizer == "adamw"
    assert plan(BASE, 32, 1, False, int(1.9 * GIB)).optimizer == "adamw_8bit"
    assert plan(BASE, 32, 1, False, 32 * GIB, "adamw_8bit").optimizer == "adamw_8bit"
    with pytest.raises(DistillError):
        plan(BASE, 32, 1, False, int(1.9 * GIB), "adamw")
    tables = replace(BASE, tables=BASE.trained // 4)
    assert (
        tables.peak(1, optimizer="adamw_8bit") - BASE.peak(1, optimizer="adamw_8bit") == 6 * BASE.trained // 4
    )


def test_a_model_that_cannot_compute_layers_again_is_not_asked_to():
    with pytest.raises(DistillError):
        plan(replace(BASE, recomputable=False), 32, 1, False, int(2.1 * GIB))


def test_what_was_asked_for_is_kept():
    assert plan(BASE, 32, 2, True, 32 * GIB) == Plan(32, 2, True, "adamw", BASE.peak(32, 2, True))
    assert plan(BASE, 12, 1, False, 4 * GIB) == Plan(12, 1, True, "adamw", BASE.peak(12, 1, True))


def test_a_model_that_cannot_fit_is_refused_with_what_it_takes():
    with pytest.raises(
        DistillError, match=r"takes 2\.0 GiB even one text at a time, and 1\.0 GiB are free; use --lora"
    ):
        plan(BASE, 32, 1, False, GIB)


def test_batches_are_halved_until_one_text_is_left_and_then_layers_are_computed_again():
    found = Plan(12, 2)
    seen = []
    for _ in range(4):
        found = smaller(found, "Teacher")
        seen.append((found.micro_batch, found.accumulation, found.recompute))
    assert seen == [(6, 4, False), (3, 8, False), (1, 24, False), (1, 24, True)]
    for last, recomputable in ((found, True), (Plan(1, 2), False)):
        with pytest.raises(DistillError, match="out of memory with one text at a time"):
            smaller(last, "Teacher", recomputable)


def _options(folder, data_file, checkpoint, **changes):
    common = {"epochs": 2, "learning_rate": 1e-3, "precision": "fp32", "batch_size": 16, "dropout": 0.0}
    return TeacherOptions(
        output=folder / "runs" / "t", data=str(data_file), model=str(checkpoint), **{**common, **changes}
    )


def _logits(folder):
    return read_predictions(folder / "runs" / "t", "test")["teacher"].logits


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4, 20], ids=["first step", "first epoch", "after a checkpoint"])
def test_out_of_memory_is_tried_again_in_smaller_batches_and_ends_the_same(
    tmp_path, data_file, checkpoint, monkeypatch, caplog, at
):
    train_teacher(_options(tmp_path / "whole", data_file, checkpoint))
    original, calls = LossTrainer.compute_loss, []

    def fails(self, model, inputs, *arguments, **named):
        if model.training:
            calls.append(len(inputs["labels"]))
            if len(calls) == at:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, model, inputs, *arguments, **named)

    monkeypatch.setattr(LossTrainer, "compute_loss", fails)
    monkeypatch.setattr(training, "KEEPING_START", ("cpu",))
    train_teacher(_options(tmp_path / "cut", data_file, checkpoint))
    assert calls[at - 1] == 16 and set(calls[at:]) == {8}
    assert "out of memory; again with 8 texts at a time" in caplog.text
    np.testing.assert_allclose(_logits(tmp_path / "cut"), _logits(tmp_path / "whole"), atol=1e-3)


@pytest.mark.slow
def test_a_training_is_cut_to_the_memory_that_there_is_and_says_so(
    tmp_path, data_file, checkpoint, monkeypatch, caplog
):
    caplog.set_level("INFO")
    train_teacher(_options(tmp_path / "whole", data_file, checkpoint))
    seen = []
    original = LossTrainer.compute_loss
    monkeypatch.setattr(
        LossTrainer, "compute_loss", lambda self, model, inputs, *a, **k: (
            seen.append(len(inputs["labels"])) if model.training else None,
            original(self, model, inputs, *a, **k),
        )[1],
    )  # fmt: skip
    footprint = Footprint(weights=0, trained=0, fixed=0, text=100, layer=0, outside=100)
    monkeypatch.setattr(training, "measure", lambda *arguments: footprint)
    monkeypatch.setattr(training, "available", lambda device: 800)
    found = train_teacher(_options(tmp_path / "cut", data_file, checkpoint))
    assert max(seen) <= 8 and "texts at a time" in caplog.text and "GiB by estimate" in caplog.text
    np.testing.assert_allclose(_logits(tmp_path / "cut"), _logits(tmp_path / "whole"), atol=1e-3)
    assert found.details["steps"] == {
        "micro_batch": 8,
        "accumulation": 2,
        "recompute": False,
        "optimizer": "adamw",
        "processes": 1,
        "sharded": False,
    }


@pytest.mark.slow
def test_texts_that_are_too_much_to_measure_are_taken_one_at_a_time(
    tmp_path, data_file, checkpoint, monkeypatch, caplog
):
    def fails(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "measure", fails)
    monkeypatch.setattr(training, "available", lambda device: 1)
    found = train_teacher(_options(tmp_path, data_file, checkpoint, max_steps=2))
    assert found.details["steps"]["micro_batch"] == 1 and found.details["steps"]["accumulation"] == 16
    assert "trying one at a time" in caplog.text
