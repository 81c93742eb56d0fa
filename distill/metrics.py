"""Scores of a classifier, all derived from counts of its answers."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.decision import Labels, same


@dataclass(frozen=True)
class Scores:
    """Per-class scores and their averages; every score in 0 to 1, classes in label order.

    Attributes:
        accuracy: share of texts that are answered right: in a multi-label problem, every label of them.
        micro_f1: F1 over all labels of all texts; where a text has one label it equals the accuracy.
        confusion: texts by true class (rows) and answer (columns), or, in a multi-label problem, for every
            label a matrix of its own: by whether they have it (rows) and whether it was given (columns).
    """

    accuracy: float
    micro_f1: float
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
    confusion: list[Any]

    def summary(self) -> dict[str, float]:
        """The figures that training reports."""
        found = {"accuracy": self.accuracy, "macro_f1": self.macro_f1}
        return found if np.ndim(self.confusion) == 2 else {**found, "micro_f1": self.micro_f1}

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return asdict(self)


def confusion_matrix(labels: Labels, predictions: Labels, classes: int) -> NDArray[np.int64]:
    """Count texts; rows are true labels, columns predictions.

    Shape (classes, classes), or, in a multi-label problem, (classes, 2, 2).
    """
    if labels.ndim == 1:
        counts = np.bincount(labels * classes + predictions, minlength=classes * classes)
        return counts.reshape(classes, classes)
    truth, given = labels.astype(bool), predictions.astype(bool)
    cells = [truth_is & given_is for truth_is in (~truth, truth) for given_is in (~given, given)]
    return np.stack([cell.sum(axis=0) for cell in cells], axis=1).reshape(classes, 2, 2)


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
        labels: true classes, shape (n,), in 0..classes-1; in a multi-label problem shape (n, classes).
        predictions: of the same shape.
        classes: number of classes.
    """
    confusion = confusion_matrix(labels, predictions, classes)
    if labels.ndim == 1:
        counts = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    else:
        counts = confusion[:, 1, 1], confusion[:, 1].sum(axis=1), confusion[:, :, 1].sum(axis=1)
    hits, support, predicted = (one.astype(float) for one in counts)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1, macro_f1 = f1_scores(hits, support, predicted)
    present = (support + predicted) > 0
    weights = support / max(support.sum(), 1.0)

    def macro(values: NDArray[np.float64]) -> float:
        return float(values[present].mean()) if present.any() else 0.0

    return Scores(
        accuracy=float(same(labels, predictions).mean()) if len(labels) else 0.0,
        micro_f1=float(2 * hits.sum() / max(support.sum() + predicted.sum(), 1.0)),
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
