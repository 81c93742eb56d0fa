"""Where labelled text comes from: a file, a folder of files, or the Hub; always as memory-mapped Arrow."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError

from distill.artifact import sha256
from distill.errors import DistillError
from distill.files import SUFFIXES, SURROGATE, TEXT_COLUMNS, find_column, read_rows

disable_progress_bars()

SEPARATOR = "|"  # of the labels of a text
PRINTED_LIST = re.compile(r"\[\s*(['\"].*['\"])?\s*\]", re.DOTALL)  # as pandas writes a list to CSV
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "intent", "sentiment", "y")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "eval": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Column names as the user gave them; None where they are to be found.

    `separator` stands between the labels of a text; None where each has one.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    separator: str | None = None


def parts_of(text: str | tuple[str, str]) -> tuple[str, ...]:
    """The one text, or the two of a pair."""
    return text if isinstance(text, tuple) else (text,)


def text_id(text: str, text_pair: str | None = None) -> str:
    """Name a text (or a pair) by 64 bits of its BLAKE2b hash, in hexadecimal."""
    joined = text if text_pair is None else f"{text}\x1f{text_pair}"
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _resolve(place: str, present: list[str], columns: Columns, labelled: bool) -> Columns:
    text = find_column(place, present, columns.text, TEXT_COLUMNS, "--text-column")
    named = "--text-pair-column" if labelled else "as in the teacher's data"
    pair = columns.text_pair and find_column(place, present, columns.text_pair, (), named)
    label = find_column(place, present, columns.label, LABEL_COLUMNS, "--label-column") if labelled else None
    return Columns(text, pair, label, columns.separator)


def _text(value: Any, place: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DistillError(f"{place}: {column!r} holds {type(value).__name__} {str(value)[:40]!r}, not text; "
                           "name the right column with --text-column")  # fmt: skip
    if SURROGATE.search(value):
        raise DistillError(f"{place}: {column!r} holds half of a character (a lone surrogate); take it out")
    return value if value.strip() else ""


def _label(value: Any, place: str, column: str) -> str | None:
    if isinstance(value, list | tuple):
        raise DistillError(f"{place}: {column!r} holds a list; if a text may have several labels, add "
                           "--multi-label")  # fmt: skip
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if not isinstance(value, str | int):
        raise DistillError(f"{place}: {column!r} holds {type(value).__name__} {str(value)[:40]!r}; "
                           "a label is one string or integer")  # fmt: skip
    return str(value).strip() or None


def _labels(value: Any, place: str, column: str, separator: str) -> list[str] | None:
    """The labels of a text, sorted, each once; none of them where the value is empty."""
    if value is None:
        return None
    if isinstance(value, str) and PRINTED_LIST.fullmatch(value.strip()):
        raise DistillError(f"{place}: {column!r} holds a printed list, {value[:40]!r}; join labels by "
                           f"{separator!r}, or write JSONL or Parquet")  # fmt: skip
    single = value.split(separator) if isinstance(value, str) else value
    parts = single if isinstance(single, list | tuple) else [single]
    if not isinstance(value, str) and len(set(map(str, parts))) < len(parts):
        raise DistillError(f"{place}: {column!r} names a label twice: {str(value)[:60]}; if these are 0 and "
                           "1 for every label, give the labels' names instead")  # fmt: skip
    if any(isinstance(part, list | tuple) for part in parts):
        raise DistillError(f"{place}: {column!r} holds a list of lists; give a list of labels")
    return sorted({label for part in parts if (label := _label(part, place, column)) is not None})


def _convert(row: dict[str, Any], place: str, columns: Columns) -> dict[str, Any]:
    """One row of a file as the row we keep."""
    assert columns.text is not None
    text = _text(row.get(columns.text), place, columns.text)
    pair = _text(row.get(columns.text_pair), place, columns.text_pair) if columns.text_pair else None
    converted: dict[str, Any] = {"id": text_id(text, pair), "text": text}
    if pair is not None:
        converted["text_pair"] = pair
    if columns.label is not None:
        value = row.get(columns.label)
        if columns.separator is None:
            converted["label"] = _label(value, place, columns.label)
        else:
            converted["label"] = _labels(value, place, columns.label, columns.separator)
    return converted


def _generate(path: str, stamp: str, columns: Columns, labelled: bool) -> Iterator[dict[str, Any]]:
    """Rows of a file; `stamp` is there so that the datasets cache notices a changed file."""
    resolved = None
    for line, row in read_rows(Path(path)):
        resolved = resolved or _resolve(path, list(row), columns, labelled)
        place = f"{path}, {'row' if path.lower().endswith('.parquet') else 'line'} {line}"
        yield {"line": line, **_convert(row, place, resolved)}


def _features(columns: Columns, labelled: bool) -> Features:
    names = ["id", "text", *(["text_pair"] if columns.text_pair else [])]
    features = {"line": Value("int64"), **{name: Value("string") for name in names}}
    if labelled:
        features["label"] = Value("string") if columns.separator is None else [Value("string")]
    return Features(features)


def read_file(path: Path, columns: Columns, labelled: bool = True) -> Dataset:
    """Read one file: columns line, id, text, (text_pair) and, if labelled, label; strings but for line."""
    features = _features(columns, labelled)
    if not path.is_file():
        raise DistillError(f"{path}: no such file")
    arguments = {"path": str(path), "stamp": sha256(path), "columns": columns, "labelled": labelled}
    try:
        dataset = Dataset.from_generator(_generate, features=features, gen_kwargs=arguments)
    except (DatasetGenerationError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DistillError):
            cause = cause.__cause__ or cause.__context__
        root = error.__cause__ or error
        if cause is None and not isinstance(error, ValueError):
            cause = DistillError(
                f"{path}: cannot be read: {' '.join(str(root).split())[:200]}; correct the file"
            )
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
    return {name: read_file(path, columns) for name, path in splits.items()}


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
        assert resolved.label is not None
        kind = dataset.features[resolved.label]
        names = getattr(getattr(kind, "feature", kind), "names", None)

        def convert(
            row: dict[str, Any],
            index: int,
            resolved: Columns = resolved,
            label: str = resolved.label,
            names: Any = names,
        ) -> dict[str, Any]:
            if names and isinstance(row[label], list):
                known = [number for number in row[label] if number is not None and number >= 0]
                row = {**row, label: [names[number] for number in known]}
            elif names:  # a ClassLabel; -1 stands for a missing one
                number = -1 if row[label] is None else row[label]
                row = {**row, label: names[number] if number >= 0 else None}
            return {"line": index, **_convert(row, f"{source}, row {index}", resolved)}

        splits[target] = dataset.map(
            convert,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=_features(columns, labelled=True),
        )
    if "train" not in splits:
        raise DistillError(
            f"--data {source}: no train split, only {', '.join(map(str, loaded))}; choose another dataset"
        )
    return splits


def read_source(source: str, columns: Columns) -> dict[str, Dataset]:
    """Read a file, a folder or a Hub dataset: split name -> rows as `read_file` gives them."""
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, columns)
    if path.is_file():
        return {"train": read_file(path, columns)}
    if (
        path.suffix.lower() in SUFFIXES
        or path.is_absolute()
        or source.startswith(".")
        or source.count("/") > 1
    ):
        raise DistillError(f"--data {source}: no such file or folder; name one, or a dataset of the Hub")
    return _read_hub(source, columns)
