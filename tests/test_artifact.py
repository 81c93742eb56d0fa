import json

import pytest

from distill.artifact import Manifest, check_output, publish, read_manifest, sha256, verify
from distill.errors import DistillError


def _manifest():
    return Manifest(stage="train-teacher", labels=["a", "b"], options={}, seed=1, data={})


def _write(output, content="weights", overwrite=False):
    with publish(output, _manifest(), overwrite) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model").write_text(content)


def test_a_published_folder_lists_the_hash_of_every_file(tmp_path):
    _write(tmp_path / "runs" / "teacher")
    manifest = read_manifest(tmp_path / "runs" / "teacher", "train-teacher")
    assert manifest.files == {"onnx/model": sha256(tmp_path / "runs" / "teacher" / "onnx" / "model")}
    assert manifest.versions["python"]
    verify(tmp_path / "runs" / "teacher", manifest)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_stage_leaves_nothing(tmp_path, error):
    with pytest.raises(error), publish(tmp_path / "teacher", _manifest(), False) as folder:
        (folder / "half").write_text("…")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_what_was_there(tmp_path):
    _write(tmp_path / "teacher", "old")
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "teacher", _manifest(), True):
        raise KeyboardInterrupt
    assert (tmp_path / "teacher" / "onnx" / "model").read_text() == "old"
    verify(tmp_path / "teacher", read_manifest(tmp_path / "teacher", "train-teacher"))


def test_an_existing_folder_is_replaced_only_with_overwrite(tmp_path):
    _write(tmp_path / "teacher", "old")
    with pytest.raises(DistillError, match="add --overwrite"):
        check_output(tmp_path / "teacher", False, "train-teacher")
    _write(tmp_path / "teacher", "new", overwrite=True)
    assert (tmp_path / "teacher" / "onnx" / "model").read_text() == "new"


def test_no_stage_replaces_what_another_wrote(tmp_path):
    _write(tmp_path / "teacher", "old")
    with pytest.raises(DistillError, match="`distill train-teacher` wrote this folder; choose another"):
        check_output(tmp_path / "teacher", True, "report")


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_verify_names_the_file_that_changed_or_is_gone(tmp_path, damage):
    _write(tmp_path / "teacher")
    path = tmp_path / "teacher" / "onnx" / "model"
    path.write_text("other") if damage == "change" else path.unlink()
    with pytest.raises(DistillError, match="onnx/model"):
        verify(tmp_path / "teacher", read_manifest(tmp_path / "teacher", "train-teacher"))


def test_a_folder_that_was_killed_half_way_does_not_look_finished(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_text("half")
    with pytest.raises(DistillError, match="no distill.json"):
        read_manifest(tmp_path / "teacher", "train-teacher")


def test_a_newer_schema_is_refused(tmp_path):
    _write(tmp_path / "teacher")
    path = tmp_path / "teacher" / "distill.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(DistillError, match="upgrade"):
        read_manifest(tmp_path / "teacher", "train-teacher")
