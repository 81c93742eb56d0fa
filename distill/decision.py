"""From logits to probabilities and answers, where a text has one label and where it has any number of them.

Labels and answers are classes, shape (n,), or, in a multi-label problem, true or false for every label,
shape (n, labels): the number of dimensions says which of the two it is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]
Labels = NDArray[Any]
MULTI_LABEL = "multi_label_classification"
SINGLE_LABEL = "single_label_classification"


def softmax(logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of logits / temperature along the last axis, in float64."""
    # In place, and by ufuncs alone: a service answers one text at a time, where every call counts.
    values = np.divide(logits, temperature, dtype=np.float64)
    values -= np.maximum.reduce(values, axis=-1, keepdims=True)
    np.exp(values, out=values)
    values /= np.add.reduce(values, axis=-1, keepdims=True)
    return values


def sigmoid(logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
    """Sigmoid of logits / temperature, in float64."""
    return np.asarray(0.5 + 0.5 * np.tanh(np.asarray(logits, dtype=np.float64) / (2 * temperature)))


def same(first: Labels, second: Labels) -> NDArray[np.bool_]:
    """Whether two answers to a text are the same, every label of them, shape (n,)."""
    equal = first == second
    return np.asarray(equal if equal.ndim == 1 else equal.all(axis=1))


def classes_in(answer: Any) -> list[int]:
    """The classes in the answer to one text: one, or those of the labels that are true."""
    return [int(answer)] if np.ndim(answer) == 0 else np.flatnonzero(answer).tolist()


@dataclass(frozen=True)
class Decision:
    """What a version's logits mean.

    Attributes:
        temperature: what logits are divided by before they become probabilities.
        thresholds: the logit from which on a label is given, one a label; None where a text has one label,
            the most probable.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None

    def probabilities(self, logits: Logits) -> NDArray[np.float64]:
        """Probabilities of logits of shape (…, labels): they sum to 1 where a text has one label."""
        function = softmax if self.thresholds is None else sigmoid
        return function(logits, self.temperature)

    def answers(self, logits: Logits) -> Labels:
        """Answers to logits of shape (…, labels): classes, shape (…,), or labels, shape (…, labels)."""
        if self.thresholds is None:
            return np.asarray(logits.argmax(axis=-1))
        return np.asarray(logits >= np.asarray(self.thresholds, dtype=logits.dtype))

    def certainty(self, logits: Logits) -> NDArray[np.float64]:
        """Probability of the answers, shape (n,): labels count as independent of each other."""
        probabilities = self.probabilities(logits)
        if self.thresholds is None:
            return np.asarray(probabilities.max(axis=-1))
        return np.asarray(np.where(self.answers(logits), probabilities, 1 - probabilities).prod(axis=-1))

    @property
    def probability_thresholds(self) -> NDArray[np.float64] | None:
        """The thresholds as probabilities, shape (labels,)."""
        return None if self.thresholds is None else sigmoid(np.array(self.thresholds), self.temperature)


def fit_thresholds(logits: Logits, labels: Labels) -> tuple[float, ...] | None:
    """For each label the threshold with the highest F1; None where a text has one label.

    It lies half-way between two logits. A label that no text has is given from a probability of one half.

    Args:
        logits: shape (n, labels), of texts that the model was not trained on.
        labels: shape (n,) or (n, labels).
    """
    if labels.ndim == 1:
        return None
    return tuple(_best_threshold(*column) for column in zip(logits.T, labels.T, strict=True))


def fit_answers(logits: Logits, labels: Labels) -> Labels:
    """Answers to the texts that any thresholds are fitted to: validation text, never test text."""
    return Decision(thresholds=fit_thresholds(logits, labels)).answers(logits)


def _best_threshold(logits: Logits, truth: Labels) -> float:
    if not truth.any():
        return 0.0
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + truth.sum())
    # Texts with one logit are answered together.
    f1[:-1][ranked[:-1] == ranked[1:]] = -1.0
    last = int(f1.argmax())
    return float(ranked[last] if last + 1 == len(ranked) else (ranked[last] + ranked[last + 1]) / 2)
