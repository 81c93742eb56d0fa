"""Words that a pre-trained encoder holds to be alike, by its table of word embeddings."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import regex
import torch

NEIGHBOURS = 5
LETTERS = regex.compile(r"[\p{L}\p{M}]+")
BLOCK = 256  # words compared with all others at once


def similar_words(
    words: Iterable[str], model: Any, tokenizer: Any, count: int = NEIGHBOURS
) -> dict[str, tuple[str, ...]]:
    """For every word, those of the vocabulary that it is most like: which of all `words` are nearest to them.

    So each word that the tokenizer knows stands with `count` words of a corpus, by cosine, whether the corpus
    has it or not, and what puts it in their place comes to all of them. Jiao et al. (2020), arXiv 1909.10351,
    take the nearest of GloVe's for a word, and so the same few again and again; a checkpoint's own table
    serves as well and needs no download. They need not mean the same ("good" has "bad"): the teacher labels
    what they make.

    Args:
        words: of a corpus, of any number; each is looked up once.
        model: whose input embeddings to compare, centred first.
        tokenizer: its fast tokenizer.
        count: words of the corpus that a word of the vocabulary stands with.

    Returns:
        Word -> words that are one token each, the nearest first; a word of several tokens is left out.
    """
    spelling = {index: tokenizer.decode([index]).strip() for index in range(len(tokenizer))}
    pieces = _tokens(tokenizer, [text for text in spelling.values() if LETTERS.fullmatch(text)])
    whole = sorted({index for text, index in pieces.items() if spelling[index] == text})
    place = {index: row for row, index in enumerate(whole)}
    found = {word: place[index] for word, index in _tokens(tokenizer, words).items() if index in place}
    if not found:
        return {}
    names = [spelling[index] for index in whole]
    table = model.get_input_embeddings().weight.detach().float().cpu()[whole]
    table = torch.nn.functional.normalize(table - table.mean(dim=0), dim=-1)
    rows = sorted(set(found.values()))
    corpus = table[rows].T
    # A few more than wanted: the word itself is among them, perhaps in several spellings.
    size = min(count + 4, len(rows))
    alike: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for start in range(0, len(names), BLOCK):
        block = slice(start, start + BLOCK)
        likeness, nearest = (table[block] @ corpus).topk(size)
        for name, *both in zip(names[block], likeness.tolist(), nearest.tolist(), strict=True):
            others = [(near, rows[row]) for near, row in zip(*both, strict=True)]
            others = [one for one in others if names[one[1]].casefold() != name.casefold()]
            for near, row in others[:count]:
                alike[row].append((-near, name))
    return {word: tuple(name for _, name in sorted(alike[row])) for word, row in found.items()}


def _tokens(tokenizer: Any, words: Iterable[str]) -> dict[str, int]:
    """Words that are one token after a blank, and which; SentencePiece's blank before an ideograph aside."""
    distinct = sorted(set(words))
    blank = tokenizer.get_vocab().get("\u2581")
    encoded = tokenizer([f" {word}" for word in distinct], add_special_tokens=False)["input_ids"]
    bare = [ids[1:] if len(ids) == 2 and ids[0] == blank else ids for ids in encoded]
    return {word: ids[0] for word, ids in zip(distinct, bare, strict=True) if len(ids) == 1}
