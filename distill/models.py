"""Load checkpoints safely, and run them over texts."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers.processors import Sequence as Processors
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

import distill.averaging  # noqa: F401  its models are known to AutoModel from then on
from distill.decision import SINGLE_LABEL
from distill.devices import inference, out_of_memory, release
from distill.encoding import Text, encode, read_long_texts
from distill.errors import DistillError
from distill.first_token import first_token_only
from distill.long_texts import HEAD, pooled

logger = logging.getLogger(__name__)
transformers.utils.logging.set_verbosity_error()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

# On a CPU larger batches fall out of the caches; on a GPU smaller ones leave it idle.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}


@contextmanager
def loading(checkpoint: str, option: str) -> Iterator[None]:
    """Turn the many ways in which loading fails into one line."""
    if checkpoint.startswith((".", "/", "~")) and not Path(checkpoint).is_dir():
        raise DistillError(f"{option} {checkpoint}: no such folder; name a Hugging Face checkpoint")
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "config.json").is_file():
        raise DistillError(
            f"{option} {checkpoint}: no config.json in this folder; name a Hugging Face checkpoint"
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
    try:
        yield
    except DistillError:
        raise
    except Exception as error:  # transformers and the Hub client raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "connect" in reason or "offline mode" in reason:
            reason = (
                "no such folder, not in the Hub's cache, and the Hub cannot be reached; "
                "name a folder with a checkpoint, or connect"
            )
        raise DistillError(f"{option} {checkpoint}: cannot be loaded: {reason}") from error


def load_model(
    checkpoint: str,
    labels: list[str],
    option: str = "--model",
    dropout: float | None = None,
    further: Callable[[Any], dict[str, Any]] | None = None,
    problem_type: str = SINGLE_LABEL,
) -> Any:
    """Load a sequence classifier in fp32 with a head for `labels`: safetensors alone, no remote code.

    Args:
        checkpoint: Hub id or folder.
        labels: label names.
        option: the option that named the checkpoint, for error messages.
        dropout: put in place of every dropout probability of the checkpoint's configuration.
        further: gives more arguments of `from_pretrained` for a configuration.
        problem_type: what the configuration says that the logits mean.
    """
    with loading(checkpoint, option):
        config = AutoConfig.from_pretrained(
            checkpoint,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type=problem_type,
            trust_remote_code=False,
        )
        if getattr(config, "pad_token_id", None) is None or is_decoder(config):
            # Of a decoder the classifier reads the last token that is not this one; its own configuration
            # may name another one than its tokenizer pads with.
            padding = load_tokenizer(checkpoint, 1, option).pad_token_id
            config.pad_token_id = config.get_text_config().pad_token_id = padding
        config.use_cache = False  # of keys and values, which serve to write text
        if dropout is not None:
            for name, value in config.to_dict().items():
                if "dropout" in name and isinstance(value, float):
                    setattr(config, name, dropout)
        return AutoModelForSequenceClassification.from_pretrained(
            checkpoint,
            config=config,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            **(further(config) if further else {}),
        )


def is_decoder(config: Any) -> bool:
    """Whether a checkpoint of this configuration reads from left to right, and writes text."""
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_tokenizer(checkpoint: str, max_length: int, option: str = "--model", long_texts: str = HEAD) -> Any:
    """Load a fast tokenizer that truncates at `max_length` tokens, or at the model's own limit.

    `encode` reads what is longer as `long_texts` says: "head", "head-tail" or "windows".
    """
    with loading(checkpoint, option):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise DistillError(
            f"{option} {checkpoint}: has no fast tokenizer (tokenizer.json); choose another checkpoint"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DistillError(f"{option} {checkpoint}: its tokenizer can neither pad nor end a text; "
                               "choose another checkpoint")  # fmt: skip
        tokenizer.pad_token = tokenizer.eos_token
    separate = tokenizer.num_special_tokens_to_add(pair=True)
    if is_decoder(config) and not separate and tokenizer.eos_token is not None:
        _separate_pairs(tokenizer)
    if config.model_type not in READ_FROM_THE_END:
        # A decoder's last token has seen no padding after it, and its positions count from the first one.
        tokenizer.padding_side = "right"
    limits = [max_length, tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions > 0:
        # RoBERTa and MPNet number positions from padding_idx + 1, so the table holds that many fewer tokens.
        offset = (config.pad_token_id or 0) + 1 if config.model_type in OFFSET_POSITIONS else 0
        limits.append(positions - offset)
    tokenizer.model_max_length = int(min(limits))
    return read_long_texts(tokenizer, long_texts)


def _separate_pairs(tokenizer: Any) -> None:
    """Put the end-of-text token between the texts of a pair, where a decoder's tokenizer puts nothing."""
    end = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    between = TemplateProcessing(single="$A", pair=f"$A {tokenizer.eos_token} $B", special_tokens=end)
    own = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = Processors([own, between]) if own else between


OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"}
# These classify by the very last position, so padding must come first.
READ_FROM_THE_END = {"xlnet"}


def batched_logits(
    model: Any,
    tokenizer: Any,
    inputs: Callable[[NDArray[np.int64]], dict[str, Any]],
    lengths: NDArray[np.int64],
    device: str,
    precision: str,
    batch_tokens: int | None = None,
) -> NDArray[np.float32]:
    """Logits of n encoded texts, shape (n, classes), in batches of similar length, the longest first.

    Args:
        model: a sequence classifier on `device`, in evaluation mode.
        tokenizer: its tokenizer, for padding.
        inputs: gives the encoded texts of some rows, as lists by name.
        lengths: tokens of each text, shape (n,).
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16" (autocast).
        batch_tokens: how many padded tokens a batch may hold; chosen for the device when left out.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS[device]
    order = np.argsort(-lengths, kind="stable")
    logits = np.empty((len(lengths), model.config.num_labels), dtype=np.float32)
    start = 0
    with first_token_only(model), inference(device, precision):
        while start < len(order):
            rows = order[start : start + max(1, batch_tokens // max(1, int(lengths[order[start]])))]
            batch = tokenizer.pad(inputs(rows), return_tensors="pt")
            try:
                batch = batch.to(device)
                logits[rows] = model(**batch).logits.float().cpu().numpy()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise DistillError(
                        f"out of memory with a text of {lengths[rows[0]]} tokens; give a smaller --max-length"
                    ) from error
                batch_tokens = len(rows) * int(lengths[rows[0]]) // 2
            else:
                start += len(rows)
                continue
            release()
            logger.info("Out of memory; again with %d tokens at a time", batch_tokens)
    return logits


def text_logits(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    device: str,
    precision: str,
    batch_tokens: int | None = None,
) -> NDArray[np.float32]:
    """Logits of n texts, shape (n, classes); the other arguments are those of `batched_logits`."""
    encoded = encode(texts, tokenizer)
    columns = {name: encoded.columns[name] for name in tokenizer.model_input_names if name in encoded.columns}
    for row, length in enumerate(encoded.lengths):
        if not length:  # the empty text, where a tokenizer adds nothing at the ends
            for name, values in columns.items():
                values[row] = [{"input_ids": tokenizer.pad_token_id, "attention_mask": 1}.get(name, 0)]
    lengths = np.array([max(1, length) for length in encoded.lengths])

    def inputs(rows: NDArray[np.int64]) -> dict[str, Any]:
        return {name: [values[row] for row in rows] for name, values in columns.items()}

    logits = batched_logits(model, tokenizer, inputs, lengths, device, precision, batch_tokens)
    return pooled(logits, encoded.owners)


def open_pytorch(
    folder: Path,
    labels: list[str],
    max_length: int,
    long_texts: str,
    option: str,
    threads: int | None = None,
) -> tuple[Callable[[Any], Any], Callable[[list[Any]], NDArray[np.float32]]]:
    """Open a stage's model on the CPU in fp32, as functions of one text, on one thread, and of many.

    Args:
        folder: of `distill train-teacher` or `distill train-student`.
        labels: label names.
        max_length: longest text, in tokens.
        long_texts: how longer ones are read.
        option: the option that named the folder, for error messages.
        threads: for many texts; the number of cores when left out.
    """
    model = load_model(str(folder), labels, option).eval()
    tokenizer = load_tokenizer(str(folder), max_length, option, long_texts)
    cores = threads or torch.get_num_threads()

    def one(text: Any) -> Any:
        torch.set_num_threads(1)
        columns = encode([text], tokenizer).columns
        # Its pieces, if it has several, are of one length, or nearly so.
        with torch.inference_mode():
            return model(**tokenizer.pad(columns, return_tensors="pt")).logits.mean(dim=0, keepdim=True)

    def many(texts: list[Any]) -> NDArray[np.float32]:
        torch.set_num_threads(cores)
        return text_logits(model, tokenizer, texts, "cpu", "fp32")

    return one, many


def count_parameters(model: Any) -> int:
    """Count the parameters of a PyTorch model."""
    return sum(parameter.numel() for parameter in model.parameters())
