"""What a teacher's answers cost: cross-entropy, with weights for rare classes and a focus on what is wrong.

In a multi-label problem every label of a text is a question of its own, and their losses add up: the negative
log-likelihood of labels that are independent of each other.
"""

import numpy as np
import torch
from torch.nn import functional as F

from distill.decision import Labels


def balanced_weights(labels: Labels, classes: int) -> torch.Tensor:
    """Weights n / (classes * count), as scikit-learn's "balanced"; 0 without rows.

    Args:
        labels: shape (n,), or (n, labels) in a multi-label problem.
        classes: how many there are.

    Returns:
        Shape (classes,); in a multi-label problem (2, classes): for texts without and with each label, of two
        classes that they are of each label.
    """
    if labels.ndim == 1:
        counts = np.bincount(labels, minlength=classes)
    else:
        with_label = labels.sum(axis=0)
        counts, classes = np.stack([len(labels) - with_label, with_label]), 2
    weights = np.divide(len(labels), classes * counts, out=np.zeros(counts.shape), where=counts > 0)
    return torch.tensor(weights, dtype=torch.float32)


def teacher_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float, gamma: float
) -> torch.Tensor:
    """(1 - p)^gamma times cross-entropy, p the label's probability: Lin et al. (2017), arXiv 1708.02002, (5).

    Args:
        logits: shape (batch, classes).
        labels: shape (batch,), or 0 and 1, shape (batch, classes): then p is the sigmoid of a logit, or 1
            less that where the text does not have the label, and a text's loss is the sum over the labels.
        weights: of `balanced_weights`, or None.
        smoothing: label smoothing.
        gamma: how much less a text counts that is already right; 0 gives cross-entropy.

    Returns:
        A scalar: the sum over the number of texts. Weights are 1 on average over the training text, so they
        are not divided by here: a step has to come out the same in however many parts it is taken.
    """
    weights = weights.to(logits.device) if weights is not None else None
    if labels.ndim == 1:
        each = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="none")
    else:
        smooth = (1 - smoothing) * labels.to(logits.dtype) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        if weights is not None:
            each = torch.where(labels.bool(), weights[1], weights[0]) * each
    if gamma:
        if labels.ndim == 1:
            probability = torch.softmax(logits, dim=-1).gather(-1, labels[:, None])[:, 0]
        else:
            probability = torch.sigmoid(torch.where(labels.bool(), logits, -logits))
        # At p = 1 the power has no gradient for gamma below 1.
        each = (1 - probability).clamp_min(1e-6) ** gamma * each
    return each.sum() / len(labels)
