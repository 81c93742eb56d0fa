"""The embedding examples; those of other languages are skipped where `make embedding` was not run."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows

from distill import Classifier
from distill.bundle import seal_manifest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = importlib.util.spec_from_file_location("embedding", ROOT / "benchmarks" / "embedding.py")
embedding = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(embedding)
# A line ends with a line feed, and with nothing else.
TEXTS = [text for text, _ in make_rows(30, seed=5)] + [
    "lovely\u2028awful",
    "lovely\rawful",
    "lovely\x85awful",
    "CRLF\r",
]


PYTHON = ROOT / "examples" / "embedding" / "classify.py"


def test_python_names_the_line_that_is_not_utf_8(chain):
    command = [sys.executable, str(PYTHON), str(chain.export)]
    found = subprocess.run(command, input=b"good\nlovely\ncaf\xe9\n", capture_output=True)
    assert found.returncode == 1 and len(found.stdout.splitlines()) == 2
    assert found.stderr.decode().splitlines()[-1].startswith("line 3: not UTF-8")


def test_python_ends_quietly_when_nobody_reads_on(chain):
    command = [sys.executable, str(PYTHON), str(chain.export)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdout = None
        said = process.communicate(b"lovely\n" * 2000)[1]
    assert process.returncode == 1 and b"Traceback" not in said, said


def test_python_answers_line_by_line_and_loads_no_torch(chain):
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__'); assert 'torch' not in sys.modules"
    command = [
        sys.executable,
        "-c",
        code,
        str(ROOT / "examples" / "embedding" / "classify.py"),
        str(chain.export),
    ]
    found = subprocess.run(command, input="\n".join(TEXTS).encode(), capture_output=True, check=True)
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    classifier = Classifier(chain.export)
    assert [answer["label"] for answer in answers] == classifier.predict(TEXTS)
    np.testing.assert_allclose(
        [answer["score"] for answer in answers], classifier.predict_proba(TEXTS).max(axis=1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", ["int8", "fp32"])
@pytest.mark.parametrize("name", ["node", "chromium", "cpp"])
def test_other_languages_give_the_same_answers(chain, name, version):
    run = embedding.available().get(name)
    if run is None:
        pytest.skip(f"{name}: not installed")
    found = embedding.compare(chain.export, TEXTS, version, run)
    assert found["same_label"] == len(TEXTS)
    assert found["largest_probability_difference"] < (0.05 if version == "int8" else 1e-4)


@pytest.mark.parametrize("name", ["node", "cpp"])
def test_other_languages_refuse_a_bundle_of_pairs(chain, name, tmp_path):
    run = embedding.available().get(name)
    if run is None:
        pytest.skip(f"{name}: not installed")
    shutil.copytree(chain.export, tmp_path / "bundle")
    manifest = json.loads((chain.export / "distill.json").read_text())
    manifest["data"]["columns"]["text_pair"] = "second"
    manifest["sha256"] = seal_manifest(manifest)
    (tmp_path / "bundle" / "distill.json").write_text(json.dumps(manifest))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(tmp_path / "bundle", TEXTS, "fp32")
    assert "was trained on pairs of texts" in failed.value.stderr
