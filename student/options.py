"""Options of a student, as a library user gives them."""

from dataclasses import dataclass
from pathlib import Path

from distill.arguments import TrainingOptions


@dataclass(frozen=True)
class StudentOptions(TrainingOptions):
    """Options of `distill train-student`."""

    output: Path = Path("runs/student")
    epochs: float = 5.0
    learning_rate: float = 1e-4
    teacher: Path = Path("runs/teacher")
    data: str | None = None
    student: str | None = None
    layers: int | None = None
    intermediate_size: int | None = None
    attention_heads: int | None = None
    speedup: float | None = None
    latency_budget: float | None = None
    vocabulary: int | None = None
    bigrams: int | None = None
    unlabeled: str | None = None
    augment: str | None = None
    hidden_epochs: float = 0.0
    temperature: float = 2.0
    alpha: float = 0.9
    text_column: str | None = None
    engine: str = "local"
    """What labels the text: this process, or "ray"."""
    workers: int | None = None
