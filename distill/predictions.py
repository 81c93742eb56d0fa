"""Saved logits: what every later comparison reads instead of running a model again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray

from distill.decision import Decision, Labels, fit_thresholds
from distill.errors import DistillError
from distill.metrics import score

FILE = "predictions.parquet"
EVALUATED = ("validation", "test")
UNSEEN = "out_of_fold"  # of a teacher's folder: what others like it say of training text they have not seen


@dataclass(frozen=True)
class Predictions:
    """What one version answered on one split, in row order.

    Attributes:
        ids: text ids, n of them.
        labels: true classes, shape (n,), or labels, shape (n, classes).
        logits: shape (n, classes).
    """

    ids: list[str]
    labels: Labels
    logits: NDArray[np.float32]


def labels_array(column: list[Any]) -> Labels:
    """A column of classes, or of lists of 0 and 1, as an array of integers or of truth values."""
    found = np.asarray(column, dtype=np.int64)
    return found if found.ndim == 1 else found.astype(bool)


def labels_of(dataset: Dataset) -> Labels:
    """True classes of the rows, shape (n,), or their labels, shape (n, classes)."""
    return labels_array(list(dataset["label"]))


def score_splits(
    splits: DatasetDict, logits: dict[str, NDArray[np.float32]], classes: int
) -> dict[str, dict[str, float]]:
    """What a manifest says of validation and test text; any thresholds are fitted to validation text."""
    truth = {split: labels_of(splits[split]) for split in EVALUATED}
    decision = Decision(thresholds=fit_thresholds(logits["validation"], truth["validation"]))
    return {
        split: score(truth[split], decision.answers(logits[split]), classes).summary() for split in EVALUATED
    }


def write_predictions(
    folder: Path, splits: DatasetDict, logits: dict[str, dict[str, NDArray[np.float32]]]
) -> None:
    """Write `predictions.parquet` with columns version, split, id, label, logits.

    Args:
        folder: where to write.
        splits: the data, with `id` and `label`.
        logits: version -> split -> logits of shape (n, classes).
    """
    import pyarrow
    import pyarrow.parquet

    tables = []
    for version, by_split in logits.items():
        for split, values in by_split.items():
            columns = {
                "version": [version] * len(values),
                "split": [split] * len(values),
                "id": list(splits[split]["id"]),
                "label": list(splits[split]["label"]),
                "logits": pyarrow.array(
                    list(values.astype(np.float32)), type=pyarrow.list_(pyarrow.float32())
                ),
            }
            tables.append(pyarrow.table(columns))
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables), folder / FILE)


def read_predictions(folder: Path, split: str) -> dict[str, Predictions]:
    """Read one split: version -> its predictions.

    Raises:
        DistillError: if the file is missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    path = folder / FILE
    if not path.is_file():
        raise DistillError(
            f"{path}: no such file; name the whole folder that the stage wrote, or run it again"
        )
    try:
        table = pyarrow.parquet.read_table(path, filters=[("split", "=", split)])
    except (OSError, pyarrow.ArrowException) as error:
        raise DistillError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); run that stage again"
        ) from error
    found: dict[str, Predictions] = {}
    for version in dict.fromkeys(table["version"].to_pylist()):
        rows = table.filter(pyarrow.compute.equal(table["version"], version))
        found[version] = Predictions(
            ids=rows["id"].to_pylist(),
            labels=labels_array(rows["label"].to_pylist()),
            logits=np.asarray(rows["logits"].to_pylist(), dtype=np.float32),
        )
    return found
