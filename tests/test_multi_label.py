"""Texts with any number of labels, from the file to the report."""

import json
import random

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FILLER, WORDS, write_csv
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from distill.examples.embedding import service
from distill.export.bundle import ExportOptions
from distill.student.options import StudentOptions
from distill.teacher.folds import assign_folds
from distill.teacher.training import TeacherOptions
from fastapi.testclient import TestClient
from sklearn.metrics import roc_auc_score

from distill import Classifier, DistillError, export_student, train_student, train_teacher
from distill.cli import cli
from distill.data import load_data
from distill.predictions import labels_of, read_predictions
from distill.sources import Columns

SEVERAL = Columns(separator="|")


def make_labelled(count, seed=0):
    """Texts that hold words of any number of the classes, none of them included."""
    generator = random.Random(seed)
    rows = {}
    while len(rows) < count:
        labels = [label for label in sorted(WORDS) if generator.random() < 0.4]
        words = generator.choices(FILLER, k=5) + [w for y in labels for w in generator.choices(WORDS[y], k=2)]
        generator.shuffle(words)
        rows[" ".join(words)] = labels
    return list(rows.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint):
    """Teacher, student and bundle."""
    root = tmp_path_factory.mktemp("several")
    data = write_csv(root / "data.csv", [(text, "|".join(y)) for text, y in make_labelled(400)])
    more = write_csv(root / "more.csv", [(text,) for text, _ in make_labelled(40, seed=1)], ("text",))
    common = {
        "epochs": 12,
        "learning_rate": 3e-3,
        "head_learning_rate": 3e-3,
        "precision": "fp32",
        "batch_size": 16,
    }
    train_teacher(
        TeacherOptions(
            output=root / "teacher", data=str(data), model=str(checkpoint), columns=SEVERAL, folds=2, **common
        )
    )
    train_student(
        StudentOptions(
            output=root / "student", teacher=root / "teacher", layers=2, unlabeled=str(more), augment="1x",
            **common,
        )
    )  # fmt: skip
    export_student(
        ExportOptions(
            student=root / "student", output=root / "export", int8=True, max_drop=50.0, single_file=True,
            provider=("cpu", "cuda"),
        )
    )  # fmt: skip
    return root


def test_every_form_of_several_labels_is_read_alike(tmp_path):
    rows = make_labelled(60)
    write_csv(tmp_path / "a.csv", [(text, " | ".join(reversed(y))) for text, y in rows])
    write_csv(tmp_path / "b.csv", [(text, ",".join(y)) for text, y in rows])
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    separators = {"a.csv": "|", "b.csv": ",", "c.jsonl": "|"}
    loaded = [load_data(str(tmp_path / name), Columns(separator=one)) for name, one in separators.items()]
    assert len({data.fingerprint for data in loaded}) == 1
    data = loaded[0]
    assert data.labels == sorted(WORDS) and data.problem_type == "multi_label_classification"
    by_text = dict(rows)
    for split in data.splits.values():
        labels = labels_of(split)
        assert labels.dtype == bool and labels.shape == (len(split), 3)
        for text, given in zip(split["text"], labels, strict=True):
            assert [label for label, has in zip(data.labels, given, strict=True) if has] == by_text[text]
    assert ("no label", "train") in {(finding.kind, finding.split) for finding in data.findings}


def test_a_hub_dataset_with_lists_of_class_names(monkeypatch):
    features = Features({"text": Value("string"), "labels": [ClassLabel(names=["a", "b", "c"])]})
    rows = {
        "text": [f"t{i}" for i in range(60)],
        "labels": [[i % 3, (i + 1) % 3][: i % 3] for i in range(60)],
    }
    hub = DatasetDict(train=Dataset.from_dict(rows, features=features))
    monkeypatch.setattr("distill.sources.load_dataset", lambda *_: hub)
    data = load_data("some/hub", SEVERAL)
    assert data.labels == ["a", "b", "c"]
    train = dict(zip(data.splits["train"]["text"], labels_of(data.splits["train"]).tolist(), strict=True))
    whole = dict(zip(rows["text"], rows["labels"], strict=True))
    assert all(np.flatnonzero(given).tolist() == sorted(whole[text]) for text, given in train.items())


def test_missing_splits_have_their_share_of_a_rare_label(tmp_path):
    rows = [(f"t{i}", ["common", "rare"] if i % 15 == 0 else ["common"]) for i in range(600)]
    path = write_csv(tmp_path / "a.csv", [(text, "|".join(y)) for text, y in rows])
    data = load_data(str(path), SEVERAL)
    assert [int(labels_of(data.splits[s])[:, 1].sum()) for s in ("train", "validation", "test")] == [32, 4, 4]
    labels = labels_of(data.splits["train"])
    folds = assign_folds(labels, 4, seed=0)
    assert [int(labels[folds == fold, 1].sum()) for fold in range(4)] == [8, 8, 8, 8]


def test_labels_that_are_made_of_others_are_pointed_out(tmp_path):
    rows = [(f"t{i}", "a|b" if i % 9 == 0 else "ab"[i % 2]) for i in range(90)]
    data = load_data(str(write_csv(tmp_path / "a.csv", rows)))
    (finding,) = [finding for finding in data.findings if finding.kind == "label made of others"]
    assert finding.examples == ["a|b"] and "--multi-label" in finding.action


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.0, 1.0, 0.0], "names a label twice"),
        ([["a"], ["b"]], "a list of lists"),
        ([{"name": "a"}], "a label is one string or integer"),
    ],
)
def test_lists_that_are_no_labels_are_refused(tmp_path, value, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "label": value}) + "\n")
    with pytest.raises(DistillError, match=f"line 1: .*{message}"):
        load_data(str(tmp_path / "a.jsonl"), SEVERAL)


def test_texts_without_any_label_are_no_classes(tmp_path):
    with pytest.raises(DistillError, match="no label at all"):
        load_data(str(write_csv(tmp_path / "a.csv", [(f"t{i}", "") for i in range(9)])), SEVERAL)


@pytest.mark.parametrize("printed", ["['joy', 'love']", "['joy' 'love']", '["joy"]', "[]"])
def test_a_printed_list_is_no_label(tmp_path, printed):
    data = write_csv(
        tmp_path / "data.csv", [*((t, "joy|love") for t, _ in make_labelled(30)), ("x", printed)]
    )
    with pytest.raises(DistillError, match="line 32: 'label' holds a printed list, .*join labels by '|'"):
        load_data(str(data), SEVERAL)


def test_a_separator_alone_is_refused(run, tmp_path, checkpoint):
    found = run("train-teacher", "--data", tmp_path, "--model", checkpoint, "--label-separator", ",")
    assert found.exit_code == 1 and "add --multi-label" in found.output


def test_an_empty_separator_is_refused(run, tmp_path, checkpoint):
    found = run("train-teacher", "--data", write_csv(tmp_path / "a.csv", []), "--model", checkpoint,
                "--multi-label", "--label-separator", "")  # fmt: skip
    assert found.exit_code == 1 and "--label-separator" in found.output


@pytest.mark.parametrize("stage", ["teacher", "student", "export"])
def test_every_stage_learns_the_labels_and_says_what_its_logits_mean(runs, stage):
    manifest = json.loads((runs / stage / "distill.json").read_text())
    assert manifest["problem_type"] == "multi_label_classification"
    assert json.loads((runs / stage / "config.json").read_text())["problem_type"] == manifest["problem_type"]
    assert manifest["metrics"]["test"].keys() == {"accuracy", "macro_f1", "micro_f1"}
    assert manifest["metrics"]["test"]["macro_f1"] > 0.62  # giving every label to every text: 0.57


def test_out_of_fold_logits_are_of_the_training_text(runs):
    unseen = read_predictions(runs / "teacher", "train")["out_of_fold"]
    assert unseen.labels.shape == unseen.logits.shape == (320, 3)
    # Better than chance, so in the order of the texts.
    assert roc_auc_score(unseen.labels, unseen.logits) > 0.6


@pytest.mark.parametrize("file", ["onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_fp16.onnx"])
def test_labels_are_those_that_reach_the_thresholds_of_the_file(runs, file):
    texts = [text for text, _ in make_labelled(40, seed=2)]
    classifier = Classifier(runs / "export", provider="cpu", file=file)
    probabilities = classifier.predict_proba(texts)
    assert classifier.thresholds.shape == (3,)
    np.testing.assert_allclose(
        probabilities, 1 / (1 + np.exp(-classifier.predict_logits(texts) / classifier.temperature)), rtol=1e-5
    )
    expected = [
        [
            label
            for label, p, least in zip(classifier.labels, row, classifier.thresholds, strict=True)
            if p >= least
        ]
        for row in probabilities
    ]
    assert classifier.predict(texts) == expected
    assert {len(labels) for labels in expected} == {0, 1, 2, 3}
    plain = Classifier(runs / "export", provider="cpu", file=file, calibrated=False)
    assert plain.predict(texts) == expected and plain.temperature == 1.0
    best = classifier(texts[0], top_k=None)
    assert [one["score"] for one in best] == sorted(probabilities[0].tolist(), reverse=True)


def test_the_single_file_gives_the_same_labels(runs):
    texts = [text for text, _ in make_labelled(20, seed=3)]
    folder, file = Classifier(runs / "export"), Classifier(runs / "export" / "classifier.onnx")
    assert file.predict(texts) == folder.predict(texts)
    np.testing.assert_array_equal(file.thresholds, folder.thresholds)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_predict_writes_all_labels_of_a_text(runs, run, tmp_path, form):
    texts = [text for text, _ in make_labelled(30, seed=4)]
    source = write_csv(tmp_path / "in.csv", [(text,) for text in texts], ("text",))
    output = tmp_path / f"out.{form}"
    found = run("predict", source, "--bundle", runs / "export", "--output", output)
    assert found.exit_code == 0, found.output
    expected = Classifier(runs / "export").predict(texts)
    if form == "jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["prediction"] for row in rows] == expected
        assert all(len(row["score"]) == len(row["prediction"]) for row in rows)
    else:
        lines = output.read_text().splitlines()[1:]
        assert [line.split(",")[1] for line in lines] == ["|".join(labels) for labels in expected]


def test_a_label_that_holds_what_joins_labels_is_not_written_into_a_table(runs, run, monkeypatch):
    opened = Classifier.__init__

    def rename(self, *args, **options):
        opened(self, *args, **options)
        self.labels[0] = "a|b"

    monkeypatch.setattr(Classifier, "__init__", rename)
    result = run("predict", "--bundle", str(runs / "export"), input="lovely\n")
    assert result.exit_code == 1 and "label 'a|b'" in result.stderr and "--json" in result.stderr
    result = run("predict", "--bundle", str(runs / "export"), "--json", input="lovely\n")
    assert result.exit_code == 0, result.stderr


def test_the_service_answers_with_all_labels(runs):
    texts = [text for text, _ in make_labelled(8, seed=5)]
    with TestClient(service.create_app(service.Settings(bundle=runs / "export"))) as client:
        answers = client.post("/predict", json={"texts": texts}).json()["predictions"]
    assert [one["label"] for one in answers] == Classifier(runs / "export").predict(texts)
    assert all(one["score"] == [one["probabilities"][label] for label in one["label"]] for one in answers)


def test_the_report_is_about_labels(runs, tmp_path):
    stages = [part for name in ("teacher", "student", "export") for part in (f"--{name}", str(runs / name))]
    found = CliRunner().invoke(
        cli, ["report", *stages, "--output", str(tmp_path / "r"), "--texts", "3", "--explain", "4"]
    )
    assert found.exit_code == 0, found.output
    from importlib import resources

    import jsonschema

    report = json.loads((tmp_path / "r" / "report.json").read_text())
    schema = json.loads(resources.files("distill.explain").joinpath("report.schema.json").read_text())
    jsonschema.validate(report, schema)
    assert report["multi_label"]
    bundle = json.loads((runs / "export" / "distill.json").read_text())
    for row in report["versions"]:
        assert np.array(row["scores"]["confusion"]).shape == (3, 2, 2)
        assert len(row["thresholds"]) == 3 and row["abstention"] is None
    # The shipped version's figures are those of the thresholds in the bundle.
    assert report["versions"][-1]["scores"]["macro_f1"] == bundle["metrics"]["test"]["macro_f1"]
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Missed and wrong" in page and "Answer only when sure" not in page
    for name in ("report.md", "report.txt"):
        text = (tmp_path / "r" / name).read_text()
        assert "micro-F1" in text and "threshold" in text and "Confusion" not in text


def test_a_text_with_a_label_that_the_teacher_lacks_is_refused(runs, tmp_path):
    rows = [(text, "|".join([*y, "odd"])) for text, y in make_labelled(60)]
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(DistillError, match="'odd' is not one of the teacher's"):
        train_student(StudentOptions(output=tmp_path / "s", teacher=runs / "teacher", data=str(path)))
