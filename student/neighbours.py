"""Words that a pre-trained encoder holds to be alike: nearest neighbours in its table of word embeddings."""

from collections.abc import Iterable
from typing import Any

import regex
import torch

NEIGHBOURS = 15
LETTERS = regex.compile(r"[\p{L}\p{M}]+")
BLOCK = 256  # words compared with all others at once


def similar_words(
    words: Iterable[str], model: Any, tokenizer: Any, count: int = NEIGHBOURS
) -> dict[str, tuple[str, ...]]:
    """Nearest neighbours, by cosine, of every word that is one token, among the words that are one token.

    Jiao et al. (2020), arXiv 1909.10351, take GloVe's for such words; a checkpoint's own table serves as
    well and needs no download. Neighbours need not mean the same ("good" has "bad"): the teacher labels what
    they make.

    Args:
        words: of any number; each is looked up once.
        model: whose input embeddings to compare, centred first.
        tokenizer: its fast tokenizer.
        count: neighbours of each, the nearest first.

    Returns:
        Word -> its neighbours; a word of several tokens is left out.
    """
    spelling = {index: tokenizer.decode([index]).strip() for index in range(len(tokenizer))}
    pieces = _tokens(tokenizer, [text for text in spelling.values() if LETTERS.fullmatch(text)])
    whole = sorted({index for text, index in pieces.items() if spelling[index] == text})
    place = {index: row for row, index in enumerate(whole)}
    found = {word: place[index] for word, index in _tokens(tokenizer, words).items() if index in place}
    if not found:
        return {}
    table = model.get_input_embeddings().weight.detach().float().cpu()[whole]
    table = torch.nn.functional.normalize(table - table.mean(dim=0), dim=-1)
    rows, size = sorted(set(found.values())), min(count + 4, len(whole))
    nearest: dict[int, tuple[str, ...]] = {}
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        likeness = table[block] @ table.T
        # A few more than wanted: the word itself is among them, perhaps in several spellings.
        for row, others in zip(block, likeness.topk(size).indices.tolist(), strict=True):
            own = spelling[whole[row]].casefold()
            names = [spelling[whole[other]] for other in others]
            nearest[row] = tuple(name for name in names if name.casefold() != own)[:count]
    return {word: nearest[row] for word, row in found.items()}


def _tokens(tokenizer: Any, words: Iterable[str]) -> dict[str, int]:
    """Words that are one token after a blank, and which; SentencePiece's blank before an ideograph aside."""
    distinct = sorted(set(words))
    blank = tokenizer.get_vocab().get("\u2581")
    encoded = tokenizer([f" {word}" for word in distinct], add_special_tokens=False)["input_ids"]
    bare = [ids[1:] if len(ids) == 2 and ids[0] == blank else ids for ids in encoded]
    return {word: ids[0] for word, ids in zip(distinct, bare, strict=True) if len(ids) == 1}
