"""Fine-tune a sequence-classification checkpoint on labelled text."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill.teacher.adapters import add_adapters, check_four_bits, in_four_bits, merge_adapters
from torch.nn import functional as F
from transformers import set_seed

from distill.artifact import Manifest, publish
from distill.checkpoints import discard_checkpoints, prepare_checkpoints
from distill.data import Data, load_data
from distill.errors import DistillError
from distill.metrics import score
from distill.models import choose_device, choose_precision, count_parameters, load_model, load_tokenizer
from distill.predictions import EVALUATED, write_predictions
from distill.sources import Columns
from distill.trainer import Trained, TrainingOptions, fit, predict_logits, tokenize


@dataclass(frozen=True)
class TeacherOptions(TrainingOptions):
    """Options of `distill train-teacher`."""

    output: Path = Path("runs/teacher")
    data: str = ""
    model: str = ""
    columns: Columns = field(default_factory=Columns)
    class_weights: bool = False
    label_smoothing: float = 0.0
    lora: bool = False
    """Train adapters and the head; the rest stays as it is."""
    qlora: bool = False
    """The same, with the rest in 4 bits."""
    lora_rank: int = 16


def balanced_weights(labels: np.ndarray, classes: int) -> torch.Tensor:
    """Weights n / (classes * count), as scikit-learn's "balanced"; 0 without rows. Shape (classes,)."""
    counts = np.bincount(labels, minlength=classes)
    weights = np.divide(len(labels), classes * counts, out=np.zeros(classes), where=counts > 0)
    return torch.tensor(weights, dtype=torch.float32)


def _loss(
    weights: torch.Tensor | None, smoothing: float
) -> Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]:
    def cross_entropy(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = weights.to(logits.device) if weights is not None else None
        return F.cross_entropy(logits, batch["labels"], weight=weight, label_smoothing=smoothing)

    return cross_entropy


def _build(options: TeacherOptions, labels: list[str]) -> Any:
    """Load the checkpoint, with adapters if asked."""
    further = partial(in_four_bits, device=choose_device(options.device)) if options.qlora else None
    model = load_model(options.model, labels, dropout=options.dropout, further=further)
    return add_adapters(model, options.lora_rank) if options.lora or options.qlora else model


def teacher_options(
    text_column: str | None, text_pair_column: str | None, label_column: str | None, **options: Any
) -> TeacherOptions:
    """Options as the command line has them."""
    return TeacherOptions(columns=Columns(text_column, text_pair_column, label_column), **options)


def tune_teacher(**options: Any) -> float:
    """Train with options as the command line has them; macro-F1 on validation, and nothing is published."""
    return _fit(teacher_options(**options)).trained.score


@dataclass
class _Fitted:
    data: Data
    tokenizer: Any
    trained: Trained
    recipe: dict[str, Any]


def _fit(options: TeacherOptions) -> _Fitted:
    """Check everything, then train; the test split is not looked at."""
    if not 0 <= options.label_smoothing < 1:
        raise DistillError(f"--label-smoothing {options.label_smoothing}: must be at least 0 and below 1")
    if options.qlora:
        check_four_bits()
    choose_precision(choose_device(options.device), options.precision)
    recipe = options.recipe()
    data = load_data(options.data, options.columns, options.seed)
    tokenizer = load_tokenizer(options.model, options.max_length)
    set_seed(options.seed)  # a new head is drawn at random
    model = _build(options, data.labels)
    resume_from = prepare_checkpoints(
        options, {**recipe, "data_fingerprint": data.fingerprint}, "train-teacher"
    )

    train = tokenize(data.splits["train"], tokenizer)
    weights = (
        balanced_weights(np.asarray(train["label"]), len(data.labels)) if options.class_weights else None
    )
    validation = tokenize(data.splits["validation"], tokenizer)
    loss = _loss(weights, options.label_smoothing)
    trained = fit(model, tokenizer, train, validation, options, loss, "Teacher", resume_from)
    return _Fitted(data, tokenizer, trained, recipe)


def train_teacher(options: TeacherOptions) -> Manifest:
    """Fine-tune a teacher and publish it.

    Returns:
        The manifest, as it stands in the output folder.

    Raises:
        DistillError: for anything wrong with data, checkpoint or options, before training starts.
    """
    started = time.monotonic()
    fitted = _fit(options)
    data, tokenizer, trained = fitted.data, fitted.tokenizer, fitted.trained
    model = merge_adapters(trained.model) if options.lora or options.qlora else trained.model
    logits = {
        split: predict_logits(model, tokenizer, data.splits[split], trained.device, trained.precision)
        for split in EVALUATED
    }
    scores = {
        s: score(np.asarray(data.splits[s]["label"]), logits[s].argmax(1), len(data.labels))
        for s in EVALUATED
    }
    manifest = Manifest(
        stage="train-teacher",
        labels=data.labels,
        options={k: str(v) if isinstance(v, Path) else v for k, v in fitted.recipe.items()},
        seed=options.seed,
        data=data.manifest(),
        metrics={split: value.summary() for split, value in scores.items()},
        max_length=tokenizer.model_max_length,
        parameters=count_parameters(model),
        device=trained.device,
        precision=trained.precision,
        wall_seconds=round(time.monotonic() - started, 1),
    )
    with publish(options.output, manifest, options.overwrite) as folder:
        model.to("cpu").save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        write_predictions(folder, data.splits, {"teacher": logits})
    discard_checkpoints(options)
    return manifest
