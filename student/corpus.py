"""What a student learns on: labelled text, and texts that only the teacher labels."""

import logging
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from distill.student.losses import UNLABELED
from numpy.typing import NDArray

from distill.data import load_unlabeled
from distill.encoding import reader_of
from distill.errors import DistillError
from distill.long_texts import WINDOWS
from distill.sources import Columns, text_id

logger = logging.getLogger(__name__)


def unlabeled_text(source: str, columns: Columns, held_out: set[str]) -> Dataset:
    """Read unlabelled texts, without those whose ids are held out (validation and test)."""
    dataset = load_unlabeled(source, columns)
    kept = [row for row, text_id in enumerate(dataset["id"]) if text_id not in held_out]
    if len(kept) < len(dataset):
        logger.warning("  unlabeled: text also in validation or test × %d: dropped", len(dataset) - len(kept))
    if not kept:
        raise DistillError(
            f"--unlabeled {source}: every text is also in validation or test; give other texts"
        )
    return dataset.select(kept)


def in_windows(dataset: Dataset, tokenizer: Any) -> Dataset:
    """The windows in which the student reads each text, as texts of their own; all else as it is.

    The teacher labels each, so that the student learns what is in it, and not what is elsewhere in its text.
    """
    reader = reader_of(tokenizer)
    if reader is None or reader.way != WINDOWS:
        return dataset

    def windows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pieces = [reader.pieces(text) for text in batch["text"]]
        owners = [owner for owner, own in enumerate(pieces) for _ in own]
        texts = [piece for own in pieces for piece in own]
        rest = {name: [values[owner] for owner in owners] for name, values in batch.items()}
        return {**rest, "text": texts, "id": list(map(text_id, texts))}

    return dataset.map(windows, batched=True)


def with_soft_labels(labelled: Dataset, unlabeled: list[Dataset], logits: NDArray[np.float32]) -> Dataset:
    """Put labelled and unlabelled rows into one dataset with a column `teacher_logits`.

    Args:
        labelled: with `label`.
        unlabeled: without; their labels become `UNLABELED`.
        logits: of all rows in this order, shape (n, classes).
    """
    parts = [labelled]
    first = labelled[0]["label"]
    label = [UNLABELED] * len(first) if isinstance(first, list) else UNLABELED
    for dataset in unlabeled:
        parts.append(dataset.add_column("label", [label] * len(dataset)).cast(labelled.features))
    return concatenate_datasets(parts).add_column("teacher_logits", list(logits))
