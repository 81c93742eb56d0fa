import json

import numpy as np
import pytest
from distill.explain.report import ReportOptions, render
from sklearn.metrics import classification_report, confusion_matrix

from distill import write_report
from distill.predictions import read_predictions


@pytest.fixture(scope="module")
def options(chain, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "report"
    return ReportOptions(chain.teacher, chain.student, chain.export, output, texts=5)


@pytest.fixture(scope="module")
def content(options):
    return write_report(options)


def test_scores_are_scikit_learns_on_the_saved_predictions(chain, content):
    folders = {
        "teacher": chain.teacher,
        "student": chain.student,
        "onnx-fp32": chain.export,
        "int8": chain.export,
    }
    assert [row["version"] for row in content["versions"]] == list(folders)
    for row in content["versions"]:
        saved = read_predictions(folders[row["version"]], "test")[row["version"]]
        labels, predictions = saved["labels"], saved["logits"].argmax(1)
        theirs = classification_report(
            labels,
            predictions,
            labels=range(3),
            target_names=content["labels"],
            output_dict=True,
            zero_division=0,
        )
        for index, label in enumerate(content["labels"]):
            mine = [row["scores"][name][index] for name in ("precision", "recall", "f1", "support")]
            np.testing.assert_allclose(mine, list(theirs[label].values()))
        assert row["scores"]["weighted_f1"] == pytest.approx(theirs["weighted avg"]["f1-score"])
        np.testing.assert_array_equal(
            row["scores"]["confusion"], confusion_matrix(labels, predictions, labels=range(3))
        )


def test_size_latency_and_parameters_are_reported_for_every_version(chain, content):
    for row in content["versions"]:
        assert row["bytes"] > 0 and row["latency_ms"] > 0 and row["parameters"] > 0
    assert content["versions"][0]["speedup"] == 1.0
    assert content["versions"][3]["bytes"] == (chain.export / "onnx" / "model_quantized.onnx").stat().st_size


def test_text_markdown_and_json_are_written(options, content):
    assert json.loads((options.output / "report.json").read_text()) == content
    assert "| int8 |" in (options.output / "report.md").read_text()
    assert "macro average" in (options.output / "report.txt").read_text()


def test_labels_cannot_break_the_markdown_table(content):
    odd = {**content, "labels": ["a|b", "c\nd", "e"]}
    lines = render(odd, markdown=True).splitlines()
    assert any(line.startswith("| a\\|b |") for line in lines)
    assert any(line.startswith("| c d |") for line in lines)


def test_many_classes_show_their_most_frequent_confusions(content):
    many = json.loads(json.dumps(content))
    many["labels"] = [f"class {i}" for i in range(20)]
    for row in many["versions"]:
        row["scores"]["confusion"] = [
            [5 if i == j else int(i == 3 and j == 7) for j in range(20)] for i in range(20)
        ]
        for name in ("precision", "recall", "f1", "support"):
            row["scores"][name] = [1] * 20
    assert "class 3 → class 7" in render(many, markdown=False)


def test_the_command_prints_the_report_or_json(chain, run, tmp_path):
    stages = ["--teacher", chain.teacher, "--student", chain.student, "--export", chain.export, "--texts", 3]
    assert "Per class" in run("report", *stages, "--output", tmp_path / "r").stdout
    printed = run("report", *stages, "--output", tmp_path / "r2", "--json").stdout
    assert json.loads(printed)["labels"] == ["negative", "neutral", "positive"]
