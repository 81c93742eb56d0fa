"""The exported graph held against PyTorch on real text."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.decision import Labels, fit_answers, same
from distill.errors import DistillError

MAX_LOGIT_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """Agreement of two versions on the same texts."""

    texts: int
    max_logit_difference: float
    mean_logit_difference: float
    label_agreement: float

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.max_logit_difference:.1e}, same label for "
            f"{100 * self.label_agreement:.2f} % of {self.texts} texts"
        )


def compare(reference: NDArray[np.float32], other: NDArray[np.float32], labels: Labels) -> Parity:
    """Compare logits of shape (n, classes).

    Args:
        reference: of one version.
        other: of another, on the same texts.
        labels: true ones; in a multi-label problem each version has thresholds that are fitted to them.
    """
    answers = [fit_answers(one, labels) for one in (reference, other)]
    return Parity(
        texts=len(reference),
        max_logit_difference=float(np.abs(reference - other).max()),
        mean_logit_difference=float(np.abs(reference - other).mean()),
        label_agreement=float(same(*answers).mean()),
    )


def require_parity(parity: Parity) -> None:
    """Refuse an fp32 graph that is not the PyTorch model.

    Raises:
        DistillError: if a logit differs by more than 1e-3.
    """
    if not parity.max_logit_difference <= MAX_LOGIT_DIFFERENCE:
        raise DistillError(
            f"export: the ONNX graph differs from PyTorch by {parity.max_logit_difference:.2g} in a logit "
            f"(allowed: {MAX_LOGIT_DIFFERENCE:g}) over {parity.texts} texts; try another "
            "version of torch or optimum-onnx"
        )
