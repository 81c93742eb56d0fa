"""Out-of-fold logits: what teachers say of training text that they have not seen.

A teacher remembers its own training text, so its soft labels there are nearly hard. Cross-fitting labels each
text by a teacher of the same kind that was trained on the other folds.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray

from distill.arguments import TrainingOptions
from distill.data import Data
from distill.decision import Decision, Labels, fit_thresholds
from distill.errors import DistillError
from distill.metrics import score
from distill.predictions import labels_of
from distill.processes import once

logger = logging.getLogger(__name__)


def assign_folds(labels: Labels, folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of every text, shape (n,): folds of equal size, each class spread evenly over them.

    In a multi-label problem a text goes by the rarest of its labels.
    """
    generator = np.random.default_rng(seed)
    if labels.ndim == 2:
        counts = np.where(labels, labels.sum(axis=0), len(labels) + 1)
        labels = np.where(labels.any(axis=1), counts.argmin(axis=1), -1)
    order = np.concatenate(
        [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    )
    found = np.empty(len(labels), dtype=np.int64)
    found[order] = np.arange(len(labels)) % folds
    return found


def _place(options: TrainingOptions) -> Path:
    return options.output.parent / "checkpoints" / f".{options.output.name}.folds"  # no other run's


def out_of_fold(
    data: Data,
    folds: int,
    options: TrainingOptions,
    train: Callable[[Any, Data, Dataset], NDArray[np.float32]],
) -> tuple[NDArray[np.float32], list[float]]:
    """Logits for the training text, each from a teacher that has not seen it.

    Those of a finished fold are kept until `discard_folds`, so that a resumed run goes on with the next.

    Args:
        data: all splits.
        folds: how many teachers to train.
        options: how to train; each fold gets them with an output of its own.
        train: trains with options on data, and gives the logits of a held-out part, shape (m, classes).

    Returns:
        Logits in the order of the training split, shape (n, classes); the macro-F1 of every fold.

    Raises:
        DistillError: if there are fewer different training texts than folds, or an interrupted run left
            some that are neither to be resumed nor overwritten.
    """
    whole = data.splits["train"]
    labels = labels_of(whole)
    # Copies of a text are in one fold, or a teacher would have seen what it labels.
    numbers: dict[str, int] = {}
    texts = np.array([numbers.setdefault(one, len(numbers)) for one in whole["id"]])
    first = np.unique(texts, return_index=True)[1]
    if folds > len(first):
        raise DistillError(f"--folds {folds}: there are only {len(first)} training texts; give fewer folds")
    _tell_lonely(labels[first], data.labels)
    assigned = assign_folds(labels[first], folds, options.seed)[texts]
    same = [options.recipe(), data.fingerprint, assigned.tolist()]
    identity = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:16]
    once(partial(_refuse_unfinished, options, identity))
    logits = np.empty((len(labels), len(data.labels)), dtype=np.float32)
    for number in range(folds):
        rest, held = np.flatnonzero(assigned != number), np.flatnonzero(assigned == number)
        fold = replace(
            data,
            splits=DatasetDict({**data.splits, "train": whole.select(rest)}),
            fingerprint=f"{data.fingerprint}, fold {number} of {folds}",
        )
        kept = _place(options) / f"{identity}-{number}.npy"
        if not kept.is_file():
            logger.info("Fold %d of %d", number + 1, folds)
            # Without --resume an unfinished fold of another run is none to go on with.
            own = replace(options, output=_place(options) / f"fold-{number + 1}", overwrite=True)
            try:
                found = train(own, fold, whole.select(held))
            except KeyboardInterrupt:
                logger.info(
                    "Fold %d of %d: interrupted; --resume goes on, with the folds before it",
                    number + 1,
                    folds,
                )
                raise
            once(partial(_keep, kept, found))
        logits[held] = np.load(kept)
    scores = [_score(logits, labels, assigned == number) for number in range(folds)]
    shown = ", ".join(f"{one:.4f}" for one in scores)
    logger.info("Cross-validation: macro-F1 %.4f ± %.4f (%s)", np.mean(scores), np.std(scores, ddof=1), shown)
    return logits, scores


def _score(logits: NDArray[np.float32], labels: Labels, held: NDArray[np.bool_]) -> float:
    """Macro-F1 of a fold, with any thresholds chosen on the other ones."""
    decision = Decision(thresholds=fit_thresholds(logits[~held], labels[~held]))
    return score(labels[held], decision.answers(logits[held]), logits.shape[1]).macro_f1


def _tell_lonely(labels: Labels, names: list[str]) -> None:
    """Warn of classes with a single text: the teacher that labels it has seen none of its class."""
    counts = labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=len(names))
    if lonely := [name for name, count in zip(names, counts, strict=True) if count == 1]:
        logger.warning(
            "--folds: labels with one training text × %d (%s): the teacher that labels it has seen none of "
            "its kind; add texts of them",
            len(lonely), ", ".join(lonely[:3]),
        )  # fmt: skip


def _refuse_unfinished(options: TrainingOptions, identity: str) -> None:
    place = _place(options)
    if not options.resume:
        if not options.overwrite and (any(place.glob("*.npy")) or any(place.rglob("trainer_state.json"))):
            raise DistillError(
                f"{place}: folds of an interrupted run; --resume goes on, --overwrite starts again"
            )
        discard_folds(options)
    elif any(not one.name.startswith(identity) for one in place.glob("*.npy")):
        raise DistillError(
            f"{place}: folds of a run with other options or data; give those, or --overwrite without --resume"
        )


def _keep(file: Path, logits: NDArray[np.float32]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file.with_suffix(".partial.npy"), logits)
    file.with_suffix(".partial.npy").replace(file)


def discard_folds(options: TrainingOptions) -> None:
    """Remove what was kept of finished folds."""
    shutil.rmtree(_place(options), ignore_errors=True)
