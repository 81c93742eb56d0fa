"""Do versions answer for the same reasons, and are the reasons given the real ones?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from distill.explain.attribution import Attribution, Probabilities
from distill.explain.words import Text, Words
from numpy.typing import NDArray
from scipy.stats import rankdata

Values = NDArray[np.float64]
TOP = 3
NOTICEABLE = 0.02
"""Words that move no probability by this much have no sign worth comparing."""
SHARES = (0.1, 0.2, 0.5)
RANDOM_ORDERS = 3
OTHER_REASONS = 0.5
"""Below this rank correlation two versions are said to have different reasons."""


def rank_correlation(first: Values, second: Values) -> float:
    """Spearman's rank correlation of two attributions of shape (words,); nan where one is constant."""
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (first, second)]
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / norm) if norm else float("nan")


def top_overlap(first: Values, second: Values, top: int = TOP) -> float:
    """Share of the `top` words with the largest absolute values that two attributions have in common.

    nan for texts of no more words than that, which would have all of them in common, and where all words of
    one attribution count the same.
    """
    if len(first) <= top or not np.ptp(first) or not np.ptp(second):
        return float("nan")
    largest = [set(np.argsort(-np.abs(values), kind="stable")[:top].tolist()) for values in (first, second)]
    return len(largest[0] & largest[1]) / top


def sign_flips(first: Values, second: Values) -> float:
    """Share of words that speak for the class in one attribution and against it in the other.

    Only words whose value is at least `NOTICEABLE` in either count; nan where there is none.
    """
    counted = np.maximum(np.abs(first), np.abs(second)) >= NOTICEABLE
    return float((first[counted] * second[counted] < 0).mean()) if counted.any() else float("nan")


@dataclass(frozen=True)
class Agreement:
    """Agreement of two attributions of the same text, for one class."""

    rank_correlation: float
    top_overlap: float
    sign_flips: float


def compare(first: Attribution, second: Attribution, label: int) -> Agreement:
    """Compare what two versions' words say about class `label`."""
    a, b = first.values[:, label], second.values[:, label]
    return Agreement(rank_correlation(a, b), top_overlap(a, b), sign_flips(a, b))


@dataclass(frozen=True)
class Faithfulness:
    """DeYoung et al. 2020 (ERASER, arXiv 1911.03429), averaged over the shares of words in `SHARES`.

    Attributes:
        comprehensiveness: how much the predicted class loses when the most important words are taken out;
            higher is better.
        sufficiency: how much it loses when only they are left; lower is better.
    """

    comprehensiveness: float
    sufficiency: float


def _erasures(order: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Masks that take out, then that leave alone, the first words of `order`, for each of `SHARES`."""
    masks = []
    for share in SHARES:
        chosen = np.zeros(len(order), dtype=bool)
        chosen[order[: max(1, round(share * len(order)))]] = True
        masks += [~chosen, chosen]
    return masks


def faithfulness(
    attributions: Sequence[tuple[Text, Words, NDArray[np.float64]]], model: Probabilities, seed: int = 42
) -> tuple[Faithfulness, Faithfulness]:
    """Measure explanations by taking words out of the texts, against random orders of the same words.

    Args:
        attributions: text, words and the values of shape (segments, classes) of each explanation.
        model: the version that is explained: texts -> probabilities of shape (n, classes).
        seed: of the random orders.

    Returns:
        Mean over the texts: of the explanations, and of `RANDOM_ORDERS` random orders.
    """
    generator = np.random.default_rng(seed)
    explained, random = [], []
    for text, words, values in attributions:
        if not words.segments:
            continue
        whole = model([text])[0]
        label = int(whole.argmax())
        orders = [np.argsort(-values[:, label], kind="stable")]
        orders += [generator.permutation(len(values)) for _ in range(RANDOM_ORDERS)]
        masks = [mask for order in orders for mask in _erasures(order)]
        left = whole[label] - model([words.keep(mask) for mask in masks])[:, label]
        drops = left.reshape(len(orders), len(SHARES), 2).mean(axis=1)
        explained.append(drops[0])
        random.append(drops[1:].mean(axis=0))
    return _faithfulness(explained), _faithfulness(random)


def _faithfulness(drops: list[NDArray[np.float64]]) -> Faithfulness:
    if not drops:
        return Faithfulness(float("nan"), float("nan"))
    comprehensiveness, sufficiency = np.mean(drops, axis=0).tolist()
    return Faithfulness(comprehensiveness, sufficiency)
