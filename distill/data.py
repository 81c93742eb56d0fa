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
from datasets import Dataset, DatasetDict, Features, Value, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray

from distill.artifact import sha256
from distill.checks import Finding, find_duplicates, report_findings
from distill.errors import DistillError
from distill.files import SUFFIXES, read_rows

logger = logging.getLogger(__name__)
disable_progress_bars()

TEXT_COLUMNS = (
    "text",
    "sentence",
    "content",
    "review",
    "comment",
    "tweet",
    "message",
    "utterance",
    "document",
    "body",
)
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "intent", "sentiment", "y")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "eval": "test",
}  # fmt: skip
HELD_OUT = 0.1


@dataclass(frozen=True)
class Columns:
    """Column names as the user gave them; None where they are to be found."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


@dataclass
class Data:
    """Validated data: `splits` has train, validation and test with columns id, text, (text_pair,) label.

    `label` is an index into `labels`; `id` is a hash of the text. `fingerprint` changes with any text,
    label or assignment to a split.
    """

    source: str
    splits: DatasetDict
    labels: list[str]
    columns: Columns
    seed: int
    findings: list[Finding] = field(default_factory=list)
    fingerprint: str = ""

    def manifest(self) -> dict[str, Any]:
        """What a manifest says about the data; enough to load the same splits again."""
        return {
            "source": self.source,
            "columns": asdict(self.columns),
            "split_seed": self.seed,
            "fingerprint": self.fingerprint,
            "rows": {name: len(split) for name, split in self.splits.items()},
            "findings": [asdict(finding) for finding in self.findings],
        }


def text_id(text: str, text_pair: str | None = None) -> str:
    """Name a text (or a pair) by 64 bits of its BLAKE2b hash, in hexadecimal."""
    joined = text if text_pair is None else f"{text}\x1f{text_pair}"
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _find_column(
    place: str, present: list[str], wanted: str | None, known: tuple[str, ...], option: str
) -> str:
    if wanted is not None:
        if wanted in present:
            return wanted
        raise DistillError(f"{place}: no column {wanted!r} ({option}); the columns are {', '.join(present)}")
    lower = {column.lower(): column for column in reversed(present)}
    for name in known:
        if name in lower:
            return lower[name]
    raise DistillError(f"{place}: which column? Found {', '.join(present)}; name one with {option}")


def _resolve(place: str, present: list[str], columns: Columns, labelled: bool) -> Columns:
    text = _find_column(place, present, columns.text, TEXT_COLUMNS, "--text-column")
    pair = columns.text_pair and _find_column(place, present, columns.text_pair, (), "--text-pair-column")
    label = _find_column(place, present, columns.label, LABEL_COLUMNS, "--label-column") if labelled else None
    return Columns(text, pair, label)


def _text(value: Any, place: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DistillError(f"{place}: {column!r} holds {type(value).__name__} {str(value)[:40]!r}, not text; "
                           "name the right column with --text-column")  # fmt: skip
    return value if value.strip() else ""


def _label(value: Any, place: str, column: str) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if not isinstance(value, str | int):
        raise DistillError(f"{place}: {column!r} holds {type(value).__name__} {str(value)[:40]!r}; "
                           "a label is one string or integer")  # fmt: skip
    return str(value).strip() or None


def _convert(row: dict[str, Any], place: str, columns: Columns) -> dict[str, Any]:
    """One row of a file as the row we keep."""
    assert columns.text is not None
    text = _text(row.get(columns.text), place, columns.text)
    pair = _text(row.get(columns.text_pair), place, columns.text_pair) if columns.text_pair else None
    converted: dict[str, Any] = {"id": text_id(text, pair), "text": text}
    if pair is not None:
        converted["text_pair"] = pair
    if columns.label is not None:
        converted["label"] = _label(row.get(columns.label), place, columns.label)
    return converted


def _generate(path: str, stamp: str, columns: Columns, labelled: bool) -> Iterator[dict[str, Any]]:
    """Rows of a file; `stamp` is there so that the datasets cache notices a changed file."""
    resolved = None
    for line, row in read_rows(Path(path)):
        resolved = resolved or _resolve(path, list(row), columns, labelled)
        place = f"{path}, {'row' if path.lower().endswith('.parquet') else 'line'} {line}"
        yield {"line": line, **_convert(row, place, resolved)}


def _read_file(path: Path, columns: Columns, labelled: bool = True) -> Dataset:
    names = ["id", "text", *(["text_pair"] if columns.text_pair else []), *(["label"] if labelled else [])]
    features = Features({"line": Value("int64"), **{name: Value("string") for name in names}})
    if not path.is_file():
        raise DistillError(f"{path}: no such file")
    arguments = {"path": str(path), "stamp": sha256(path), "columns": columns, "labelled": labelled}
    try:
        dataset = Dataset.from_generator(_generate, features=features, gen_kwargs=arguments)
    except (DatasetGenerationError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DistillError):
            cause = cause.__cause__ or cause.__context__
        raise cause or DistillError(
            f"{path}: no rows; the file needs a header and at least one row"
        ) from error
    if not len(dataset):
        raise DistillError(f"{path}: no rows; the file needs a header and at least one row")
    return dataset


def _read_folder(folder: Path, columns: Columns) -> dict[str, Dataset]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    splits: dict[str, Path] = {}
    for path in files:
        name = SPLIT_NAMES.get(path.stem.lower())
        if name in splits:
            raise DistillError(
                f"{folder}: both {splits[name].name} and {path.name} are {name} files; keep one"
            )
        if name:
            splits[name] = path
    if not splits and len(files) == 1:
        splits["train"] = files[0]
    if "train" not in splits:
        found = ", ".join(path.name for path in files) or "no data files"
        raise DistillError(
            f"{folder}: no train file, only {found}; name it train.csv (or .tsv, .jsonl, .parquet)"
        )
    return {name: _read_file(path, columns) for name, path in splits.items()}


def _read_hub(source: str, columns: Columns) -> dict[str, Dataset]:
    name, _, config = source.partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # the Hub client raises many kinds; each ends here as one line
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DistillError(
            f"--data {source}: no such file or folder here, and the Hub says: {reason}"
        ) from error
    splits: dict[str, Dataset] = {}
    for split, dataset in loaded.items():
        target = SPLIT_NAMES.get(str(split).lower())
        if target is None or target in splits:
            continue
        resolved = _resolve(f"{source} ({split})", dataset.column_names, columns, True)
        names = getattr(dataset.features[resolved.label], "names", None)

        def convert(
            row: dict[str, Any], index: int, resolved: Columns = resolved, names: Any = names
        ) -> dict[str, Any]:
            if names:
                value = row[resolved.label]
                row = {**row, resolved.label: names[value] if value is not None and value >= 0 else None}
            return {"line": index, **_convert(row, f"{source}, row {index}", resolved)}

        splits[target] = dataset.map(convert, with_indices=True, remove_columns=dataset.column_names)
    if "train" not in splits:
        raise DistillError(
            f"--data {source}: no train split, only {', '.join(map(str, loaded))}; choose another dataset"
        )
    return splits


def _read(source: str, columns: Columns) -> dict[str, Dataset]:
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, columns)
    if path.is_file():
        return {"train": _read_file(path, columns)}
    if (
        path.suffix.lower() in SUFFIXES
        or path.is_absolute()
        or source.startswith(".")
        or source.count("/") > 1
    ):
        raise DistillError(f"--data {source}: no such file or folder")
    return _read_hub(source, columns)


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


def _label_names(splits: dict[str, Dataset], findings: list[Finding]) -> list[str]:
    counts = {split: Counter(dataset["label"]) for split, dataset in splits.items()}
    names = sorted(set().union(*counts.values()))
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=int)
    rows = sum(counts["train"].values())
    if len(names) < 2:
        raise DistillError(f"--data: only one label ({', '.join(names)}); a classifier needs at least two")
    if rows > 20 and len(counts["train"]) > rows / 2:
        raise DistillError(f"--data: {len(counts['train'])} different labels in {rows} rows; "
                           "is this the label column? Name it with --label-column")  # fmt: skip
    unseen = [name for name in names if name not in counts["train"]]
    if unseen:
        rare = sum(counter[name] for name in unseen for counter in counts.values())
        findings.append(
            Finding("label only in evaluation", "train", rare, unseen[:3], "kept, but cannot be learnt")
        )
    return names


def _split(dataset: Dataset, missing: list[str], seed: int, findings: list[Finding]) -> dict[str, Dataset]:
    """Take a stratified tenth of every class for each missing split; the rest stays for training."""
    labels = np.asarray(dataset["label"])
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
    raw = {name: _drop_unusable(name, dataset, findings) for name, dataset in _read(source, columns).items()}
    if not len(raw["train"]):
        raise DistillError(f"--data {source}: no row of the training split has both a text and a label")
    splits = {name: dataset for name, dataset in raw.items() if len(dataset)}
    names = _label_names(splits, findings)
    if labels is not None:
        unknown = [name for name in names if name not in labels]
        if unknown:
            raise DistillError(f"--data {source}: label {unknown[0]!r} is not one of the teacher's; "
                               "train the teacher on this data, or correct the label")  # fmt: skip
        names = labels
    missing = [name for name in ("validation", "test") if name not in splits]
    if missing:
        splits |= _split(splits["train"], missing, seed, findings)
        for name in missing:
            if not len(splits[name]):
                raise DistillError(
                    f"--data {source}: every class is too small for a {name} split; add rows or a {name} file"
                )
    splits = find_duplicates(splits, findings)
    if not len(splits["train"]):
        raise DistillError(
            f"--data {source}: every training text is also in validation or test; nothing is left to train on"
        )
    index = {name: position for position, name in enumerate(names)}
    ready = DatasetDict()
    for name in ("train", "validation", "test"):
        numbers = [index[label] for label in splits[name]["label"]]
        ready[name] = splits[name].remove_columns(["label", "line"]).add_column("label", numbers)
    data = Data(source, ready, names, columns, seed, findings)
    digest = hashlib.sha256("\n".join(names).encode())
    for name, dataset in ready.items():
        digest.update("".join([name, *dataset["id"]]).encode())
        digest.update(np.asarray(dataset["label"], dtype=np.int64).tobytes())
    data.fingerprint = digest.hexdigest()
    if not quiet:
        rows = ", ".join(f"{name} {len(dataset):,}" for name, dataset in ready.items())
        logger.info("%s: %s texts; %d classes", source, rows, len(names))
        report_findings(findings)
    return data


def reload_data(manifest: dict[str, Any], labels: list[str], source: str | None = None) -> Data:
    """Load again what an earlier stage recorded in its manifest.

    Raises:
        DistillError: if the source is gone or its rows have changed since.
    """
    try:
        data = load_data(
            source or manifest["source"],
            Columns(**manifest["columns"]),
            manifest["split_seed"],
            labels,
            quiet=True,
        )
    except DistillError as error:
        raise DistillError(
            f"{error} (the earlier stage read it; if it has moved, say where with --data)"
        ) from error
    if data.fingerprint != manifest["fingerprint"]:
        raise DistillError(
            f"--data {data.source}: its rows are not those the earlier stage was trained on, so the test split "
            "could leak; bring the old file back, or train the teacher again"
        )
    return data


def load_unlabeled(source: str, columns: Columns | None = None) -> Dataset:
    """Load texts without labels: columns id, text (and text_pair), empty texts dropped."""
    dataset = _read_file(Path(source), columns or Columns(), labelled=False)
    kept = [index for index, text in enumerate(dataset["text"]) if text]
    if not kept:
        raise DistillError(f"--unlabeled {source}: every text is empty; give a file with texts")
    return dataset.select(kept).remove_columns(["line"])
