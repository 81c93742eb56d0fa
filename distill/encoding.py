"""Texts as a checkpoint's tokenizer gives them to its model, long ones in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from distill.long_texts import HEAD, HEAD_TAIL, Reader
from distill.sources import parts_of

Text = str | tuple[str, str]


@dataclass
class Encoded:
    """Rows for a model, one for each piece of a text.

    Attributes:
        columns: token ids and what else the model takes, as lists, by name.
        lengths: tokens of each row.
        owners: the text that each row is of, from 0 on.
        cut: for each row, whether something of its text is not read.
    """

    columns: dict[str, list[list[int]]]
    lengths: list[int]
    owners: list[int]
    cut: list[bool]


def read_long_texts(tokenizer: Any, way: str) -> Any:
    """Have `encode` read long texts so ("head", "head-tail" or "windows"); gives the tokenizer back."""
    tokenizer.reader = None
    if way != HEAD:
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        tokenizer.reader = Reader(own, tokenizer.model_max_length, way)
    return tokenizer


def reader_of(tokenizer: Any) -> Reader | None:
    """What reads its long texts; None where only their beginning is read."""
    return getattr(tokenizer, "reader", None)


def way_of(tokenizer: Any) -> str:
    """How it reads long texts."""
    reader = reader_of(tokenizer)
    return reader.way if reader else HEAD


def encode(texts: Sequence[Text], tokenizer: Any) -> Encoded:
    """Tokenize texts (or pairs), each truncated to what the model reads, without padding.

    Args:
        texts: all single, or all pairs.
        tokenizer: as `load_tokenizer` gives it.
    """
    encoded = tokenizer(*map(list, zip(*map(parts_of, texts), strict=True)), truncation=True)
    cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
    owners = list(range(len(texts)))
    reader = reader_of(tokenizer)
    if reader and any(cut):
        # Pairs have no pieces: training refuses them.
        pieces = [reader.pieces(str(text)) if long else [text] for text, long in zip(texts, cut, strict=True)]
        owners = [owner for owner, own in enumerate(pieces) for _ in own]
        encoded = tokenizer([piece for own in pieces for piece in own], truncation=True)
        cut = [reader.way == HEAD_TAIL and cut[owner] for owner in owners]
    return Encoded(dict(encoded), [len(ids) for ids in encoded["input_ids"]], owners, cut)
