"""A student without layers, and the teacher's own states of single tokens, which it starts from."""

import logging
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from distill.student.soft_labels import kept_beside
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, ModernBertConfig

from distill.artifact import Manifest
from distill.devices import choose_device, choose_precision, inference, placed
from distill.idle_layers import depth
from distill.models import is_decoder, load_model, load_tokenizer
from distill.processes import ahead

logger = logging.getLogger(__name__)
SPECIAL = ("pad", "cls", "sep", "bos", "eos")  # tokens that a configuration names
DROPOUT = 0.2  # of token embeddings, where nothing else is asked for
BATCH = 512  # tokens that are read at a time, each as a text of its own


def average_tokens(model: Any, tokenizer: Any, dropout: float | None = None) -> Any:
    """A sequence classifier without layers: the mean of token embeddings, and a small network that reads it.

    Formula: y = W2 norm(gelu(W1 mean_i norm(norm(E[x_i])) + b1)) + b2, of the tokens x_i that are no padding.
    It is a deep averaging network (Iyyer et al. 2015, https://aclanthology.org/P15-1162) and knows nothing of
    order; written as a ModernBERT whose one layer adds nothing (`idle_layers`), so that whatever reads
    transformers' checkpoints reads it.

    Args:
        model: a sequence classifier; its token embeddings E are where the new one starts, the rest is drawn.
        tokenizer: its tokenizer.
        dropout: of token embeddings, in training; `DROPOUT` when left out.
    """
    table, old = model.get_input_embeddings(), model.config
    width = table.embedding_dim
    config = ModernBertConfig(
        vocab_size=table.num_embeddings,
        hidden_size=width,
        intermediate_size=1,
        num_attention_heads=1,
        num_hidden_layers=1,
        classifier_pooling="mean",
        embedding_dropout=DROPOUT if dropout is None else dropout,
        norm_bias=True,
        classifier_bias=True,
        reference_compile=False,
        layerless=True,
        num_labels=old.num_labels,
        id2label=old.id2label,
        label2id=old.label2id,
        problem_type=old.problem_type,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL},
    )
    student = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in student.model.layers.parameters():
            weight.zero_().requires_grad_(False)
        student.get_input_embeddings().weight.copy_(table.weight)
    return student


def teacher_states(teacher: Path, manifest: Manifest, device: str, precision: str) -> NDArray[np.float32]:
    """What a teacher makes of each token by itself, for `start_from`; kept beside its soft labels.

    Each token is read as a text of its own, as model2vec (Tulkens and van Dongen 2024,
    https://github.com/MinishLab/model2vec) does with a model of sentences, here after fine-tuning and two
    thirds up the layers. To that the token's own embedding is added, both with mean 0 and deviation 1. So a
    word that no training text has starts beside those that the teacher reads alike. The embeddings alone
    serve where they are narrower than the states (ALBERT, small ELECTRAs), and of teachers that have a
    decoder beside their encoder.

    Args:
        teacher: the teacher's folder.
        manifest: its manifest.
        device: "auto", "cpu" or "cuda".
        precision: "auto" or one of fp32, bf16, fp16.

    Returns:
        Of shape (vocabulary, width).
    """
    file = kept_beside(teacher) / "token_states.npy"

    def kept() -> NDArray[np.float32]:
        if not file.is_file():
            where = choose_device(device)
            _write(file, _states(teacher, manifest, where, choose_precision(where, precision)))
        return np.asarray(np.load(file))

    return ahead(kept)


def _states(teacher: Path, manifest: Manifest, device: str, precision: str) -> NDArray[np.float32]:
    model = load_model(str(teacher), manifest.labels, "--teacher").eval()
    tokenizer = load_tokenizer(str(teacher), manifest.max_length, "--teacher")
    table = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    config, embeddings = model.config, _standard(table)
    narrower = getattr(config, "hidden_size", None) != table.shape[1]
    if not depth(model) or narrower or config.is_encoder_decoder:
        return embeddings
    text, place = _text_of_one_token(tokenizer, is_decoder(config))
    layer, started, found = round(2 * depth(model) / 3), time.monotonic(), []
    with placed(model, device, precision), inference(device, precision):
        for ids in torch.arange(len(table)).split(BATCH):
            rows = text.repeat(len(ids), 1)
            rows[:, place] = ids
            read = model.base_model(
                rows.to(device), attention_mask=torch.ones_like(rows).to(device), output_hidden_states=True
            )
            found.append(read.hidden_states[layer][:, place].float().cpu().numpy())
            done = int(ids[-1]) + 1
            if done % (20 * BATCH) == 0 or done == len(table):
                left = (time.monotonic() - started) / done * (len(table) - done)
                logger.info("Tokens by themselves: %d of %d, %d s left", done, len(table), left)
    return _standard(np.concatenate(found)) + embeddings


def _text_of_one_token(tokenizer: Any, decoder: bool) -> tuple[torch.Tensor, int]:
    """A token between those that a tokenizer adds at the ends, shape (tokens,), and its place.

    The first token of a decoder's text has a state like that of any other first one, so something stands
    before: the end of another text.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    first = added.index(0) if 0 in added else 0  # none in a tokenizer of few characters
    last = len(added) - 1 - added[::-1].index(0) if 0 in added else len(added)
    before = ids[:first]
    if decoder and not before and tokenizer.eos_token_id is not None:
        before = [tokenizer.eos_token_id]
    return torch.tensor([*before, 0, *ids[last + 1 :]]), len(before)


def _standard(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(centred.std(axis=1, keepdims=True), 1e-6), dtype=np.float32)


def _write(file: Path, states: NDArray[np.float32]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{uuid4().hex}.partial")  # another run may be writing the same
    with unfinished.open("wb") as stream:
        np.save(stream, states)
    os.replace(unfinished, file)


def start_from(student: Any, states: NDArray[np.float32]) -> None:
    """Let the embeddings of a student without layers start as `teacher_states`, as large as they were.

    That is on average: its norms make all of one size anyway, and how large they are says how far a step of
    training moves them.
    """
    table = student.get_input_embeddings().weight
    with torch.no_grad():
        size = (table - table.mean(dim=1, keepdim=True)).std(dim=1).mean()
        table.copy_(size * torch.from_numpy(_standard(states)))
