"""A chain that classifies pairs of texts, from the file to the bundle."""

import json

import numpy as np
import pytest
from conftest import make_rows, write_csv
from distill.explain.explanations import ExplainOptions
from distill.export.bundle import ExportOptions
from distill.export.cold_start import cold_start
from distill.student.options import StudentOptions
from distill.teacher.training import TeacherOptions

from distill import Classifier, DistillError, explain_texts, export_student, train_student, train_teacher
from distill.predictions import read_predictions
from distill.sources import Columns

PAIRS = [("the phone was lovely", "it was awful"), ("awful", "lovely and very fast")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint):
    """Where teacher, student and bundle are."""
    root = tmp_path_factory.mktemp("pairs")
    firsts, seconds = make_rows(240, seed=1), make_rows(240, seed=2)
    rows = [(text, second, label) for (text, label), (second, _) in zip(firsts, seconds, strict=True)]
    data = write_csv(root / "pairs.csv", rows, ("text", "second", "label"))
    common = {"max_steps": 10, "learning_rate": 3e-3, "precision": "fp32"}
    train_teacher(
        TeacherOptions(output=root / "teacher", data=str(data), model=str(checkpoint),
                       columns=Columns(None, "second", None), **common)
    )  # fmt: skip
    train_student(StudentOptions(output=root / "student", teacher=root / "teacher", layers=1, **common))
    export_student(
        ExportOptions(student=root / "student", output=root / "export", int8=True, max_drop=100.0,
                      single_file=True)
    )  # fmt: skip
    return root


def test_both_texts_count_in_the_bundle_as_in_the_single_file(runs):
    classifier = Classifier(runs / "export")
    assert classifier.pairs
    logits = classifier.predict_logits(PAIRS)
    swapped = classifier.predict_logits([(second, first) for first, second in PAIRS])
    assert not np.allclose(logits, swapped)
    (single,) = (runs / "export").glob("*.onnx")
    np.testing.assert_array_equal(Classifier(single).predict_logits(PAIRS), logits)


def test_a_single_text_is_refused_wherever_it_is_given(runs, run):
    classifier = Classifier(runs / "export")
    for answer in (classifier.predict, classifier.predict_proba, classifier):
        with pytest.raises(DistillError, match="one text, and this bundle was trained on pairs"):
            answer(["lovely"])
    with pytest.raises(DistillError, match="trained on pairs of texts; take some with --sample"):
        explain_texts(
            ExplainOptions(
                teacher=runs / "teacher", student=runs / "student", export=runs / "export", texts=["lovely"]
            )
        )
    done = run("predict", "--bundle", runs / "export", input="lovely\n")
    assert done.exit_code == 1 and "no column 'second'" in done.stderr


def test_a_file_with_both_columns_is_answered(runs, run, tmp_path):
    source = write_csv(tmp_path / "in.csv", PAIRS, ("text", "second"))
    done = run("predict", source, "--bundle", runs / "export", "--json")
    assert done.exit_code == 0, done.output
    found = [json.loads(line)["prediction"] for line in done.stdout.splitlines()]
    assert found == Classifier(runs / "export").predict(PAIRS)


def test_a_cold_start_is_taken_with_pairs(runs):
    seconds, _ = cold_start(runs / "export", "onnx/model_quantized.onnx", "cpu", PAIRS)
    assert 0 < seconds < 20


def test_what_was_saved_at_the_export_is_what_the_bundle_answers(runs):
    import pyarrow.csv

    saved = read_predictions(runs / "export", "test")["int8"]
    rows = pyarrow.csv.read_csv(runs / "pairs.csv").to_pylist()
    answers = Classifier(runs / "export").predict_logits([(row["text"], row["second"]) for row in rows])
    for logits in saved.logits:
        assert np.abs(answers - logits).max(axis=1).min() < 1e-5


def test_the_card_of_the_bundle_shows_a_pair(runs):
    assert 'classifier.predict([("a text", "another one")])' in (runs / "export" / "README.md").read_text()


def test_a_mean_of_tokens_cannot_tell_two_texts_apart(runs, tmp_path):
    with pytest.raises(DistillError, match="a mean of tokens, which cannot tell the two texts of a pair"):
        train_student(StudentOptions(output=tmp_path / "s", teacher=runs / "teacher", layers=0, max_steps=1))


def test_unlabelled_text_without_a_second_one_is_named(runs, tmp_path):
    more = write_csv(tmp_path / "more.csv", [("awful", "great")], ("text", "other"))
    options = StudentOptions(output=tmp_path / "s", teacher=runs / "teacher", layers=1, unlabeled=str(more))
    with pytest.raises(
        DistillError, match=r"no column 'second' \(as in the teacher's data\); the columns are"
    ):
        train_student(options)
