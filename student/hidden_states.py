"""A student that first learns the teacher's hidden states, token by token: a start for the soft labels.

TinyBERT (Jiao et al. 2020, https://arxiv.org/abs/1909.10351) calls it intermediate-layer distillation, and
does it before that of the predictions, as here. A text's soft label says little where there are few classes;
its hidden states say what the teacher makes of every word there.
"""

import hashlib
import logging
import os
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from distill.student.losses import hidden_state_loss
from distill.student.soft_labels import kept_beside
from distill.student.states import states_of
from filelock import FileLock
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from distill.arguments import TrainingOptions
from distill.artifact import Manifest
from distill.checkpoints import EARLIER, last_complete
from distill.data import texts_of
from distill.devices import choose_device, choose_precision, inference, placed
from distill.encoding import Text, way_of
from distill.errors import DistillError
from distill.long_texts import HEAD_TAIL
from distill.models import load_model, load_tokenizer
from distill.processes import ahead, once
from distill.sources import parts_of
from distill.training import fit

logger = logging.getLogger(__name__)
MOST = 2_000_000  # the student's tokens that it learns from, at most
BATCH_TOKENS = 4096  # that the teacher reads at a time, padding included
FASTER = 5  # times the learning rate of the labels
TEXTS = 1000  # that are tokenized at once
Spans = NDArray[np.int64]


@dataclass
class TeacherStates:
    """What a teacher makes of the student's tokens.

    Attributes:
        values: of its own tokens, shape (its tokens, width), each with mean 0 and deviation 1.
        spans: for each of the student's tokens the first of those in its place, and the one after the last,
            shape (student's tokens, 2); an empty span where there is none.
        starts: the first of the student's tokens of each text, and their number at the end.
    """

    values: NDArray[np.float16]
    spans: Spans
    starts: NDArray[np.int64]

    def of(self, rows: list[int], length: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Means over the spans of these texts' tokens, shape (texts, length, width), and which are known.

        Padding stands behind a text, or on its left.
        """
        found = np.zeros((len(rows), length, self.values.shape[1]), dtype=np.float32)
        known = np.zeros((len(rows), length), dtype=bool)
        for place, row in enumerate(rows):
            spans = self.spans[self.starts[row] : self.starts[row + 1]]
            there = np.flatnonzero(spans[:, 1] > spans[:, 0])
            if not len(there):
                continue
            columns = there + left * (length - len(spans))
            begin, end = spans[there, 0].min(), spans[there, 1].max()
            sums = np.cumsum(self.values[begin:end], axis=0, dtype=np.float32)
            sums = np.concatenate([np.zeros_like(sums[:1]), sums])
            first, last = (spans[there] - begin).T
            found[place, columns] = (sums[last] - sums[first]) / (last - first)[:, None]
            known[place, columns] = True
        return torch.from_numpy(found), torch.from_numpy(known)


def spans_of(texts: list[Text], tokenizer: Any, teacher_tokenizer: Any) -> tuple[Spans, Spans, Spans]:
    """Which of the teacher's tokens stand where the student's do, by the characters that they are made of.

    Tokens at the ends that a tokenizer adds stand where the other's do, if it adds as many.

    Args:
        texts: each read up to what a tokenizer's model reads.
        tokenizer: the student's, a fast one.
        teacher_tokenizer: the teacher's, a fast one.

    Returns:
        Spans as in `TeacherStates`; the number of the student's tokens in each text; and of the teacher's.
    """
    parts = list(map(list, zip(*map(parts_of, texts), strict=True)))
    own, theirs = (one(*parts, truncation=True).encodings for one in (tokenizer, teacher_tokenizer))
    spans, begin = [], 0
    for mine, other in zip(own, theirs, strict=True):
        found = np.zeros((len(mine.ids), 2), dtype=np.int64)
        added = [np.flatnonzero(np.array(one.special_tokens_mask)) for one in (mine, other)]
        if len(added[0]) == len(added[1]):
            found[added[0]] = np.stack([added[1], added[1] + 1], axis=1)
        for part in range(len(parts)):
            here, there = (
                np.flatnonzero(np.array([kind == part for kind in one.sequence_ids])) for one in (mine, other)
            )
            if not len(here) or not len(there):
                continue
            starts, ends = np.array(mine.offsets)[here].T
            other_starts, other_ends = np.array(other.offsets)[there].T
            first = np.searchsorted(other_ends, starts, side="right")
            last = np.searchsorted(other_starts, ends, side="left")
            # A token of no characters has no place.
            kept = (last > first) & (ends > starts)
            found[here[kept]] = np.stack([there[0] + first, there[0] + last], axis=1)[kept]
        found[found[:, 1] > found[:, 0]] += begin
        spans.append(found)
        begin += len(other.ids)
    lengths, their_lengths = (np.array([len(one.ids) for one in side]) for side in (own, theirs))
    return np.concatenate(spans), lengths, their_lengths


def _read(
    file: Path, teacher: Path, manifest: Manifest, texts: list[Text], lengths: Spans, how: tuple[str, str]
) -> None:
    """Write the states of all texts' tokens, two thirds up the layers, one text after the other."""
    model = load_model(str(teacher), manifest.labels, "--teacher").eval()
    tokenizer = load_tokenizer(str(teacher), manifest.max_length, "--teacher")
    device = choose_device(how[0])
    precision = choose_precision(device, how[1])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    unfinished = file.with_suffix(".partial")
    values = np.lib.format.open_memmap(
        unfinished, mode="w+", dtype=np.float16, shape=(int(starts[-1]), model.config.hidden_size)
    )
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    done, told, started = 0, 0.1, time.monotonic()
    with placed(model, device, precision), inference(device, precision):
        while done < len(order):
            rows = order[done : done + max(1, BATCH_TOKENS // int(lengths[order[done]]))]
            parts = list(map(list, zip(*(parts_of(texts[row]) for row in rows), strict=True)))
            batch = tokenizer(*parts, truncation=True, padding=True, return_tensors="pt").to(device)
            states = states_of(model, **batch).float()
            states = F.layer_norm(states, states.shape[-1:]).cpu()
            for row, own, mask in zip(rows, states, batch["attention_mask"].cpu().bool(), strict=True):
                values[starts[row] : starts[row + 1]] = own[mask].numpy()
            done += len(rows)
            read = lengths[order[:done]].sum() / starts[-1]
            if read >= told or done == len(order):
                told = read + 0.1
                left = (time.monotonic() - started) * (1 - read) / read
                logger.info("Teacher's states: %d of %d texts, %d s left", done, len(order), left)
    values.flush()
    os.replace(unfinished, file)


def teacher_hidden_states(
    teacher: Path, manifest: Manifest, dataset: Dataset, tokenizer: Any, device: str, precision: str
) -> TeacherStates:
    """What a teacher makes of a student's tokens; it reads each text once, for all students of these texts.

    The states are kept beside its soft labels, two bytes a number: 1.5 GB for a million tokens of a teacher
    of base size. Of students that start at the same time one has it read, and the others wait.

    Args:
        teacher: the teacher's folder.
        manifest: its manifest.
        dataset: with `id`, `text` and perhaps `text_pair`.
        tokenizer: the student's.
        device: "auto", "cpu" or "cuda".
        precision: "auto" or one of fp32, bf16, fp16.
    """
    texts, begin = list(texts_of(dataset)), 0
    other = load_tokenizer(str(teacher), manifest.max_length, "--teacher")
    found = []
    for first in range(0, len(texts), TEXTS):
        spans, own, theirs = spans_of(texts[first : first + TEXTS], tokenizer, other)
        spans[spans[:, 1] > spans[:, 0]] += begin
        begin += int(theirs.sum())
        found.append((spans, own, theirs))
    spans, own, theirs = (np.concatenate(column) for column in zip(*found, strict=True))
    identity = hashlib.sha256("".join(dataset["id"]).encode()).hexdigest()[:16]
    file = kept_beside(teacher) / f"hidden_states_{identity}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            _read(file, teacher, manifest, texts, theirs, (device, precision))
    return TeacherStates(np.load(file, mmap_mode="r"), spans, np.concatenate([[0], np.cumsum(own)]))


class Reading(nn.Module):
    """A student, whose classifier rests, and a linear map from its last states to those of a teacher.

    The map is W_h in equation 8 of TinyBERT; it is thrown away afterwards.
    """

    base_model_prefix = "student"

    def __init__(self, student: Any, width: int) -> None:
        super().__init__()
        self.config = student.config
        self.student, self.map = student, nn.Linear(student.config.hidden_size, width)
        self.supports_gradient_checkpointing = student.supports_gradient_checkpointing

    @property
    def device(self) -> Any:
        """The student's."""
        return self.student.device

    @property
    def rows(self) -> Any:
        """The student's, if it has no layers."""
        return self.student.rows

    @rows.setter
    def rows(self, value: Any) -> None:
        self.student.rows = value

    def get_input_embeddings(self) -> Any:
        """The student's."""
        return self.student.get_input_embeddings()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The student's."""
        self.student.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The student's."""
        self.student.gradient_checkpointing_disable()

    def forward(self, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        """States, shape (texts, tokens, width), in the place of logits."""
        states = self.student(**inputs, output_hidden_states=True).hidden_states[-1]
        return SequenceClassifierOutput(logits=self.map(states))


class _Stage(TrainingOptions):
    """Options of this stage, whose checkpoints are within those of the student."""

    @property
    def checkpoints(self) -> Path:
        """Where an interrupted run can be picked up."""
        return super().checkpoints / EARLIER


def of_this_stage(options: TrainingOptions) -> TrainingOptions:
    """How a student learns hidden states where nothing else is said: as its labels, but faster."""
    same = {one.name: getattr(options, one.name) for one in fields(TrainingOptions)}
    own = {"max_steps": -1, "min_steps": 0, "patience": 10**6, "report_to": ()}
    return _Stage(**same | own | {"learning_rate": FASTER * options.learning_rate})


def refuse_two_stacks(epochs: float, teacher: Path, student: Any) -> None:
    """Refuse a teacher (its folder) or a student (its configuration) with a decoder beside its encoder."""
    if not epochs:
        return
    for config, name in ((AutoConfig.from_pretrained(teacher), "teacher"), (student, "student")):
        if getattr(config, "is_encoder_decoder", False):
            raise DistillError(
                f"--hidden-epochs: the {name} has a decoder beside its encoder, whose states are of no one "
                "token; leave it out"
            )


def learn_hidden_states(
    student: Any,
    tokenizer: Any,
    texts: tuple[Dataset, Dataset],
    tokenized: tuple[Dataset, Dataset],
    options: TrainingOptions,
    epochs: float,
    teacher: tuple[Path, Manifest],
) -> None:
    """Train a student, in place, to have a teacher's hidden states, up to a linear map.

    Args:
        student: a sequence classifier.
        tokenizer: its tokenizer.
        texts: of training and validation, with `id`, `text` and perhaps `text_pair`.
        tokenized: the same as `tokenize` leaves them, row by row.
        options: how it learns labels.
        epochs: for how long; with 0 nothing happens.
        teacher: its folder and manifest.
    """
    if not epochs:
        return
    stage = of_this_stage(replace(options, epochs=epochs))
    resume_from = once(lambda: last_complete(stage.checkpoints))
    names = [name for name in ("id", "text", "text_pair") if name in texts[0].column_names]
    chosen = [_chosen(one, tokenizer) for one in tokenized]
    if not all(map(len, chosen)):
        logger.warning("--hidden-epochs: nothing to learn from, since every text lacks its middle")
        return
    parts = [one.select(rows).select_columns(names) for one, rows in zip(texts, chosen, strict=True)]
    both = concatenate_datasets(parts)
    states = ahead(
        lambda: teacher_hidden_states(*teacher, both, tokenizer, options.device, options.precision)
    )
    numbers = np.split(np.arange(len(both)), [len(chosen[0])])
    train, validation = (
        one.select(rows).add_column("row", own)
        for one, rows, own in zip(tokenized, chosen, numbers, strict=True)
    )

    def loss(read: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        expected, known = states.of(batch["row"].tolist(), read.shape[1], tokenizer.padding_side == "left")
        return hidden_state_loss(read, expected.to(read.device), known.to(read.device))

    reading = Reading(student, states.values.shape[1])
    fit(reading, tokenizer, train, validation, stage, loss, "Student's states", resume_from, scored=False)


def _chosen(tokenized: Dataset, tokenizer: Any) -> NDArray[np.int64]:
    """As many texts as have `MOST` tokens, drawn where there are more; none that lacks its middle."""
    lengths = np.asarray(tokenized["length"])
    rows = np.arange(len(lengths))
    if way_of(tokenizer) == HEAD_TAIL:
        rows = rows[~np.asarray(tokenized["cut"], dtype=bool)]
    rows = np.random.default_rng(0).permutation(rows)
    return np.sort(rows[: max(1, int(np.searchsorted(np.cumsum(lengths[rows]), MOST, side="right")))])
