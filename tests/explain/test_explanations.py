import json
import shutil

import numpy as np
import pytest
from distill.explain.explanations import ExplainOptions

from distill import Classifier, DistillError, explain_texts

TEXT = "the phone was lovely and very fast"


def _stages(chain):
    return ["--teacher", chain.teacher, "--student", chain.student, "--export", chain.export]


def _options(chain, **changes):
    return ExplainOptions(teacher=chain.teacher, student=chain.student, export=chain.export, **changes)


def test_every_version_is_explained_and_its_values_sum_up(chain):
    (entry,) = explain_texts(_options(chain, texts=[TEXT]))
    assert list(entry["versions"]) == ["teacher", "student", "int8"]
    assert entry["words"] == TEXT.split()
    for one in entry["versions"].values():
        for label, values in one["values"].items():
            total = one["base"][label] + sum(values)
            assert total == pytest.approx(one["probabilities"][label], abs=1e-3)
        assert one["residual"] < 1e-3


def test_what_is_explained_is_what_the_classifier_answers(chain):
    (entry,) = explain_texts(_options(chain, texts=[TEXT], versions=["int8"]))
    classifier = Classifier(chain.export)
    answers = dict(zip(classifier.labels, classifier.predict_proba([TEXT])[0], strict=True))
    assert entry["versions"]["int8"]["probabilities"] == pytest.approx(answers)
    empty = dict(zip(classifier.labels, classifier.predict_proba([""])[0], strict=True))
    assert entry["versions"]["int8"]["base"] == pytest.approx(empty)


def test_the_student_explained_through_its_graph_is_the_one_in_pytorch(chain, tmp_path, monkeypatch):
    # In bf16, which some machines choose, values as small as this toy's are rounded away.
    monkeypatch.setattr("distill.devices.choose_precision", lambda device: "fp32")
    through_graph = explain_texts(_options(chain, texts=[TEXT], versions=["student"]))[0]
    options = ExplainOptions(
        texts=[TEXT], versions=["student"], student=chain.student, export=tmp_path / "absent"
    )
    in_pytorch = explain_texts(options)[0]
    for label, values in in_pytorch["versions"]["student"]["values"].items():
        np.testing.assert_allclose(values, through_graph["versions"]["student"]["values"][label], atol=1e-4)


def test_only_the_folders_that_are_needed_are_read(chain, run, tmp_path):
    stages = ["--teacher", tmp_path / "absent", "--student", tmp_path / "absent", "--export", chain.export]
    result = run("explain", TEXT, *stages, "--version", "int8")
    assert result.exit_code == 0
    assert "int8" in result.stdout and "lovely" in result.stdout


def test_a_sample_of_the_test_split_is_the_same_for_the_same_seed(chain, run):
    arguments = ["explain", *_stages(chain), "--version", "int8", "--sample", 3, "--json"]
    first, again = run(*arguments).stdout, run(*arguments).stdout
    assert first == again
    assert len(first.splitlines()) == 3
    assert set(json.loads(first.splitlines()[0])) == {"text", "method", "words", "versions"}


def test_lime_claims_no_sum(chain, run):
    result = run("explain", TEXT, *_stages(chain), "--version", "int8", "--method", "lime", "--json")
    assert json.loads(result.stdout)["versions"]["int8"]["residual"] is None


def test_words_beyond_the_first_dozen_are_summed_up(chain, run):
    result = run("explain", " ".join(f"word{n}" for n in range(20)), *_stages(chain), "--version", "int8")
    assert "others (8)" in result.stdout


def test_folders_of_other_labels_are_refused(chain, run, tmp_path):
    shutil.copytree(chain.teacher, tmp_path / "t")
    manifest = json.loads((tmp_path / "t" / "distill.json").read_text())
    (tmp_path / "t" / "distill.json").write_text(json.dumps({**manifest, "labels": ["a", "b", "c"]}))
    result = run("explain", TEXT, "--teacher", tmp_path / "t", "--export", chain.export)
    assert result.exit_code == 1 and "its labels are not" in result.stderr


def test_stages_that_do_not_belong_together_are_refused(chain, run, tmp_path):
    shutil.copytree(chain.teacher, tmp_path / "t")
    manifest = json.loads((tmp_path / "t" / "distill.json").read_text())
    (tmp_path / "t" / "distill.json").write_text(json.dumps({**manifest, "seed": 7}))
    stages = ["--teacher", tmp_path / "t", "--student", chain.student, "--export", chain.export]
    result = run("explain", TEXT, *stages)
    assert result.exit_code == 1 and "run `distill train-student --overwrite` again" in result.stderr


def test_a_student_that_was_named_is_not_replaced_by_the_bundles(chain, run, tmp_path):
    result = run(
        "explain", TEXT, "--version", "student", "--student", tmp_path / "no", "--export", chain.export
    )
    assert result.exit_code == 1 and f"--student {tmp_path / 'no'}" in result.stderr


def test_a_string_in_place_of_a_list_and_broken_text_are_refused(chain):
    with pytest.raises(DistillError, match="a single string"):
        explain_texts(_options(chain, texts="hello"))
    with pytest.raises(DistillError, match="text 1: not valid UTF-8"):
        explain_texts(_options(chain, texts=["a \udcff"]))


def test_long_words_do_not_widen_the_table(chain, run):
    shown = run("explain", "lovely " + "x" * 500, *_stages(chain), "--version", "int8").stdout
    assert max(len(line) for line in shown.splitlines()[1:]) < 100


def test_a_text_is_run_once_however_often_it_is_asked_for(chain):
    from distill.explain.attribution import attribute

    seen = []

    def model(texts):
        seen.extend(texts)
        return np.tile([0.5, 0.5], (len(texts), 1))

    attribute(" ".join(f"word{n}" for n in range(12)), {"one": model})
    assert len(seen) == len(set(seen))
