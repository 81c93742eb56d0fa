"""The distillation objective."""

import torch
from torch.nn import functional as F

UNLABELED = -100


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 2.0,
    alpha: float = 0.9,
) -> torch.Tensor:
    """Soft-label loss of Hinton, Vinyals and Dean (2015), arXiv 1503.02531, with hard labels if any.

    L = alpha * T^2 * KL(softmax(z_teacher / T) || softmax(z_student / T)) + (1 - alpha) * CE(y, z_student)

    In a multi-label problem every label of a text is a question with the answers no and yes, whose KL and CE
    add up: those of labels that are independent of each other.

    T^2 keeps the gradient of the first term at the size of the second's whatever T is (section 2 of the
    paper). Both terms are sums over the batch divided by its size; an unlabelled text has the first only.

    Args:
        student_logits: shape (batch, classes).
        teacher_logits: shape (batch, classes); no gradient flows into them.
        labels: shape (batch,), or 0 and 1, shape (batch, classes), in a multi-label problem; `UNLABELED`
            (-100) where a text is not labelled.
        temperature: T > 0, softens both distributions.
        alpha: share of the soft-label term, 0 to 1.

    Returns:
        A scalar.
    """
    log_probabilities = _log_softmax if labels.ndim == 1 else _log_sigmoids
    soft = F.kl_div(
        log_probabilities(student_logits / temperature),
        log_probabilities(teacher_logits.detach() / temperature),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * temperature**2 * soft + (1 - alpha) * hard_label_loss(student_logits, labels)


def hard_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the labelled texts, divided by the number of texts; shapes as above."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=UNLABELED, reduction="sum") / len(labels)
    known = labels != UNLABELED
    return F.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), weight=known.to(logits.dtype), reduction="sum"
    ) / len(labels)


def hidden_state_loss(
    student_states: torch.Tensor, teacher_states: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of hidden states: equation 8 of TinyBERT (Jiao et al. 2020), arXiv 1909.10351.

    L = mean over known tokens i and their features of (W_h h_i - z_i)^2

    Args:
        student_states: W_h h, shape (batch, tokens, width).
        teacher_states: z, of the same shape; no gradient flows into them.
        known: which tokens count, shape (batch, tokens); padding does not.

    Returns:
        A scalar; 0 where no token counts.
    """
    squares = (student_states - teacher_states.detach()).pow(2).mean(dim=-1)
    return (squares * known).sum() / known.sum().clamp(min=1)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(logits, dim=-1)


def _log_sigmoids(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of no and yes for every label, shape (batch, classes, 2)."""
    return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)
