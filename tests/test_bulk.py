"""Prediction and soft labels over Ray Data, on two local workers."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import make_rows
from distill.student.soft_labels import _read
from distill.student.training import StudentOptions

from distill import Classifier, train_student

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster of two cores for all tests."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _write(folder, texts, shards=3):
    folder.mkdir(exist_ok=True)
    for number in range(shards):
        part = {"number": list(range(number, len(texts), shards)), "text": texts[number::shards]}
        pyarrow.parquet.write_table(pyarrow.table(part), folder / f"{number}.parquet")
    return folder


def _answers(folder):
    return pyarrow.dataset.dataset(folder, format="parquet").to_table().sort_by("number").to_pylist()


def test_every_row_is_answered_once_also_where_a_run_broke_off(chain, run, tmp_path):
    texts = [text for text, _ in make_rows(300, seed=7)]
    source = _write(tmp_path / "in", [*texts[:-1], None])
    arguments = ("predict", source, "--engine", "ray", "--output", tmp_path / "out", "--bundle", chain.export)
    broken = run(*arguments)
    assert broken.exit_code == 1 and "no text in column 'text'; found None" in broken.output
    assert len(broken.output.strip().splitlines()) <= 3
    _write(source, texts)
    other = run(*arguments, "--file", "onnx/model.onnx")
    assert "whose file was None, not onnx/model.onnx; give it as it was" in other.output
    done = run(*arguments)
    assert done.exit_code == 0 and "300 rows" in done.output, done.output
    rows = _answers(tmp_path / "out")
    assert [row["number"] for row in rows] == list(range(300))
    classifier = Classifier(chain.export)
    assert [row["prediction"] for row in rows] == classifier.predict(texts)
    expected = classifier.predict_proba(texts).max(axis=1)
    np.testing.assert_allclose([row["score"] for row in rows], expected)
    assert not (tmp_path / "out.checkpoint").exists()
    assert "already there; add --overwrite" in run(*arguments).output
    assert run(*arguments, "--overwrite").exit_code == 0
    assert len(_answers(tmp_path / "out")) == 300


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("none", "out", "no Parquet to read"),
        ("in", None, "name a file, a folder or an address"),
        ("odd", "out", "already has a column 'score'"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    chain, run, tmp_path, source, output, message
):
    _write(tmp_path / "in", ["a", "b", "c"])
    (tmp_path / "odd").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "score": [1]}), tmp_path / "odd" / "a.parquet")
    place = ("--output", tmp_path / output) if output else ()
    found = run("predict", tmp_path / source, "--engine", "ray", *place, "--bundle", chain.export)
    assert found.exit_code == 1 and message in found.output
    assert not (tmp_path / "out").exists()


def test_soft_labels_of_workers_are_those_of_one_process(chain, tmp_path):
    kept = {}
    for engine in ("local", "ray"):
        folder = tmp_path / engine
        shutil.copytree(chain.teacher, folder / "teacher")
        train_student(
            StudentOptions(
                output=folder / "student", teacher=folder / "teacher", layers=1, max_steps=1, precision="fp32",
                augment="1x", engine=engine,
            )
        )  # fmt: skip
        (place,) = (folder / "soft_labels").iterdir()
        ids, logits = _read(place, 3)
        assert len(ids) == len(set(ids)) == 480
        kept[engine] = logits[np.argsort(ids)]
        assert {path.suffix for path in place.iterdir()} == {".parquet"}
        recipe = json.loads((folder / "student" / "distill.json").read_text())["options"]
        assert "engine" not in recipe
    np.testing.assert_allclose(kept["ray"], kept["local"], atol=1e-5)
