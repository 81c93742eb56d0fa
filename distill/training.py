"""How a teacher and a student are trained: batches that fit the memory, and the best weights."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from distill import processes
from distill.arguments import TrainingOptions, training_arguments
from distill.attention import attention_in_fp32
from distill.callbacks import ProgressCallback, SaveInTime, Watch, being_watched
from distill.decision import fit_answers
from distill.devices import choose_device, choose_precision, out_of_memory, placed, release
from distill.encoding import way_of
from distill.errors import DistillError
from distill.first_token import first_token_only
from distill.long_texts import HEAD, pooled
from distill.memory import Plan, available, measure, plan, smaller
from distill.metrics import score
from distill.models import batched_logits
from distill.predictions import labels_array
from distill.sharding import prepare_sharding, sharded, whole
from distill.trainer import BEYOND_THE_MODEL, Collator, LossTrainer, tokenize
from distill.used_tokens import used_tokens_only

logger = logging.getLogger(__name__)


TOLD_TRUNCATED = 0.01
KEEPING_START = ("cuda",)  # a CPU that is out of memory ends the process


@dataclass
class Trained:
    """A trained model, where it was trained, its macro-F1 on validation, and what was long in its texts."""

    model: Any
    device: str
    precision: str
    score: float
    cut: Plan
    long: dict[str, float]

    def steps(self) -> dict[str, Any]:
        """For a manifest: how every step was cut."""
        cut = {name: value for name, value in asdict(self.cut).items() if name != "peak"}
        return {**cut, "processes": processes.count(), "sharded": sharded()}


def fit(
    model: Any,
    tokenizer: Any,
    train: Dataset,
    validation: Dataset,
    options: TrainingOptions,
    loss: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    title: str,
    resume_from: str | None,
    scored: bool = True,
) -> Trained:
    """Train with early stopping on validation; the best weights are kept.

    Where validation text has `teacher_logits`, the best are those of the lowest loss, which tells epochs
    apart that macro-F1 of a thousand texts cannot; else those of the highest macro-F1.

    Args:
        model: a sequence classifier.
        tokenizer: its tokenizer, for padding.
        train: as `tokenize` leaves it, with `label` and, for a student, `teacher_logits`.
        validation: as `tokenize` leaves it, with `label` and perhaps `teacher_logits`.
        options: how to train.
        loss: maps fp32 logits of shape (batch, classes) and the batch to a scalar, a mean over the batch.
            Labels come as integers, shape (batch,), or as 0 and 1, shape (batch, classes).
        title: what the progress display says.
        resume_from: a checkpoint folder or None.
        scored: whether the model gives logits of classes, of each text; else they are what `loss` takes, of
            every token, and the best weights are those of the lowest loss.
    """
    device = choose_device(options.device)
    precision = choose_precision(device, options.precision)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", "distill")
    os.environ.setdefault("WANDB_PROJECT", "distill")
    set_seed(options.seed)
    classes = model.config.num_labels
    if options.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        kind = model.config.model_type
        raise DistillError(f"--gradient-checkpointing: a model of type {kind} cannot do it; leave it out")
    if options.freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)

    in_windows = "document" in validation.column_names
    criterion = _criterion(validation) if scored else "loss"
    watch = [Watch()] if scored else []

    def attempt(cut: Plan, resume_from: str | None) -> LossTrainer | None:
        """Train; None where memory was too short."""
        progress = ProgressCallback(title)
        trainer = LossTrainer(
            model=model,
            args=training_arguments(options, cut, precision, device, len(train), criterion, in_windows),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=collate,
            compute_metrics=_scorer(classes, in_windows) if scored else None,
            callbacks=[progress, SaveInTime(), *watch, EarlyStoppingCallback(options.patience)],
            loss=loss,
            head_learning_rate=options.head_learning_rate,
        )
        trainer.pop_callback(_printer())
        prepare_sharding(trainer)
        try:
            with attention_in_fp32(device, precision):
                trainer.train(resume_from_checkpoint=resume_from)
        except KeyboardInterrupt:
            if get_last_checkpoint(str(options.checkpoints)) and not being_watched():
                logger.info("%s: interrupted; --resume goes on from the last checkpoint", title)
            raise
        except RuntimeError as error:
            if not out_of_memory(error) or device not in KEEPING_START:
                raise
            if processes.count() > 1 or sharded():  # the others wait in the middle of a step
                raise DistillError(
                    f"{title}: out of memory; give a smaller --batch-size and more --gradient-accumulation, "
                    "and --overwrite to start again"
                ) from error
            return None
        finally:
            progress.close()
        return trainer

    rows = "windows" if in_windows else "texts"
    logger.info("%s: %d %s on %s in %s", title, len(train), rows, device, precision)
    long = _tell_long(train, tokenizer, title) if scored else {}
    kind = type(model)
    record = options.checkpoints / "tokens.npy"
    texts = [train, validation]
    with _unread_left_out(model, tokenizer, texts, device, record, resume_from, scored) as collate:
        cut = processes.once(lambda: _cut(model, collate, train, options, device, precision, title))
        # What an attempt that ran out of memory has changed is put back.
        start = _trained_weights(model) if device in KEEPING_START and processes.count() == 1 else {}
        while (trainer := attempt(cut, resume_from)) is None:
            cut = smaller(cut, title, getattr(model, "supports_gradient_checkpointing", False))
            logger.warning("%s: out of memory; again with %d texts at a time", title, cut.micro_batch)
            resume_from = get_last_checkpoint(str(options.checkpoints)) or None
            model.load_state_dict(start, strict=False)
            release()
    best = _best_score(trainer.state)
    trained = whole(trainer.model, kind) if sharded() else trainer.model
    del trainer
    release()
    return Trained(trained, device, precision, best, cut, long)


def _criterion(validation: Dataset) -> str:
    """What tells the best evaluation."""
    return "loss" if "teacher_logits" in validation.column_names else "macro_f1"


def _best_score(state: Any) -> float:
    """Macro-F1 of the weights that are kept; 0 where none was taken."""
    found = [entry for entry in state.log_history if "eval_macro_f1" in entry]
    return next((entry["eval_macro_f1"] for entry in found if entry["step"] == state.best_global_step), 0.0)


@contextmanager
def _unread_left_out(
    model: Any,
    tokenizer: Any,
    texts: list[Dataset],
    device: str,
    record: Path,
    resume_from: str | None,
    first_token: bool = True,
) -> Iterator[Collator]:
    """Within it a model computes no tokens and trains no embeddings that nobody reads; gives its collator.

    Every token's state is read where not `first_token`.
    """
    if sharded():
        yield Collator(tokenizer)
        return
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    used = used_tokens_only(model, tokenizer, texts, device, record, resumed=resume_from is not None)
    with first_token_only(classifier) if first_token else nullcontext(), used as new_ids:
        yield Collator(tokenizer, new_ids)


def _scorer(classes: int, in_windows: bool) -> Callable[[Any], dict[str, float]]:
    """What scores the Trainer's predictions; of texts in windows, the logits of each text's are averaged."""

    def scores(prediction: Any) -> dict[str, float]:
        labels, logits = prediction.label_ids, prediction.predictions
        if in_windows:
            labels, documents = labels
            labels, logits = labels[np.unique(documents, return_index=True)[1]], pooled(logits, documents)
        labels = labels_array(labels)
        return score(labels, fit_answers(logits, labels), classes).summary()

    return scores


def _tell_long(train: Dataset, tokenizer: Any, title: str) -> dict[str, float]:
    """The shares, for a manifest, of texts that are longer than the model reads; told where they matter."""
    limit, found = tokenizer.model_max_length, {"truncated_share": float(np.mean(train["cut"]))}
    if "document" in train.column_names:
        windows = np.unique(np.asarray(train["document"]), return_counts=True)[1]
        found["in_windows_share"] = float(np.mean(windows > 1))
        share = 100 * found["in_windows_share"]
        logger.info("%s: %.1f %% of the texts are longer than %d tokens: in windows", title, share, limit)
    if found["truncated_share"] >= TOLD_TRUNCATED:
        part = "ends" if way_of(tokenizer) == HEAD else "middles"
        other = ", and --long-texts other parts of single texts, or all" if title == "Teacher" else ""
        logger.warning(
            "%s: %.1f %% of the texts are longer than %d tokens, and their %s are not read; --max-length "
            "reads more, as far as the model can%s",
            title, 100 * found["truncated_share"], limit, part, other,
        )  # fmt: skip
    return found


def _trained_weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _cut(
    model: Any,
    collate: Collator,
    train: Dataset,
    options: TrainingOptions,
    device: str,
    precision: str,
    title: str,
) -> Plan:
    """Cut a step into micro-batches that fit the device, and say so where it is not as asked."""
    asked = Plan(options.batch_size, options.gradient_accumulation, options.gradient_checkpointing)
    if available(device) is None or sharded():  # of a part nothing can be measured
        return asked
    model.to(device)
    longest = np.argsort(-np.asarray(train["length"]), kind="stable")

    def batch(texts: int) -> dict[str, torch.Tensor]:
        rows = [train[int(longest[index % len(longest)])] for index in range(texts)]
        inputs = collate(rows)
        return {name: value for name, value in inputs.items() if name not in BEYOND_THE_MODEL}

    # An optimizer's state is of its kind, so a resumed run keeps it, whatever is free by then.
    record = options.checkpoints / "optimizer.txt"
    kind = record.read_text(encoding="utf-8") if record.is_file() else None
    try:
        footprint = measure(model, batch, precision)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        times = asked.micro_batch * asked.accumulation
        cut = Plan(1, times, getattr(model, "supports_gradient_checkpointing", False), kind or "adamw")
        logger.warning("%s: two texts are too much for this memory; trying one at a time", title)
    else:
        limit = (available(device) or 0) + footprint.weights
        if processes.count() > 1:
            limit -= 4 * footprint.trained  # gradients once more, in the buckets that processes exchange
        cut = plan(footprint, asked.micro_batch, asked.accumulation, asked.recompute, limit, kind)
        logger.info("%s: takes %.1f of %.1f GiB by estimate", title, cut.peak / 2**30, limit / 2**30)
    if cut.micro_batch < asked.micro_batch or cut.recompute > asked.recompute or cut.optimizer != "adamw":
        again = ", layers computed again in the backward pass" if cut.recompute else ""
        bits = ", an 8-bit optimizer" if cut.optimizer != "adamw" else ""
        logger.info("%s: %d texts at a time%s%s", title, cut.micro_batch, again, bits)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(cut.optimizer, encoding="utf-8")
    return cut


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback  # type: ignore[no-any-return]


def predict_logits(
    model: Any, tokenizer: Any, dataset: Dataset, device: str, precision: str
) -> NDArray[np.float32]:
    """Logits for every row, shape (n, classes), computed in batches of similar length.

    Processes that train together take a part each, and all get the whole.

    Args:
        model: a sequence classifier, on `device` or on the CPU, from where it is moved there for the time.
        tokenizer: its tokenizer.
        dataset: with `text` and perhaps `text_pair`.
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16" (autocast).
    """
    total, rank, count = len(dataset), processes.rank(), processes.count()
    logits = np.empty((total, model.config.num_labels), dtype=np.float32)
    own = np.empty((0, model.config.num_labels), dtype=np.float32)
    model.eval()
    if rank < total:
        encoded = tokenize(dataset.select(range(rank, total, count)) if count > 1 else dataset, tokenizer)
        inputs = encoded.select_columns(
            [name for name in tokenizer.model_input_names if name in encoded.column_names]
        )
        lengths = np.asarray(encoded["length"])
        with placed(model, device, precision):
            own = batched_logits(model, tokenizer, inputs.__getitem__, lengths, device, precision)
        if "document" in encoded.column_names:
            own = pooled(own, np.asarray(encoded["document"]))
    for number, part in enumerate(processes.gather(own)):
        logits[number::count] = part
    return logits
