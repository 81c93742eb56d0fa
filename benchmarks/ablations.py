"""What each part of the recipe for students is worth: with and without it, over seeds.

Losses that were tried and are not in the package stand here, so that their rows can be repeated. One teacher;
students of two layers, all with the same number of steps, scored on the validation split, which is where the
recipe and every student's best epoch were chosen. A student that is there already is not trained again.
Prints a table and keeps benchmarks/results/ablations/SET.json.

Usage: python benchmarks/ablations.py DATA --teacher all-mpnet-base-v2 --student all-MiniLM-L6-v2

DATA holds a folder for every set, as for pareto.py, whose teacher is taken where it is already there.
"""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from distill.student import training
from distill.student.losses import UNLABELED
from distill.student.training import StudentOptions
from distill.teacher.training import TeacherOptions
from torch import Tensor
from torch.nn import functional as F

from distill import augmentation, train_student, train_teacher
from distill.artifact import read_manifest
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results" / "ablations"
SETS = ("banking77", "sst2_sentences")
SEEDS = (1, 2, 3)
BUDGET, EPOCHS = 2, 5  # texts made for each training text; passes over them all


def logit_mse(student: Tensor, teacher: Tensor, labels: Tensor, _: float, alpha: float) -> Tensor:
    """Squared difference of centred logits in place of KL: Kim et al. (2021), arXiv 2105.08919."""
    centred = [logits - logits.mean(dim=-1, keepdim=True) for logits in (student, teacher)]
    return alpha * F.mse_loss(*centred) + (1 - alpha) * _hard(student, labels)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, _: float, alpha: float) -> Tensor:
    """KL of the teacher's first class, and twice that of the others: Zhao et al. (2022), arXiv 2203.08679.

    The teacher's first class stands for the target class, which unlabelled text does not have.
    """
    first = teacher.argmax(dim=-1, keepdim=True)
    kept = [torch.softmax(logits, dim=-1).gather(-1, first) for logits in (student, teacher)]
    yes, true = (torch.cat([share, 1 - share], dim=-1).clamp_min(1e-7) for share in kept)
    binary = F.kl_div(yes.log(), true, reduction="batchmean")
    others = [logits.scatter(-1, first, -1e4) for logits in (student, teacher)]
    rest = F.kl_div(*(F.log_softmax(one, dim=-1) for one in others), reduction="batchmean", log_target=True)
    return alpha * (binary + 2 * rest) + (1 - alpha) * _hard(student, labels)


def standardised(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """KL of logits of mean 0 and deviation 1, at T = 2: Sun et al. (2024), arXiv 2403.01427."""
    even = [(one - one.mean(-1, keepdim=True)) / one.std(-1, keepdim=True).clamp_min(1e-6) / 2
            for one in (student, teacher)]  # fmt: skip
    soft = F.kl_div(*(F.log_softmax(one, dim=-1) for one in even), reduction="batchmean", log_target=True)
    return alpha * 2**2 * soft + (1 - alpha) * _hard(student, labels)


def _hard(student: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels, ignore_index=UNLABELED, reduction="sum") / len(labels)


def _loss(function: Callable[..., Tensor]) -> Callable[[], AbstractContextManager[Any]]:
    return partial(mock.patch.object, training, "distillation_loss", function)


def _without(kind: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    rest = tuple(one for one in augmentation.AUGMENTATIONS if one is not kind)
    return partial(mock.patch.object, augmentation, "AUGMENTATIONS", rest)


# What is changed in the recipe, and what in the code for the time of the training.
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "recipe": ({}, nullcontext),
    "no augmented text": ({"augment": None, "epochs": EPOCHS * (1 + BUDGET)}, nullcontext),
    **{f"no {kind.__name__}": ({}, _without(kind)) for kind in augmentation.AUGMENTATIONS},
    "head at the encoder's rate": ({"head_learning_rate": 3e-4}, nullcontext),
    "teacher as sure as it is": (
        {},
        partial(mock.patch.object, training, "_teacher_temperature", lambda folder: 1.0),
    ),
    "T = 2": ({"temperature": 2.0}, nullcontext),
    "squared difference of logits": ({}, _loss(logit_mse)),
    "decoupled KL": ({}, _loss(decoupled)),
    "KL of standardised logits": ({}, _loss(standardised)),
    "no hard labels": ({"alpha": 1.0}, nullcontext),
    "no dropout": ({"dropout": 0.0}, nullcontext),
    "the whole vocabulary": ({"vocabulary": None}, nullcontext),
}


def run(data: Path, teacher: str, student: str, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train whatever is not there yet; validation macro-F1 of every variant and seed."""
    if not Path("runs/teacher").is_dir():
        train_teacher(TeacherOptions(output=Path("runs/teacher"), data=str(data), model=teacher, resume=True))
    common = StudentOptions(
        student=student, layers=2, vocabulary=0, augment=f"{BUDGET}x", epochs=EPOCHS, batch_size=64,
        learning_rate=3e-4, patience=10**6, resume=True,
    )  # fmt: skip
    scores: dict[str, list[float]] = {}
    for name, (options, patch) in VARIANTS.items():
        if only and name not in ("recipe", *only):
            continue
        for seed in SEEDS:
            output = Path("ablations", f"{name.replace(' ', '_')}_{seed}")
            wanted = replace(common, output=output, seed=seed, **options)
            if not _is_done(wanted):
                click.echo(f"{name}, seed {seed}")
                with patch():
                    train_student(replace(wanted, overwrite=output.is_dir()))
            metrics = read_manifest(output, "train-student").metrics
            scores.setdefault(name, []).append(metrics["validation"]["macro_f1"])
    return scores


def _is_done(wanted: StudentOptions) -> bool:
    """Whether a student is there, trained with these options."""
    if not wanted.output.is_dir():
        return False
    before = read_manifest(wanted.output, "train-student").options
    return all(str(before[name]) == str(getattr(wanted, name)) for name in before)


def table(scores: dict[str, list[float]]) -> dict[str, Any]:
    """Mean, deviation and what is lost without it, with its standard error over paired seeds."""
    recipe = np.array(scores["recipe"])
    rows = {}
    for name, values in scores.items():
        loss = recipe - np.array(values)
        rows[name] = {
            "macro_f1": float(np.mean(values)),
            "deviation": float(np.std(values, ddof=1)),
            "loss": float(loss.mean()),
            "standard_error": float(loss.std(ddof=1) / len(loss) ** 0.5),
        }
        click.echo(
            f"{name:30} {100 * rows[name]['macro_f1']:6.2f} ± {100 * rows[name]['deviation']:.2f}   "
            f"{-100 * rows[name]['loss']:+.2f} ± {100 * rows[name]['standard_error']:.2f}"
        )
    return rows


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--teacher", default="sentence-transformers/all-mpnet-base-v2", help="Checkpoint.")
@click.option("--student", default="sentence-transformers/all-MiniLM-L6-v2", help="Checkpoint.")
@click.option("--set", "names", multiple=True, default=SETS, help="Sets to run.")
@click.option("--only", multiple=True, help="Variants to run, besides the recipe itself; all when left out.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("pareto"), help="Folder for the runs.")
def main(
    data: Path, teacher: str, student: str, names: tuple[str, ...], only: tuple[str, ...], work: Path
) -> None:
    """Run the ablations, set by set."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    teacher, student = (str(Path(one).resolve()) if Path(one).is_dir() else one for one in (teacher, student))
    data, work = data.resolve(), work.resolve()
    for name in names:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        rows = table(run(data / name, teacher, student, only))
        record = RESULTS / f"{name}.json"
        if only and record.is_file():  # the other rows stay
            rows = {**json.loads(record.read_text(encoding="utf-8"))["rows"], **rows}
        result = {"cpu": cpu_name(), "seeds": SEEDS, "augment": f"{BUDGET}x", "epochs": EPOCHS, "rows": rows}
        record.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
