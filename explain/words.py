"""Words as the features of an explanation: the same for every version, whatever its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.words import segments

Text = str | tuple[str, str]
MAX_WORDS = 64


@dataclass(frozen=True)
class Words:
    """A text cut into segments: a word and the blanks before it; the last one also has the blanks at the end.

    Joined, the segments are the text, byte for byte. A text of more than `MAX_WORDS` words is cut into that
    many segments of several words each, so that its explanation costs a bounded time.

    Attributes:
        segments: what can be masked, in order.
        first: how many of them belong to the first text of a pair; None for a single text.
    """

    segments: tuple[str, ...]
    first: int | None = None

    @property
    def words(self) -> list[str]:
        """The segments without the blanks around them."""
        return [segment.strip() for segment in self.segments]

    def keep(self, mask: NDArray[np.bool_]) -> Text:
        """The text with the segments where `mask`, shape (segments,), is false taken out."""
        if self.first is None:
            return _join(self.segments, mask)
        return (
            _join(self.segments[: self.first], mask[: self.first]),
            _join(self.segments[self.first :], mask[self.first :]),
        )


def _join(segments: Sequence[str], mask: NDArray[np.bool_]) -> str:
    return "".join(segment for segment, kept in zip(segments, mask.tolist(), strict=True) if kept)


def _segments(text: str, limit: int) -> list[str]:
    words = segments(text)
    group = -(-len(words) // limit) or 1
    return ["".join(words[start : start + group]) for start in range(0, len(words), group)]


def split_words(text: Text, limit: int = MAX_WORDS) -> Words:
    """Cut a text, or a pair of texts, into at most `limit` segments (`limit` each for a pair)."""
    if isinstance(text, str):
        return Words(tuple(_segments(text, limit)))
    first, second = (_segments(part, limit) for part in text)
    return Words((*first, *second), len(first))
