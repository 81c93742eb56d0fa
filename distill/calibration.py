"""May a probability be trusted? Calibration error, temperature scaling, and when to abstain."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from distill.decision import Decision, Labels, Logits, fit_thresholds, softmax

BINS = 15
BINNING = f"{BINS} equal-width bins of the top label's probability"
PRIOR_DEVIATION = 0.5
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Calibration:
    """How well probabilities say how often they are right; lower is better for all three figures.

    Attributes:
        ece: expected calibration error over `BINS` equal-width bins of the top label's probability, Guo et
            al. 2017, arXiv 1706.04599: sum over bins of (texts in bin / n) * |accuracy - mean confidence|.
        brier: mean over texts of the squared distance between probabilities and the one-hot label (0 to 2).
        nll: mean negative log-likelihood of the true label, in nats.
        confidence: mean confidence of each bin that holds texts.
        accuracy: accuracy of each bin that holds texts.
        count: texts in each of those bins.
    """

    ece: float
    brier: float
    nll: float
    confidence: list[float]
    accuracy: list[float]
    count: list[int]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


def _as_classes(logits: Logits, labels: Labels) -> tuple[Logits, NDArray[np.int64]]:
    """In a multi-label problem each label of each text is a question of its own, with the classes no and yes.

    The softmax of the logits 0 and z is the sigmoid of z. Shapes (n * labels, 2) and (n * labels,).
    """
    if labels.ndim == 1:
        return logits, labels
    return np.stack([np.zeros(logits.size), logits.ravel()], axis=1), labels.ravel().astype(np.int64)


def nll(logits: Logits, labels: Labels, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of `labels` under the probabilities of logits / temperature, in nats.

    In a multi-label problem the mean is over all labels of all texts.
    """
    logits, labels = _as_classes(logits, labels)
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    return float(-log_softmax(scaled, axis=1)[np.arange(len(labels)), labels].mean())


def calibration(logits: Logits, labels: Labels, temperature: float = 1.0) -> Calibration:
    """Measure the calibration of the probabilities of logits / temperature.

    In a multi-label problem every label of every text counts as a question with the classes no and yes.

    Args:
        logits: shape (n, classes).
        labels: true classes, shape (n,) or (n, classes).
        temperature: see `fit_temperature`.
    """
    logits, labels = _as_classes(logits, labels)
    probabilities = softmax(logits, temperature)
    top = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    # The first bin is [0, 1/15], the others are open at their lower edge.
    bins = np.clip(np.ceil(top * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    full = count > 0
    confidence = np.bincount(bins, weights=top, minlength=BINS)[full] / count[full]
    accuracy = np.bincount(bins, weights=right, minlength=BINS)[full] / count[full]
    one_hot = np.eye(probabilities.shape[1])[labels]
    return Calibration(
        ece=float(np.abs(accuracy - confidence) @ count[full] / len(labels)),
        brier=float(((probabilities - one_hot) ** 2).sum(axis=1).mean()),
        nll=nll(logits, labels, temperature),
        confidence=confidence.tolist(),
        accuracy=accuracy.tolist(),
        count=count[full].tolist(),
    )


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """Fit the one number that logits are divided by so that probabilities mean what they say.

    Temperature scaling (Guo et al. 2017): minimise the negative log-likelihood on held-out text, which
    changes no label. The estimate is the most probable one a posteriori, with log T normally distributed
    about 0 with a standard deviation of 0.5 beforehand: that hardly matters for many texts, and for few
    keeps answers that all happen to be right, or wrong, from moving T far.

    Args:
        logits: shape (n, classes), of texts that the model was not trained on.
        labels: true classes, shape (n,) or (n, classes).
    """
    low, high = TEMPERATURES
    weight = 1 / (2 * PRIOR_DEVIATION**2 * labels.size)
    found = minimize_scalar(
        lambda log: nll(logits, labels, np.exp(log)) + weight * log**2,
        bounds=(np.log(low), np.log(high)),
        method="bounded",
    )
    return float(np.exp(found.x))


def fit_decision(logits: Logits, labels: Labels) -> Decision:
    """Fit temperature and thresholds to held-out text: what `fit_temperature` and `fit_thresholds` give."""
    return Decision(fit_temperature(logits, labels), fit_thresholds(logits, labels))


@dataclass(frozen=True)
class Selection:
    """What is gained by answering only where the top label's probability reaches a threshold.

    Attributes:
        threshold: answer at this probability or above.
        coverage: share of texts that are answered.
        precision: share of answered texts that are right.
    """

    threshold: float
    coverage: float
    precision: float


def risk_coverage(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> list[Selection]:
    """Every threshold's coverage and precision, from the most to the least confident text.

    Risk is 1 - precision (El-Yaniv and Wiener 2010). Texts with equal confidence are answered together.

    Args:
        confidence: probability of the top label, shape (n,).
        right: whether it is the true one, shape (n,).
    """
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence, hits = confidence[order], np.cumsum(right[order])
    last = np.flatnonzero(np.append(sorted_confidence[1:] != sorted_confidence[:-1], True))
    return [
        Selection(float(sorted_confidence[i]), (i + 1) / len(confidence), float(hits[i] / (i + 1)))
        for i in last.tolist()
    ]


def select(confidence: NDArray[np.float64], right: NDArray[np.bool_], threshold: float) -> Selection:
    """Coverage and precision of one threshold; precision is nan where nothing is answered."""
    answered = confidence >= threshold
    precision = float(right[answered].mean()) if answered.any() else float("nan")
    return Selection(threshold, float(answered.mean()), precision)


def threshold_for(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], precision: float
) -> Selection | None:
    """The threshold with the largest coverage whose precision is at least `precision`; None if there is none.

    Choose it on validation text and read what it gives on test text off `select`.
    """
    reached = [s for s in risk_coverage(confidence, right) if s.precision >= precision]
    return max(reached, key=lambda s: s.coverage, default=None)
