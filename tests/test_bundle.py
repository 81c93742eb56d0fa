import json
import shutil

import numpy as np
import onnx
import pytest
from distill.export.bundle import ExportOptions

from distill import Classifier, DistillError, export_student
from distill.bundle import seal_manifest

TEXTS = ["a lovely phone", "awful", "it arrived tuesday", ""]
USED = ["distill.json", "tokenizer.json", "tokenizer_config.json", "onnx/model_quantized.onnx"]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def _edit(path):
    content = bytearray(path.read_bytes())
    place = content.index(b"e")
    content[place : place + 1] = b"E"
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def single(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "export"
    export_student(
        ExportOptions(student=chain.student, output=folder, int8=True, max_drop=100.0, single_file=True)
    )
    return folder / "classifier.onnx"


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("damage", [_truncate, _edit])
def test_a_truncated_or_edited_file_is_refused_with_its_name(chain, tmp_path, name, damage):
    folder = shutil.copytree(chain.export, tmp_path / "b")
    damage(folder / name)
    with pytest.raises(DistillError, match=name) as caught:
        Classifier(folder)
    assert "again" in str(caught.value)


@pytest.mark.parametrize("name", USED)
def test_a_missing_file_is_refused_with_its_name(chain, tmp_path, name):
    folder = shutil.copytree(chain.export, tmp_path / "b")
    (folder / name).unlink()
    with pytest.raises(DistillError, match=name):
        Classifier(folder)


@pytest.mark.parametrize("gone", [{"sha256": ""}, {"sha256": "", "files": {}}])
def test_a_manifest_without_its_seal_is_refused(chain, tmp_path, gone):
    folder = shutil.copytree(chain.export, tmp_path / "b")
    manifest = json.loads((folder / "distill.json").read_text())
    (folder / "distill.json").write_text(json.dumps({**manifest, "labels": manifest["labels"][::-1], **gone}))
    with pytest.raises(DistillError, match=r"distill\.json: changed"):
        Classifier(folder)


@pytest.mark.parametrize("content", ['{"details": null}', '{"details": 5}', "[" * 100_000, "[]"])
def test_a_manifest_that_is_none_is_refused(chain, tmp_path, content):
    folder = shutil.copytree(chain.export, tmp_path / "b")
    (folder / "distill.json").write_text(content)
    with pytest.raises(DistillError, match=r"not a bundle|distill\.json: damaged"):
        Classifier(folder)


def test_damage_is_never_answered_by_another_provider(chain, tmp_path, monkeypatch):
    import onnxruntime

    folder = shutil.copytree(chain.export, tmp_path / "b")
    _truncate(folder / "onnx/model.onnx")
    found = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
    with pytest.raises(DistillError, match="onnx/model.onnx: changed"):
        Classifier(folder)  # auto: the file for CUDA first


def test_a_file_swapped_with_another_of_the_bundle_is_refused(chain, tmp_path):
    folder = shutil.copytree(chain.export, tmp_path / "b")
    shutil.copy(folder / "onnx/model.onnx", folder / "onnx/model_quantized.onnx")
    with pytest.raises(DistillError, match="onnx/model_quantized.onnx: changed"):
        Classifier(folder)


def test_files_that_are_not_used_may_be_taken_away(chain, tmp_path):
    folder = shutil.copytree(chain.export, tmp_path / "b")
    for name in ("onnx/model.onnx", "predictions.parquet", "README.md", "config.json"):
        (folder / name).unlink()
    assert Classifier(folder).predict(TEXTS) == Classifier(chain.export).predict(TEXTS)


def test_the_seal_does_not_depend_on_layout():
    content = {"b": [1, 0.1, float("nan")], "a": {"x": "é", 2: None}}
    again = json.loads(json.dumps({**content, "sha256": "old"}, indent=4))
    assert seal_manifest(again) == seal_manifest(content)
    assert seal_manifest({**again, "b": [1]}) != seal_manifest(content)


def test_the_single_file_gives_the_folders_results_bit_for_bit(single):
    folder = Classifier(single.parent, provider="cpu")
    alone = Classifier(single)
    assert alone.labels == folder.labels and alone.temperature == folder.temperature
    np.testing.assert_array_equal(alone.predict_proba(TEXTS), folder.predict_proba(TEXTS))


def test_the_single_file_is_a_valid_model(single):
    onnx.checker.check_model(single)
    model = onnx.load(single)
    names = {entry.key for entry in model.metadata_props}
    assert {"distill.json", "tokenizer.json", "tokenizer_config.json", "sha256"} <= names
    assert model.graph == onnx.load(single.parent / "onnx/model_quantized.onnx").graph


@pytest.mark.parametrize("place", [0.01, 0.5, 0.999])
def test_a_single_file_with_a_changed_byte_is_refused(single, tmp_path, place):
    content = bytearray(single.read_bytes())
    content[int(len(content) * place)] ^= 1
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(DistillError, match=r"x\.onnx: .*changed since"):
        Classifier(tmp_path / "x.onnx")


def test_another_onnx_file_and_a_cut_one_are_refused(single, tmp_path):
    with pytest.raises(DistillError, match="not what `distill export --single-file` wrote"):
        Classifier(single.parent / "onnx/model_quantized.onnx")
    (tmp_path / "cut.onnx").write_bytes(single.read_bytes()[:50])
    with pytest.raises(DistillError, match="cut.onnx"):
        Classifier(tmp_path / "cut.onnx")


def test_predict_reads_a_single_file(single, run):
    result = run("predict", "--bundle", single, input="a lovely phone\n")
    assert result.exit_code == 0 and "a lovely phone," in result.stdout


def test_the_single_file_is_that_of_cuda_where_cuda_is_the_only_provider(chain, single, tmp_path):
    options = ExportOptions(
        chain.student, tmp_path / "b", provider=("cuda",), max_drop=100.0, single_file=True
    )
    export_student(options)
    place = tmp_path / "b" / "classifier.onnx"
    assert onnx.load(place).graph == onnx.load(tmp_path / "b/onnx/model_fp16.onnx").graph
    assert Classifier(place, provider="cpu", file="onnx/model_fp16.onnx").predict(TEXTS)
    with pytest.raises(DistillError, match="'cpu': .* holds no file for it; .*--provider cpu` wrote"):
        Classifier(place, provider="cpu")


def test_a_file_that_the_single_file_lacks_is_refused(single):
    with pytest.raises(DistillError, match=r"classifier.onnx: holds no onnx/model.onnx"):
        Classifier(single, file="onnx/model.onnx")
