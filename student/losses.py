"""The distillation objective."""

import torch
from torch.nn import functional as F

UNLABELED = -100


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    alpha: float = 0.9,
) -> torch.Tensor:
    """Soft-label loss of Hinton, Vinyals and Dean (2015), arXiv 1503.02531, with hard labels if any.

    L = alpha * T^2 * KL(softmax(z_teacher / T) || softmax(z_student / T)) + (1 - alpha) * CE(y, z_student)

    T^2 keeps the gradient of the first term at the size of the second's whatever T is (section 2 of the
    paper). Both terms are sums over the batch divided by its size; an unlabelled text has the first only.

    Args:
        student_logits: shape (batch, classes).
        teacher_logits: shape (batch, classes); no gradient flows into them.
        labels: shape (batch,); `UNLABELED` (-100) where a text has no label.
        temperature: T > 0, softens both distributions.
        alpha: share of the soft-label term, 0 to 1.

    Returns:
        A scalar.
    """
    soft = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=-1),
        F.log_softmax(teacher_logits.detach() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student_logits, labels, ignore_index=UNLABELED, reduction="sum") / len(labels)
    return alpha * temperature**2 * soft + (1 - alpha) * hard
