"""Scores of a classifier, all derived from its confusion matrix."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Per-class scores and their averages; every score in 0 to 1, classes in label order."""

    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    weighted_precision: float
    weighted_recall: float
    weighted_f1: float
    precision: list[float]
    recall: list[float]
    f1: list[float]
    support: list[int]
    confusion: list[list[int]]

    def summary(self) -> dict[str, float]:
        """The two figures that training reports."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1}

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return asdict(self)


def confusion_matrix(labels: Labels, predictions: Labels, classes: int) -> NDArray[np.int64]:
    """Count pairs; rows are true labels, columns predictions. Shape (classes, classes)."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide, with 0 where there is nothing to divide by (as scikit-learn's zero_division=0)."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def f1_scores(
    hits: NDArray[Any], support: NDArray[Any], predicted: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """F1 of every class and their macro average, from counts.

    The macro average runs over the classes that occur as a true label or as a prediction, as scikit-learn's
    `f1_score(average="macro")` does.

    Args:
        hits: texts of a class that were predicted as it, shape (…, classes).
        support: texts of a class, shape (…, classes).
        predicted: texts predicted as a class, shape (…, classes).

    Returns:
        F1, shape (…, classes), 0 where a class does not occur; the macro average, shape (…,).
    """
    total = np.asarray(support + predicted, dtype=float)
    f1 = _ratio(2.0 * hits, total)
    return f1, f1.sum(axis=-1) / np.maximum((total > 0).sum(axis=-1), 1)


def score(labels: Labels, predictions: Labels, classes: int) -> Scores:
    """Score predictions against true labels; macro averages as in `f1_scores`.

    Args:
        labels: true classes, shape (n,), in 0..classes-1.
        predictions: predicted classes, shape (n,).
        classes: number of classes.
    """
    confusion = confusion_matrix(labels, predictions, classes)
    hits = np.diag(confusion).astype(float)
    support = confusion.sum(axis=1).astype(float)
    predicted = confusion.sum(axis=0).astype(float)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1, macro_f1 = f1_scores(hits, support, predicted)
    present = (support + predicted) > 0
    weights = support / max(support.sum(), 1.0)

    def macro(values: NDArray[np.float64]) -> float:
        return float(values[present].mean()) if present.any() else 0.0

    return Scores(
        accuracy=float(hits.sum() / max(support.sum(), 1.0)),
        macro_precision=macro(precision),
        macro_recall=macro(recall),
        macro_f1=float(macro_f1),
        weighted_precision=float(precision @ weights),
        weighted_recall=float(recall @ weights),
        weighted_f1=float(f1 @ weights),
        precision=precision.tolist(),
        recall=recall.tolist(),
        f1=f1.tolist(),
        support=support.astype(int).tolist(),
        confusion=confusion.tolist(),
    )


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of logits / temperature along the last axis, in float64."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    exponents = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))
