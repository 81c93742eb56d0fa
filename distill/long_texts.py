"""What a model reads of a text that is too long for it: its beginning, both ends, or all of it in windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distill.errors import DistillError

HEAD, HEAD_TAIL, WINDOWS = "head", "head-tail", "windows"
WAYS = (HEAD, HEAD_TAIL, WINDOWS)
PART = 4  # a quarter is the head of head and tail, and what two windows have in common


class Reader:
    """Turns a text into pieces that a model can read whole.

    A piece is text, so that every tokenizer and runtime reads it alike. It begins and ends between words,
    where words are short enough.

    Attributes:
        way: "head-tail" takes the first quarter of the tokens that fit and three quarters from the end
            (Sun et al. 2019, arXiv 1905.05583, section 5.3.1). "windows" takes everything, in windows that
            share a quarter with the next.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, way: str) -> None:
        """Read with a tokenizer.

        Args:
            tokenizer: for this reader alone; its truncation and padding are switched off.
            max_length: tokens that the model reads, special ones among them.
            way: "head-tail" or "windows".
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.way = way
        self._tokenizer = tokenizer
        self._room = max_length - tokenizer.num_special_tokens_to_add(False)
        if self._room < PART:
            raise DistillError(f"--max-length {max_length}: too short for --long-texts {way}; give more")

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, in order; the text itself where it is short enough."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        words, ends = encoding.word_ids, [end for _, end in encoding.offsets]
        count, room = len(ends), self._room
        if count <= room:
            return [text]

        def position(token: int, direction: int) -> int:
            """Where in the text a token begins, or one near it in this direction that begins a word."""
            for near in range(token, token + direction * (room // (3 * PART)), direction):
                # Where a tokenizer takes all of a text for one word, blanks tell.
                around = text[max(0, ends[near - 1] - 1) : ends[near - 1] + 1] if near else ""
                if near in (0, count) or words[near] != words[near - 1] or any(map(str.isspace, around)):
                    token = near
                    break
            return ends[token - 1] if 0 < token < count else (len(text) if token else 0)

        if self.way == HEAD_TAIL:
            head = room // PART
            tail = text[position(count - room + head, 1) :].lstrip()
            return [self._fitting(f"{text[: position(head, -1)]} {tail}")]
        starts = [*range(0, count - room, room - room // PART), count - room]
        found = [text[position(start, 1) : position(start + room, -1)] for start in starts]
        found = [self._fitting(piece, keep_end=piece is found[-1]) for piece in found if piece.strip()]
        return found or [text[: ends[room - 1]]]

    def _fitting(self, piece: str, keep_end: bool = False) -> str:
        """A piece without its last, or first, tokens where it has more than fit: a cut can make new ones."""
        room = self._room
        while len(offsets := self._tokenizer.encode(piece, add_special_tokens=False).offsets) > room:
            # At least one character, of which several tokens may be, goes every time.
            if keep_end:
                piece = piece[max(1, offsets[-room][0]) :]
            else:
                piece = piece[: min(len(piece) - 1, offsets[room - 1][1])]
        return piece


def pooled(logits: NDArray[Any], owners: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Mean logits of each text's pieces, shape (texts, classes).

    Args:
        logits: of pieces, shape (pieces, classes).
        owners: the text that each piece is of, from 0 on, shape (pieces,); every text has a piece.
    """
    counts = np.bincount(owners)
    if len(counts) == len(logits) and np.array_equal(owners, np.arange(len(logits))):
        return logits
    sums = np.zeros((len(counts), logits.shape[1]), dtype=np.float64)
    np.add.at(sums, owners, logits)
    return np.asarray(sums / counts[:, np.newaxis], dtype=logits.dtype)
