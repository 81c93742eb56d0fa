"""Two processes that train together, connected by gloo, as torchrun starts them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import make_rows, write_csv
from distill.student.options import StudentOptions
from distill.student.soft_labels import _read
from safetensors.numpy import load_file

from distill import DistillError, processes, train_student
from distill.metrics import score
from distill.predictions import read_predictions

# All trainings of this file in one launch, since importing takes longest. Writes down what is trained on.
WORKER = """
import logging, sys
from dataclasses import replace
from pathlib import Path
from distill import processes, train_student, train_teacher
from distill.student.soft_labels import _read
from distill.student.options import StudentOptions
from distill.teacher.training import TeacherOptions
from distill.trainer import LossTrainer

class Killed(BaseException):
    pass

data, checkpoint = sys.argv[1:]
step, phase = LossTrainer.training_step, "teacher"

def training_step(self, model, inputs, *rest):
    if phase == "killed" and self.state.global_step == 20:
        raise Killed
    with Path(f"{phase}-{processes.rank()}.txt").open("a") as file:
        for row, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()):
            print(int(self.state.epoch + 1e-6), *row[:sum(mask)], file=file)
    return step(self, model, inputs, *rest)

LossTrainer.training_step = training_step
if processes.rank() == 0:
    logging.basicConfig(filename="log.txt", format="%(message)s")
    logging.getLogger("distill").setLevel(logging.INFO)
common = {"epochs": 3, "learning_rate": 3e-3, "batch_size": 8, "precision": "fp32"}
options = TeacherOptions(output=Path("whole/teacher"), data=data, model=checkpoint, **common)
train_teacher(options)
again = replace(options, output=Path("parts/teacher"))
phase = "killed"
try:
    train_teacher(again)
except Killed:
    pass
phase = "resumed"
train_teacher(replace(again, resume=True))
phase = "student"
train_student(StudentOptions(output=Path("whole/student"), teacher=Path("whole/teacher"), layers=2,
                             augment="1x", hidden_epochs=1, **common))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory, checkpoint):
    """The folder where two processes have trained on 240 texts, each step on 16 of them."""
    root = tmp_path_factory.mktemp("two")
    (root / "worker.py").write_text(WORKER)
    data = write_csv(root / "data.csv", make_rows(300))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py",
         str(data), str(checkpoint)],
        cwd=root, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root


def _seen(root, phase):
    return [(root / f"{phase}-{rank}.txt").read_text().splitlines() for rank in range(2)]


def test_every_text_is_trained_on_once_an_epoch(launched):
    seen = _seen(launched, "teacher")
    assert [len(rows) for rows in seen] == [360, 360]
    by_epoch = [Counter(row for rows in seen for row in rows if row.startswith(f"{e} ")) for e in range(3)]
    texts = [Counter(row.split(" ", 1)[1] for row in found.elements()) for found in by_epoch]
    assert [found.total() for found in texts] == [240, 240, 240]
    assert texts[0] == texts[1] == texts[2] and max(texts[0].values()) == 1
    first, second = ([row.split(" ", 1)[1] for row in seen[0] if row.startswith(f"{e} ")] for e in (0, 1))
    assert first != second  # in another order


def test_scores_are_of_the_whole_split_and_are_told_once(launched):
    folder = launched / "whole" / "teacher"
    manifest = json.loads((folder / "distill.json").read_text())
    assert manifest["details"]["steps"]["processes"] == 2
    for split in ("validation", "test"):
        saved = read_predictions(folder, split)["teacher"]
        assert len(saved.ids) == len(set(saved.ids)) == 30
        expected = score(saved.labels, saved.logits.argmax(axis=1), 3).summary()
        assert manifest["metrics"][split] == expected
    # What the Trainer measured while it trained, of which the best is kept.
    told = [line.split() for line in (launched / "log.txt").read_text().splitlines() if "macro-F1" in line]
    assert len(told) == 3 + 1 + 2 + 3
    best = max(float(words[5].rstrip(",")) for words in told[:3])
    assert best == pytest.approx(manifest["metrics"]["validation"]["macro_f1"], abs=1e-4)


def test_a_killed_run_ends_the_same_once_it_is_resumed(launched):
    assert sum(map(len, _seen(launched, "resumed"))) == 480  # the second and the third epoch
    folders = [launched / place / "teacher" for place in ("whole", "parts")]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for name, values in weights[0].items():
        np.testing.assert_array_equal(values, weights[1][name])


def test_a_student_of_two_processes_has_the_soft_labels_of_one(launched, tmp_path):
    assert sum(map(len, _seen(launched, "student"))) == (1 + 3) * 480  # hidden states first
    shutil.copytree(launched / "whole" / "teacher", tmp_path / "teacher")
    train_student(
        StudentOptions(
            output=tmp_path / "student", teacher=tmp_path / "teacher", layers=2, augment="1x", max_steps=1,
            precision="fp32",
        )
    )  # fmt: skip
    kept = []
    for folder in (launched / "whole", tmp_path):
        (place,) = (folder / "soft_labels").iterdir()
        ids, logits = _read(place, 3)
        assert len(ids) == len(set(ids)) == 480
        kept.append(logits[np.argsort(ids)])
    np.testing.assert_allclose(*kept, atol=1e-5)


def test_a_share_without_texts_is_an_empty_one(monkeypatch, checkpoint):
    from datasets import Dataset

    from distill.models import load_model, load_tokenizer
    from distill.training import predict_logits

    model, tokenizer = load_model(str(checkpoint), ["a", "b"]), load_tokenizer(str(checkpoint), 16)
    one = Dataset.from_dict({"id": ["x"], "text": ["a lovely box"]})
    whole = predict_logits(model, tokenizer, one, "cpu", "fp32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.count() == 1  # started, but not among those that train together
    monkeypatch.setattr(processes, "_joined", True)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts = [whole, np.empty((0, 2), dtype=np.float32)]

        def gather(own, rank=rank, parts=parts):
            assert own.shape == parts[rank].shape
            return parts

        monkeypatch.setattr(processes, "gather", gather)
        np.testing.assert_array_equal(predict_logits(model, tokenizer, one, "cpu", "fp32"), whole)


def test_an_error_of_the_first_process_is_told_by_it_alone(monkeypatch):
    class Local(Exception):  # cannot be sent to another process
        pass

    told = processes._told(Local("what went wrong"))
    assert isinstance(told, DistillError) and str(told) == "what went wrong"
    again = pickle.loads(pickle.dumps(processes._told(DistillError("x"))))
    assert not processes.is_told(again)
    monkeypatch.setenv("RANK", "1")
    assert processes.is_told(again) and not processes.is_told(DistillError("of this process alone"))
