"""What each part of the recipe for students is worth: with and without it, over seeds.

One teacher; students of one depth (but for the rows that say otherwise), all with the same number of steps,
scored on the validation split, which is where the recipe and every student's best epoch were chosen:
macro-F1, negative log-likelihood of the labels, and KL divergence from what the recipe's students learn
from. The latter two tell students apart where macro-F1 of a thousand texts cannot; what learns from others
(two teachers) is not to be judged by the last. The variants are those of variants.py. A student that is
there already is not trained again. Prints a table and keeps it in results/ablations/SET_N_layers.json.

Usage: python benchmarks/ablations.py DATA --teacher all-mpnet-base-v2 --student all-MiniLM-L6-v2

DATA holds a folder for every set, as for pareto.py, whose teacher is taken where it is already there.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from distill.student.options import StudentOptions
from distill.teacher.training import TeacherOptions
from scipy.special import log_softmax
from variants import BUDGET, EPOCHS, LAYERLESS, SECOND, VARIANTS, WITH_LAYERS

from distill import train_student, train_teacher
from distill.artifact import read_manifest
from distill.calibration import nll
from distill.latency import cpu_name
from distill.predictions import read_predictions

RESULTS = Path(__file__).resolve().parent / "results" / "ablations"
SETS = ("banking77", "sst2_sentences")
SEEDS = (1, 2, 3)
MEASURES = ("macro_f1", "log_loss", "divergence")
BESIDE = 2  # students that train at the same time: a small one keeps few cores busy


def run(
    data: Path, teacher: str, student: str, layers: int, only: tuple[str, ...] = ()
) -> dict[str, list[tuple[float, ...]]]:
    """Train whatever is not there yet; the `MEASURES` of every variant and seed."""
    if not Path("runs/teacher").is_dir():
        train_teacher(TeacherOptions(output=Path("runs/teacher"), data=str(data), model=teacher, resume=True))
    if not SECOND.is_dir() and (not only or "two teachers" in only):
        # As the first but in other batches; another seed would also be another split.
        first = read_manifest(Path("runs/teacher"), "train-teacher").options
        own = ("output", "data", "columns")
        names = [one.name for one in fields(TeacherOptions) if one.name in first and one.name not in own]
        same = {name: first[name] for name in names} | {"batch_size": first["batch_size"] // 2}
        train_teacher(TeacherOptions(output=SECOND, data=str(data), resume=True, **same))
    wanted = {
        (name, seed): _options(student, layers, (name, seed))
        for name in VARIANTS
        if (name in ("recipe", *only) if only else name not in (WITH_LAYERS if layers == 0 else LAYERLESS))
        for seed in SEEDS
    }
    missing = [key for key, options in wanted.items() if not _is_done(options)]
    # The first leaves the soft labels that most of the others share.
    for key in missing[:1]:
        _train(student, layers, key)
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // BESIDE))
    with ProcessPoolExecutor(BESIDE, get_context("spawn")) as pool:
        list(pool.map(partial(_train, student, layers), missing[1:]))
    scores: dict[str, list[tuple[float, ...]]] = {}
    recipe = read_manifest(wanted["recipe", SEEDS[0]].output, "train-student")
    temperature = recipe.details["teacher_temperature"]
    for (name, _), options in wanted.items():
        scores.setdefault(name, []).append(_measured(options.output, temperature))
    return scores


def _options(student: str, layers: int, one: tuple[str, int]) -> StudentOptions:
    """Of one student: a variant and a seed."""
    name, seed = one
    common = StudentOptions(
        student=student if layers else None, layers=layers, augment=f"{BUDGET}x", epochs=EPOCHS,
        batch_size=64, learning_rate=3e-4, patience=10**6, resume=True,
    )  # fmt: skip
    output = Path("ablations", f"{layers}_layers", f"{name.replace(' ', '_')}_{seed}")
    return replace(common, output=output, seed=seed, **VARIANTS[name][0])


def _train(student: str, layers: int, one: tuple[str, int]) -> None:
    click.echo(f"{one[0]}, seed {one[1]}")
    options = _options(student, layers, one)
    with VARIANTS[one[0]][1]():
        train_student(replace(options, overwrite=options.output.is_dir()))


def _measured(student: Path, temperature: float) -> tuple[float, ...]:
    """The `MEASURES` of a student over validation text, in nats but for the first.

    The divergence is KL(teacher || student), of the teacher's logits over a temperature.
    """
    answers = read_predictions(student, "validation")["student"]
    teacher = read_predictions(Path("runs/teacher"), "validation")["teacher"].logits
    expected, found = log_softmax(teacher / temperature, axis=1), log_softmax(answers.logits, axis=1)
    return (
        read_manifest(student, "train-student").metrics["validation"]["macro_f1"],
        nll(answers.logits, answers.labels),
        float((np.exp(expected) * (expected - found)).sum(axis=1).mean()),
    )


def _is_done(wanted: StudentOptions) -> bool:
    """Whether a student is there, trained with these options."""
    if not wanted.output.is_dir():
        return False
    before = read_manifest(wanted.output, "train-student").options
    return all(str(before[name]) == str(getattr(wanted, name)) for name in before)


def table(scores: dict[str, list[tuple[float, ...]]]) -> dict[str, Any]:
    """Mean and deviation, and the change from the recipe with its standard error over paired seeds."""
    rows = {}
    for name, values in scores.items():
        change = np.array(values) - np.array(scores["recipe"])
        error = change.std(axis=0, ddof=1) / len(change) ** 0.5
        deviation = np.std(values, axis=0, ddof=1)
        rows[name] = {
            measure: {
                "mean": float(np.mean(values, axis=0)[place]),
                "deviation": float(deviation[place]),
                "change": float(change.mean(axis=0)[place]),
                "standard_error": float(error[place]),
            }
            for place, measure in enumerate(MEASURES)
        }
        f1, loss, kl = rows[name].values()
        click.echo(
            f"{name:30} {100 * f1['mean']:6.2f} ± {100 * f1['deviation']:.2f}   "
            f"{100 * f1['change']:+.2f} ± {100 * f1['standard_error']:.2f}   "
            f"NLL {loss['mean']:.4f}   {loss['change']:+.4f} ± {loss['standard_error']:.4f}   "
            f"KL {kl['mean']:.4f}   {kl['change']:+.4f} ± {kl['standard_error']:.4f}"
        )
    return rows


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--teacher", default="sentence-transformers/all-mpnet-base-v2", help="Checkpoint.")
@click.option("--student", default="sentence-transformers/all-MiniLM-L6-v2", help="Checkpoint.")
@click.option("--set", "names", multiple=True, default=SETS, help="Sets to run.")
@click.option(
    "--layers", type=click.IntRange(0), default=2, help="Of the students; 0 starts from the teacher."
)
@click.option(
    "--only",
    type=click.Choice(list(VARIANTS)),
    multiple=True,
    help="Variants to run, besides the recipe itself; all when left out.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("pareto"), help="Folder for the runs.")
def main(
    data: Path,
    teacher: str,
    student: str,
    names: tuple[str, ...],
    layers: int,
    only: tuple[str, ...],
    work: Path,
) -> None:
    """Run the ablations, set by set."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    teacher, student = (str(Path(one).resolve()) if Path(one).is_dir() else one for one in (teacher, student))
    data, work = data.resolve(), work.resolve()
    for name in names:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        rows = table(run(data / name, teacher, student, layers, only))
        record = RESULTS / f"{name}_{layers}_layers.json"
        result: dict[str, Any] = {
            "cpu": cpu_name(),
            "teacher": Path(teacher).name,
            "student": Path(student).name if layers else None,
            "seeds": list(SEEDS),
            "recipe": {
                option: value
                for option, value in _options(student, layers, ("recipe", 1)).recipe().items()
                if option not in ("output", "teacher", "student", "data", "seed")
            },
        }
        if only and record.is_file():  # the other rows stay, if they were made in the same way
            before = json.loads(record.read_text(encoding="utf-8"))
            others = before.pop("rows")
            rows = {**others, **rows} if before == result else rows
        result["rows"] = rows
        record.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
