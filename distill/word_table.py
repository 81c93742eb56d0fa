"""Token ids of a text out of a table of its words: exactly the tokenizer's, in a fraction of its time.

A tokenizer makes offsets, masks and strings of every token, for which a model has no use. Where it reads each
word by itself, a word's ids are asked for once and remembered.
"""

import re
from itertools import chain
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel

SIZE = 2**15  # words that are remembered
LONGEST = 32  # characters of one
# BERT: each mark of ASCII is a word, and blanks lie between; what else divides words the tokenizer sees.
_BERT = re.compile(r"[^ \t\n\r!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]").findall
# GPT-2 and RoBERTa: their own rule, as it is for ASCII; a blank belongs to the word after it.
_BYTE_LEVEL = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[a-zA-Z]+| ?[0-9]+| ?[^\t-\r a-zA-Z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
).findall


class Tokens(NamedTuple):
    """Tokens of a text.

    Attributes:
        ids: of what the model reads.
        type_ids: of each; None where all are 0.
        cut: whether the text has more.
    """

    ids: list[int]
    type_ids: list[int] | None
    cut: bool


class WordTable(dict[str, list[int]]):
    """Ids by word, filled as words come. May be shared by threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Stand in for a tokenizer.

        Args:
            tokenizer: with the truncation that is to be kept, and without padding.

        Raises:
            ValueError: if it is not known to read each word by itself.
        """
        super().__init__()
        self._tokenizer, self._model = tokenizer, tokenizer.model
        normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
        kinds = type(normalizer), type(splitter), type(self._model)
        self._lowercase = False
        added = tokenizer.get_added_tokens_decoder().values()
        self._not_words = [token.content for token in added]
        if kinds == (BertNormalizer, BertPreTokenizer, WordPiece):
            self._words, self._lowercase = _BERT, normalizer.lowercase
        elif (
            kinds == (type(None), ByteLevel, BPE)
            and (splitter.use_regex, splitter.add_prefix_space) == (True, False)
            and not self._model.dropout
        ):
            self._words = _BYTE_LEVEL
        else:
            raise ValueError("a tokenizer of another kind")
        whole, inner = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False).ids
        before = whole.special_tokens_mask.index(0) if 0 in whole.special_tokens_mask else 0
        self._before, self._after = whole.ids[:before], whole.ids[before + len(inner) :]
        truncation = tokenizer.truncation
        self._room: int = truncation["max_length"] - len(self._before) - len(self._after)
        plain = truncation["direction"] == "right" and not any(whole.type_ids) and self._room > 0
        # What is looked for in normalized text may lie across words.
        across = any(token.normalized for token in added) and normalizer is not None
        if not plain or across or whole.ids != [*self._before, *inner, *self._after]:
            raise ValueError("a tokenizer that does more than read words")

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "WordTable | None":
        """One for this tokenizer; None where there is none."""
        try:
            return cls(tokenizer)
        except ValueError:
            return None

    def __missing__(self, word: str) -> list[int]:
        if word.isascii() and word.isprintable():
            plain = word.lower() if self._lowercase else word.replace(" ", "Ġ")
            ids = [piece.id for piece in self._model.tokenize(plain)]
        else:
            ids = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= LONGEST:
            if len(self) >= SIZE:
                self.clear()
            self[word] = ids
        return ids

    def tokens(self, text: str) -> Tokens | None:
        """What the tokenizer would give; None where only it can tell."""
        for content in self._not_words:
            if content in text:
                return None
        if text.isascii():
            text = text.lower() if self._lowercase else text
        elif self._words is _BYTE_LEVEL:
            return None
        ids = [*self._before, *chain.from_iterable(map(self.__getitem__, self._words(text)))]
        end = len(self._before) + self._room
        cut = len(ids) > end
        if cut:
            del ids[end:]
        ids += self._after
        return Tokens(ids, None, cut)
