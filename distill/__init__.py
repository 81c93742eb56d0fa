"""Distil a large text classifier into a small INT8 ONNX model, and prove that they agree.

Names are loaded when they are first used, so that ``import distill`` costs nothing and an application
that only predicts never loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.errors import DistillError
    from distill.explain.explanations import explain_texts
    from distill.explain.report import write_report
    from distill.export.bundle import export_student
    from distill.export.candidate import open_candidate
    from distill.runtime import Classifier
    from distill.student.training import train_student
    from distill.teacher.training import train_teacher

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "DistillError",
    "explain_texts",
    "export_student",
    "open_candidate",
    "train_student",
    "train_teacher",
    "write_report",
]

_HOMES = {
    "Classifier": "distill.runtime",
    "DistillError": "distill.errors",
    "explain_texts": "distill.explain.explanations",
    "export_student": "distill.export.bundle",
    "open_candidate": "distill.export.candidate",
    "train_student": "distill.student.training",
    "train_teacher": "distill.teacher.training",
    "write_report": "distill.explain.report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
