"""What a training is told: the options of both stages, and the Trainer's arguments that follow from them."""

import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from distill import processes
from distill.memory import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """Options that both training stages have. Batch size is per device."""

    output: Path
    epochs: float = 3.0
    max_steps: int = -1
    min_steps: int = 0
    """Where the epochs make fewer, so many are taken, with as many evaluations as there are epochs."""
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
        beside = ("report_to", "resume", "overwrite", "engine", "workers")
        return {name: value for name, value in asdict(self).items() if name not in beside}

    @property
    def checkpoints(self) -> Path:
        """Where an interrupted run can be picked up."""
        return self.output.parent / "checkpoints" / self.output.name


EVALUATIONS = 5  # of a training on few texts, whatever its epochs, so that the trials of a search compare
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit"}


def _of_this_version(options: TrainingOptions) -> dict[str, Any]:
    """Arguments that transformers 5 has under other names."""
    logs = str(options.output.parent / "logs" / options.output.name)
    if int(transformers.__version__.split(".")[0]) < 5:
        return {"warmup_ratio": options.warmup_ratio, "logging_dir": logs}
    os.environ["TENSORBOARD_LOGGING_DIR"] = logs
    return {"warmup_steps": min(options.warmup_ratio, 1 - 1e-9)}  # from 1 on it counts steps


class _Arguments(TrainingArguments):
    @property
    def device(self) -> torch.device:
        """As the base class has it; but PyTorch restores no checkpoint to the second process' "cpu:1"."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def length_of(options: TrainingOptions, cut: Plan, texts: int) -> dict[str, Any]:
    """How long to train, and when to evaluate and save."""
    an_epoch = math.ceil(texts / (cut.micro_batch * cut.accumulation * processes.count()))
    if options.max_steps > 0 or an_epoch * options.epochs >= options.min_steps:
        length = {"num_train_epochs": options.epochs, "max_steps": options.max_steps}
        return {**length, "eval_strategy": "epoch", "save_strategy": "epoch"}
    logger.info("Few texts: %d steps, %.0f epochs", options.min_steps, options.min_steps / an_epoch)
    every = math.ceil(options.min_steps / EVALUATIONS)
    return {
        "max_steps": every * EVALUATIONS,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
    }


def training_arguments(
    options: TrainingOptions,
    cut: Plan,
    precision: str,
    device: str,
    texts: int,
    criterion: str = "macro_f1",
    in_windows: bool = False,
) -> TrainingArguments:
    """The Trainer's arguments for training on so many texts (or windows of them), in steps cut so.

    The best evaluation is the one with the lowest loss, if that is the criterion, or else with the highest
    score of that name.
    """
    # The Trainer reads it before its own arguments where these ask for fp32, and it may be an earlier one's.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
    return _Arguments(
        output_dir=str(options.checkpoints),
        **length_of(options, cut, texts),
        per_device_train_batch_size=cut.micro_batch,
        per_device_eval_batch_size=cut.micro_batch * 2,
        gradient_accumulation_steps=cut.accumulation,
        gradient_checkpointing=cut.recompute,
        # The re-entrant kind gives no gradient to anything after frozen embeddings.
        gradient_checkpointing_kwargs={"use_reentrant": False} if cut.recompute else None,
        ddp_broadcast_buffers=False,  # ours are constants, alike in all processes
        optim=OPTIMIZERS[cut.optimizer],
        learning_rate=options.learning_rate,
        **_of_this_version(options),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type=options.scheduler,
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model=criterion,
        label_names=["labels", "document"] if in_windows else ["labels"],
        greater_is_better=criterion != "loss",
        remove_unused_columns=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        seed=options.seed,
        disable_tqdm=True,
        logging_strategy="steps" if options.report_to else "no",
        logging_steps=10,
        run_name=options.output.name,
        report_to=list(options.report_to),
        log_level_replica="error",
    )
