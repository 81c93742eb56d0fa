"""Prediction and soft labels over Ray Data, on two local workers."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import make_rows
from distill.student.options import StudentOptions
from distill.student.soft_labels import _read

from distill import Classifier, train_student

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests, as `start_ray` makes it on two cores."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
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


def _interrupt(output):
    """Make of a finished run one that was killed when half of its rows were written."""
    rows = pyarrow.dataset.dataset(output, format="parquet").to_table()
    for path in output.glob("*.parquet"):
        path.unlink()
    half = rows.slice(0, len(rows) // 2)
    pyarrow.parquet.write_table(half, output / "first.parquet")
    notes = output.with_name(f"{output.name}.checkpoint")
    notes.mkdir()
    pyarrow.parquet.write_table(half.select(["row_hash"]), notes / "first.parquet")
    record = json.loads((output / "_distill.json").read_text())
    del record["done"]
    (output / "_distill.json").write_text(json.dumps(record))
    return half["number"].to_pylist()


def test_every_row_is_answered_once_also_where_a_run_broke_off(chain, run, tmp_path):
    texts = [text for text, _ in make_rows(300, seed=7)]
    source, output = _write(tmp_path / "in", [*texts[:-1], None]), tmp_path / "out"
    arguments = ("predict", source, "--engine", "ray", "--output", output, "--bundle", chain.export)
    done = run(*arguments)
    assert done.exit_code == 0 and "300 rows" in done.output, done.output
    rows = _answers(output)
    assert [row["number"] for row in rows] == list(range(300))
    classifier = Classifier(chain.export)
    assert [row["prediction"] for row in rows] == [*classifier.predict(texts[:-1]), None]
    expected = classifier.predict_proba(texts[:-1]).max(axis=1)
    np.testing.assert_allclose([row["score"] for row in rows[:-1]], expected)
    assert not (tmp_path / "out.checkpoint").exists()
    assert "already there; add --overwrite" in run(*arguments).output
    first = _interrupt(output)
    assert len(first) == 150
    other = run(*arguments, "--file", "onnx/model.onnx")
    assert "an interrupted run with another file; give it as it was" in other.output
    assert run(*arguments).exit_code == 0
    assert [row["prediction"] for row in _answers(output)] == [row["prediction"] for row in rows]
    assert (output / "first.parquet").exists()  # what was done was not done again
    _interrupt(output)
    _write(source, texts)
    assert "another content of the source" in run(*arguments).output


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("none", "out", "no Parquet to read"),
        ("in", None, "name a file, a folder or an address"),
        ("odd", "out", "already has a column 'score'"),
        ("in", "in", "in, or around, what is read"),
        ("in", "in/out", "in, or around, what is read"),
        ("in", "mine", "not what distill wrote"),
        ("damaged", "out", "no Parquet to read"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    chain, run, tmp_path, source, output, message
):
    _write(tmp_path / "in", ["a", "b", "c"])
    (tmp_path / "odd").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "score": [1]}), tmp_path / "odd" / "a.parquet")
    _write(tmp_path / "mine", ["a", "b", "c"])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.parquet").write_text("nothing of the kind")
    place = ("--output", tmp_path / output) if output else ()
    found = run(
        "predict", tmp_path / source, "--engine", "ray", *place, "--overwrite", "--bundle", chain.export
    )
    assert found.exit_code == 1 and message in found.output
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "mine").iterdir())) == 3


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
