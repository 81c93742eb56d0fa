"""How sure a comparison is: paired bootstrap intervals, McNemar's exact test, and non-inferiority."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from distill.decision import Labels, same
from distill.metrics import f1_scores

Samples = NDArray[np.float64]
RESAMPLES = 10_000
CONFIDENCE = 0.95
CHUNK = 4_000_000


@dataclass(frozen=True)
class Bootstrap:
    """Resampled scores of versions that answered the same texts; `[b]` is one resample, `[v]` one version.

    Attributes:
        accuracy: shape (resamples, versions).
        macro_f1: shape (resamples, versions).
        f1: shape (resamples, versions, classes).
    """

    accuracy: Samples
    macro_f1: Samples
    f1: Samples


@dataclass(frozen=True)
class Interval:
    """A score, or a difference of two, with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    labels: Labels,
    predictions: Sequence[Labels],
    classes: int,
    resamples: int = RESAMPLES,
    seed: int = 42,
) -> Bootstrap:
    """Resample texts with replacement inside each class, the same texts for every version.

    All three scores depend on a resample only through how often each pattern (true class; what version 1, 2,
    … predicted) occurs in it. Those counts are multinomial within a class, so they are drawn instead of the
    rows: the same distribution as drawing rows (Efron and Tibshirani 1993, chapter 8, with strata), at a cost
    that grows with the number of patterns, not of texts. In a multi-label problem there is one stratum.

    Args:
        labels: true classes, shape (n,), in 0..classes-1; in a multi-label problem shape (n, classes).
        predictions: one array of that shape a version.
        classes: number of classes.
        resamples: how many.
        seed: of the generator.
    """
    generator = np.random.default_rng(seed)
    versions = len(predictions)
    answered = np.stack([labels, *predictions])
    columns, counts = np.unique(
        answered.reshape(len(answered), len(labels), -1).swapaxes(0, 1), axis=0, return_counts=True
    )
    if labels.ndim == 1:
        strata = [np.flatnonzero(columns[:, 0, 0] == label) for label in np.unique(labels)]
        truth, *answers = (np.eye(classes)[columns[:, number, 0]] for number in range(versions + 1))
    else:
        strata = [np.arange(len(counts))]
        truth, *answers = columns.swapaxes(0, 1).astype(float)
    accuracy = np.empty((resamples, versions))
    macro_f1 = np.empty((resamples, versions))
    f1 = np.empty((resamples, versions, classes))
    step = max(1, CHUNK // max(len(counts), versions * classes))
    for start in range(0, resamples, step):
        part = slice(start, min(start + step, resamples))
        size = part.stop - part.start
        drawn = np.empty((size, len(counts)))
        for rows in strata:
            texts = counts[rows].sum()
            drawn[:, rows] = generator.multinomial(texts, counts[rows] / texts, size=size)
        support = drawn @ truth
        for version, answer in enumerate(answers):
            accuracy[part, version] = drawn @ same(truth, answer) / len(labels)
            f1[part, version], macro_f1[part, version] = f1_scores(
                drawn @ (truth * answer), support, drawn @ answer
            )
    return Bootstrap(accuracy, macro_f1, f1)


def interval(value: float, samples: Samples, confidence: float = CONFIDENCE) -> Interval:
    """Percentile interval of one score or of the difference of two, from its resampled values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def undetected(texts: int, confidence: float = CONFIDENCE) -> float:
    """Largest rate of losses that `texts` texts without any loss do not exclude: 1 - a^(1/n).

    Clopper and Pearson 1934; the "rule of three". a is half of what `confidence` leaves.
    """
    return float(1 - ((1 - confidence) / 2) ** (1 / max(texts, 1)))


def undetected_macro(support: Sequence[int], confidence: float = CONFIDENCE) -> float:
    """Largest loss of macro-F1 that may hide in one class without any text of it being lost.

    A class of which a share r is lost loses at most r of its F1, and macro-F1 a part of that: one class in
    all. What the rarest class may hide is most.
    """
    present = [texts for texts in support if texts]
    return undetected(min(present), confidence) / len(present)


def difference_interval(
    value: float, samples: Samples, least: float, confidence: float = CONFIDENCE
) -> Interval:
    """`interval` of a difference between two versions, reaching at least `least` to both sides.

    Where two versions hardly differ on the test texts, resampling these finds no uncertainty, however few
    they are; `undetected` says how much they may hide.
    """
    found = interval(value, samples, confidence)
    return Interval(
        found.value, max(-1.0, min(found.low, value - least)), min(1.0, max(found.high, value + least))
    )


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test (1947) of two versions on the same texts.

    Attributes:
        lost: texts that the reference got right and the other wrong.
        gained: texts that the reference got wrong and the other right.
        p_value: two-sided, of the hypothesis that both err equally often.
    """

    lost: int
    gained: int
    p_value: float


def mcnemar(labels: Labels, reference: Labels, other: Labels) -> McNemar:
    """Test whether two versions err equally often; classes, shape (n,), or labels, shape (n, labels)."""
    right, others = same(reference, labels), same(other, labels)
    lost, gained = int((right & ~others).sum()), int((~right & others).sum())
    p_value = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    return McNemar(lost, gained, float(p_value))


def non_inferior(difference: Interval, margin: float) -> bool:
    """Whether a version is shown to be at most `margin` worse: the interval's lower end is above -margin.

    Args:
        difference: the version's score less the reference's, 0 to 1.
        margin: the loss that is tolerated, 0 to 1.
    """
    return difference.low >= -margin
