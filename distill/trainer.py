"""The `Trainer` that teacher and student training share, and the rows that it reads."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill.averaging import is_layerless
from distill.encoding import encode, way_of
from distill.long_texts import WINDOWS
from distill.sharding import sharded

logger = logging.getLogger(__name__)


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


def tokenize(
    dataset: Dataset, tokenizer: Any, file: Path | None = None, shared: torch.Tensor | None = None
) -> Dataset:
    """Add token ids (truncated, not padded), `length` in tokens and whether a text was `cut`; its columns go.

    A text that is read in windows becomes as many rows, with its label; `document` numbers the texts.

    Args:
        dataset: with `text` and perhaps `text_pair`; other columns, such as `teacher_logits`, stay.
        tokenizer: a fast one.
        file: where to keep the rows, memory-mapped from then on; one that is there is taken as it is.
        shared: for every token the one that is read in its place, shape (vocabulary,).
    """
    windows = way_of(tokenizer) == WINDOWS
    pair = ["text_pair"] if "text_pair" in dataset.column_names else []

    def rows(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
        texts = list(zip(batch["text"], batch["text_pair"], strict=True)) if pair else batch["text"]
        encoded = encode(texts, tokenizer)
        if shared is not None:
            encoded.columns["input_ids"] = [shared[ids].tolist() for ids in encoded.columns["input_ids"]]
        found = {**encoded.columns, "length": encoded.lengths, "cut": encoded.cut}
        if windows:
            repeated = [name for name in batch if name not in ("id", "text")]
            found |= {name: [batch[name][owner] for owner in encoded.owners] for name in repeated}
            found["document"] = [numbers[owner] for owner in encoded.owners]
        return found

    return dataset.map(
        rows,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names if windows else ["id", "text", *pair],
        cache_file_name=str(file) if file else None,
    )


class Collator:
    """Pad a batch to its longest text; labels and teacher logits become tensors as they are.

    Args:
        tokenizer: pads.
        new_ids: of every token, where the model has others than the tokenizer, shape (vocabulary,).
    """

    def __init__(self, tokenizer: Any, new_ids: torch.Tensor | None = None) -> None:
        self.tokenizer, self.new_ids = tokenizer, new_ids

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows as `tokenize` leaves them."""
        inputs = [
            {name: row[name] for name in self.tokenizer.model_input_names if name in row} for row in rows
        ]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        if self.new_ids is not None:
            batch["input_ids"] = self.new_ids[batch["input_ids"]]
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        if "teacher_logits" in rows[0]:
            batch["teacher_logits"] = torch.tensor(
                [row["teacher_logits"] for row in rows], dtype=torch.float32
            )
        if "document" in rows[0]:
            batch["document"] = torch.tensor([row["document"] for row in rows])
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows])
        return batch


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


def _keep_tables_at_32_bits(model: Any) -> None:
    """As the Trainer does: 8-bit optimizer state is unstable for embeddings."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


BEYOND_THE_MODEL = ("labels", "teacher_logits", "document", "row")


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

        A head and adapters have further to go than pre-trained weights, which the other rate suits. Without
        layers all is new but the embeddings of tokens.
        """
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            table = self.model.get_input_embeddings().weight if is_layerless(self.model) else None
            prefix = self.model.base_model_prefix
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    new = is_new(name, prefix) if table is None else parameter is not table
                    groups.setdefault((new, name in decayed), []).append(parameter)
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
            if "8bit" in self.args.optim:
                _keep_tables_at_32_bits(self.model)
        return self.optimizer

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does, but a resumed run is cut as now, not as when its checkpoint was written."""
        return super()._inner_training_loop(self.args.train_batch_size, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does, but the scaler is ready: to fill an optimizer in parts, it takes a step."""
        scaler = self.accelerator.scaler
        if checkpoint and scaler is not None and sharded():
            scaler.scale(torch.zeros((), device=self.args.device))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer does, but the folder is there: it takes no other for the best, FSDP's comes late."""
        step = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        Path(self.args.output_dir, step).mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Run the model on its own inputs and apply the loss to its logits in fp32."""
        extra = {name: tensor for name, tensor in inputs.items() if name in BEYOND_THE_MODEL}
        outputs = model(**{name: value for name, value in inputs.items() if name not in extra})
        logits = outputs.logits.float()
        loss = self.loss(logits, extra)
        return (loss, {"logits": logits}) if return_outputs else loss
