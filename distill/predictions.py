"""Saved logits: what every later comparison reads instead of running a model again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from numpy.typing import NDArray

from distill.errors import DistillError

FILE = "predictions.parquet"
EVALUATED = ("validation", "test")
UNSEEN = "out_of_fold"  # of a teacher's folder: what others like it say of training text they have not seen


@dataclass(frozen=True)
class Predictions:
    """What one version answered on one split, in row order.

    Attributes:
        ids: text ids, n of them.
        labels: true classes, shape (n,).
        logits: shape (n, classes).
    """

    ids: list[str]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each text, shape (n,)."""
        return self.logits.argmax(axis=1)


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
            labels=np.asarray(rows["label"].to_pylist(), dtype=np.int64),
            logits=np.asarray(rows["logits"].to_pylist(), dtype=np.float32),
        )
    return found
