"""The teacher's logits: computed once per (teacher, text), kept on disk, found again by the text's id."""

import hashlib
import logging
import os
import shutil
import time
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from distill.artifact import Manifest, manifest_hash
from distill.devices import choose_device, choose_precision, put_on
from distill.models import load_model, load_tokenizer
from distill.predictions import UNSEEN, read_predictions
from distill.processes import once
from distill.ray_data import map_parquet, start_ray, stop_ray
from distill.training import predict_logits

logger = logging.getLogger(__name__)
CHUNK = 5_000
DONE = "done"


def _read(folder: Path, classes: int) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
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


def _table(ids: list[str], logits: NDArray[np.float32]) -> pyarrow.Table:
    values = pyarrow.array(list(logits), type=pyarrow.list_(pyarrow.float32()))
    return pyarrow.table({"id": ids, "logits": values})


def _write(folder: Path, ids: NDArray[np.str_], logits: NDArray[np.float32]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{hashlib.sha256(''.join(ids).encode()).hexdigest()[:16]}.parquet"
    unfinished = path.with_suffix(f".{uuid4().hex}.partial")  # another run may be writing the same
    pyarrow.parquet.write_table(_table(ids.tolist(), logits), unfinished)
    os.replace(unfinished, path)


class Labeller:
    """A worker of Ray: the teacher, which labels rows with id, text and perhaps text_pair."""

    def __init__(
        self, teacher: str, labels: list[str], max_length: int, long_texts: str, device: str, precision: str
    ) -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # there is a worker for every core
        self._model = load_model(teacher, labels, "--teacher")
        self._tokenizer = load_tokenizer(teacher, max_length, "--teacher", long_texts)
        self._how = device, precision
        put_on(self._model, *self._how)

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        """Give the columns id and logits."""
        logits = predict_logits(self._model, self._tokenizer, Dataset(InMemoryTable(rows)), *self._how)
        return _table(rows["id"].to_pylist(), logits)


def _label_with_ray(
    teacher: Path,
    manifest: Manifest,
    missing: Dataset,
    folder: Path,
    how: tuple[str, str],
    workers: int | None,
) -> None:
    """Label texts over Ray Data; where that was interrupted, those that are missing."""
    ready = start_ray(how[0] == "cuda", workers)
    identity = hashlib.sha256("".join(missing["id"]).encode()).hexdigest()[:16]
    place = folder / f"ray-{identity}"
    if not (place / "texts").is_dir():
        unfinished = place / "texts.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for start in range(0, len(missing), CHUNK):
            part = missing.select(range(start, min(start + CHUNK, len(missing))))
            part.to_parquet(unfinished / f"{start // CHUNK:06}.parquet")
        unfinished.rename(place / "texts")
    for name in ("logits", "notes"):
        (place / name).mkdir(exist_ok=True)
    arguments = (
        str(teacher.resolve()), manifest.labels, manifest.max_length, manifest.long_texts, *how
    )  # fmt: skip
    texts, logits, notes = (str(place / name) for name in ("texts", "logits", "notes"))
    map_parquet(texts, logits, notes, Labeller, arguments, ready, id_column="id")
    stop_ray(ready)  # what follows is a training
    (place / DONE).touch()
    _collect(place)


def _collect_finished(folder: Path) -> None:
    for place in folder.glob("ray-*"):
        if (place / DONE).exists():
            _collect(place)


def _collect(place: Path) -> None:
    """Move what Ray has written to the other parts; what an interruption leaves is moved the next time."""
    for path in (place / "logits").glob("*.parquet"):
        path.rename(place.parent / f"part-{path.name}")
    shutil.rmtree(place)


def kept_beside(teacher: Path) -> Path:
    """Folder for what this teacher said, in which another one, trained in its place, is not found."""
    return teacher.parent / "soft_labels" / manifest_hash(teacher)[:16]


def teacher_logits(
    teacher: Path,
    manifest: Manifest,
    dataset: Dataset,
    device: str,
    precision: str,
    engine: str = "local",
    workers: int | None = None,
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
        engine: "local", or "ray" for workers on one machine or many, which see the same folders.
        workers: of Ray; one for each core, or GPU, when left out.
    """
    folder = kept_beside(teacher)
    classes = len(manifest.labels)
    wanted = np.asarray(dataset["id"], dtype="<U16")
    once(partial(_collect_finished, folder))
    known, logits = _labelled(teacher, folder, classes)
    _, first = np.unique(wanted, return_index=True)
    missing = np.sort(first[~np.isin(wanted[first], known)])
    logger.info("Soft labels: %d texts known, %d to compute", len(first) - len(missing), len(missing))
    if len(missing):
        device = choose_device(device)
        precision = choose_precision(device, precision)
    if len(missing) and engine == "ray":
        texts = dataset.select(missing)
        once(partial(_label_with_ray, teacher, manifest, texts, folder, (device, precision), workers))
    elif len(missing):
        model = load_model(str(teacher), manifest.labels, "--teacher")
        tokenizer = load_tokenizer(str(teacher), manifest.max_length, "--teacher", manifest.long_texts)
        put_on(model, device, precision)
        started = time.monotonic()
        for start in range(0, len(missing), CHUNK):
            rows = missing[start : start + CHUNK]
            found = predict_logits(model, tokenizer, dataset.select(rows), device, precision)
            once(partial(_write, folder, wanted[rows], found))
            done = start + len(rows)
            left = (time.monotonic() - started) / done * (len(missing) - done)
            logger.info("Soft labels: %d of %d, %d s left", done, len(missing), left)
    if len(missing):
        known, logits = _labelled(teacher, folder, classes)
    order = np.argsort(known, kind="stable")
    return logits[order[np.searchsorted(known, wanted, sorter=order)]]
