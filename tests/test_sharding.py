"""A teacher in parts, one for each of two processes: FSDP over gloo."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_rows, write_csv
from distill.student.options import StudentOptions
from distill.teacher.training import TeacherOptions
from safetensors.numpy import load_file

from distill import DistillError, train_student, train_teacher

# Trains as DDP does, then in parts, then in parts but broken off and resumed. accelerate does FSDP on GPUs
# alone, though PyTorch does it on CPUs too; here it is told to.
WORKER = """
import logging, os, sys
import numpy as np
from dataclasses import replace
from pathlib import Path
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from distill import processes, train_teacher
from distill import training as all_training
from distill.teacher import training
from distill.teacher.training import TeacherOptions
from distill.trainer import LossTrainer
from torch.distributed.tensor import DTensor

start = AcceleratorState.__init__

def on_a_cpu_too(self, *args, fsdp_plugin=None, **kwargs):
    start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type

AcceleratorState.__init__ = on_a_cpu_too
training.check_sharding = lambda device: None

class Killed(BaseException):
    pass

step, phase = LossTrainer.training_step, "ddp"

def training_step(self, model, *rest):
    if self.state.global_step == 10 and phase == "killed":
        raise Killed
    if self.state.global_step == 0:
        own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        Path(f"{phase}-{processes.rank()}.txt").write_text(str(own))
    loss = step(self, model, *rest)
    if self.state.global_step == 0 and phase == "fsdp":  # in parts after each of the two micro-batches
        assert all(isinstance(p.grad, DTensor) for p in model.parameters())
    return loss

LossTrainer.training_step = training_step
if processes.rank() == 0:
    logging.basicConfig(filename="log.txt", format="%(message)s")
    logging.getLogger("distill").setLevel(logging.INFO)
options = TeacherOptions(output=Path("ddp/teacher"), data=sys.argv[1], model=sys.argv[2], epochs=3, dropout=0.0,
                         learning_rate=3e-3, batch_size=4, gradient_accumulation=2, precision="fp32")
train_teacher(options)
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
               "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
phase = "fsdp"
train_teacher(replace(options, output=Path("fsdp/teacher")))
again = replace(options, output=Path("again/teacher"))
phase = "killed"
try:
    train_teacher(again)
except Killed:
    pass
phase = "resumed"
GradientState._reset_state()  # as in a new process
train_teacher(replace(again, resume=True))

scored = []

def ever_worse(*_):
    def scores(prediction):
        scored.append(1)
        return {"macro_f1": 1 / len(scored), "accuracy": 0.5}
    return scores

def evaluate(self, *args, **kwargs):
    weights = self.model.get_parameter("classifier.weight").full_tensor().detach().clone()
    if not scored and processes.rank() == 0:
        np.save("first.npy", weights.numpy())
    return evaluation(self, *args, **kwargs)

evaluation, LossTrainer.evaluate = LossTrainer.evaluate, evaluate
all_training._scorer = ever_worse
phase = "worse"
train_teacher(replace(options, output=Path("worse/teacher")))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory, checkpoint):
    """The folder where two processes have trained."""
    root = tmp_path_factory.mktemp("parts")
    (root / "worker.py").write_text(WORKER)
    data = write_csv(root / "data.csv", make_rows(160))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py",
         str(data), str(checkpoint)],
        cwd=root, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root


def _weights(folder):
    return load_file(folder / "teacher" / "model.safetensors")


def test_every_process_holds_its_part_alone(launched):
    total = sum(values.size for values in _weights(launched / "fsdp").values())
    parts = [int((launched / f"fsdp-{rank}.txt").read_text()) for rank in range(2)]
    assert sum(parts) == total and min(parts) > 0.45 * total
    assert int((launched / "ddp-0.txt").read_text()) == total


def test_weights_are_those_that_whole_models_end_with(launched):
    expected, found = _weights(launched / "ddp"), _weights(launched / "fsdp")
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], atol=1e-4, err_msg=name)


def test_the_best_weights_are_kept(launched):
    """Also those of the last epoch, which are the best here."""
    told = [line.split() for line in (launched / "log.txt").read_text().splitlines() if "macro-F1" in line]
    scores = [float(words[5].rstrip(",")) for words in told]
    ddp, fsdp = scores[:3], scores[3:6]
    assert fsdp == ddp and max(fsdp) == fsdp[2] > max(fsdp[:2])
    manifest = json.loads((launched / "fsdp" / "teacher" / "distill.json").read_text())
    assert manifest["metrics"]["validation"]["macro_f1"] == pytest.approx(fsdp[2], abs=1e-4)


def test_the_best_weights_are_kept_if_they_come_early(launched):
    first = np.load(launched / "first.npy")
    np.testing.assert_array_equal(_weights(launched / "worse")["classifier.weight"], first)


def test_a_killed_run_ends_the_same_once_it_is_resumed(launched):
    for name, values in _weights(launched / "again").items():
        np.testing.assert_array_equal(values, _weights(launched / "fsdp")[name])


@pytest.fixture
def asked(monkeypatch):
    """As `accelerate launch --use_fsdp --fsdp_version 2` starts a process."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    return monkeypatch


def _teacher(tmp_path, data_file, checkpoint, **further):
    options = {"output": tmp_path / "teacher", "data": str(data_file), "model": str(checkpoint), **further}
    return TeacherOptions(max_steps=1, precision="fp32", **options)


def test_what_cannot_be_trained_in_parts_is_told(asked, tmp_path, data_file, checkpoint):
    with pytest.raises(DistillError, match="on several GPUs alone; leave it out"):
        train_teacher(_teacher(tmp_path, data_file, checkpoint))
    with asked.context() as elsewhere:
        elsewhere.setattr("distill.sharding.choose_device", lambda device: "cuda")
        elsewhere.setenv("FSDP_VERSION", "1")
        with pytest.raises(DistillError, match="add --fsdp_version 2"):
            train_teacher(_teacher(tmp_path, data_file, checkpoint))
    asked.setattr("distill.teacher.training.check_sharding", lambda device: None)
    with pytest.raises(DistillError, match="accelerate does without it"):
        train_teacher(_teacher(tmp_path, data_file, checkpoint))
    with pytest.raises(DistillError, match="not with --lora or --qlora"):
        train_teacher(_teacher(tmp_path, data_file, checkpoint, lora=True))
    with pytest.raises(DistillError, match="a student fits every GPU; leave --use_fsdp out"):
        train_student(StudentOptions(output=tmp_path / "student", teacher=tmp_path / "teacher"))


def test_layers_are_the_parts_unless_the_launcher_names_others(asked, checkpoint):
    from types import SimpleNamespace

    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    from distill.models import load_model
    from distill.sharding import prepare_sharding

    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)
    plugin = SimpleNamespace(
        mixed_precision_policy=half, auto_wrap_policy=None, transformer_cls_names_to_wrap=None
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    trainer = SimpleNamespace(
        model=load_model(str(checkpoint), ["a", "b"]), accelerator=SimpleNamespace(state=state)
    )
    prepare_sharding(trainer)
    assert plugin.mixed_precision_policy.param_dtype is torch.float16
    assert plugin.mixed_precision_policy.reduce_dtype is torch.float32
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap == ["BertLayer"]
    trainer.model.classifier.to("meta")  # as a process has it that did not load it
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = (
        size_based_auto_wrap_policy,
        ["BertSelfOutput"],
    )
    prepare_sharding(trainer)
    assert plugin.auto_wrap_policy is size_based_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap == ["BertSelfOutput"]
    head = trainer.model.classifier
    assert head.weight.requires_grad and head.weight.data_ptr() not in (0, head.bias.data_ptr())
    trainer.model.config.num_experts = 8
    with pytest.raises(DistillError, match="not for a mixture of experts"):
        prepare_sharding(trainer)


def test_a_scaler_is_ready_when_an_optimizer_in_parts_is_filled(asked, monkeypatch):
    """As it is in a resumed run in fp16."""
    from types import SimpleNamespace

    import torch
    from transformers import Trainer

    from distill.trainer import LossTrainer

    scaler = torch.amp.GradScaler("cpu")
    trainer = LossTrainer.__new__(LossTrainer)
    trainer.accelerator = SimpleNamespace(scaler=scaler)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    filled = []

    def fill(self, checkpoint):
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        scaler.step(torch.optim.AdamW([parameter]))
        filled.append(checkpoint)

    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", fill)
    trainer._load_optimizer_and_scheduler("checkpoint-1")
    assert filled == ["checkpoint-1"]
