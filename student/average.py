"""A student without layers, and the teacher's own states of tokens and bigrams, which it starts from."""

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from distill.student.soft_labels import kept_beside
from distill.student.states import states_of
from numpy.typing import ArrayLike, NDArray

from distill.artifact import Manifest
from distill.averaging import AveragingConfig, AveragingForSequenceClassification, depth
from distill.devices import choose_device, choose_precision, inference, placed
from distill.encoding import Text, encode
from distill.models import is_decoder, load_model, load_tokenizer
from distill.processes import ahead

logger = logging.getLogger(__name__)
SPECIAL = ("pad", "cls", "sep", "bos", "eos")  # tokens that a configuration names
DROPOUT = 0.2  # of embeddings, where nothing else is asked for
BIGRAMS = 16_384  # the most that have an embedding
LEAST = 2  # times that one occurs
COUNTED = 2_000_000  # different ones at a time
TEXTS = 1000  # that are tokenized at once
BATCH = 512  # tokens that are read at a time, each as a text of its own


def average_tokens(
    model: Any, tokenizer: Any, dropout: float | None = None, bigrams: Sequence[tuple[int, int]] = ()
) -> AveragingForSequenceClassification:
    """A sequence classifier without layers: the mean of embeddings, and a small network that reads it.

    Args:
        model: a sequence classifier, whose token embeddings are where the new one starts; bigrams start near
            zero, and the rest is drawn.
        tokenizer: its tokenizer.
        dropout: of embeddings, in training; `DROPOUT` when left out.
        bigrams: pairs of tokens that get an embedding besides.
    """
    table, old = model.get_input_embeddings(), model.config
    config = AveragingConfig(
        vocab_size=table.num_embeddings,
        hidden_size=table.embedding_dim,
        bigrams=len(bigrams),
        embedding_dropout=DROPOUT if dropout is None else dropout,
        num_labels=old.num_labels,
        id2label=old.id2label,
        label2id=old.label2id,
        problem_type=old.problem_type,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL},
    )
    student = AveragingForSequenceClassification(config)
    if bigrams:
        student.know_bigrams(bigrams)
    with torch.no_grad():
        student.tokens.weight.copy_(table.weight)
    return student


def frequent_bigrams(tokenizer: Any, texts: Iterable[Text], most: int | None = None) -> list[tuple[int, int]]:
    """The pairs of neighbouring tokens that occur in `texts` `LEAST` times or more, the most frequent first.

    Args:
        tokenizer: as `load_tokenizer` gives it; the tokens that it adds at the ends have neighbours too.
        texts: what the student learns on.
        most: how many to return at most; `BIGRAMS` when left out.
    """
    most = BIGRAMS if most is None else most
    texts = iter(texts if most else ())
    counts: Counter[tuple[int, int]] = Counter()
    while batch := list(islice(texts, TEXTS)):
        for ids in encode(batch, tokenizer).columns["input_ids"]:
            counts.update(pairwise(ids))
        if len(counts) > COUNTED:  # rare ones of the texts so far
            counts = Counter({pair: count for pair, count in counts.items() if count >= LEAST})
    found = sorted((-count, pair) for pair, count in counts.items() if count >= LEAST)
    return [pair for _, pair in found[:most]]


def teacher_states(
    teacher: Path, manifest: Manifest, bigrams: ArrayLike, device: str, precision: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a teacher makes of single tokens and of bigrams, for `start_from`; kept beside its soft labels.

    Each token is read as a text of its own, as model2vec (Tulkens and van Dongen 2024,
    https://github.com/MinishLab/model2vec) does with a model of sentences, here after fine-tuning and two
    thirds up the layers. To that the token's own embedding is added, both with mean 0 and deviation 1. So a
    word that no training text has starts beside those that the teacher reads alike. Of a bigram it is what
    the two tokens' states gain from each other; zero for those with a special token.
    The embeddings alone serve, and zeros, where they are narrower than the states (ALBERT, small ELECTRAs),
    and of teachers that have a decoder beside their encoder.

    Args:
        teacher: the teacher's folder.
        manifest: its manifest.
        bigrams: pairs of its tokens, shape (bigrams, 2).
        device: "auto", "cpu" or "cuda".
        precision: "auto" or one of fp32, bf16, fp16.

    Returns:
        Of shapes (vocabulary, width) and (bigrams, width).
    """
    pairs = np.asarray(bigrams, dtype=np.int64).reshape(-1, 2)
    of_tokens = kept_beside(teacher) / "token_states.npy"
    of_pairs = of_tokens.with_name(f"bigram_states_{hashlib.sha256(pairs.tobytes()).hexdigest()[:16]}.npy")

    def kept() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        missing = [
            file for file in ((of_tokens, of_pairs) if len(pairs) else (of_tokens,)) if not file.is_file()
        ]
        reader = _Reader(teacher, manifest, device, precision) if missing else None
        if reader and of_tokens in missing:
            _write(of_tokens, reader.tokens())
        tokens = np.load(of_tokens)
        if reader and of_pairs in missing:
            _write(of_pairs, reader.bigrams(pairs, tokens))
        return tokens, np.load(of_pairs) if len(pairs) else np.zeros((0, tokens.shape[1]), tokens.dtype)

    return ahead(kept)


class _Reader:
    """A teacher that reads one or two tokens as a text."""

    def __init__(self, teacher: Path, manifest: Manifest, device: str, precision: str) -> None:
        self.model = load_model(str(teacher), manifest.labels, "--teacher").eval()
        self.tokenizer = load_tokenizer(str(teacher), manifest.max_length, "--teacher")
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, precision)
        table = self.model.get_input_embeddings().weight.detach().float().cpu().numpy()
        config, self.embeddings = self.model.config, _standard(table)
        narrower = getattr(config, "hidden_size", None) != table.shape[1]
        self.has_states = bool(depth(self.model)) and not narrower and not config.is_encoder_decoder

    def tokens(self) -> NDArray[np.float32]:
        """Shape (vocabulary, width)."""
        found = self.embeddings.copy()
        if self.has_states:
            for rows, states in self._states(np.arange(len(found))[:, None], "Tokens by themselves"):
                found[rows] += states[:, 0]
        return found

    def bigrams(self, pairs: NDArray[np.int64], tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Shape (bigrams, width), of pairs of shape (bigrams, 2) and what `tokens` gives."""
        found = np.zeros((len(pairs), tokens.shape[1]), dtype=np.float32)
        words = np.flatnonzero(~np.isin(pairs, self.tokenizer.all_special_ids).any(axis=1))
        if self.has_states:
            for rows, states in self._states(pairs[words], "Pairs of tokens"):
                one = pairs[words[rows]]
                gained = states - (tokens - self.embeddings)[one]
                # A token's state is about 1 / sqrt(2) of its row, which has deviation 1 in the student.
                found[words[rows]] = gained.sum(axis=1) / 2**0.5
        return found

    def _states(
        self, ids: NDArray[np.int64], title: str
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Rows of `ids`, shape (texts, tokens), and their tokens' states, shape (rows, tokens, width)."""
        text, place = _text_around(self.tokenizer, is_decoder(self.model.config), ids.shape[1])
        started, inside = time.monotonic(), slice(place, place + ids.shape[1])
        with placed(self.model, self.device, self.precision), inference(self.device, self.precision):
            for begin in range(0, len(ids), BATCH):
                rows = np.arange(begin, min(begin + BATCH, len(ids)))
                read = text.repeat(len(rows), 1)
                read[:, inside] = torch.from_numpy(ids[rows])
                read = read.to(self.device)
                states = states_of(self.model, input_ids=read, attention_mask=torch.ones_like(read))
                yield rows, _standard(states[:, inside].float().cpu().numpy())
                done = begin + len(rows)
                if done % (20 * BATCH) == 0 or done == len(ids):
                    left = (time.monotonic() - started) / done * (len(ids) - done)
                    logger.info("%s: %d of %d, %d s left", title, done, len(ids), left)


def _text_around(tokenizer: Any, decoder: bool, tokens: int) -> tuple[torch.Tensor, int]:
    """Room for `tokens` tokens between those that a tokenizer adds at the ends, and its place.

    The first token of a decoder's text has a state like that of any other first one, so something stands
    before: the end of another text.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    first = added.index(0) if 0 in added else 0  # none in a tokenizer of few characters
    last = len(added) - 1 - added[::-1].index(0) if 0 in added else len(added)
    before = ids[:first]
    if decoder and not before and tokenizer.eos_token_id is not None:
        before = [tokenizer.eos_token_id]
    return torch.tensor([*before, *[0] * tokens, *ids[last + 1 :]]), len(before)


def _standard(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = rows - rows.mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.maximum(centred.std(axis=-1, keepdims=True), 1e-6), dtype=np.float32)


def _write(file: Path, states: NDArray[np.float32]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{uuid4().hex}.partial")  # another run may be writing the same
    with unfinished.open("wb") as stream:
        np.save(stream, states)
    os.replace(unfinished, file)


def start_from(
    student: AveragingForSequenceClassification, tokens: NDArray[np.float32], bigrams: NDArray[np.float32]
) -> None:
    """Let the embeddings of a student without layers start as `teacher_states`, tokens as large as they were.

    That is on average: a norm makes all of one size anyway, and how large they are says how far a step of
    training moves them.
    """
    table = student.tokens.weight
    with torch.no_grad():
        size = (table - table.mean(dim=1, keepdim=True)).std(dim=1).mean()
        table.copy_(size * torch.from_numpy(_standard(tokens)))
        if len(bigrams):
            student.bigrams.weight[1:] = torch.from_numpy(bigrams)
