"""A smaller vocabulary: fewer rows in the embedding table, shared by tokens that are alike.

Most of a small student's file is its embedding table, and a corpus uses a fraction of it. The most frequent
tokens of the corpus keep a row of their own; every other token reads the row of the one that the table, as
it is before training, holds to be most like it, in training already. The tokenizer stays as it is, so a
text whose tokens all have rows of their own is answered as before, and a token that was never seen is read
as one that was. The student's folder has the whole table, equal rows and all, as transformers reads
it; export stores equal rows once (export/equal_rows.py).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch

from distill.averaging import is_layerless
from distill.encoding import Text, encode
from distill.errors import DistillError

BATCH = 1000  # texts that are tokenized at once
BLOCK = 1024  # rows that are compared with all others at once


def shared_rows(model: Any, tokenizer: Any, texts: Iterable[Text], size: int | None = None) -> torch.Tensor:
    """Choose which rows of a classifier's embedding table stay, and who reads them.

    Args:
        model: a sequence classifier that is not trained yet.
        tokenizer: as `load_tokenizer` gives it.
        texts: the corpus, never validation or test text.
        size: how many tokens keep their rows: the most frequent ones, then the first of the vocabulary, which
            is in order of frequency as a rule; all that occur when left out. Special tokens come on top.

    Returns:
        For every token the one whose row it reads, shape (vocabulary,): itself if it keeps its own, otherwise
        the nearest of those that do, by the cosine of centred rows. Nothing shares a special token's row.

    Raises:
        DistillError: if the model has no table of tokens.
    """
    try:
        table = model.get_input_embeddings().weight.detach().float().cpu()
    except (NotImplementedError, AttributeError) as error:
        raise DistillError("--vocabulary: this checkpoint has no table of tokens; leave it out") from error
    counts = _counts(tokenizer, texts)
    special = {token for token in _special(model, tokenizer) if 0 <= token < len(table)}
    ranked = sorted(counts.keys() - special, key=lambda token: (-counts[token], token))
    others = (token for token in _in_order(tokenizer) if token not in special and token not in counts)
    own = ranked if size is None else list(islice(chain(ranked, others), size))
    if not own or max(own) >= len(table):
        raise DistillError("--vocabulary: the texts have no token that this checkpoint knows; leave it out")
    rows = torch.arange(len(table))
    shares = torch.ones(len(table), dtype=torch.bool)
    shares[[*own, *special]] = False
    table = torch.nn.functional.normalize(table - table.mean(dim=0), dim=-1)
    kept = torch.tensor(own)
    for block in shares.nonzero()[:, 0].split(BLOCK):
        rows[block] = kept[(table[block] @ table[kept].T).argmax(dim=1)]
    return rows


def share_rows(model: Any, rows: torch.Tensor) -> None:
    """Copy the rows that `rows` names to the tokens that share them, shape (vocabulary,); in place."""
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(table[rows.to(table.device)])
    share_bigrams(model, rows)


def share_bigrams(model: Any, rows: torch.Tensor) -> None:
    """Where a model has bigrams, those of tokens that share a row by `rows` are one too from now on."""
    if is_layerless(model) and model.config.bigrams:
        model.share(rows)


def _counts(tokenizer: Any, texts: Iterable[Text]) -> Counter[int]:
    texts = iter(texts)
    counts: Counter[int] = Counter()
    while batch := list(islice(texts, BATCH)):
        counts.update(chain.from_iterable(encode(batch, tokenizer).columns["input_ids"]))
    return counts


def _in_order(tokenizer: Any) -> list[int]:
    """All tokens but those that BERT leaves unused, whose rows nobody trained."""
    spelt = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [token for token, piece in enumerate(spelt) if piece and not piece.startswith("[unused")]


def _special(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that a model or tokenizer knows by their numbers; some configurations name several ends."""
    named = [value for name, value in vars(model.config).items() if name.endswith("_token_id")]
    named += [model.get_input_embeddings().padding_idx, *tokenizer.all_special_ids]
    flat = chain.from_iterable(one if isinstance(one, list) else [one] for one in named)
    return {token for token in flat if isinstance(token, int)} | tokenizer.added_tokens_decoder.keys()
