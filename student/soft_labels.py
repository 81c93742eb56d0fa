"""The teacher's logits: computed once per (teacher, text), kept on disk, found again by the text's id."""

import hashlib
import logging
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from distill.artifact import Manifest, manifest_hash
from distill.models import choose_device, choose_precision, load_model, load_tokenizer
from distill.predictions import UNSEEN, read_predictions
from distill.processes import once
from distill.training import predict_logits

logger = logging.getLogger(__name__)
CHUNK = 5_000


def _read(folder: Path, classes: int) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    import pyarrow
    import pyarrow.parquet

    parts = [pyarrow.parquet.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    if not parts:
        return np.empty(0, dtype="<U16"), np.empty((0, classes), dtype=np.float32)
    table = pyarrow.concat_tables(parts)
    logits = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, classes)
    return np.asarray(table["id"].to_pylist(), dtype="<U16"), logits


def _labelled(teacher: Path, folder: Path, classes: int) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    """All that is labelled already: training text out of fold, where the teacher has folds; then the rest."""
    known, logits = _read(folder, classes)
    unseen = read_predictions(teacher, "train").get(UNSEEN)
    if unseen is None:
        return known, logits
    ids = np.asarray(unseen.ids, dtype="<U16")
    others = ~np.isin(known, ids)
    return np.concatenate([ids, known[others]]), np.concatenate([unseen.logits, logits[others]])


def _write(folder: Path, ids: NDArray[np.str_], logits: NDArray[np.float32]) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{hashlib.sha256(''.join(ids).encode()).hexdigest()[:16]}.parquet"
    partial = path.with_suffix(".partial")
    values = pyarrow.array(list(logits), type=pyarrow.list_(pyarrow.float32()))
    pyarrow.parquet.write_table(pyarrow.table({"id": ids.tolist(), "logits": values}), partial)
    os.replace(partial, path)


def teacher_logits(
    teacher: Path, manifest: Manifest, dataset: Dataset, device: str, precision: str
) -> NDArray[np.float32]:
    """Logits of the teacher for every row, shape (n, classes); the teacher runs on unknown texts alone.

    They are kept in `soft_labels/` beside the teacher's folder, under the hash of the teacher's manifest, in
    parts of 5,000 texts, so that an interrupted run loses at most one part. They serve whatever
    precision a later run asks for.

    Args:
        teacher: the teacher's folder.
        manifest: its manifest.
        dataset: with `id`, `text` and perhaps `text_pair`.
        device: "auto", "cpu" or "cuda".
        precision: "auto" or one of fp32, bf16, fp16.
    """
    folder = teacher.parent / "soft_labels" / manifest_hash(teacher)[:16]
    classes = len(manifest.labels)
    wanted = np.asarray(dataset["id"], dtype="<U16")
    known, logits = _labelled(teacher, folder, classes)
    _, first = np.unique(wanted, return_index=True)
    missing = np.sort(first[~np.isin(wanted[first], known)])
    logger.info("Soft labels: %d texts known, %d to compute", len(first) - len(missing), len(missing))
    if len(missing):
        device = choose_device(device)
        precision = choose_precision(device, precision)
        model = load_model(str(teacher), manifest.labels, "--teacher")
        tokenizer = load_tokenizer(str(teacher), manifest.max_length, "--teacher")
        started = time.monotonic()
        for start in range(0, len(missing), CHUNK):
            rows = missing[start : start + CHUNK]
            found = predict_logits(model, tokenizer, dataset.select(rows), device, precision)
            once(partial(_write, folder, wanted[rows], found))
            done = start + len(rows)
            left = (time.monotonic() - started) / done * (len(missing) - done)
            logger.info("Soft labels: %d of %d, %d s left", done, len(missing), left)
        known, logits = _labelled(teacher, folder, classes)
    order = np.argsort(known, kind="stable")
    return logits[order[np.searchsorted(known, wanted, sorter=order)]]
