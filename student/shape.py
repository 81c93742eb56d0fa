"""How many layers a student may have, by the speed that is asked for, measured on this machine."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import pipeline

import distill
from distill.artifact import read_manifest
from distill.errors import DistillError
from distill.latency import cpu_name, measure
from distill.long_texts import HEAD
from distill.models import load_model, load_tokenizer, open_pytorch

logger = logging.getLogger(__name__)
TEXTS = 30


@dataclass(frozen=True)
class Goal:
    """What an INT8 student has to reach on one thread, one text at a time.

    Attributes:
        speedup: times as fast as the teacher in transformers' pipeline.
        milliseconds: a text, at most; the median of validation texts.
    """

    speedup: float | None = None
    milliseconds: float | None = None

    def __str__(self) -> str:
        return f"--speedup {self.speedup:g}" if self.speedup else f"--latency-budget {self.milliseconds:g}ms"

    def is_met(self, teacher: float | None, student: float) -> bool:
        """Say whether a student that takes `student` milliseconds does."""
        if self.speedup:
            return teacher is not None and teacher / student >= self.speedup
        return self.milliseconds is not None and student <= self.milliseconds


def choose_layers(
    build: Callable[[int], Any],
    depths: range,
    tokenizer: Any,
    labels: list[str],
    texts: Sequence[Any],
    goal: Goal,
    teacher: Path,
) -> int:
    """Find the most layers with which a student, not trained yet but exported to INT8, meets a goal.

    Args:
        build: makes the student with so many layers.
        depths: how many layers it may have.
        tokenizer: its tokenizer.
        labels: label names.
        texts: to time, of validation; some of them are taken.
        goal: to meet.
        teacher: folder of `distill train-teacher`, timed in the same turns.

    Raises:
        DistillError: if the fewest layers are not fast enough; it says how fast they are.
    """
    sample = texts[:: max(1, len(texts) // TEXTS)][:TEXTS]
    with _one_thread():
        slow = {"teacher": _pipeline(teacher, labels)} if goal.speedup else {}

        def time_of(layers: int) -> tuple[float | None, float]:
            with TemporaryDirectory() as folder:
                candidate = distill.open_candidate(
                    build(layers), tokenizer, labels, Path(folder), isinstance(texts[0], tuple)
                )
                found = measure({**slow, "student": lambda text: candidate([text])}, sample)
            logger.info("  %d of %d layers: %s", layers, depths[-1], _tell(found))
            return found.get("teacher"), found["student"]

        logger.info("%s: the most layers that are fast enough, in INT8 on one thread of %s", goal, cpu_name())
        chosen = _most(depths, time_of, goal)
        logger.info("%s: %d of %d layers", goal, chosen, depths[-1])
        return chosen


def _most(depths: range, time_of: Callable[[int], tuple[float | None, float]], goal: Goal) -> int:
    """Bisect: fewer layers are faster."""
    low, high = depths[0] - 1, depths[-1]
    while low < high:
        layers = (low + high + 1) // 2
        found = time_of(layers)
        if goal.is_met(*found):
            low = layers
        else:
            high = layers - 1
    if low < depths[0]:
        narrower = ", or give a smaller --intermediate-size" if depths[0] else ""
        raise DistillError(
            f"{goal}: {_reached(depths[0], *found)} on this machine{narrower}, or start from a narrower "
            "checkpoint with --student"
        )
    return low


def _reached(layers: int, teacher: float | None, student: float) -> str:
    """What the fewest layers do, rounded so that it can be had."""
    few = "with one layer" if layers else "without layers"
    if teacher is None:
        return f"{few} a text takes {student:.2f} ms; allow {math.ceil(100 * student) / 100:.2f}ms"
    times = math.floor(teacher / student)
    return f"{few} this student is {times} times as fast as the teacher; ask for no more than that"


def _tell(found: dict[str, float]) -> str:
    student = f"{found['student']:.2f} ms"
    if "teacher" not in found:
        return student
    return f"{student}, {found['teacher'] / found['student']:.0f} times as fast as the teacher"


def _pipeline(teacher: Path, labels: list[str]) -> Callable[[Any], object]:
    manifest = read_manifest(teacher, "train-teacher", "--teacher")
    limit = manifest.max_length
    if manifest.long_texts != HEAD:  # a pipeline reads the beginning alone
        return open_pytorch(teacher, labels, limit, manifest.long_texts, "--teacher")[0]
    classify = pipeline(
        "text-classification",
        model=load_model(str(teacher), labels, "--teacher").eval(),
        tokenizer=load_tokenizer(str(teacher), limit, "--teacher"),
        device="cpu",
        truncation=True,
    )

    def one(text: Any) -> object:
        return classify({"text": text[0], "text_pair": text[1]} if isinstance(text, tuple) else text)

    return one


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
