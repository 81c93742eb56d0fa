import csv
import hashlib
import io
import tarfile

import pytest
from distill.examples import snippets

from distill.errors import DistillError


def _tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def source_archive(tmp_path, monkeypatch):
    """An archive laid out as the real one: 40 reviews of 5 snippets in each source."""
    files = {}
    for source in (*snippets.RATED, snippets.UNLABELED):
        keys = [f"{review}_{number}" for review in range(40) for number in range(5)]
        texts = "".join(f"{key}\t0.0\t{source} says {key}\n" for key in keys)
        ratings = "".join(f"{key}\t0.0\t0.0\t[{int(key[-1]) - 2}, {int(key[-1]) - 2}, 0]\n" for key in keys)
        files[f"hutto_ICWSM_2014/{source}_GroundTruth.txt"] = texts.encode()
        files[f"hutto_ICWSM_2014/{source}_anonDataRatings.txt"] = b"\xef\xbb\xbf" + ratings.encode()
    inner = _tar(files)
    path = tmp_path / "package.tar.gz"
    path.write_bytes(_tar({snippets.MEMBER: inner}))
    monkeypatch.setattr(snippets, "SHA256", hashlib.sha256(inner).hexdigest())
    return path


def _read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("ratings", "label"),
    [
        ([-1, -2, 3], "negative"),
        ([0, 0, 4], "neutral"),
        ([1, 2, 0], "positive"),
        ([1, -1], "neutral"),
        ([0, 1], "neutral"),
    ],
)
def test_the_label_is_the_sign_that_most_raters_chose(ratings, label):
    assert snippets.plurality(ratings) == label


def test_snippets_of_one_review_never_stand_in_two_splits(source_archive, tmp_path):
    snippets.write_snippets(source_archive, tmp_path / "data")
    groups = {}
    for split in ("train", "validation", "test"):
        rows = _read(tmp_path / "data" / f"{split}.csv")
        groups[split] = {row["text"].rsplit("_", 1)[0] for row in rows}
        assert {row["label"] for row in rows} == {"negative", "neutral", "positive"}
    assert not groups["train"] & groups["validation"]
    assert not groups["train"] & groups["test"]
    assert not groups["validation"] & groups["test"]
    assert sum(len(group) for group in groups.values()) == 3 * 40
    assert len(_read(tmp_path / "data" / "unlabeled.csv")) == 100


def test_an_archive_with_other_content_is_refused(source_archive, tmp_path, monkeypatch):
    monkeypatch.setattr(snippets, "SHA256", "0" * 64)
    with pytest.raises(DistillError, match="expected 000"):
        snippets.write_snippets(source_archive, tmp_path / "data")
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


def test_a_folder_that_is_not_a_demos_is_left_alone(run, tmp_path):
    (tmp_path / "distill.toml").write_text("[export]\n")
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 1 and "choose another" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["distill.toml"]
