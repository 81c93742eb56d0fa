"""Soft labels of a teacher's own training text against out-of-fold ones (`--folds`), over seeds.

For each seed some texts a class are drawn from the training split, and one teacher is trained on them with
folds. Of two students one learns from what the teacher says of that text, the other from what the folds'
teachers say. Scores are of the validation split; the test split is not looked at. Prints a table and keeps
benchmarks/results/folds.json.

Usage: python benchmarks/folds.py DATA --model all-MiniLM-L6-v2 [--set snips] [--shots 64] [--folds 3]

DATA holds a folder for every set, with train.csv, validation.csv and test.csv.
"""

import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from few_shot import SEEDS, draw

RESULTS = Path(__file__).resolve().parent / "results"
MIN_STEPS = 200  # as on the command line


def _students(data: Path, model: str, seed: int, folds: int, layers: int, place: Path) -> dict[str, float]:
    """Train a teacher and both students; macro-F1 of all on validation."""
    from distill.student import soft_labels
    from distill.student.options import StudentOptions
    from distill.teacher.training import TeacherOptions

    from distill import train_student, train_teacher
    from distill.artifact import read_manifest

    common: dict[str, Any] = {"seed": seed, "min_steps": MIN_STEPS}
    teacher = place / "runs" / "teacher"
    train_teacher(TeacherOptions(output=teacher, data=str(data), model=model, folds=folds, **common))
    found = {"teacher": read_manifest(teacher, "train-teacher").metrics["validation"]["macro_f1"]}
    # The teacher that knows nothing of folds is the same, without the answers of theirs.
    plain: AbstractContextManager[Any] = mock.patch.object(soft_labels, "UNSEEN", "none")
    for name, labels in (("own soft labels", plain), ("out-of-fold soft labels", nullcontext())):
        output = place / "runs" / name.replace(" ", "_")
        with labels:
            train_student(
                StudentOptions(output=output, teacher=teacher, student=model, layers=layers, **common)
            )
        found[name] = read_manifest(output, "train-student").metrics["validation"]["macro_f1"]
    return found


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Checkpoint of both.")
@click.option("--set", "names", multiple=True, default=("snips", "sst2_sentences"), help="Sets to run.")
@click.option("--shots", default=64, help="Texts a class.")
@click.option("--folds", default=3, help="Teachers besides.")
@click.option("--layers", default=2, help="Of the students.")
def main(data: Path, model: str, names: tuple[str, ...], shots: int, folds: int, layers: int) -> None:
    """Train all students on all sets."""
    from distill.latency import cpu_name

    rows = {}
    for name in names:
        found = []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as scratch:
                draw(data / name, Path(scratch) / "data", shots, seed)
                found.append(_students(Path(scratch) / "data", model, seed, folds, layers, Path(scratch)))
        rows[name] = {kind: [one[kind] for one in found] for kind in found[0]}
        for kind, values in rows[name].items():
            click.echo(f"{name:16} {kind:24} {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}")
        gain = np.subtract(rows[name]["out-of-fold soft labels"], rows[name]["own soft labels"])
        error = gain.std(ddof=1) / len(gain) ** 0.5
        click.echo(f"{name:16} {'gain, paired':24} {gain.mean():+.4f} ± {error:.4f} (standard error)")
    result = {
        "cpu": cpu_name(),
        "model": Path(model).name,
        "texts a class": shots,
        "folds": folds,
        "student's layers": layers,
        "seeds": list(SEEDS),
        "split": "validation",
    }
    record = RESULTS / "folds.json"
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if {**before, "macro_f1": None} == {**result, "macro_f1": None}:  # the other sets stay
            rows = {**before["macro_f1"], **rows}
    RESULTS.mkdir(exist_ok=True)
    record.write_text(json.dumps({**result, "macro_f1": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
