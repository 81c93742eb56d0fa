"""`distill predict --engine ray`: the rows of many Parquet files, here or in an object store."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.dataset
from numpy.typing import NDArray
from pyarrow import fs

from distill.artifact import sha256
from distill.bundle import MANIFEST, open_bundle, second_column
from distill.errors import DistillError
from distill.files import TEXT_COLUMNS, find_column
from distill.ray_data import ROW_HASH, map_parquet, open_parquet, place_of, start_ray
from distill.runtime import Classifier

logger = logging.getLogger(__name__)
RECORD = "_distill.json"  # readers of Parquet pass over names that begin so
ADDED = ("prediction", "score")


class Predictor:
    """A worker: a classifier that adds its answers to rows."""

    def __init__(self, bundle: str, provider: str, file: str | None, text: str, pair: str | None) -> None:
        self._classifier = Classifier(bundle, provider=provider, file=file, threads=1)
        self._columns = (text, pair) if pair else (text,)

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        """Add the columns prediction and score; lists of them where a text may have several labels.

        Both are null where there is no text.
        """
        classifier = self._classifier
        texts = list(zip(*(rows[name].to_pylist() for name in self._columns), strict=True))
        known = [row for row, parts in enumerate(texts) if None not in parts]
        logits = classifier.predict_logits(
            [texts[row] if len(texts[row]) == 2 else texts[row][0] for row in known]
        )
        answers: list[Any] = [None] * len(texts)
        scores: list[Any] = [None] * len(texts)
        for row, one, probabilities in zip(known, logits, classifier.probabilities(logits), strict=True):
            answers[row] = classifier.answer(one)
            scores[row] = self._scores(answers[row], probabilities)
        label: Any = pyarrow.string()
        score: Any = pyarrow.float64()
        if classifier.thresholds is not None:
            label, score = pyarrow.list_(label), pyarrow.list_(score)
        rows = rows.append_column(ADDED[0], pyarrow.array(answers, label))
        return rows.append_column(ADDED[1], pyarrow.array(scores, score))

    def _scores(self, answer: str | list[str], probabilities: NDArray[np.float64]) -> Any:
        if isinstance(answer, str):
            return float(probabilities[self._classifier.labels.index(answer)])
        return [float(probabilities[self._classifier.labels.index(label)]) for label in answer]


def _identity(source: Any) -> str:
    """Of the files of a source: their names, sizes and times, since Ray names a row by its file and place."""
    found = [(one.path, one.size, one.mtime_ns) for one in source.filesystem.get_file_info(source.files)]
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _columns(source: str, schema: Any, text: str | None, pair: str | None) -> list[str]:
    """The columns with the text and perhaps a second one."""
    found = [find_column(source, schema.names, text, TEXT_COLUMNS, "--text-column")]
    if pair:
        found.append(find_column(source, schema.names, pair, (), "--text-pair-column"))
    for name in found:
        kind = schema.field(name).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DistillError(f"{source}: column {name!r} holds {kind}, not text; name another column")
    for name in (ROW_HASH, *ADDED):
        if name in schema.names:
            raise DistillError(f"{source}: already has a column {name!r}; rename it")
    return found


def _read_record(files: fs.FileSystem, place: str) -> dict[str, Any] | None:
    try:
        with files.open_input_stream(f"{place}/{RECORD}") as stream:
            return dict(json.loads(stream.read()))
    except (OSError, ValueError):
        return None


def _write_record(files: fs.FileSystem, place: str, record: dict[str, Any]) -> None:
    with files.open_output_stream(f"{place}/{RECORD}") as stream:
        stream.write(json.dumps(record, indent=2).encode())


def _prepare(
    files: fs.FileSystem, place: str, notes: str, record: dict[str, Any], output: str, overwrite: bool
) -> None:
    """Make room for a run, or find that it goes on with an interrupted one."""
    there, interrupted = (one.type != fs.FileType.NotFound for one in files.get_file_info([place, notes]))
    before = _read_record(files, place) if there else None
    if (
        there
        and before is None
        and any(
            one.type == fs.FileType.File
            for one in files.get_file_info(fs.FileSelector(place, recursive=True))
        )
    ):
        raise DistillError(f"--output {output}: there, and not what distill wrote; choose another --output")
    if before and interrupted and not overwrite:
        changed = [name for name in record if record[name] != before.get(name)]
        if changed:
            raise DistillError(
                f"--output {output}: an interrupted run with another {changed[0]}; give it as it was, or add "
                "--overwrite to start again"
            )
        logger.info("%s: going on with the rows that are missing", output)
        return
    if before and not overwrite:
        raise DistillError(f"--output {output}: already there; add --overwrite to replace it")
    for folder, exists in ((place, there), (notes, interrupted)):
        if exists:
            files.delete_dir(folder)
    files.create_dir(place, recursive=True)
    _write_record(files, place, record)
    files.create_dir(notes, recursive=True)


def predict_with_ray(
    source: str,
    output: str,
    bundle: Path,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    provider: str = "cpu",
    file: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Classify the rows of Parquet files, and write them with their answers as Parquet files.

    Where a run was interrupted, the same call, without `overwrite`, does the rows that are missing.

    Args:
        source: a Parquet file, a folder of them, or an address such as s3://bucket/folder.
        output: a folder, or an address. Rows come in any order, with `row_hash`, which names a row.
        bundle: what `distill export` wrote; on a cluster at the same place on every machine.
        text_column: with the text; found by its usual names when left out.
        text_pair_column: with a second text, for pairs.
        provider: "cpu" or "cuda".
        file: ONNX file of the bundle, in place of the provider's.
        workers: how many; one for each core, or GPU, when left out.
        overwrite: replace what is there.

    Returns:
        How many rows there are now.

    Raises:
        DistillError: if something is missing, in the way, or not what an interrupted run was started with.
    """
    given = open_parquet(source)
    if not given.count_rows():
        raise DistillError(f"{source}: no rows; give a file with texts")
    files, place = place_of(output)
    notes = place_of(f"{output.rstrip('/')}.checkpoint")[1]
    _, inner = place_of(source)
    if f"{place}/".startswith(f"{inner}/") or f"{inner}/".startswith(f"{place}/"):
        raise DistillError(f"--output {output}: in, or around, what is read; choose another folder")
    parts = open_bundle(bundle)
    second = second_column(parts.manifest["data"])
    if text_pair_column and not second:
        raise DistillError(f"--text-pair-column: {bundle} was trained on single texts; leave it out")
    pair = text_pair_column or second
    columns = _columns(source, given.schema, text_column, pair)
    if provider == "cpu":
        Classifier(parts, provider=provider, file=file)  # what is wrong with it is told here
    record = {
        "source": source,
        "content of the source": _identity(given),
        "bundle": [str(bundle.resolve()), sha256(bundle / MANIFEST if bundle.is_dir() else bundle)],
        "text column": columns,
        "file": file,
    }
    ready = start_ray(provider == "cuda", workers)
    _prepare(files, place, notes, record, output, overwrite)
    if not (_read_record(files, place) or {}).get("done"):
        arguments = (str(bundle.resolve()), provider, file, columns[0], (*columns, None)[1])
        map_parquet(source, output, f"{output.rstrip('/')}.checkpoint", Predictor, arguments, ready)
        # From here on a restart has only the notes to remove.
        _write_record(files, place, {**record, "done": True})
    files.delete_dir(notes)
    written = pyarrow.dataset.dataset(place, filesystem=files, format="parquet")
    if without := written.count_rows(filter=pyarrow.dataset.field(ADDED[0]).is_null()):
        logger.warning("%s: %d rows have no text, and no prediction", output, without)
    return int(written.count_rows())
