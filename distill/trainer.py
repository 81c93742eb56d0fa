"""What teacher and student training share: the `Trainer`, its arguments and its options."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint

from distill.callbacks import ProgressCallback, SaveInTime, Watch
from distill.first_token import first_token_only
from distill.metrics import score
from distill.models import batched_logits, choose_device, choose_precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """Options that both training stages have. Batch size is per device."""

    output: Path
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 32
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 5e-5
    head_learning_rate: float | None = None
    """Of what is new, head and adapters; ten times `learning_rate` when left out."""
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    dropout: float | None = None
    freeze_embeddings: bool = False
    max_grad_norm: float = 1.0
    scheduler: str = "linear"
    patience: int = 3
    max_length: int = 256
    device: str = "auto"
    precision: str = "auto"
    seed: int = 42
    report_to: tuple[str, ...] = ()
    """Trackers that the Trainer tells about loss and scores: tensorboard, mlflow, wandb."""
    resume: bool = False
    overwrite: bool = False

    def recipe(self) -> dict[str, Any]:
        """What decides the result, by name."""
        beside = ("report_to", "resume", "overwrite")
        return {name: value for name, value in asdict(self).items() if name not in beside}

    @property
    def checkpoints(self) -> Path:
        """Where an interrupted run can be picked up."""
        return self.output.parent / "checkpoints" / self.output.name


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Rows in an order that depends on seed and epoch alone, so that a resumed epoch goes on with its own."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def tokenize(dataset: Dataset, tokenizer: Any, file: Path | None = None) -> Dataset:
    """Add token ids (truncated, not padded) and `length` in tokens; the text columns go.

    Args:
        dataset: with `text` and perhaps `text_pair`; other columns, such as `teacher_logits`, stay.
        tokenizer: a fast one.
        file: where to keep the rows, memory-mapped from then on; one that is there is taken as it is.
    """
    pairs = "text_pair" in dataset.column_names

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], batch["text_pair"] if pairs else None, truncation=True)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    return dataset.map(
        encode,
        batched=True,
        remove_columns=["id", "text", *(["text_pair"] if pairs else [])],
        cache_file_name=str(file) if file else None,
    )


class Collator:
    """Pad a batch to its longest text; labels and teacher logits become tensors as they are."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows as `tokenize` leaves them."""
        inputs = [
            {name: row[name] for name in self.tokenizer.model_input_names if name in row} for row in rows
        ]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        if "teacher_logits" in rows[0]:
            batch["teacher_logits"] = torch.tensor(
                [row["teacher_logits"] for row in rows], dtype=torch.float32
            )
        return batch


def _arguments(options: TrainingOptions, precision: str, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.checkpoints),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size * 2,
        gradient_accumulation_steps=options.gradient_accumulation,
        gradient_checkpointing=options.gradient_checkpointing,
        # The re-entrant kind gives no gradient to anything after frozen embeddings.
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        learning_rate=options.learning_rate,
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type=options.scheduler,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="macro_f1",
        greater_is_better=True,
        group_by_length=True,
        length_column_name="length",
        remove_unused_columns=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        seed=options.seed,
        disable_tqdm=True,
        logging_strategy="steps" if options.report_to else "no",
        logging_steps=10,
        logging_dir=str(options.output.parent / "logs" / options.output.name),
        run_name=options.output.name,
        report_to=list(options.report_to),
    )


HEAD_RATE = 10


def is_new(name: str, prefix: str) -> bool:
    """Say whether a parameter or module is new: in the classifier, in the pooler below it, or an adapter's.

    A classifier and adapters are drawn at random; a pooler too, or it was trained for another task.

    Args:
        name: in the classifier, perhaps as PEFT wraps it.
        prefix: of the encoder in it, its `base_model_prefix`.
    """
    name = f"{name.removeprefix('base_model.model.')}."
    return not name.startswith(f"{prefix}.") or ".pooler." in name or ".lora_" in name


BEYOND_THE_MODEL = ("labels", "teacher_logits")


class LossTrainer(Trainer):
    """A Trainer whose loss is a function of the model's logits and the rest of the batch."""

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        loss: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
        head_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.head_learning_rate = (
            HEAD_RATE * self.args.learning_rate if head_learning_rate is None else head_learning_rate
        )
        # Our losses are means over the batch, so the Trainer must divide by the accumulation steps itself.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Group by length as the Trainer does, but from integers: a column is read cell by cell."""
        lengths = np.asarray(self.train_dataset["length"]).tolist()
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(lengths, batch_size, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """As for training; an order is of no matter to a score."""
        return LengthGroupedSampler(
            np.asarray(eval_dataset["length"]).tolist(), self.args.eval_batch_size, self.args.seed
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does, but with a learning rate of its own for what is new.

        A head and adapters have further to go than pre-trained weights, which the other rate suits.
        """
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    kind = (is_new(name, self.model.base_model_prefix), name in decayed)
                    groups.setdefault(kind, []).append(parameter)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(
                [
                    {
                        "params": parameters,
                        "lr": self.head_learning_rate if new else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for (new, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Run the model on its own inputs and apply the loss to its logits in fp32."""
        extra = {name: tensor for name, tensor in inputs.items() if name in BEYOND_THE_MODEL}
        outputs = model(**{name: value for name, value in inputs.items() if name not in extra})
        loss = self.loss(outputs.logits.float(), extra)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


@dataclass
class Trained:
    """A trained model, where it was trained, and its macro-F1 on validation."""

    model: Any
    device: str
    precision: str
    score: float


def fit(
    model: Any,
    tokenizer: Any,
    train: Dataset,
    validation: Dataset,
    options: TrainingOptions,
    loss: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    title: str,
    resume_from: str | None,
) -> Trained:
    """Train with early stopping on validation macro-F1; the best weights are kept.

    Args:
        model: a sequence classifier.
        tokenizer: its tokenizer, for padding.
        train: as `tokenize` leaves it, with `label` and, for a student, `teacher_logits`.
        validation: as `tokenize` leaves it, with `label`.
        options: how to train.
        loss: maps fp32 logits of shape (batch, classes) and the batch to a scalar, a mean over the batch.
        title: what the progress display says.
        resume_from: a checkpoint folder or None.
    """
    device = choose_device(options.device)
    precision = choose_precision(device, options.precision)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", "distill")
    os.environ.setdefault("WANDB_PROJECT", "distill")
    set_seed(options.seed)
    classes = model.config.num_labels
    if options.freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)

    def evaluate(prediction: Any) -> dict[str, float]:
        return score(prediction.label_ids, prediction.predictions.argmax(axis=-1), classes).summary()

    progress = ProgressCallback(title)
    trainer = LossTrainer(
        model=model,
        args=_arguments(options, precision, device),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer),
        compute_metrics=evaluate,
        callbacks=[progress, SaveInTime(), Watch(), EarlyStoppingCallback(options.patience)],
        loss=loss,
        head_learning_rate=options.head_learning_rate,
    )
    trainer.pop_callback(_printer())
    logger.info("%s: %d texts on %s in %s", title, len(train), device, precision)
    try:
        with first_token_only(model.get_base_model() if hasattr(model, "get_base_model") else model):
            trainer.train(resume_from_checkpoint=resume_from)
    except KeyboardInterrupt:
        if get_last_checkpoint(str(options.checkpoints)):
            logger.info("%s: interrupted; --resume goes on from the last checkpoint", title)
        raise
    finally:
        progress.close()
    return Trained(trainer.model, device, precision, float(trainer.state.best_metric or 0.0))


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback  # type: ignore[no-any-return]


def predict_logits(
    model: Any, tokenizer: Any, dataset: Dataset, device: str, precision: str
) -> NDArray[np.float32]:
    """Logits for every row, shape (n, classes), computed in batches of similar length.

    Args:
        model: a sequence classifier; moved to `device`.
        tokenizer: its tokenizer.
        dataset: with `text` and perhaps `text_pair`.
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16" (autocast).
    """
    encoded = tokenize(dataset, tokenizer)
    inputs = encoded.select_columns(
        [name for name in tokenizer.model_input_names if name in encoded.column_names]
    )
    model.to(device).eval()
    lengths = np.asarray(encoded["length"])
    return batched_logits(model, tokenizer, inputs.__getitem__, lengths, device, precision)
