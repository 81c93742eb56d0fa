"""More text made from the training text: for a student's teacher to label, or with the labels kept.

Its own training text shows a teacher at its most certain. Between those texts, and beside them, it says more
about what it has learnt, and a student may ask as often as it likes: Tang et al. (2019), arXiv 1903.12136.
Such a text has no label of its own, so it need not be right or even readable. One that is made out of texts
with one label alone keeps it, for a teacher that has few of them.
"""

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features

from distill.data import texts_of
from distill.errors import DistillError
from distill.sources import parts_of, text_id
from distill.words import segments

logger = logging.getLogger(__name__)
Text = str | tuple[str, str]
Words = list[str]
DROP, SUBSTITUTE, REPLACE = 0.2, 0.3, 0.4  # share of the words
LARGEST_CORPUS = 1_000_000  # words whose n-grams are kept
RARE = 0.001  # share of a word in the corpus up to which it is replaced as often as any
GRAMMAR = 0.01  # share from which a word holds sentences together and replaces no other
ATTEMPTS = 3  # a text wanted, before the corpus is held to be exhausted
EDGE = ""
TOLD_SHORT = 0.99  # of the texts that were asked for


@dataclass
class Corpus:
    """The training text as words, each with the blanks before it, and which words stand where in it.

    Attributes:
        texts: words of each text.
        between: words seen between two others.
        after: words seen after another; the edge of a text is an empty word.
        before: words seen before another.
        similar: words like a word, by that word; those that hold sentences together are left out.
        share: of each word among all.
        used: how often a similar word was put in place of another.
    """

    texts: list[Words]
    similar: Mapping[str, Sequence[str]] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)
    between: dict[tuple[str, str], Words] = field(default_factory=lambda: defaultdict(list))
    after: dict[str, Words] = field(default_factory=lambda: defaultdict(list))
    before: dict[str, Words] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for words in self.texts:
            bare = [EDGE, *map(_bare, words), EDGE]
            for left, word, right in zip(bare, words, bare[2:], strict=False):
                self.between[left, right].append(word)
                self.after[left].append(word)
                self.before[right].append(word)
        counts = Counter(_bare(word) for words in self.texts for word in words)
        total = counts.total()
        self.share = {word: count / total for word, count in counts.items()}
        self.similar = {
            word: [other for other in others if self.share.get(_bare(other), 0) < GRAMMAR]
            for word, others in self.similar.items()
        }


def _bare(word: str) -> str:
    return word.strip().casefold()


def drop_words(words: Words, corpus: Corpus, generator: random.Random) -> Words:
    """Leave out a fifth of the words: what masking is in Tang et al. (2019), for any pair of tokenizers."""
    return [word for word in words if generator.random() >= DROP]


def mix_texts(words: Words, corpus: Corpus, generator: random.Random) -> Words:
    """Join the beginning of one text and the end of another: n-gram sampling of Tang et al. (2019), twice."""
    other = generator.choice(corpus.texts)
    begin, end = words[: generator.randint(1, len(words))], other[generator.randrange(len(other)) :]
    blank = " " if any(word[:1].isspace() for word in words + other) else ""
    return [*begin, blank + end[0].lstrip(), *end[1:]]


def substitute_words(words: Words, corpus: Corpus, generator: random.Random) -> Words:
    """Put other words of the corpus in place of three in ten, by what it has between the same neighbours.

    Where it has nothing else between them, one that follows the left neighbour or precedes the right one is
    taken: a trigram model's back-off (Katz 1987) in place of the masked language model of TinyBERT (Jiao et
    al. 2020, arXiv 1909.10351, algorithm 1), so it needs no second checkpoint.
    """
    changed = list(words)
    for position, word in enumerate(words):
        if generator.random() >= SUBSTITUTE:
            continue
        left = _bare(changed[position - 1]) if position else EDGE
        right = _bare(words[position + 1]) if position + 1 < len(words) else EDGE
        options = corpus.between.get((left, right), [])
        if all(_bare(option) == _bare(word) for option in options):
            after = generator.random() < 0.5
            options = corpus.after.get(left, []) if after else corpus.before.get(right, [])
        if options:
            blanks = word[: len(word) - len(word.lstrip())]
            changed[position] = blanks + generator.choice(options).strip()
    return changed


def replace_words(words: Words, corpus: Corpus, generator: random.Random) -> Words:
    """Put a word that is like it in place of two words in five: algorithm 1 of TinyBERT.

    Frequent words are replaced less often, by the square root of section 2.3 of Mikolov et al. (2013), arXiv
    1310.4546. Of all augmentations this one alone brings in words that the corpus does not have: each time
    the one that was least used so far, of several the one most alike, since a student is furthest from its
    teacher where text has a word that it never met.
    """
    changed = list(words)
    for position, word in enumerate(words):
        chance = REPLACE * min(1.0, (RARE / corpus.share.get(_bare(word), RARE)) ** 0.5)
        if generator.random() >= chance:
            continue
        options = corpus.similar.get(word.strip())
        if options:
            blanks = word[: len(word) - len(word.lstrip())]
            other = min(options, key=corpus.used.__getitem__)
            corpus.used[other] += 1
            changed[position] = blanks + other
    return changed


Augmentation = Callable[[Words, Corpus, random.Random], Words]
AUGMENTATIONS: tuple[Augmentation, ...] = (replace_words, substitute_words, mix_texts, drop_words)


def augment(
    texts: Sequence[Text],
    budget: int,
    seed: int,
    taken: set[str],
    similar: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Text]:
    """Make up to `budget` different texts, by each of `AUGMENTATIONS` in turn, from one text after the other.

    Args:
        texts: the training text, never validation or test text. Both texts of a pair change.
        budget: how many to make; fewer come if the corpus is too small for so many different ones.
        seed: the same texts, in the same order, for the same corpus and seed.
        taken: ids (`text_id`) of texts that are never made, not even by chance, such as those of validation
            and test. Those of `texts`, and of what is made, are added.
        similar: words like a word, by that word; without any, no text is made by `replace_words`.
    """
    generator = random.Random(seed)
    pairs = list(map(parts_of, texts))
    corpora = [
        Corpus([words for words in texts_of_part if words], similar or {})
        for texts_of_part in zip(*_sample(pairs, generator), strict=True)
    ]
    taken.update(text_id(*parts) for parts in pairs)
    count = 0
    for attempt in range(budget * ATTEMPTS):
        if attempt % len(pairs) == 0:
            generator.shuffle(pairs)
        augmentation = AUGMENTATIONS[attempt % len(AUGMENTATIONS)]
        originals = [segments(part) for part in pairs[attempt % len(pairs)]]
        parts = [
            "".join(augmentation(words, corpus, generator)).strip() if words else ""
            for words, corpus in zip(originals, corpora, strict=True)
        ]
        identity = text_id(*parts)
        # A part of a pair may be empty, but not become so.
        if identity in taken or list(map(bool, parts)) != list(map(bool, originals)):
            continue
        taken.add(identity)
        yield (parts[0], parts[1]) if len(parts) == 2 else parts[0]
        count += 1
        if count == budget:
            return


def _sample(pairs: list[tuple[str, ...]], generator: random.Random) -> list[list[Words]]:
    """Texts as words, drawn without replacement until there are `LARGEST_CORPUS` words of them."""
    sample: list[list[Words]] = []
    count = 0
    for pair in generator.sample(pairs, len(pairs)):
        sample.append([segments(part) for part in pair])
        count += sum(map(len, sample[-1]))
        if count >= LARGEST_CORPUS:
            break
    return sample


def augmented(
    corpus: Dataset,
    budget: int,
    seed: int,
    held_out: set[str],
    folder: Path,
    similar: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """Make `budget` texts out of a corpus, on disk in `folder`: its columns, in its order.

    Args:
        corpus: with id, text and perhaps text_pair. Where it has `label`, a text is made out of those with
            one label, or set of labels, which it keeps; each gets its share of the budget.
        budget: how many; fewer come, with a warning, if the corpus is too small.
        seed: as for `augment`.
        held_out: ids of texts that are never made; nor are texts of the corpus, whatever their label.
        folder: for the rows, which are memory-mapped.
        similar: as for `augment`.

    Raises:
        DistillError: if nothing can be made.
    """
    # Tuples: datasets would give the items of a list to one call each.
    groups: dict[Any, list[Text]] = defaultdict(list)
    labels = corpus["label"] if "label" in corpus.column_names else [None] * len(corpus)
    for text, label in zip(texts_of(corpus), labels, strict=True):
        groups[tuple(label) if isinstance(label, list) else label].append(text)
    parts, before = [], 0
    for label, texts in groups.items():
        after = before + len(texts)
        share = budget * after // len(corpus) - budget * before // len(corpus)  # they add up to the budget
        parts.append((label, tuple(texts), share))
        before = after
    names = [name for name in corpus.column_names if name in ("id", "text", "text_pair", "label")]
    try:
        dataset = Dataset.from_generator(
            _rows,
            features=Features({name: corpus.features[name] for name in names}),
            gen_kwargs={
                "parts": tuple(parts),
                "seed": seed,
                "taken": held_out | set(corpus["id"]),
                "similar": similar,
            },
            cache_dir=str(folder),
        )
    except ValueError as error:  # that is how datasets takes a generator without rows
        raise DistillError(
            f"--augment: nothing new can be made of these {len(corpus)} texts; leave it out, or give more"
        ) from error
    if len(dataset) < budget * TOLD_SHORT:
        logger.warning(
            "  augmented: %d texts, not %d: the corpus is too small for more", len(dataset), budget
        )
    return dataset


def _rows(
    parts: tuple[tuple[Any, tuple[Text, ...], int], ...],
    seed: int,
    taken: set[str],
    similar: Mapping[str, Sequence[str]] | None,
) -> Iterator[dict[str, Any]]:
    taken = set(taken)
    for label, texts, budget in parts:
        for text in augment(texts, budget, seed, taken, similar):
            both = parts_of(text)
            row = {"id": text_id(*both), **dict(zip(("text", "text_pair"), both, strict=False))}
            yield (
                row if label is None else {**row, "label": list(label) if isinstance(label, tuple) else label}
            )
