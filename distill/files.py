"""Rows out of CSV, TSV, JSONL and Parquet files, one at a time, with the place of every fault."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from distill.errors import DistillError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
MAX_FIELD = 2**24
SURROGATE = re.compile("[\ud800-\udfff]")
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


def find_column(
    place: str, present: list[str], wanted: str | None, known: tuple[str, ...], option: str
) -> str:
    """Give the wanted column, or the first known one that is present, whatever its case.

    Raises:
        DistillError: listing the columns at `place` and naming `option`.
    """
    if wanted is not None:
        if wanted in present:
            return wanted
        raise DistillError(f"{place}: no column {wanted!r} ({option}); the columns are {', '.join(present)}")
    lower = {column.lower(): column for column in reversed(present)}
    for name in known:
        if name in lower:
            return lower[name]
    if len(present) == 1 and (other := next((mark for mark in ";\t|" if mark in present[0]), None)):
        kind = "a tab; name the file .tsv" if other == "\t" else f"{other!r}; save the file with commas"
        raise DistillError(
            f"{place}: only one column, {present[0]!r}; its columns seem to be separated by {kind}"
        )
    raise DistillError(f"{place}: which column? Found {', '.join(present)}; name one with {option}")


def read_lines(file: IO[bytes], name: str) -> Iterator[str]:
    """Lines of UTF-8, each to its line feed, without a byte order mark; a fault is an error with its line."""
    for number, raw in enumerate(file, start=1):
        if b"\0" in raw or raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DistillError(
                f"{name}, line {number}: a zero byte; is this UTF-16? Convert the file to UTF-8"
            )
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DistillError(
                f"{name}, line {number}: byte 0x{raw[error.start]:02x} is not UTF-8; "
                f"convert the file, for example with: iconv -f WINDOWS-1252 -t UTF-8"
            ) from error


def read_csv(file: IO[bytes], name: str, delimiter: str = ",") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) from delimited text whose first line names the columns.

    Raises:
        DistillError: for an empty file, repeated column names, or a row with more or fewer fields than
            the header; the first such rows and their number are named.
    """
    csv.field_size_limit(MAX_FIELD)
    # A lone carriage return ends a line too.
    lines = (part for line in read_lines(file, name) for part in io.StringIO(line, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise DistillError(
                f"{name}: the file is empty; its first line must name the columns, as in text,label"
            )
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise DistillError(f"{name}, line 1: the column name {twice!r} appears twice; rename one")
        ragged: list[tuple[int, int]] = []
        count, start = 0, 2
        for fields in reader:
            line, start = start, reader.line_num + 1
            if not fields:
                continue
            if len(fields) != len(header):
                count += 1
                ragged = ragged or [(line, len(fields))]
            elif not count:
                yield line, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DistillError(
            f"{name}, line {reader.line_num}: {error}; close every quote, and double a quote inside a text"
        ) from error
    if count:
        line, found = ragged[0]
        raise DistillError(
            f"{name}, line {line}: {found} fields where the header has {len(header)} "
            f"({count} such row{'s' * (count > 1)}); put quotes around texts that contain {delimiter!r}"
        )


def read_jsonl(file: IO[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) from a file with one JSON object a line."""
    for number, line in enumerate(read_lines(file, name), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DistillError(
                f"{name}, line {number}: not JSON ({error.msg}); write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise DistillError(
                f'{name}, line {number}: {type(row).__name__}, not an object; write {{"text": …}} a line'
            )
        yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DistillError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give (line or row number, row) from a file, by its suffix, in constant memory.

    Raises:
        DistillError: at once, if there is no such file or its suffix is unknown; naming file and line, when
            that is reached, for anything that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        if path.is_dir():
            raise DistillError(f"{path}: a folder; name one of its files")
        raise DistillError(f"{path}: unknown kind of file {suffix!r}; use {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DistillError(f"{path}: no such file")
    return _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)


def _read_text(path: Path, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        if suffix in (".csv", ".tsv"):
            yield from read_csv(file, str(path), "\t" if suffix == ".tsv" else ",")
        else:
            yield from read_jsonl(file, str(path))
