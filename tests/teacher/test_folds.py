from dataclasses import replace

import numpy as np
import pytest
from conftest import make_rows, write_csv
from distill.student.options import StudentOptions
from distill.student.soft_labels import teacher_logits
from distill.student.training import train_student
from distill.teacher import training
from distill.teacher.folds import assign_folds, out_of_fold
from distill.teacher.training import TeacherOptions, train_teacher

from distill.artifact import read_manifest
from distill.data import load_data
from distill.errors import DistillError
from distill.metrics import score
from distill.predictions import UNSEEN, read_predictions


def _options(folder, data_file, checkpoint, **changes):
    common = {"epochs": 2, "learning_rate": 3e-3, "precision": "fp32", "batch_size": 16, "folds": 3}
    return TeacherOptions(
        output=folder / "runs" / "t", data=str(data_file), model=str(checkpoint), **{**common, **changes}
    )


def test_folds_are_of_one_size_and_every_class_is_spread_over_them():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 4)
    folds = assign_folds(labels, 5, seed=1)
    assert np.bincount(folds).max() - np.bincount(folds).min() <= 1
    for label in range(3):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (assign_folds(labels, 5, seed=1) == folds).all() and (
        assign_folds(labels, 5, seed=2) != folds
    ).any()


def test_each_text_is_labelled_once_and_by_a_teacher_that_has_not_seen_it(
    tmp_path, data_file, checkpoint, monkeypatch
):
    calls = []

    def fold(options, data, held_out):
        seen, held = set(data.splits["train"]["id"]), held_out["id"]
        assert not seen & set(held)
        calls.append((seen, list(held)))
        return np.full((len(held), 3), len(calls), dtype=np.float32)

    monkeypatch.setattr(training, "_fold", fold)
    train_teacher(_options(tmp_path, data_file, checkpoint, max_steps=1))
    data = load_data(str(data_file), quiet=True)
    unseen = read_predictions(tmp_path / "runs" / "t", "train")[UNSEEN]
    assert unseen.ids == data.splits["train"]["id"]
    assert sorted(sum((held for _, held in calls), [])) == sorted(unseen.ids)
    for number, (seen, held) in enumerate(calls, 1):
        assert seen | set(held) == set(unseen.ids)
        assert (unseen.logits[np.isin(unseen.ids, held)] == number).all()


@pytest.mark.slow
def test_a_student_learns_training_text_from_teachers_that_have_not_seen_it(
    tmp_path, data_file, checkpoint, caplog
):
    caplog.set_level("INFO")
    manifest = train_teacher(_options(tmp_path, data_file, checkpoint))
    folder = tmp_path / "runs" / "t"
    unseen = read_predictions(folder, "train")[UNSEEN]
    overall = score(unseen.labels, unseen.logits.argmax(axis=1), 3).macro_f1
    assert len(manifest.details["fold_macro_f1"]) == 3
    assert np.mean(manifest.details["fold_macro_f1"]) == pytest.approx(overall, abs=0.1)
    assert "Cross-validation: macro-F1" in caplog.text
    assert not (tmp_path / "runs" / "checkpoints").exists()
    train = load_data(str(data_file), quiet=True).splits["train"]
    found = teacher_logits(folder, read_manifest(folder, "train-teacher"), train, "cpu", "fp32")
    np.testing.assert_array_equal(found, unseen.logits)
    train_student(
        StudentOptions(
            output=tmp_path / "runs" / "s",
            teacher=folder,
            student=str(checkpoint),
            augment="1x",
            max_steps=4,
            precision="fp32",
        )
    )
    assert "Soft labels: 240 texts known" in caplog.text


def test_copies_of_a_text_are_in_one_fold_and_single_texts_of_a_class_are_told(tmp_path, caplog):
    rows = [*make_rows(40), *make_rows(40)[:10], ("only this one", "rare"), ("and this", "neutral")]
    data = load_data(str(write_csv(tmp_path / "train.csv", rows)), quiet=True)
    seen = []

    def fold(options, part, held_out):
        assert not {*part.splits["train"]["id"]} & {*held_out["id"]}
        seen.extend(held_out["id"])
        return np.zeros((len(held_out), len(part.labels)), np.float32)

    options = TeacherOptions(output=tmp_path / "runs" / "t", data="x", model="m")
    out_of_fold(data, 3, options, fold)
    train = data.splits["train"]["id"]
    assert sorted(seen) == sorted(train) and len({*train}) < len(train)
    with pytest.raises(DistillError, match="--resume goes on, --overwrite starts again"):
        out_of_fold(data, 3, options, fold)
    with pytest.raises(DistillError, match="other options or data"):
        out_of_fold(data, 3, replace(options, resume=True, learning_rate=1.0), fold)
    out_of_fold(data, 3, replace(options, resume=True), None)
    assert len(seen) == len(train)
    out_of_fold(data, 3, replace(options, overwrite=True), fold)
    assert len(seen) == 2 * len(train)
    assert "labels with one training text × 1 (rare)" in caplog.text


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_next_fold(tmp_path, data_file, checkpoint, monkeypatch):
    whole = train_teacher(_options(tmp_path / "whole", data_file, checkpoint))
    original, calls = training._fold, []

    def fold(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(training, "_fold", fold)
    options = _options(tmp_path / "half", data_file, checkpoint)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(options)
    resumed = train_teacher(TeacherOptions(**{**vars(options), "resume": True}))
    assert len(calls) == 4
    assert resumed.metrics == whole.metrics and resumed.details == whole.details
    assert not (tmp_path / "half" / "runs" / "checkpoints").exists()


def test_more_folds_than_texts_are_refused(tmp_path, data_file, checkpoint):
    with pytest.raises(DistillError, match="there are only 240 training texts"):
        train_teacher(_options(tmp_path, data_file, checkpoint, folds=1000))
