"""`distill predict --engine ray`: the rows of many Parquet files, here or in an object store."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.dataset
from numpy.typing import NDArray
from pyarrow import fs

from distill.bundle import MANIFEST
from distill.errors import DistillError
from distill.files import TEXT_COLUMNS, find_column
from distill.ray_data import ROW_HASH, columns_of, map_parquet, place_of
from distill.runtime import Classifier

logger = logging.getLogger(__name__)
RECORD = "_distill.json"  # readers of Parquet pass over names that begin so


class Predictor:
    """A worker: a classifier that adds its answers to rows."""

    def __init__(self, bundle: str, provider: str, file: str | None, text: str, pair: str | None) -> None:
        self._classifier = Classifier(bundle, provider=provider, file=file, threads=1)
        self._columns = (text, pair) if pair else (text,)

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        """Add the columns prediction and score; lists of them where a text may have several labels."""
        columns = [rows[name].to_pylist() for name in self._columns]
        for name, values in zip(self._columns, columns, strict=True):
            for value, row in zip(values, rows[ROW_HASH].to_pylist(), strict=True):
                if not isinstance(value, str):
                    raise DistillError(f"{ROW_HASH} {row}: no text in column {name!r}; found {value!r}")
        classifier = self._classifier
        logits = classifier.predict_logits(list(zip(*columns, strict=True)) if columns[1:] else columns[0])
        answers = [classifier.answer(row) for row in logits]
        scores = list(map(self._scores, answers, classifier.probabilities(logits)))
        label: Any = pyarrow.string()
        score: Any = pyarrow.float64()
        if classifier.thresholds is not None:
            label, score = pyarrow.list_(label), pyarrow.list_(score)
        rows = rows.append_column("prediction", pyarrow.array(answers, label))
        return rows.append_column("score", pyarrow.array(scores, score))

    def _scores(self, answer: str | list[str], probabilities: NDArray[np.float64]) -> Any:
        if isinstance(answer, str):
            return float(probabilities[self._classifier.labels.index(answer)])
        return [float(probabilities[self._classifier.labels.index(label)]) for label in answer]


def _prepare(
    files: fs.FileSystem, place: str, notes: str, record: dict[str, Any], output: str, overwrite: bool
) -> None:
    """Make room for a run, or find that it goes on with an interrupted one."""
    there, interrupted = (one.type != fs.FileType.NotFound for one in files.get_file_info([place, notes]))
    if interrupted and not overwrite:
        with files.open_input_stream(f"{place}/{RECORD}") as stream:
            before = json.loads(stream.read())
        changed = [name for name in record if record[name] != before.get(name)]
        if changed:
            raise DistillError(
                f"--output {output}: of an interrupted run whose {changed[0]} was {before.get(changed[0])}, "
                f"not {record[changed[0]]}; give it as it was, or add --overwrite to start again"
            )
        logger.info("%s: going on with the rows that are missing", output)
        return
    if there and not overwrite:
        raise DistillError(f"--output {output}: already there; add --overwrite to replace it")
    for folder, exists in ((place, there), (notes, interrupted)):
        if exists:
            files.delete_dir(folder)
        files.create_dir(folder, recursive=True)
    with files.open_output_stream(f"{place}/{RECORD}") as stream:
        stream.write(json.dumps(record, indent=2).encode())


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

    Where a run was interrupted, the same call does the rows that are missing.

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
    files, place = place_of(output)
    present = columns_of(source)
    text = find_column(source, present, text_column, TEXT_COLUMNS, "--text-column")
    if text_pair_column:
        find_column(source, present, text_pair_column, (), "--text-pair-column")
    for name in (ROW_HASH, "prediction", "score"):
        if name in present:
            raise DistillError(f"{source}: already has a column {name!r}; rename it")
    if provider == "cpu":
        Classifier(bundle, provider=provider, file=file)  # what is wrong with it is told here
    manifest = bundle / MANIFEST if bundle.is_dir() else bundle
    record = {
        "source": source,
        "bundle": str(bundle),
        "manifest": json.loads(manifest.read_text())["sha256"] if bundle.is_dir() else None,
        "text column": text,
        "text pair column": text_pair_column,
        "file": file,
    }
    notes = f"{output.rstrip('/')}.checkpoint"
    _prepare(files, place, place_of(notes)[1], record, output, overwrite)
    arguments = (str(bundle.resolve()), provider, file, text, text_pair_column)
    map_parquet(source, output, notes, Predictor, arguments, on_gpu=provider == "cuda", workers=workers)
    return int(pyarrow.dataset.dataset(place, filesystem=files, format="parquet").count_rows())
