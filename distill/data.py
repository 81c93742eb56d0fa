"""Files and Hub ids become validated, memory-mapped splits with integer labels."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from numpy.typing import NDArray

from distill.checks import Finding, find_duplicates, report_findings
from distill.decision import MULTI_LABEL, SINGLE_LABEL
from distill.errors import DistillError
from distill.files import SUFFIXES
from distill.ray_data import fetch
from distill.sources import Columns, read_file, read_source

logger = logging.getLogger(__name__)
HELD_OUT = 0.1


@dataclass
class Data:
    """Validated data: `splits` has train, validation and test with columns id, text, (text_pair,) label.

    `label` is an index into `labels`, or in a multi-label problem a list with 1 for every label that the text
    has and 0 for the others; `id` is a hash of the text. `local` says whether the source was a file or folder
    here, and no dataset of the Hub. `fingerprint` changes with any text, label or
    assignment to a split.
    """

    source: str
    splits: DatasetDict
    labels: list[str]
    columns: Columns
    seed: int
    findings: list[Finding] = field(default_factory=list)
    fingerprint: str = ""
    local: bool = True

    @property
    def problem_type(self) -> str:
        """As a Hugging Face configuration calls it."""
        return SINGLE_LABEL if self.columns.separator is None else MULTI_LABEL

    def manifest(self) -> dict[str, Any]:
        """What a manifest says about the data; enough to load the same splits again."""
        return {
            "source": self.source,
            "local": self.local,
            "columns": asdict(self.columns),
            "split_seed": self.seed,
            "fingerprint": self.fingerprint,
            "rows": {name: len(split) for name, split in self.splits.items()},
            "findings": [asdict(finding) for finding in self.findings],
        }


def _each_label(dataset: Dataset) -> Iterator[str]:
    """Every label of every text."""
    for label in dataset["label"]:
        yield from (label,) if isinstance(label, str) else label


def _drop_unusable(split: str, dataset: Dataset, findings: list[Finding]) -> Dataset:
    texts_missing: list[int] = []
    labels_missing: list[int] = []
    keep: list[int] = []
    for start in range(0, len(dataset), 10_000):
        batch = dataset[start : start + 10_000]
        for offset, (text, label) in enumerate(zip(batch["text"], batch["label"], strict=True)):
            if not text:
                texts_missing.append(batch["line"][offset])
            elif label is None:
                labels_missing.append(batch["line"][offset])
            else:
                keep.append(start + offset)
    for kind, lines in (("empty text", texts_missing), ("missing label", labels_missing)):
        if lines:
            examples = [f"line {line}" for line in lines[:3]]
            findings.append(Finding(kind, split, len(lines), examples, "dropped"))
    return dataset if len(keep) == len(dataset) else dataset.select(keep)


def _label_names(splits: dict[str, Dataset], separator: str | None, findings: list[Finding]) -> list[str]:
    counts = {split: Counter(_each_label(dataset)) for split, dataset in splits.items()}
    names = sorted(set().union(*counts.values()))
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=int)
    rows = sum(counts["train"].values())
    if len(names) < 2:
        found = f"only one label ({names[0]})" if names else "no label at all"
        raise DistillError(f"--data: {found}; a classifier needs at least two")
    if rows > 20 and len(counts["train"]) > rows / 2:
        raise DistillError(
            f"--data: {len(counts['train'])} different labels in {rows} rows are no classes; "
            "name the column that holds them with --label-column, or, if a text may have several labels, add "
            "--multi-label"
        )
    joined = [
        name
        for name in names
        if any(mark in name and {part.strip() for part in name.split(mark)} <= set(names) for mark in "|,;")
    ]
    if joined:
        hint = "add --multi-label?" if separator is None else "give its --label-separator?"
        findings.append(
            Finding("label made of others", "train", len(joined), joined[:3], f"kept as one; {hint}")
        )
    for split, dataset in splits.items():
        if separator is not None and (none := sum(not label for label in dataset["label"])):
            findings.append(Finding("no label", split, none, ["the value is empty"], "kept: none applies"))
    return names


def _find_unseen(splits: dict[str, Dataset], findings: list[Finding]) -> None:
    """Report labels that no training text has."""
    counts = {split: Counter(_each_label(dataset)) for split, dataset in splits.items()}
    held_out = counts["validation"] + counts["test"]
    unseen = sorted(set(held_out) - set(counts["train"]))
    if unseen:
        rare = sum(held_out[name] for name in unseen)
        findings.append(
            Finding("label only in evaluation", "train", rare, unseen[:3], "kept, but cannot be learnt")
        )


def _split(dataset: Dataset, missing: list[str], seed: int, findings: list[Finding]) -> dict[str, Dataset]:
    """Take a stratified tenth of every class for each missing split; the rest stays for training.

    A text with several labels goes by the rarest of them.
    """
    counts = Counter(_each_label(dataset))
    labels = np.array(
        [
            label if isinstance(label, str) else min(label, key=lambda one: (counts[one], one), default="")
            for label in dataset["label"]
        ]
    )
    generator = np.random.default_rng(seed)
    chosen: dict[str, list[NDArray[np.int64]]] = {name: [] for name in ["train", *missing]}
    small: list[str] = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) <= len(missing):
            small.append(str(label))
            size = 0
        else:
            size = max(1, round(len(rows) * HELD_OUT))
        for position, name in enumerate(missing):
            chosen[name].append(rows[position * size : (position + 1) * size])
        chosen["train"].append(rows[len(missing) * size :])
    if small:
        findings.append(
            Finding("class too small to split", "train", len(small), small[:3], "kept in train alone")
        )
    return {name: dataset.select(np.sort(np.concatenate(parts))) for name, parts in chosen.items()}


def _complete(
    source: str, splits: dict[str, Dataset], seed: int, findings: list[Finding]
) -> dict[str, Dataset]:
    missing = [name for name in ("validation", "test") if name not in splits]
    if not missing:
        return splits
    splits = splits | _split(splits["train"], missing, seed, findings)
    for name in missing:
        if not len(splits[name]):
            raise DistillError(
                f"--data {source}: every class is too small for a {name} split; add rows or a {name} file"
            )
    return splits


def load_data(
    source: str,
    columns: Columns | None = None,
    seed: int = 42,
    labels: list[str] | None = None,
    quiet: bool = False,
) -> Data:
    """Load, check and split labelled text.

    Args:
        source: a CSV, TSV, JSONL or Parquet file, a folder with train, validation and test files, or a
            Hub id (`name` or `name:configuration`).
        columns: column names; those left out are found by their usual names.
        seed: of the stratified splits that are made where the source has none.
        labels: label names in the order to use (the teacher's); found when left out.
        quiet: do not log what was found.

    Raises:
        DistillError: naming file, line and remedy for anything that makes training meaningless.
    """
    columns = columns or Columns()
    findings: list[Finding] = []
    found = read_source(source, columns)
    raw = {name: _drop_unusable(name, dataset, findings) for name, dataset in found.items()}
    if not len(raw["train"]):
        raise DistillError(f"--data {source}: no row of the training split has both a text and a label")
    splits = {name: dataset for name, dataset in raw.items() if len(dataset)}
    names = _label_names(splits, columns.separator, findings)
    unknown = [name for name in names if labels is not None and name not in labels]
    if unknown:
        raise DistillError(
            f"--data {source}: label {unknown[0]!r} is not one of the teacher's; "
            "train the teacher on this data, or correct the label"
        )
    names = labels or names
    splits = find_duplicates(_complete(source, splits, seed, findings), findings)
    if not len(splits["train"]):
        raise DistillError(
            f"--data {source}: every training text is also in validation or test; nothing is left to train on"
        )
    if not len(splits["validation"]):
        raise DistillError(
            f"--data {source}: every validation text is also in test; give others, or give no validation "
            "file, and some of the training texts are taken"
        )
    _find_unseen(splits, findings)
    index = {name: position for position, name in enumerate(names)}
    ready = DatasetDict()
    for name in ("train", "validation", "test"):
        numbers = [
            index[label] if isinstance(label, str) else [int(one in label) for one in names]
            for label in splits[name]["label"]
        ]
        ready[name] = splits[name].remove_columns(["label", "line"]).add_column("label", numbers)
    data = Data(source, ready, names, columns, seed, findings, local=Path(source).exists())
    digest = hashlib.sha256("\n".join(names).encode())
    for name, dataset in ready.items():
        digest.update("".join([name, *dataset["id"]]).encode())
        digest.update(np.asarray(dataset["label"], dtype=np.int64).tobytes())
    data.fingerprint = digest.hexdigest()
    if not quiet:
        rows = ", ".join(f"{name} {len(dataset):,}" for name, dataset in ready.items())
        kind = "classes" if columns.separator is None else "labels, any number of them a text"
        logger.info("%s: %s texts; %d %s", source, rows, len(names), kind)
        report_findings(findings)
    return data


def reload_data(
    manifest: dict[str, Any],
    labels: list[str],
    source: str | None = None,
    remedy: str = "say where with --data",
) -> Data:
    """Load again what an earlier stage recorded in its manifest.

    Args:
        manifest: its `data`.
        labels: label names, in its order.
        source: where the data is now, if it has moved.
        remedy: what a user can do if it is not found.

    Raises:
        DistillError: if the source is gone or its rows have changed since.
    """
    moved = f"(the earlier stage read it; if it has moved, or was read in another folder, {remedy})"
    before = manifest["source"]
    if source is None and manifest.get("local") and not Path(before).exists():  # not to be asked of the Hub
        raise DistillError(f"{before}: no such file or folder here {moved}")
    try:
        data = load_data(
            source or before,
            Columns(**manifest["columns"]),
            manifest["split_seed"],
            labels,
            quiet=True,
        )
    except DistillError as error:
        if source is not None:
            raise
        raise DistillError(f"{str(error).removeprefix('--data ')} {moved}") from error
    if data.fingerprint != manifest["fingerprint"]:
        place, instead = (f"--data {source}", "") if source else (before, f", {remedy}")
        raise DistillError(
            f"{place}: its rows are not those the earlier stage was trained on, so the test split could "
            f"leak; bring the old file back{instead}, or train the teacher again"
        )
    return data


def texts_of(dataset: Dataset) -> list[str | tuple[str, str]]:
    """Texts, or pairs of texts, as `Classifier` takes them."""
    if "text_pair" in dataset.column_names:
        return list(zip(dataset["text"], dataset["text_pair"], strict=True))
    return list(dataset["text"])


def load_unlabeled(source: str, columns: Columns | None = None) -> Dataset:
    """Load texts without labels: columns id, text (and text_pair), none empty.

    Args:
        source: a file, a folder of files, or the address of one, such as s3://bucket/folder.
        columns: column names; those left out are found by their usual names.
    """
    if "://" in source:
        folder = str(fetch(source))
        try:
            return load_unlabeled(folder, columns)
        except DistillError as error:
            raise DistillError(str(error).replace(folder, source)) from error
    paths = [Path(source)]
    if paths[0].is_dir():
        paths = sorted(path for path in paths[0].iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DistillError(f"--unlabeled {source}: no file with text in it; name {', '.join(SUFFIXES)}")
    dataset = concatenate_datasets([read_file(path, columns or Columns(), labelled=False) for path in paths])
    kept = [index for index, text in enumerate(dataset["text"]) if text]
    if not kept:
        raise DistillError(f"--unlabeled {source}: every text is empty; give a file with texts")
    return dataset.select(kept).remove_columns(["line"])
