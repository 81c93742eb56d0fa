"""Train the rows of the embedding table that the texts read; the others wait beside the model.

A row that no text reads gets no gradient, but a dense optimizer reads it, its gradient and its two moments in
every step and writes them again. Of a small student, or a multilingual model of base size, most parameters
are such rows.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn

from distill import processes
from distill.averaging import is_layerless
from distill.errors import DistillError
from distill.trainer import BEYOND_THE_MODEL, Collator

logger = logging.getLogger(__name__)
BATCH = 10_000
MOST = 0.75  # of the rows in use; leaving out fewer is not worth it
SHORT = 32  # tokens of a text that logits are compared on
TOLERANCE = 1e-5  # of the largest logit


@contextmanager
def used_tokens_only(
    model: Any, tokenizer: Any, texts: list[Dataset], device: str, record: Path, resumed: bool = False
) -> Iterator[torch.Tensor | None]:
    """Within it, a classifier's embedding table has rows for the tokens of `texts` alone.

    Afterwards the table is whole again, with the rows as they were trained. They learn what they would learn
    in the whole table; a row that is not there is not decayed.

    Args:
        model: a sequence classifier.
        tokenizer: its tokenizer, for padding.
        texts: all that the model will read meanwhile, as `tokenize` leaves it.
        device: where it will be trained.
        record: file for the tokens, since checkpoints hold their rows alone.
        resumed: take the tokens from there; without such a file the table stays whole, as it was before.

    Yields:
        The new id of every token, shape (vocabulary,), -1 for those that are not there. None where texts keep
        their ids: a model without layers finds the rows itself; or the table is left as it is, since it is
        frozen or shared, or nearly all in use, up to a special token near the end, or the model answers in
        another way then, or not at all (found by comparing logits).

    Raises:
        DistillError: if a resumed run reads tokens that it did not read before.
    """
    table = _own_table(model)
    if table is None or (resumed and not record.is_file()):
        yield None
        return
    rows = processes.once(lambda: _rows(model, table, tokenizer, texts, record if resumed else None))
    if rows is None:
        yield None
        return
    model.to(device)
    whole: Any = table.weight
    new_ids = torch.full((len(whole),), -1)
    new_ids[rows] = torch.arange(len(rows))
    expected = _logits(model, texts[0], Collator(tokenizer))
    _set(table, nn.Parameter(whole.detach()[rows.to(whole.device)]))
    whole.data = whole.data.cpu()
    translates = is_layerless(model)  # its bigrams are of the tokens themselves
    if translates:
        model.rows = new_ids.to(device)
    given = None if translates else new_ids
    try:
        found = _logits(model, texts[0], Collator(tokenizer, given))
        if not _same(expected, found):
            _set(table, whole)
            if translates:
                model.rows = None
            yield None
            return
        logger.debug("Training %d of %d rows of the embedding table", len(rows), len(whole))
        record.parent.mkdir(parents=True, exist_ok=True)
        processes.once(lambda: np.save(record, rows.numpy()))
        yield given
    finally:
        if translates:
            model.rows = None
        if table.weight is not whole:
            whole.data[rows] = table.weight.detach().cpu()
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


def _rows(
    model: Any, table: nn.Embedding, tokenizer: Any, texts: list[Dataset], record: Path | None
) -> torch.Tensor | None:
    """Sorted ids of the tokens in use, and of all up to the last special one; None where that is nearly all.

    A model looks for the id of padding, or of the end, in what it reads, so these keep their ids.
    """
    special = [value for name, value in vars(model.config).items() if name.endswith("_token_id")]
    known = np.hstack([-1, *(value for value in (*special, table.padding_idx) if value is not None)])
    if known.max() >= MOST * len(table.weight):
        return None
    ids = [np.arange(known.max() + 1), np.array([tokenizer.pad_token_id])]
    for part in texts:
        for batch in part.with_format("arrow", columns=["input_ids"]).iter(BATCH):
            ids.append(np.unique(batch["input_ids"].combine_chunks().flatten().to_numpy()))
    used = np.unique(np.concatenate(ids)).astype(np.int64)
    if record:
        kept: NDArray[np.int64] = np.load(record)
        if not np.isin(used, kept).all():
            raise DistillError(
                f"--resume: the texts have tokens that they did not have when {record.parent} was written; "
                "start again with --overwrite instead of --resume"
            )
        used = kept
    return torch.from_numpy(used) if record or len(used) <= MOST * len(table.weight) else None


def _set(table: nn.Embedding, weight: nn.Parameter) -> None:
    table.weight, table.num_embeddings = weight, len(weight)


def _logits(model: Any, texts: Dataset, collate: Collator) -> torch.Tensor | None:
    """Logits of two short texts, one of them padded if they differ in length; None if there are none."""
    lengths = np.asarray(texts["length"])
    order = np.argsort(lengths, kind="stable")
    second = max(1, int((lengths <= SHORT).sum()) - 1)
    batch = collate([texts[int(row)] for row in (order[0], order[min(second, len(order) - 1)])])
    inputs = {name: value.to(model.device) for name, value in batch.items() if name not in BEYOND_THE_MODEL}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs).logits.float().cpu()  # type: ignore[no-any-return]
    except Exception as error:  # what it needs beside the rows may be of any kind
        logger.debug("No logits to compare: %s", error)
        return None
    finally:
        model.train(training)


def _same(expected: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    if expected is None or found is None:
        return False
    return bool((expected - found).abs().max() <= TOLERANCE * expected.abs().max())
