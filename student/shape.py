"""How large a student may be, by the speed that is asked for, measured on this machine."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from distill.student.heads import PROJECTIONS
from distill.student.neurons import width_of
from transformers import pipeline

import distill
from distill.artifact import read_manifest
from distill.averaging import depth
from distill.errors import DistillError
from distill.latency import cpu_name, measure
from distill.long_texts import HEAD
from distill.models import load_model, load_tokenizer, open_pytorch

logger = logging.getLogger(__name__)
TEXTS = 30


@dataclass(frozen=True)
class Shape:
    """What a student keeps of its checkpoint; None is all.

    Attributes:
        layers: evenly spaced.
        neurons: of each feed-forward network.
        heads: of each attention.
    """

    layers: int | None = None
    neurons: int | None = None
    heads: int | None = None

    def in_words(self, total: int) -> str:
        """Say it, of a checkpoint with `total` layers."""
        kept = {"neurons": self.neurons, "heads": self.heads}
        parts = [f"{count} {name}" for name, count in kept.items() if count]
        return f"{self.layers} of {total} layers" + (f" with {' and '.join(parts)}" if parts else "")


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


def shapes(model: Any, asked: Shape, build: Callable[[Shape], Any], layerless: bool = True) -> list[Shape]:
    """Shapes that a student of `model` may have, the fastest first.

    Narrow layers have an eighth of the neurons and half of the heads, and multiply a quarter as often as
    whole ones. Two of them keep as much as one that is whole, which keeps less than none at all, more slowly
    (benchmarks/README.md), so there are neither where there may be none. Whole ones that take longer follow
    where all narrow ones are fast enough. That order is BERT's, whose last layer computes the first token
    alone: all narrow layers take as long as 1 + (total - 1) / 4 whole ones. A family of which export leaves
    no heads out has whole layers alone.

    Args:
        model: the checkpoint's sequence classifier.
        asked: neurons and heads that are asked for: then all shapes have these.
        build: makes a student of a shape, or raises DistillError where `model` has no such part.
        layerless: whether one may be without layers.
    """
    total = depth(model)
    if asked.neurons or asked.heads:
        return [replace(asked, layers=layers) for layers in range(min(1, total), total + 1)]
    few = 2 if layerless and total > 1 else 1
    none = [Shape(0)] if layerless or not total else []
    whole = [Shape(layers) for layers in range(few, total + 1)]
    if total < 2 or model.config.model_type not in PROJECTIONS:
        return none + whole
    narrow = Shape(
        neurons=max(1, width_of(model.config)[1] // 8), heads=max(1, model.config.num_attention_heads // 2)
    )
    try:
        build(replace(narrow, layers=1))
    except DistillError:
        return none + whole
    slower = (total + 3) // 4 + 1
    return [
        *none,
        *(shape for shape in whole if shape.layers == 1),
        *(replace(narrow, layers=layers) for layers in range(few + 1, total + 1)),
        *(shape for shape in whole if (shape.layers or 0) >= slower),
    ]


def choose_shape(
    build: Callable[[Shape], Any],
    candidates: Sequence[Shape],
    tokenizer: Any,
    labels: list[str],
    texts: Sequence[Any],
    goal: Goal,
    teacher: Path,
) -> Shape:
    """Find the largest student that, not trained yet but exported to INT8, meets a goal.

    Args:
        build: makes a student of a shape.
        candidates: shapes that it may have, the fastest first.
        tokenizer: its tokenizer.
        labels: label names.
        texts: to time, of validation; some of them are taken.
        goal: to meet.
        teacher: folder of `distill train-teacher`, timed in the same turns.

    Raises:
        DistillError: if the first is not fast enough; it says how fast it is.
    """
    sample = texts[:: max(1, len(texts) // TEXTS)][:TEXTS]
    total = candidates[-1].layers or 0
    with _one_thread():
        slow = {"teacher": _pipeline(teacher, labels)} if goal.speedup else {}

        def time_of(shape: Shape) -> tuple[float | None, float]:
            with TemporaryDirectory() as folder:
                candidate = distill.open_candidate(
                    build(shape), tokenizer, labels, Path(folder), isinstance(texts[0], tuple)
                )
                found = measure({**slow, "student": lambda text: candidate([text])}, sample)
            logger.info("  %s: %s", shape.in_words(total), _tell(found))
            return found.get("teacher"), found["student"]

        logger.info("%s: the largest that is fast enough, in INT8 on one thread of %s", goal, cpu_name())
        chosen = _largest(candidates, time_of, goal)
        logger.info("%s: %s", goal, chosen.in_words(total))
        return chosen


def _largest(
    candidates: Sequence[Shape], time_of: Callable[[Shape], tuple[float | None, float]], goal: Goal
) -> Shape:
    """Bisect: the first are faster."""
    low, high = -1, len(candidates) - 1
    while low < high:
        middle = (low + high + 1) // 2
        found = time_of(candidates[middle])
        if goal.is_met(*found):
            low = middle
        else:
            high = middle - 1
    if low < 0:
        layers = candidates[0].layers or 0
        can_narrow = layers and any(shape.neurons or shape.heads for shape in candidates)
        narrower = ", or give a smaller --intermediate-size or --attention-heads" if can_narrow else ""
        raise DistillError(
            f"{goal}: {_reached(layers, *found)} on this machine{narrower}, or start from a narrower "
            "checkpoint with --student"
        )
    return candidates[low]


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
