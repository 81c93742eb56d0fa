"""Why a version answered as it did: SHAP and LIME values of words, for several versions at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shap
from distill.explain.words import Text, Words, split_words
from lime.lime_base import LimeBase
from numpy.typing import NDArray

Probabilities = Callable[[Sequence[Text]], NDArray[np.float64]]
METHODS = ("shap", "lime")
EXACT_WORDS = 8
PERMUTATIONS = 3
LIME_SAMPLES = 500
LIME_KERNEL_WIDTH = 25.0


@dataclass(frozen=True)
class Attribution:
    """What each word adds to the probability of each class.

    Attributes:
        words: the segments of the text.
        values: shape (segments, classes).
        base: probabilities with every word taken out, shape (classes,); for LIME the local model's intercept.
        output: probabilities of the whole text, shape (classes,).
    """

    words: Words
    values: NDArray[np.float64]
    base: NDArray[np.float64]
    output: NDArray[np.float64]

    @property
    def residual(self) -> float:
        """Largest difference over the classes between the sum of the values and output - base."""
        return float(np.abs(self.values.sum(axis=0) + self.base - self.output).max())

    @property
    def predicted(self) -> int:
        """Index of the most probable class."""
        return int(self.output.argmax())


class WordMasker(shap.maskers.Masker):
    """Takes words out of a text; with nothing taken out the text is what it was, byte for byte."""

    immutable_outputs = True
    clustering = None

    def __init__(self, words: Words) -> None:
        self.words = words

    def __call__(self, mask: Any, text: Text) -> tuple[NDArray[np.object_]]:
        """One masked text in an array of shape (1,), as shap wants it."""
        masked = np.empty(1, dtype=object)
        masked[0] = self.words.keep(self._standardize_mask(mask, text))
        return (masked,)

    def shape(self, text: Text) -> tuple[int, int]:
        """One masked text a mask; as many features as segments."""
        return (1, len(self.words.segments))

    def mask_shapes(self, text: Text) -> list[tuple[int]]:
        """The same, for shap's own bookkeeping."""
        return [(len(self.words.segments),)]


def _shap(words: Words, text: Text, model: Probabilities, seed: int) -> tuple[NDArray, NDArray]:
    """Values (segments, outputs) and base values (outputs,): exact for short texts, else by permutations."""
    count = len(words.segments)
    masker = WordMasker(words)
    if count <= EXACT_WORDS:
        explainer = shap.explainers.Exact(model, masker)
        row = explainer.explain_row(
            text, max_evals=2**count, main_effects=False, error_bounds=False, batch_size=2**count,
            outputs=None, interactions=1, silent=True,
        )  # fmt: skip
    else:
        masks = 2 * count + 1
        explainer = shap.explainers.Permutation(model, masker, seed=seed)
        row = explainer.explain_row(
            text, max_evals=PERMUTATIONS * masks, main_effects=False, error_bounds=False, batch_size=masks,
            outputs=None, silent=True,
        )  # fmt: skip
    return row["values"], row["expected_values"]


def _lime(words: Words, text: Text, model: Probabilities, seed: int) -> tuple[NDArray, NDArray]:
    """Coefficients (segments, outputs) and intercepts (outputs,) of LIME's local linear model.

    Sampling, distance and kernel are those of lime's own text explainer (Ribeiro et al. 2016, arXiv
    1602.04938); only its word splitting, which cannot rebuild a text, is replaced.
    """
    count = len(words.segments)
    generator = np.random.default_rng(seed)
    masks = np.ones((LIME_SAMPLES, count), dtype=bool)
    for row in masks[1:]:
        row[generator.choice(count, generator.integers(1, count + 1), replace=False)] = False
    outputs = model([words.keep(mask) for mask in masks])
    kept = masks.sum(axis=1) / count
    distances = 100 * (1 - np.sqrt(kept))  # cosine distance of a 0/1 vector to the vector of ones
    base = LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / LIME_KERNEL_WIDTH**2)), random_state=seed)
    values, intercepts = np.zeros((count, outputs.shape[1])), np.zeros(outputs.shape[1])
    for output in range(outputs.shape[1]):
        intercepts[output], weights, *_ = base.explain_instance_with_data(
            masks.astype(float), outputs, distances, output, count, feature_selection="none"
        )
        for word, weight in weights:
            values[word, output] = weight
    return values, intercepts


def attribute(
    text: Text, versions: Mapping[str, Probabilities], method: str = "shap", seed: int = 42
) -> dict[str, Attribution]:
    """Attribute the answers of several versions to the words of one text.

    All versions see the same masked texts, so differences between their values are differences between the
    versions and not of sampling. SHAP values are Shapley values of the game in which a word is in the text or
    taken out of it: exact over all subsets for texts of up to `EXACT_WORDS` words, otherwise averaged over
    `PERMUTATIONS` random orders, each walked forwards and backwards (shap's Permutation explainer). Either
    way they sum to the output less the base value.

    Args:
        text: a text or a pair of texts.
        versions: name -> function of n texts that gives probabilities of shape (n, classes).
        method: "shap" or "lime".
        seed: of the permutations or samples.
    """
    words = split_words(text)
    names = list(versions)

    known: dict[Text, NDArray[np.float64]] = {}

    def model(texts: Sequence[Text]) -> NDArray[np.float64]:
        """Answers of all versions side by side; a text is run once, so that rounding cannot break the sum."""
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, np.hstack([versions[name](new) for name in names]), strict=True))
        return np.stack([known[text] for text in texts])

    output = model([text])[0]
    if not words.segments:
        values, base = np.zeros((0, len(output))), output
    else:
        values, base = (_shap if method == "shap" else _lime)(words, text, model, seed)
    shares = len(names)
    return {
        name: Attribution(words, *parts)
        for name, *parts in zip(
            names,
            np.split(values, shares, axis=1),
            np.split(np.asarray(base, dtype=float), shares),
            np.split(output, shares),
            strict=True,
        )
    }


def attribute_all(
    texts: Sequence[Text], versions: Mapping[str, Probabilities], method: str = "shap", seed: int = 42
) -> Iterator[dict[str, Attribution]]:
    """`attribute` for each text in turn."""
    for text in texts:
        yield attribute(text, versions, method, seed)
