"""Fine-tune a sequence-classification checkpoint on labelled text."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from distill.teacher.adapters import add_adapters, check_four_bits, in_four_bits, merge_adapters
from distill.teacher.folds import discard_folds, out_of_fold
from distill.teacher.losses import balanced_weights, teacher_loss
from numpy.typing import NDArray
from transformers import set_seed

from distill.arguments import TrainingOptions
from distill.artifact import Manifest, publish
from distill.augmentation import augmented
from distill.averaging import is_layerless, refuse_pairs
from distill.checkpoints import discard_checkpoints, prepare_checkpoints, refuse_unfinished
from distill.data import Data, load_data
from distill.devices import choose_device, choose_precision
from distill.errors import DistillError
from distill.long_texts import HEAD, WAYS, WINDOWS
from distill.models import count_parameters, load_model, load_tokenizer
from distill.options import budget_of
from distill.predictions import EVALUATED, UNSEEN, labels_of, score_splits, write_predictions
from distill.processes import ahead, count, join, once
from distill.sharding import ASKED, check_sharding, sharded
from distill.sources import SEPARATOR, Columns
from distill.trainer import tokenize
from distill.training import Trained, fit, predict_logits

logger = logging.getLogger(__name__)
FEW = 50


@dataclass(frozen=True)
class TeacherOptions(TrainingOptions):
    """Options of `distill train-teacher`."""

    output: Path = Path("runs/teacher")
    data: str = ""
    model: str = ""
    columns: Columns = field(default_factory=Columns)
    """With a `separator`, which is any text, a text may have several labels."""
    class_weights: bool = False
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    """Exponent of the focal loss; 0 is cross-entropy."""
    folds: int | None = None
    """Teachers trained besides, each to label the part of the training text that it has not seen."""
    lora: bool = False
    """Train adapters and the head; the rest stays as it is."""
    qlora: bool = False
    """The same, with the rest in 4 bits."""
    lora_rank: int = 16
    augment: str | None = None
    """How many texts to make of the training text, as "4x" or as a number."""
    long_texts: str = HEAD
    """How texts of more than `max_length` tokens are read: "head", "head-tail" or "windows"."""


def _build(options: TeacherOptions, data: Data) -> Any:
    """Load the checkpoint, with adapters if asked."""
    device = choose_device(options.device)
    precision = choose_precision(device, options.precision)
    further = partial(in_four_bits, device=device, precision=precision) if options.qlora else None
    model = load_model(
        options.model, data.labels, dropout=options.dropout, further=further, problem_type=data.problem_type
    )
    return add_adapters(model, options.lora_rank) if options.lora or options.qlora else model


def teacher_options(
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    multi_label: bool = False,
    label_separator: str = SEPARATOR,
    **options: Any,
) -> TeacherOptions:
    """Options as the command line has them."""
    if label_separator != SEPARATOR and not multi_label:
        raise DistillError("--label-separator: stands between several labels of a text; add --multi-label")
    if multi_label and not label_separator:
        raise DistillError("--label-separator: empty; give what stands between labels, such as ,")
    separator = label_separator if multi_label else None
    return TeacherOptions(columns=Columns(text_column, text_pair_column, label_column, separator), **options)


def tune_teacher(**options: Any) -> float:
    """Train with options as the command line has them; macro-F1 on validation, and nothing is published."""
    checked = teacher_options(**options)
    _check(checked)
    return _fit(checked, load_data(checked.data, checked.columns, checked.seed)).trained.score


class _Fitted(NamedTuple):
    """The model, merged; its tokenizer; and how many texts were made to train it on."""

    trained: Trained
    tokenizer: Any
    augmented: int


def _fit(options: TeacherOptions, data: Data, unseen: Sequence[str] = ()) -> _Fitted:
    """Train on data, without making a text whose id is in `unseen`; the test split is not looked at."""
    tokenizer = load_tokenizer(options.model, options.max_length, "--model", options.long_texts)
    set_seed(options.seed)  # a new head is drawn at random
    model = _build(options, data)
    refuse_pairs(is_layerless(model), bool(data.columns.text_pair))
    recipe = {**options.recipe(), "data_fingerprint": data.fingerprint}
    if count() > 1:
        recipe["processes"] = count()
    if sharded():
        recipe["sharded"] = True
    resume_from = once(partial(prepare_checkpoints, options, recipe, "train-teacher"))
    made = [ahead(partial(_augmented, options, data, unseen))] if options.augment else []
    train = tokenize(concatenate_datasets([data.splits["train"], *made]), tokenizer)
    weights = balanced_weights(labels_of(train), len(data.labels)) if options.class_weights else None
    validation = tokenize(data.splits["validation"], tokenizer)

    def loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return teacher_loss(logits, batch["labels"], weights, options.label_smoothing, options.focal_gamma)

    trained = fit(model, tokenizer, train, validation, options, loss, "Teacher", resume_from)
    if options.lora or options.qlora:
        trained = replace(trained, model=merge_adapters(trained.model))
    return _Fitted(trained, tokenizer, sum(map(len, made)))


def _augmented(options: TeacherOptions, data: Data, unseen: Sequence[str]) -> Dataset:
    train = data.splits["train"]
    held_out = {*unseen, *(text_id for split in EVALUATED for text_id in data.splits[split]["id"])}
    budget = budget_of(str(options.augment), len(train))
    return augmented(train, budget, options.seed, held_out, options.checkpoints / "augmented")


def _fold(options: TeacherOptions, data: Data, held_out: Dataset) -> NDArray[np.float32]:
    """Train a teacher on a part of the training text; logits of the rest."""
    trained, tokenizer, _ = _fit(options, data, held_out["id"])
    logits = predict_logits(trained.model, tokenizer, held_out, trained.device, trained.precision)
    once(partial(discard_checkpoints, options))
    return logits


def _check(options: TeacherOptions) -> None:
    way = f"--long-texts {options.long_texts}"
    if options.long_texts not in WAYS:
        raise DistillError(f"{way}: unknown; use {', '.join(WAYS)}")
    if options.long_texts != HEAD and options.columns.text_pair:
        raise DistillError(f"{way}: not for pairs of texts; leave it out")
    if options.long_texts == WINDOWS and options.folds:
        raise DistillError(f"{way}: not with --folds, which label whole texts; leave one of them out")
    if not 0 <= options.label_smoothing < 1:
        raise DistillError(f"--label-smoothing {options.label_smoothing}: must be at least 0 and below 1")
    if options.augment:
        budget_of(options.augment, 1000)
    if (options.lora or options.qlora) and sharded():
        raise DistillError(f"{ASKED}: not with --lora or --qlora, which need less memory; leave one out")
    if options.qlora:
        check_four_bits()
    choose_precision(choose_device(options.device), options.precision)
    once(partial(refuse_unfinished, options, "train-teacher"))


def train_teacher(options: TeacherOptions) -> Manifest:
    """Fine-tune a teacher and publish it.

    Returns:
        The manifest, as it stands in the output folder.

    Raises:
        DistillError: for anything wrong with data, checkpoint or options, before training starts.
    """
    started = time.monotonic()
    check_sharding(options.device)
    join(options.device)
    _check(options)
    data = ahead(partial(load_data, options.data, options.columns, options.seed))
    if (few := len(data.splits["validation"])) < FEW:
        logger.warning(
            "Validation: the best epoch is chosen by %d texts, which is chance in part; give more of them",
            few,
        )
    unseen, details = {}, {}
    if options.folds:
        unseen["train"], scores = out_of_fold(data, options.folds, options, _fold)
        details["fold_macro_f1"] = scores
    trained, tokenizer, made = _fit(options, data)
    logits = {
        split: predict_logits(trained.model, tokenizer, data.splits[split], trained.device, trained.precision)
        for split in EVALUATED
    }
    manifest = Manifest(
        stage="train-teacher",
        labels=data.labels,
        options={k: str(v) if isinstance(v, Path) else v for k, v in options.recipe().items()},
        seed=options.seed,
        data={**data.manifest(), "augmented": made},
        metrics=score_splits(data.splits, logits, len(data.labels)),
        problem_type=data.problem_type,
        long_texts=options.long_texts,
        max_length=tokenizer.model_max_length,
        parameters=count_parameters(trained.model),
        device=trained.device,
        precision=trained.precision,
        wall_seconds=round(time.monotonic() - started, 1),
        details={**details, "steps": trained.steps(), **trained.long},
    )

    def finish() -> Manifest:
        with publish(options.output, manifest, options.overwrite) as folder:
            trained.model.to("cpu").save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
            write_predictions(folder, data.splits, {"teacher": logits, UNSEEN: unseen})
        if options.folds:
            discard_folds(options)
        discard_checkpoints(options)
        return manifest

    return once(finish)
