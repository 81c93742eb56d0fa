"""What each part of the recipe for students is worth: with and without it, over seeds.

One teacher; students of two layers, all with the same number of steps, scored on the validation split, which
is where the recipe was chosen. A student that is there already is not trained again. Prints a table and keeps
benchmarks/results/ablations/SET.json.

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
from distill.student import augmentation, training
from distill.student.training import StudentOptions
from distill.teacher.training import TeacherOptions

from distill import train_student, train_teacher
from distill.artifact import read_manifest
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results" / "ablations"
SETS = ("banking77", "sst2_sentences")
SEEDS = (1, 2, 3)
BUDGET, EPOCHS = 2, 5  # texts made for each training text; passes over them all


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
    "no hard labels": ({"alpha": 1.0}, nullcontext),
    "dropout as pre-trained": ({"dropout": None}, nullcontext),
    "the whole vocabulary": ({"vocabulary": None}, nullcontext),
}


def run(data: Path, teacher: str, student: str) -> dict[str, Any]:
    """Train whatever is not there yet; validation macro-F1 of every variant and seed."""
    if not Path("runs/teacher").is_dir():
        train_teacher(TeacherOptions(output=Path("runs/teacher"), data=str(data), model=teacher, resume=True))
    common = StudentOptions(
        student=student, layers=2, vocabulary=0, augment=f"{BUDGET}x", epochs=EPOCHS, batch_size=64,
        learning_rate=3e-4, dropout=0.0, resume=True,
    )  # fmt: skip
    scores: dict[str, list[float]] = {}
    for name, (options, patch) in VARIANTS.items():
        for seed in SEEDS:
            output = Path("ablations", f"{name.replace(' ', '_')}_{seed}")
            if not output.is_dir():
                click.echo(f"{name}, seed {seed}")
                with patch():
                    train_student(replace(common, output=output, seed=seed, **options))
            metrics = read_manifest(output, "train-student").metrics
            scores.setdefault(name, []).append(metrics["validation"]["macro_f1"])
    return scores


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
@click.option("--work", type=click.Path(path_type=Path), default=Path("pareto"), help="Folder for the runs.")
def main(data: Path, teacher: str, student: str, names: tuple[str, ...], work: Path) -> None:
    """Run the ablations, set by set."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    teacher, student = (str(Path(one).resolve()) if Path(one).is_dir() else one for one in (teacher, student))
    data, work = data.resolve(), work.resolve()
    for name in names:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        rows = table(run(data / name, teacher, student))
        result = {"cpu": cpu_name(), "seeds": SEEDS, "augment": f"{BUDGET}x", "epochs": EPOCHS, "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
