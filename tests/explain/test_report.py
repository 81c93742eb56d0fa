import json
from dataclasses import replace

import numpy as np
import pytest
from distill.explain.comparison import QUESTIONS, compare_versions, only_guesses, verdict
from distill.explain.reasons import reasons_answer
from distill.explain.rendering import render
from distill.explain.report import ReportOptions
from distill.explain.versions import Version, read_versions, truncated_share
from sklearn.metrics import classification_report, confusion_matrix

from distill import write_report
from distill.decision import Decision
from distill.metrics import score
from distill.predictions import Predictions, read_predictions


@pytest.fixture(scope="module")
def options(chain, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "report"
    return ReportOptions(chain.teacher, chain.student, chain.export, output, texts=5, explain=4)


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
        labels, predictions = saved.labels, saved.logits.argmax(axis=1)
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


def test_the_report_tells_how_many_texts_are_longer_than_what_is_read(chain, content):
    assert [row["truncated_share"] for row in content["versions"]] == [0.0] * 4
    assert "All test texts are read to their end." in render(content, markdown=True)
    student = replace(read_versions(chain.teacher, chain.student, chain.export)[0][1], max_length=6)
    assert truncated_share(student, ["lovely phone", "lovely phone lovely phone lovely phone"]) == 0.5
    content["versions"][1]["truncated_share"] = 0.125
    assert "0.0 % of the test texts for the teacher, 12.5 % for the student" in render(
        content, markdown=False
    )
    content["versions"][1]["truncated_share"] = 0.0


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
    stages = ["--teacher", chain.teacher, "--student", chain.student, "--export", chain.export]
    stages += ["--texts", 3, "--explain", 2]
    assert "Per class" in run("report", *stages, "--output", tmp_path / "r").stdout
    printed = run("report", *stages, "--output", tmp_path / "r2", "--json").stdout
    assert json.loads(printed)["labels"] == ["negative", "neutral", "positive"]


def test_the_json_follows_its_schema(content):
    from importlib import resources

    import jsonschema

    schema = json.loads(resources.files("distill.explain").joinpath("report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(content, schema)


def test_differences_and_intervals_belong_to_the_scores_beside_them(content):
    teacher, *others = content["versions"]
    assert teacher["difference"] is None and teacher["mcnemar"] is None
    for row in others:
        change = row["difference"]["macro_f1"]
        assert change["value"] == pytest.approx(row["scores"]["macro_f1"] - teacher["scores"]["macro_f1"])
        for found in (change, row["intervals"]["macro_f1"], row["intervals"]["accuracy"]):
            assert found["low"] - 1e-9 <= found["value"] <= found["high"] + 1e-9


def test_reasons_are_given_for_teacher_student_and_int8_and_sum_up(content):
    reasons = content["reasons"]
    assert list(reasons["versions"]) == ["teacher", "student", "int8"]
    assert reasons["sampled"] == 4
    for one in reasons["versions"].values():
        assert one["largest_residual"] < 1e-3
    assert tuple(content["verdict"]["answers"]) == QUESTIONS


def test_the_report_names_its_data_and_the_teachers_checkpoint(content, checkpoint, data_file):
    assert (content["model"], content["data"]) == (checkpoint.name, data_file.name)


def _row(name, latency, low, value, high):
    change = {"value": value, "low": low, "high": high}
    return {
        "version": name, "latency_ms": latency, "speedup": 2.0, "bytes": 10, "macro_f1_kept": 0.9,
        "scores": {"macro_f1": 0.8}, "difference": {"macro_f1": change, "f1": [change, change], "calls": ["even", "even"]},
        "calibration": {"calibrated": {"ece": 0.1}, "uncalibrated": {"ece": 0.2}},
        "abstention": {"target_precision": 0.9, "test": None}, "thresholds": None,
    }  # fmt: skip


TEACHER = {
    "version": "teacher",
    "bytes": 100,
    "scores": {"macro_f1": 0.85, "support": [50, 50]},
    "intervals": {"macro_f1": {"low": 0.8}},
    "thresholds": None,
}
SIZES = {"latency_ms": 1.0, "speedup": 1.0, "bytes": 9}
FP32 = _row("onnx-fp32", 3.0, -0.005, 0.0, 0.005)


@pytest.mark.parametrize(
    ("int8", "margin", "status", "version"),
    [
        (_row("int8", 1.0, -0.02, -0.01, 0.0), 3.0, "ship", "int8"),
        (_row("int8", 1.0, -0.02, -0.01, 0.0), 1.0, "ship", "onnx-fp32"),
        (_row("int8", 1.0, -0.02, -0.01, 0.0), 0.1, "unsettled", "int8"),
        (_row("int8", 1.0, -0.09, -0.07, -0.05), 0.1, "reject", "int8"),
    ],
)
def test_the_verdict_is_the_fastest_exported_version_that_is_not_inferior(int8, margin, status, version):
    found = verdict([TEACHER, FP32, int8], ["a", "b"], margin)
    assert (found["status"], found["version"]) == (status, version)


def test_beside_a_teacher_that_only_guesses_nothing_is_recommended(chain, run, tmp_path, monkeypatch):
    labels = np.repeat(np.arange(4), 50)
    versions = [_version(name, labels, np.roll(labels, 25), 4, tmp_path) for name in ("teacher", "int8")]
    assert not only_guesses(compare_versions(versions, 4, 0.9, seed=0)[0])  # half of the texts right
    blind = np.random.default_rng(0).integers(0, 4, len(labels))
    versions = [_version(name, labels, blind, 4, tmp_path) for name in ("teacher", "int8")]
    rows = [{**row, **SIZES} for row in compare_versions(versions, 4, 0.9, seed=0)]
    found = verdict(rows, list("abcd"), 50.0)
    assert found["status"] == "reject" and found["headline"].startswith("Train the teacher first")

    monkeypatch.setattr("distill.explain.report.only_guesses", lambda row: True)
    stages = ["--teacher", chain.teacher, "--student", chain.student, "--export", chain.export]
    result = run("report", *stages, "--explain", 0, "--max-drop", 100, "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "--max-drop 100: the teacher is not shown" in result.stderr


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.98, 0.01, 0.01), (0.25,) * 4])
def test_answers_that_ignore_the_text_reach_a_macro_f1_of_at_most_one_by_the_classes(shares):
    generator = np.random.default_rng(0)
    classes = len(shares)
    labels = generator.choice(classes, size=200_000, p=shares)
    for answers in (shares, (1, *[0] * (classes - 1)), (1 / classes,) * classes):
        blind = generator.choice(classes, size=len(labels), p=answers)
        assert score(labels, blind, classes).macro_f1 <= 1 / classes + 0.005


def test_the_verdict_names_the_classes_that_are_worse():
    row = _row("int8", 1.0, -0.02, -0.01, 0.0)
    row["difference"]["f1"][1] = {"value": -0.05, "low": -0.09, "high": -0.01}
    row["difference"]["calls"][1] = "worse"
    answer = verdict([TEACHER, row], ["a", "b"], 3.0)["answers"]["For which classes is it not?"]
    assert "b (-5.0 points)" in answer and "a (" not in answer


def test_max_drop_gates_and_the_report_is_written_all_the_same(chain, run, tmp_path):
    stages = ["--teacher", chain.teacher, "--student", chain.student, "--export", chain.export]
    stages += ["--texts", 2, "--explain", 0]
    assert run("report", *stages, "--output", tmp_path / "a", "--max-drop", 100).exit_code == 0
    lost = (
        -100
        * json.loads((tmp_path / "a" / "report.json").read_text())["versions"][-1]["difference"]["macro_f1"][
            "low"
        ]
    )
    assert run("report", *stages, "--output", tmp_path / "d", "--max-drop", lost + 0.01).exit_code == 0
    result = run("report", *stages, "--output", tmp_path / "b", "--max-drop", lost - 0.01)
    assert result.exit_code == 1
    assert (
        result.stderr.strip().splitlines()[-1].startswith(f"Error: --max-drop {lost - 0.01:g}: int8 may lose")
    )
    assert (tmp_path / "b" / "report.html").is_file()
    assert run("report", *stages, "--output", tmp_path / "c").exit_code == 0


def test_when_int8_is_refused_the_page_says_so_and_gives_the_reasons_of_what_is_shipped():
    found = verdict([TEACHER, FP32, _row("int8", 1.0, -0.02, -0.01, 0.0)], ["a", "b"], 1.0)
    assert "int8 may lose up to 2.00." in found["answers"]["Is it as good?"]
    one = {"rank_correlation": 0.9, "top_overlap": 0.5, "sign_flips": 0.0, "other_reasons": 0.0}
    faith = {"comprehensiveness": 0.3, "sufficiency": 0.0}
    versions = {
        name: {
            "agreement": {**one, "rank_correlation": value},
            "faithfulness": faith,
            "random_faithfulness": faith,
        }
        for name, value in (("student", 0.91), ("int8", 0.72))
    }
    summary = {"versions": versions, "top": 3, "sampled": 40}
    assert "0.91" in reasons_answer(summary, "onnx-fp32") and "0.72" in reasons_answer(summary, "int8")
    assert reasons_answer({**summary, "sampled": 4}, "int8").startswith("Not known: only 4")
    versions["int8"]["agreement"]["rank_correlation"] = float("nan")
    assert reasons_answer(summary, "int8").startswith("Not known")


def _version(name, labels, predicted, classes, tmp_path):
    logits = 4 * np.eye(classes, dtype=np.float32)[predicted]
    answers = Predictions([str(n) for n in range(len(labels))], labels, logits)
    return Version(name, tmp_path, "x.onnx", 1, 64, answers, answers, Decision())


def test_equally_good_versions_are_not_called_worse_in_some_of_150_classes(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(150), 30)
    versions = []
    for name in ("teacher", "int8"):
        wrong = generator.random(len(labels)) < 0.15
        predicted = np.where(wrong, generator.integers(0, 150, size=len(labels)), labels)
        versions.append(_version(name, labels, predicted, 150, tmp_path))
    rows = compare_versions(versions, 150, 0.9, seed=0)
    assert sum(call != "even" for call in rows[1]["difference"]["calls"]) <= 1
    predicted = np.where((labels == 7) & (generator.random(len(labels)) < 0.7), 8, versions[0].answers)
    rows = compare_versions(
        [versions[0], _version("int8", labels, predicted, 150, tmp_path)], 150, 0.9, seed=0
    )
    assert rows[1]["difference"]["calls"][7] == "worse"


def test_a_class_that_loses_precision_alone_is_called_worse(tmp_path):
    labels = np.repeat([0, 1, 2], 400)
    answers = labels.copy()
    answers[-80:] = 0  # texts of class 2
    versions = [
        _version("teacher", labels, labels, 3, tmp_path),
        _version("int8", labels, answers, 3, tmp_path),
    ]
    assert compare_versions(versions, 3, 0.9, seed=0)[1]["difference"]["calls"] == ["worse", "even", "worse"]


def test_a_threshold_keeps_its_promise_in_the_digits_that_are_shown(tmp_path):
    logits = np.zeros((130, 2), dtype=np.float32)
    logits[:, 0] = np.linspace(9.5, 12, 130)  # all probabilities between 0.9999 and 1
    labels = np.r_[np.ones(40), np.zeros(90)].astype(np.int64)
    answers = Predictions([str(n) for n in range(130)], labels, logits)
    versions = [
        Version(name, tmp_path, "x.onnx", 1, 64, answers, answers, Decision()) for name in ("teacher", "int8")
    ]
    found = compare_versions(versions, 2, 0.95, seed=0)[1]["abstention"]
    assert found["validation"]["precision"] >= 0.95
    assert float(str(found["threshold"])) == found["threshold"]


def test_a_report_in_which_no_test_text_reaches_the_threshold_is_written(content):
    silent = json.loads(json.dumps(content))
    for row in silent["versions"]:
        row["abstention"]["test"] = {"threshold": 0.9, "coverage": 0.0, "precision": None}
    assert "0.0 %" in render(silent, markdown=True) and "0.0 %" in render(silent, markdown=False)


def test_a_loss_is_never_rounded_to_a_smaller_one():
    found = verdict([TEACHER, _row("int8", 1.0, -0.030004, -0.01, 0.0)], ["a", "b"], 3.0)
    assert "up to 3.1 points" in found["headline"] and "may lose up to 3.01" in found["answers"][QUESTIONS[0]]


def test_agreement_is_given_for_every_pair_and_every_explained_text(content):
    reasons = content["reasons"]
    pairs = [("teacher", "student"), ("teacher", "int8"), ("student", "int8")]
    assert [tuple(one["versions"]) for one in reasons["between"]] == pairs
    assert len(reasons["single_texts"]) == reasons["texts"]
    for one in reasons["single_texts"]:
        classes = {*one["true_classes"], *one["answers"].values()}
        assert {(tuple(pair["versions"]), pair["class"]) for pair in one["pairs"]} == {
            (pair, label) for pair in pairs for label in classes
        }


@pytest.mark.parametrize("margin", ["inf", "nan"])
def test_a_margin_that_is_no_number_of_points_is_refused(chain, run, tmp_path, margin):
    stages = ["--teacher", chain.teacher, "--student", chain.student, "--export", chain.export]
    result = run("report", *stages, "--max-drop", margin, "--output", tmp_path / "r")
    assert result.exit_code == 1 and f"--max-drop {margin}" in result.stderr


def test_one_lost_text_of_a_rare_class_is_not_called_worse(tmp_path):
    labels = np.array([0] * 50 + [1] * 50 + [2])
    lost = labels.copy()
    lost[-1] = 0
    versions = [_version("teacher", labels, labels, 3, tmp_path), _version("int8", labels, lost, 3, tmp_path)]
    assert compare_versions(versions, 3, 0.9, seed=0)[1]["difference"]["calls"] == ["even"] * 3


def test_a_class_that_the_test_split_lacks_does_not_move_the_difference(tmp_path):
    labels = np.repeat([0, 1], 100)
    strayed = labels.copy()
    strayed[0] = 2
    versions = [
        _version("teacher", labels, labels, 3, tmp_path),
        _version("int8", labels, strayed, 3, tmp_path),
    ]
    change = compare_versions(versions, 3, 0.9, seed=0)[1]["difference"]["macro_f1"]
    assert -0.01 < change["value"] < 0


def test_versions_that_are_all_perfect_make_a_report(tmp_path):
    from distill.explain.figures import accuracy_against_latency, risk_against_coverage

    labels = np.repeat([0, 1], 20)
    versions = [_version(name, labels, labels, 2, tmp_path) for name in ("teacher", "onnx-fp32", "int8")]
    rows = [{**row, **SIZES} for row in compare_versions(versions, 2, 0.9, 0)]
    assert "svg" in accuracy_against_latency(rows) and "svg" in risk_against_coverage(rows)
    assert verdict(rows, ["a", "b"], 3.0)["status"] == "unsettled"  # 40 texts cannot exclude 3 points


def test_an_export_without_int8_and_lime_make_a_report(chain, tmp_path):
    from distill.export.bundle import ExportOptions

    from distill import export_student

    export_student(ExportOptions(student=chain.student, output=tmp_path / "b"))
    options = ReportOptions(
        chain.teacher, chain.student, tmp_path / "b", tmp_path / "r", texts=2, explain=2, method="lime"
    )
    content = write_report(options)
    assert content["verdict"]["version"] == "onnx-fp32"
    assert list(content["reasons"]["versions"]) == ["teacher", "student"]
    assert (tmp_path / "r" / "report.html").is_file()
