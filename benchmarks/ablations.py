"""What each part of the recipe for students is worth: with and without it, over seeds.

Losses that were tried and are not in the package stand here, so that their rows can be repeated. One teacher;
students of two layers (but for two rows), all with the same number of steps, scored on the validation split,
which is where the recipe and every student's best epoch were chosen: macro-F1, negative log-likelihood of
the labels, and KL divergence from what the recipe's students learn from. The latter two tell students apart
where macro-F1 of a thousand texts cannot; what learns from others (two teachers) is not to be judged by the
last. A student that is there already is not trained again. Prints a table and keeps it in
results/ablations/SET.json.

Usage: python benchmarks/ablations.py DATA --teacher all-mpnet-base-v2 --student all-MiniLM-L6-v2

DATA holds a folder for every set, as for pareto.py, whose teacher is taken where it is already there.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from distill.student import soft_labels, training
from distill.student.losses import distillation_loss, hard_label_loss
from distill.student.training import StudentOptions
from distill.teacher.training import TeacherOptions
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.nn import functional as F

from distill import augmentation, train_student, train_teacher
from distill.artifact import read_manifest
from distill.calibration import fit_temperature, nll
from distill.devices import choose_precision
from distill.latency import cpu_name
from distill.models import load_model, load_tokenizer
from distill.predictions import read_predictions
from distill.training import fit, predict_logits

RESULTS = Path(__file__).resolve().parent / "results" / "ablations"
SETS = ("banking77", "sst2_sentences")
SEEDS = (1, 2, 3)
BUDGET, EPOCHS = 2, 3  # texts made for each training text; passes over them all
MEASURES = ("macro_f1", "log_loss", "divergence")
BESIDE = 2  # students that train at the same time: a small one keeps few cores busy


def logit_mse(student: Tensor, teacher: Tensor, labels: Tensor, _: float, alpha: float) -> Tensor:
    """Squared difference of centred logits in place of KL: Kim et al. (2021), arXiv 2105.08919."""
    own, theirs = (logits - logits.mean(dim=-1, keepdim=True) for logits in (student, teacher))
    return alpha * F.mse_loss(own, theirs) + (1 - alpha) * hard_label_loss(student, labels)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, _: float, alpha: float) -> Tensor:
    """KL of the teacher's first class, and twice that of the others: Zhao et al. (2022), arXiv 2203.08679.

    The teacher's first class stands for the target class, which unlabelled text does not have.
    """
    first = teacher.argmax(dim=-1, keepdim=True)
    kept = [torch.softmax(logits, dim=-1).gather(-1, first) for logits in (student, teacher)]
    yes, true = (torch.cat([share, 1 - share], dim=-1).clamp_min(1e-7) for share in kept)
    binary = F.kl_div(yes.log(), true, reduction="batchmean")
    others = [logits.scatter(-1, first, -1e4) for logits in (student, teacher)]
    rest = _divergence(*others)
    return alpha * (binary + 2 * rest) + (1 - alpha) * hard_label_loss(student, labels)


def standardised(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """KL of logits of mean 0 and deviation 1, at T = 2: Sun et al. (2024), arXiv 2403.01427."""
    even = [(one - one.mean(-1, keepdim=True)) / one.std(-1, keepdim=True).clamp_min(1e-6) / 2
            for one in (student, teacher)]  # fmt: skip
    return alpha * 2**2 * _divergence(*even) + (1 - alpha) * hard_label_loss(student, labels)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    own, theirs = (F.log_softmax(logits, dim=-1) for logits in (student, teacher))
    return F.kl_div(own, theirs, reduction="batchmean", log_target=True)


def _loss(function: Callable[..., Tensor]) -> Callable[[], AbstractContextManager[Any]]:
    return partial(mock.patch.object, training, "distillation_loss", function)


def _without(kind: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    rest = tuple(one for one in augmentation.AUGMENTATIONS if one is not kind)
    return partial(mock.patch.object, augmentation, "AUGMENTATIONS", rest)


SECOND = Path("runs/teacher_2")


def _two_teachers() -> AbstractContextManager[Any]:
    """The mean of two teachers' probabilities: Hinton, Vinyals and Dean (2015), arXiv 1503.02531."""

    def both(teacher: Path, _: Any, texts: Any, *how: Any) -> NDArray[np.float32]:
        found, temperatures = [], []
        for folder in (teacher, SECOND):
            manifest, known = read_manifest(folder, "train-teacher"), read_predictions(folder, "validation")
            temperatures.append(fit_temperature(known["teacher"].logits, known["teacher"].labels))
            found.append(softmax(one_teacher(folder, manifest, texts, *how) / temperatures[-1], axis=1))
        # The caller divides by the first one's temperature.
        return np.asarray(temperatures[0] * np.log(np.mean(found, axis=0)), dtype=np.float32)

    one_teacher = soft_labels.teacher_logits
    return mock.patch.object(training, "teacher_logits", both)


def _features(teacher: Path, manifest: Any, texts: Any) -> NDArray[np.float32]:
    """What the teacher's last linear layer reads of every text, shape (n, width); kept in a file."""
    key = hashlib.sha256("".join(texts["id"]).encode()).hexdigest()[:16]
    file = Path("ablations", f"features_{key}.npy")
    if file.is_file():
        return np.asarray(np.load(file), dtype=np.float32)
    model = load_model(str(teacher), manifest.labels)
    head = model.classifier
    if hasattr(head, "out_proj"):
        model.config.num_labels, head.out_proj = head.out_proj.in_features, nn.Identity()
    else:
        model.config.num_labels, model.classifier = head.in_features, nn.Identity()
    tokenizer = load_tokenizer(str(teacher), manifest.max_length)
    found = predict_logits(model, tokenizer, texts, "cpu", choose_precision("cpu"))
    np.save(file, found)
    return found


@contextmanager
def _with_features() -> Iterator[None]:
    """Beside the loss the cosine distance of what the last linear layers read, as PKD has it for all layers.

    Sun et al. (2019), arXiv 1908.09355. A wider teacher's features are taken in their main directions.
    """
    student: dict[str, Any] = {}

    def built(*given: Any) -> Any:
        model, tokenizer = build(*given)
        head = getattr(model.classifier, "out_proj", model.classifier)
        head.register_forward_pre_hook(lambda _, inputs: student.update(features=inputs[0]))
        student["width"] = head.in_features
        return model, tokenizer

    def labelled(teacher: Path, manifest: Any, texts: Any, *how: Any) -> NDArray[np.float32]:
        found = _features(teacher, manifest, texts)
        directions = np.linalg.eigh(found.T @ found)[1][:, -student["width"] :]
        own = found if found.shape[1] <= student["width"] else found @ directions
        return np.hstack([one_teacher(teacher, manifest, texts, *how), own])

    def both(logits: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
        kept, expected = teacher[:, : logits.shape[1]], teacher[:, logits.shape[1] :]
        if not expected.shape[1]:  # validation text
            return distillation_loss(logits, kept, *rest)
        distance = 1 - F.cosine_similarity(student["features"].float(), expected, dim=1).mean()
        return distillation_loss(logits, kept, *rest) + distance

    build, one_teacher = training._build, soft_labels.teacher_logits
    with (
        mock.patch.object(training, "_build", built),
        mock.patch.object(training, "teacher_logits", labelled),
        mock.patch.object(training, "distillation_loss", both),
    ):
        yield


@contextmanager
def _annealed() -> Iterator[None]:
    """T falls from 4 to 1 while the student trains: Jafari et al. (2021), arXiv 2104.07163, with KL."""
    taken, steps = itertools.count(), 0

    def fitted(model: Any, tokenizer: Any, train: Any, validation: Any, options: Any, *rest: Any) -> Any:
        nonlocal steps
        steps = max(1, options.epochs * len(train) // options.batch_size)
        return fit(model, tokenizer, train, validation, options, *rest)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, _: float, alpha: float) -> Tensor:
        temperature = 4 - 3 * min(1.0, next(taken) / steps) if student.requires_grad else 1.0
        return distillation_loss(student, teacher, labels, temperature, alpha)

    with (
        mock.patch.object(training, "fit", fitted),
        mock.patch.object(training, "distillation_loss", loss),
    ):
        yield


# What is changed in the recipe, and what in the code for the time of the training.
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "recipe": ({}, nullcontext),
    "no augmented text": ({"augment": None, "epochs": EPOCHS * (1 + BUDGET)}, nullcontext),
    **{f"no {kind.__name__}": ({}, _without(kind)) for kind in augmentation.AUGMENTATIONS},
    "head at the encoder's rate": ({"head_learning_rate": 3e-4}, nullcontext),
    "teacher as sure as it is": (
        {},
        partial(mock.patch.object, training, "fit_temperature", lambda *_: 1.0),
    ),
    "T = 2": ({"temperature": 2.0}, nullcontext),
    "T from 4 to 1": ({}, _annealed),
    "squared difference of logits": ({}, _loss(logit_mse)),
    "decoupled KL": ({}, _loss(decoupled)),
    "KL of standardised logits": ({}, _loss(standardised)),
    "no hard labels": ({"alpha": 1.0}, nullcontext),
    "no dropout": ({"dropout": 0.0}, nullcontext),
    "the whole vocabulary": ({"vocabulary": None}, nullcontext),
    "two teachers": ({}, _two_teachers),
    "the teacher's features too": ({}, _with_features),
    "three layers of 384 neurons": ({"layers": 3, "intermediate_size": 384}, nullcontext),
    "no layers": ({"layers": 0}, nullcontext),
}


def run(
    data: Path, teacher: str, student: str, only: tuple[str, ...] = ()
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
        (name, seed): _options(student, (name, seed))
        for name in VARIANTS
        if not only or name in ("recipe", *only)
        for seed in SEEDS
    }
    missing = [key for key, options in wanted.items() if not _is_done(options)]
    # The first leaves the soft labels that most of the others share.
    for key in missing[:1]:
        _train(student, key)
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // BESIDE))
    with ProcessPoolExecutor(BESIDE, get_context("spawn")) as pool:
        list(pool.map(partial(_train, student), missing[1:]))
    scores: dict[str, list[tuple[float, ...]]] = {}
    recipe = read_manifest(wanted["recipe", SEEDS[0]].output, "train-student")
    temperature = recipe.details["teacher_temperature"]
    for (name, _), options in wanted.items():
        scores.setdefault(name, []).append(_measured(options.output, temperature))
    return scores


def _options(student: str, one: tuple[str, int]) -> StudentOptions:
    """Of one student: a variant and a seed."""
    name, seed = one
    common = StudentOptions(
        student=student, layers=2, vocabulary=0, augment=f"{BUDGET}x", epochs=EPOCHS, batch_size=64,
        learning_rate=3e-4, patience=10**6, resume=True,
    )  # fmt: skip
    output = Path("ablations", f"{name.replace(' ', '_')}_{seed}")
    return replace(common, output=output, seed=seed, **VARIANTS[name][0])


def _train(student: str, one: tuple[str, int]) -> None:
    click.echo(f"{one[0]}, seed {one[1]}")
    options = _options(student, one)
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
        result = {
            "cpu": cpu_name(),
            "teacher": Path(teacher).name,
            "student": Path(student).name,
            "seeds": list(SEEDS),
            "augment": f"{BUDGET}x",
            "epochs": EPOCHS,
        }
        if only and record.is_file():  # the other rows stay, if they were made in the same way
            before = json.loads(record.read_text(encoding="utf-8"))
            others = before.pop("rows")
            rows = {**others, **rows} if before == result else rows
        result["rows"] = rows
        record.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
