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

SIZE = 2**14  # words that are remembered
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
        normalizer, splitter, truncation = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.truncation
        kinds = type(normalizer), type(splitter), type(self._model)
        self._bert = kinds == (BertNormalizer, BertPreTokenizer, WordPiece)
        byte_level = (
            kinds == (type(None), ByteLevel, BPE)
            and (splitter.use_regex, splitter.add_prefix_space) == (True, False)
            and not self._model.dropout
        )
        if not (self._bert or byte_level):
            raise ValueError("a tokenizer of another kind")
        if (truncation["direction"], truncation["strategy"]) != ("right", "longest_first"):
            raise ValueError("a tokenizer that cuts in another way")
        self._words = _BERT if self._bert else _BYTE_LEVEL
        self._lowercase = self._bert and normalizer.lowercase
        added = tokenizer.get_added_tokens_decoder().values()
        # Those that are looked for in normalized text, which of plain text alone is known here.
        late = [token.content for token in added if token.normalized and self._bert]
        if not all(map(_is_plain, late)):
            raise ValueError("a tokenizer with added tokens that are not plain")
        self._plain_alone = bool(late) or byte_level
        contents = {token.content for token in added}
        self._not_words = sorted(contents | {content.lower() for content in contents if self._lowercase})
        try:
            whole, inner = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises no other kind, here where "a" and [UNK] are missing
            raise ValueError("a tokenizer of few characters") from error
        before = whole.special_tokens_mask.index(0)
        self._before, self._after = whole.ids[:before], whole.ids[before + len(inner) :]
        self._end: int = truncation["max_length"] - len(self._after)
        # Without special tokens a word that the tokenizer cuts would not be seen to be cut.
        if not self._before + self._after or any(whole.type_ids) or self._end <= before:
            raise ValueError("a tokenizer with other special tokens")
        if not inner or whole.ids != self._before + inner + self._after:
            raise ValueError("a tokenizer that adds more than special tokens")

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "WordTable | None":
        """One for this tokenizer; None where there is none."""
        try:
            return cls(tokenizer)
        except ValueError:
            return None

    def __missing__(self, word: str) -> list[int]:
        if _is_plain(word):
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
        if _is_plain(text) or (not self._bert and text.isascii()):
            text = text.lower() if self._lowercase else text
        elif self._plain_alone:
            return None
        for content in self._not_words:
            if content in text:
                return None
        ids = [*self._before, *chain.from_iterable(map(self.__getitem__, self._words(text)))]
        cut = len(ids) > self._end
        if cut:
            del ids[self._end :]
        ids += self._after
        return Tokens(ids, None, cut)


def _is_plain(text: str) -> bool:
    """Whether it is letters, digits, marks and blanks of ASCII, which BERT's normalizer lowers at most."""
    return text.isascii() and text.isprintable()
