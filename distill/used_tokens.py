"""Train the rows of the embedding table that the texts read; the others wait beside the model.

A row that no text reads gets no gradient, but a dense optimizer reads it, its gradient and its two moments in
every step and writes them again. Most rows are of that kind, and of a small student, or of a multilingual
model of any size, most parameters are such rows.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn

from distill.trainer import BEYOND_THE_MODEL, Collator

logger = logging.getLogger(__name__)
BATCH = 10_000
MIN_LEFT_OUT = 0.25  # of the rows; fewer are not worth it
TOLERANCE = 1e-5  # of the largest logit


@contextmanager
def used_tokens_only(model: Any, tokenizer: Any, *texts: Dataset) -> Iterator[torch.Tensor | None]:
    """Within it, a classifier's embedding table has rows for the tokens of `texts` alone.

    Afterwards the table is whole again, with the rows as they were trained. They learn what they would learn
    in the whole table; a row that is not there is not decayed.

    Args:
        model: a sequence classifier.
        tokenizer: its tokenizer, for padding.
        texts: all that the model will read meanwhile, as `tokenize` leaves it.

    Yields:
        The new id of every token, shape (vocabulary,), -1 for those that are not there; None where the model
        is left as it is: its table is frozen or shared, nearly all is used, or it answers in another way
        (found by comparing logits), as where it looks for an id of its own.
    """
    table = _own_table(model)
    used = np.empty(0, dtype=np.int64) if table is None else _used(model, table, texts)
    if table is None or len(used) > (1 - MIN_LEFT_OUT) * len(table.weight):
        yield None
        return
    whole: Any = table.weight
    new_ids = torch.full((len(whole),), -1)
    new_ids[used] = torch.arange(len(used))
    rows = torch.from_numpy(used)
    order = np.argsort(np.asarray(texts[0]["length"]), kind="stable")
    two = [texts[0][int(row)] for row in (order[0], order[-1])]
    expected = _logits(model, Collator(tokenizer)(two))
    _set(table, nn.Parameter(whole.detach()[rows.to(whole.device)]))
    try:
        found = _logits(model, Collator(tokenizer, new_ids)(two))
        same = bool((expected - found).abs().max() <= TOLERANCE * expected.abs().max())
        if not same:
            _set(table, whole)
        logger.debug("Training %d of %d rows of the embedding table", len(table.weight), len(whole))
        yield new_ids if same else None
    finally:
        if table.weight is not whole:
            trained = table.weight.detach()
            with torch.no_grad():
                whole.data = whole.data.to(trained.device)
                whole[rows.to(trained.device)] = trained
            _set(table, whole)


def _own_table(model: Any) -> nn.Embedding | None:
    """The table of a model's tokens, if it is trained, and no other module's too."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    if not isinstance(table, nn.Embedding) or not table.weight.requires_grad:
        return None
    every = model.named_parameters(remove_duplicate=False)
    return table if sum(parameter is table.weight for _, parameter in every) == 1 else None


def _used(model: Any, table: nn.Embedding, texts: tuple[Dataset, ...]) -> NDArray[np.int64]:
    """Sorted ids of the tokens in use, and of all up to the last special one, which so keep their ids.

    A model looks for the id of padding, or of the end, in what it reads.
    """
    ids = [np.arange(0)]
    for part in texts:
        for batch in part.with_format("arrow").iter(BATCH):
            ids.append(np.unique(batch["input_ids"].combine_chunks().flatten().to_numpy()))
    special = [value for name, value in vars(model.config).items() if name.endswith("_token_id")]
    known = np.hstack([-1, *(value for value in (*special, table.padding_idx) if value is not None)])
    return np.unique(np.concatenate([*ids, np.arange(known.max() + 1)])).astype(np.int64)


def _set(table: nn.Embedding, weight: nn.Parameter) -> None:
    table.weight, table.num_embeddings = weight, len(weight)


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value.to(model.device) for name, value in batch.items() if name not in BEYOND_THE_MODEL}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs).logits.float()  # type: ignore[no-any-return]
    finally:
        model.train(training)
