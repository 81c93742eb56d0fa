"""Two processes that train together, connected by gloo, as torchrun starts them."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_csv
from distill.student.training import StudentOptions
from safetensors.numpy import load_file

from distill import train_student
from distill.metrics import score
from distill.predictions import read_predictions

# The command line, which also writes down what each process trains on, and may die in the middle.
WORKER = """
import os, signal, sys
from pathlib import Path
from distill import processes
from distill.cli import main
from distill.trainer import LossTrainer

step = LossTrainer.training_step
dies_at = int(os.environ.get("DIES_AT", "0"))

def training_step(self, model, inputs, *rest):
    if dies_at and self.state.global_step == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    with Path(os.environ["SEEN"], f"{processes.rank()}.txt").open("a") as file:
        for row, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()):
            print(int(self.state.epoch + 1e-6), *row[:sum(mask)], file=file)
    return step(self, model, inputs, *rest)

LossTrainer.training_step = training_step
main()
"""
COMMON = ("--epochs", "3", "--learning-rate", "3e-3", "--batch-size", "8")


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Run the command line in two processes; gives the finished launcher and what was trained on, by rank."""
    root = tmp_path_factory.mktemp("launcher")
    (root / "worker.py").write_text(WORKER)

    def run(folder: Path, *arguments: object, dies_at: int = 0):
        seen = folder / "seen"
        shutil.rmtree(seen, ignore_errors=True)
        seen.mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(root / "worker.py"), *map(str, arguments), "--precision", "fp32"],
            cwd=folder, capture_output=True, text=True, timeout=300,
            env={**os.environ, "SEEN": str(seen), "DIES_AT": str(dies_at), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return done, [path.read_text().splitlines() for path in sorted(seen.iterdir())]

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, launch, checkpoint):
    """A teacher that two processes have trained on 240 texts."""
    root = tmp_path_factory.mktemp("two")
    data = write_csv(root / "data.csv", make_rows(300))
    done, seen = launch(root, "train-teacher", "--data", data, "--model", checkpoint, *COMMON)
    assert done.returncode == 0, done.stderr
    return root, done, seen


def test_every_text_is_trained_on_once_an_epoch(teacher):
    _, _, seen = teacher
    assert [len(rows) for rows in seen] == [360, 360]
    by_epoch = [Counter(row for rows in seen for row in rows if row.startswith(f"{e} ")) for e in range(3)]
    texts = [Counter(row.split(" ", 1)[1] for row in found.elements()) for found in by_epoch]
    assert [found.total() for found in texts] == [240, 240, 240]
    assert texts[0] == texts[1] == texts[2] and max(texts[0].values()) == 1
    first, second = ([row.split(" ", 1)[1] for row in seen[0] if row.startswith(f"{e} ")] for e in (0, 1))
    assert first != second  # in another order


def test_scores_are_of_the_whole_split_and_are_told_once(teacher):
    root, done, _ = teacher
    manifest = json.loads((root / "runs" / "teacher" / "distill.json").read_text())
    assert manifest["details"]["steps"]["processes"] == 2
    for split in ("validation", "test"):
        saved = read_predictions(root / "runs" / "teacher", split)["teacher"]
        assert len(saved.ids) == len(set(saved.ids)) == 30
        expected = score(saved.labels, saved.logits.argmax(axis=1), 3).summary()
        assert manifest["metrics"][split] == expected
    # What the Trainer measured while it trained, of which the best is kept.
    told = [line.split() for line in done.stderr.splitlines() if "validation macro-F1" in line]
    assert len(told) == 3
    best = max(float(words[5].rstrip(",")) for words in told)
    assert best == pytest.approx(manifest["metrics"]["validation"]["macro_f1"], abs=1e-4)
    assert done.stdout.count("test: accuracy") == 1


def test_a_student_of_two_processes_has_the_soft_labels_of_one(teacher, launch, tmp_path):
    root, _, _ = teacher
    shutil.copytree(root / "runs" / "teacher", tmp_path / "runs" / "teacher")
    done, seen = launch(tmp_path, "train-student", "--layers", 2, "--augment", "1x", *COMMON)
    assert done.returncode == 0, done.stderr
    assert sum(map(len, seen)) == 3 * 480
    alone = tmp_path / "alone"
    shutil.copytree(root / "runs" / "teacher", alone / "teacher")
    train_student(
        StudentOptions(
            output=alone / "student", teacher=alone / "teacher", layers=2, augment="1x", max_steps=1,
            precision="fp32",
        )
    )  # fmt: skip
    kept = []
    for folder in (tmp_path / "runs", alone):
        from distill.student.soft_labels import _read

        (place,) = (folder / "soft_labels").iterdir()
        ids, logits = _read(place, 3)
        assert len(ids) == len(set(ids)) == 480
        kept.append(logits[np.argsort(ids)])
    np.testing.assert_allclose(*kept, atol=1e-5)


def test_a_killed_run_ends_the_same_once_it_is_resumed(teacher, launch, tmp_path, checkpoint):
    root, _, _ = teacher
    arguments = ("train-teacher", "--data", root / "data.csv", "--model", checkpoint, *COMMON)
    done, _ = launch(tmp_path, *arguments, dies_at=20)  # in the second of three epochs
    assert done.returncode != 0 and not (tmp_path / "runs" / "teacher").exists()
    done, seen = launch(tmp_path, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert sum(map(len, seen)) == 480
    weights = [load_file(folder / "runs" / "teacher" / "model.safetensors") for folder in (root, tmp_path)]
    for name, values in weights[0].items():
        np.testing.assert_array_equal(values, weights[1][name])


def test_a_mistake_is_told_once(launch, tmp_path, checkpoint):
    done, _ = launch(tmp_path, "train-teacher", "--data", tmp_path / "none.csv", "--model", checkpoint)
    assert done.returncode != 0
    assert done.stderr.count("no such file or folder") == 1
