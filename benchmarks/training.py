"""How fast a student trains: against the `Trainer` with its defaults, and with the teacher in every step.

All sides train the same student, without dropout but for two of them, the slow ones on a quarter of the
texts; the teacher's weights do not matter to speed. An epoch ends with an evaluation of 8 texts and a
checkpoint, but on the slow sides, which have neither. Tokens are those of the texts, without padding. One
side after the other, several rounds, the median of each. Prints JSON and keeps it in
benchmarks/results/training.json.

Usage: python benchmarks/training.py SET --teacher all-mpnet-base-v2 --student all-MiniLM-L6-v2

SET is a folder with data, as `distill train-teacher --data` takes it.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from datasets import Dataset
from distill.student.architecture import keep_layers
from distill.student.losses import distillation_loss
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from distill import training
from distill.arguments import TrainingOptions
from distill.attention import attention_in_fp32
from distill.data import load_data, texts_of
from distill.devices import choose_precision
from distill.first_token import first_token_only
from distill.latency import cpu_name
from distill.models import load_model, load_tokenizer
from distill.trainer import BEYOND_THE_MODEL, Collator, LossTrainer, tokenize
from distill.training import fit
from distill.used_tokens import used_tokens_only

RESULTS = Path(__file__).resolve().parent / "results"
RATE = 3e-4
DROPPING = ("Trainer, defaults", "distill, with dropout")


def _loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return distillation_loss(logits, batch["teacher_logits"], batch["labels"])


def with_defaults(model: Any, tokenizer: Any, train: Dataset) -> None:
    """`Trainer` as it comes: batches of 8 as they fall, padded, in fp32."""
    names = [*tokenizer.model_input_names, "label"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, num_train_epochs=1, save_strategy="no", report_to=[],
                                      disable_tqdm=True, logging_strategy="no")  # fmt: skip
        rows = train.select_columns([name for name in names if name in train.column_names])
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, arguments, collator, rows).train()


def without(shortcut: str, model: Any, tokenizer: Any, train: Dataset, batch_size: int) -> None:
    """As `distill train-student` would without one of its shortcuts, named by its function."""
    with mock.patch.object(training, shortcut, lambda *_, **__: nullcontext()):
        from_kept_labels(model, tokenizer, train, batch_size)


def from_kept_labels(model: Any, tokenizer: Any, train: Dataset, batch_size: int) -> None:
    """As `distill train-student` trains, with the teacher's logits at hand."""
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingOptions(Path(folder, "run"), epochs=1, batch_size=batch_size, learning_rate=RATE)
        fit(model, tokenizer, train, train.select(range(8)), options, _loss, "Student", None)


class BothTrainer(LossTrainer):
    """Runs the teacher on every batch."""

    teacher: Any
    precision: str

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Teacher logits first, then as always."""
        own = {name.removeprefix("teacher_"): inputs.pop(name) for name in list(inputs)
               if name.startswith("teacher_") and name not in BEYOND_THE_MODEL}  # fmt: skip
        with torch.no_grad():
            inputs["teacher_logits"] = self.teacher(**own).logits
        return super().compute_loss(model, inputs, *args, **kwargs)


def with_teacher_in_step(
    model: Any, tokenizer: Any, train: Dataset, batch_size: int, teacher: Any, teacher_tokenizer: Any
) -> None:
    """The same, but that the teacher labels every batch again, in the same precision.

    Without the evaluation and the saving at an epoch's end, which the others have.
    """

    def both(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        theirs = [{"input_ids": row["teacher_input_ids"]} for row in rows]
        padded = teacher_tokenizer.pad(theirs, return_tensors="pt")
        return {**collate(rows), **{f"teacher_{name}": value for name, value in padded.items()}}

    with (
        tempfile.TemporaryDirectory() as folder,
        first_token_only(model),
        used_tokens_only(model, tokenizer, [train], "cpu", Path(folder, "used_tokens.json")) as new_ids,
        attention_in_fp32("cpu", choose_precision("cpu")),
    ):
        collate = Collator(tokenizer, new_ids)
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=batch_size, learning_rate=RATE,
            group_by_length=True, remove_unused_columns=False, save_strategy="no", report_to=[],
            disable_tqdm=True, logging_strategy="no", bf16=choose_precision("cpu") == "bf16", use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        rows = train.remove_columns("teacher_logits")
        both_trainer = BothTrainer(model, arguments, both, rows, processing_class=tokenizer, loss=_loss)
        both_trainer.teacher = teacher
        both_trainer.train()


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--teacher", default="sentence-transformers/all-mpnet-base-v2", help="Checkpoint.")
@click.option("--student", default="sentence-transformers/all-MiniLM-L6-v2", help="Checkpoint.")
@click.option("--layers", default=2, show_default=True, help="Layers of the student.")
@click.option("--texts", default=8000, show_default=True, help="Texts of an epoch, at most.")
@click.option("--batch-size", default=64, show_default=True, help="Where it is not the Trainer's own.")
@click.option("--rounds", default=3, show_default=True, help="Epochs of each side.")
def main(
    data: Path, teacher: str, student: str, layers: int, texts: int, batch_size: int, rounds: int
) -> None:
    """Time an epoch of each side."""
    loaded = load_data(str(data))
    texts = min(texts, len(loaded.splits["train"]))
    split, classes = loaded.splits["train"].select(range(texts)), loaded.labels
    tokenizer = load_tokenizer(student, 256)
    teacher_model, teacher_tokenizer = load_model(teacher, classes).eval(), load_tokenizer(teacher, 256)
    theirs = teacher_tokenizer(texts_of(split), truncation=True)["input_ids"]
    rng = np.random.default_rng(0)

    logits = rng.normal(size=(texts, len(classes))).astype(np.float32)
    prepared = tokenize(split, tokenizer).add_column("teacher_logits", list(logits))
    prepared = prepared.add_column("teacher_input_ids", theirs)
    epoch: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        "Trainer, defaults": (with_defaults, ()),
        "distill": (from_kept_labels, (batch_size,)),
        "distill, all tokens in the last layer": (partial(without, "first_token_only"), (batch_size,)),
        "distill, all rows of the embeddings": (partial(without, "used_tokens_only"), (batch_size,)),
        "distill, attention in bf16": (partial(without, "attention_in_fp32"), (batch_size,)),
        "distill, with dropout": (from_kept_labels, (batch_size,)),
        "distill, teacher in every step": (
            with_teacher_in_step,
            (batch_size, teacher_model, teacher_tokenizer),
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in epoch}
    for _ in range(rounds):
        for name, (train, arguments) in epoch.items():
            dropout = None if name in DROPPING else 0.0
            model, rows = keep_layers(load_model(student, classes, dropout=dropout), layers), prepared
            if train in (with_defaults, with_teacher_in_step):
                rows = rows.select(range(texts // 4))
            started = time.monotonic()
            train(model, tokenizer, rows, *arguments)
            rates[name].append(float(np.sum(rows["length"])) / (time.monotonic() - started))
            click.echo(f"{name}: {rates[name][-1]:.0f} tokens/s")
    median = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "cpu": cpu_name(),
        "precision": choose_precision("cpu"),
        "data": data.name,
        "teacher": Path(teacher).name,
        "student": Path(student).name,
        "texts": texts,
        "layers": layers,
        "batch_size": batch_size,
        "tokens_per_second": {name: round(value) for name, value in median.items()},
        "spread": {name: [round(min(values)), round(max(values))] for name, values in rates.items()},
        "over_trainer": {name: value / median["Trainer, defaults"] for name, value in median.items()},
        "over_teacher_in_step": median["distill"] / median["distill, teacher in every step"],
    }
    text = json.dumps(result, indent=2)
    (RESULTS / "training.json").write_text(text + "\n", encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
