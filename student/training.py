"""Train a small student on a teacher's soft labels."""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from distill.student.average import start_from, teacher_states
from distill.student.building import build_student
from distill.student.checks import check_options
from distill.student.corpus import in_windows, unlabeled_text, with_soft_labels
from distill.student.hidden_states import learn_hidden_states
from distill.student.losses import distillation_loss, hard_label_loss
from distill.student.neighbours import similar_words
from distill.student.options import StudentOptions
from distill.student.shape import Shape
from distill.student.soft_labels import teacher_logits
from distill.student.vocabulary import share_bigrams, share_rows, shared_rows
from numpy.typing import NDArray

from distill.artifact import Manifest, manifest_hash, publish, read_manifest, verify
from distill.augmentation import augmented
from distill.averaging import depth, is_layerless
from distill.calibration import fit_temperature
from distill.checkpoints import discard_checkpoints, prepare_checkpoints, refuse_unfinished
from distill.data import Data, reload_data, texts_of
from distill.devices import choose_device, choose_precision
from distill.encoding import way_of
from distill.errors import DistillError
from distill.long_texts import WINDOWS
from distill.models import count_parameters, load_model, load_tokenizer
from distill.options import budget_of
from distill.predictions import EVALUATED, labels_of, read_predictions, score_splits, write_predictions
from distill.processes import ahead, count, join, once
from distill.sharding import ASKED, sharded
from distill.sources import Columns, parts_of
from distill.trainer import tokenize
from distill.training import Trained, fit, predict_logits
from distill.words import segments

logger = logging.getLogger(__name__)
Label = Callable[[Dataset], NDArray[np.float32]]


def _similar_words(folder: Path, teacher: Manifest, corpus: Dataset) -> dict[str, tuple[str, ...]]:
    """For the words of the corpus, those that the teacher holds to be alike."""
    words = {word.strip() for text in texts_of(corpus) for part in parts_of(text) for word in segments(part)}
    model = load_model(str(folder), teacher.labels, "--teacher")
    return similar_words(words, model, load_tokenizer(str(folder), teacher.max_length, "--teacher"))


def _teacher_on_validation(
    teacher: Path, label: Label, windows: Dataset | None
) -> tuple[NDArray[np.float32], float]:
    """What the teacher answers on validation, and the temperature that makes its probabilities honest there.

    A teacher that is too sure, or not sure enough, would teach the wrong amount of doubt. Where it labels
    `windows`, of which it is less sure than of whole texts, these are those of validation text.
    """
    answers = read_predictions(teacher, "validation")["teacher"]
    logits, labels = answers.logits, answers.labels
    if windows is not None:
        logits, labels = label(windows), labels_of(windows)
    temperature = fit_temperature(logits, labels)
    logger.info("Teacher's temperature: %.2f", temperature)
    return logits, temperature


def tune_student(**options: Any) -> float:
    """Train with options as the command line has them; macro-F1 on validation, and nothing is published."""
    return _fit(StudentOptions(**options)).trained.score


@dataclass
class _Fitted:
    data: Data
    tokenizer: Any
    trained: Trained
    shared: torch.Tensor | None
    shape: Shape
    made: dict[str, int]
    parent: str
    teacher_temperature: float


def _fit(options: StudentOptions) -> _Fitted:
    """Check everything, have the teacher label what it has not labelled yet, then train."""
    check_options(asdict(options))
    choose_precision(choose_device(options.device), options.precision)
    once(partial(refuse_unfinished, options, "train-student"))
    teacher = read_manifest(options.teacher, "train-teacher", "--teacher")
    verify(options.teacher, teacher)
    data = ahead(partial(reload_data, teacher.data, teacher.labels, options.data))
    columns = Columns(options.text_column or data.columns.text, data.columns.text_pair)
    held_out = {text_id for split in EVALUATED for text_id in data.splits[split]["id"]}
    unlabeled = [unlabeled_text(options.unlabeled, columns, held_out)] if options.unlabeled else []
    corpus = concatenate_datasets([data.splits["train"].remove_columns("label"), *unlabeled])
    budget = budget_of(options.augment, len(data.splits["train"])) if options.augment else 0
    model, tokenizer, shape, from_teacher = build_student(options, teacher, data, corpus)
    parent = manifest_hash(options.teacher)
    recipe = _recipe(options, shape, parent, data, corpus, from_teacher)
    resume_from = once(partial(prepare_checkpoints, options, recipe, "train-student"))
    if from_teacher:
        bigrams = model.pairs.numpy() if model.config.bigrams else []
        start_from(
            model, *teacher_states(options.teacher, teacher, bigrams, options.device, options.precision)
        )
    extra = {"unlabeled": sum(map(len, unlabeled)), "augmented": 0}
    if budget:
        # Of the split's seed, not of this run's: all students of a teacher share texts and soft labels.
        similar = _similar_words(options.teacher, teacher, corpus)
        folder = options.checkpoints / "augmented"
        made = ahead(partial(augmented, corpus, budget, data.seed, held_out, folder, similar))
        corpus, unlabeled = concatenate_datasets([corpus, made]), [*unlabeled, made]
        extra["augmented"] = len(made)
    shared = None
    if options.vocabulary is not None:
        shared = once(partial(_shared_rows, model, tokenizer, corpus, options, resume_from is not None))
        logger.info("Vocabulary: %d tokens share %d rows", len(tokenizer), len(shared.unique()))
        share_bigrams(model, shared)
    rows, *unlabeled = (in_windows(part, tokenizer) for part in (data.splits["train"], *unlabeled))
    how = (options.device, options.precision, options.engine, options.workers)

    def label(texts: Dataset) -> NDArray[np.float32]:
        return teacher_logits(options.teacher, teacher, texts, *how)

    held = in_windows(data.splits["validation"], tokenizer)
    windows = held if way_of(tokenizer) == WINDOWS and options.alpha else None
    expected, temperature = _teacher_on_validation(options.teacher, label, windows)
    validation = tokenize(data.splits["validation"], tokenizer, shared=shared)
    if options.alpha:
        logits = label(concatenate_datasets([rows.remove_columns("label"), *unlabeled]))
        rows = with_soft_labels(rows, unlabeled, logits / temperature)
        validation = validation.add_column("teacher_logits", list(expected / temperature))
    train = ahead(partial(tokenize, rows, tokenizer, options.checkpoints / "train.arrow", shared))
    if not resume_from:
        given = options.hidden_epochs, (options.teacher, teacher)
        learn_hidden_states(model, tokenizer, (rows, held), (train, validation), options, *given)

    def loss(student_logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if "teacher_logits" not in batch:
            return hard_label_loss(student_logits, batch["labels"])
        return distillation_loss(
            student_logits, batch["teacher_logits"], batch["labels"], options.temperature, options.alpha
        )

    trained = fit(model, tokenizer, train, validation, options, loss, "Student", resume_from)
    if shared is not None:
        share_rows(trained.model, shared)
    return _Fitted(data, tokenizer, trained, shared, shape, extra, parent, temperature)


def _recipe(
    options: StudentOptions, shape: Shape, parent: str, data: Data, corpus: Dataset, from_teacher: bool
) -> dict[str, Any]:
    """All that a run which is resumed must have in common with what it was before."""
    recipe = {
        **options.recipe(),
        "shape": asdict(shape),
        "teacher_hash": parent,
        "data_fingerprint": data.fingerprint,
        "corpus_fingerprint": hashlib.sha256("".join(corpus["id"]).encode()).hexdigest(),
    }
    if count() > 1:
        recipe["processes"] = count()
    if from_teacher:
        recipe["embeddings"] = "the teacher's states, and what bigrams gain"
    return recipe


def _shared_rows(
    model: Any, tokenizer: Any, corpus: Dataset, options: StudentOptions, resumed: bool
) -> torch.Tensor:
    """Who reads which row; a resumed run goes on with what it was trained as."""
    record = options.checkpoints / "rows.npy"
    if resumed and record.is_file():
        return torch.from_numpy(np.load(record))
    rows = shared_rows(model, tokenizer, texts_of(corpus), options.vocabulary or None)
    record.parent.mkdir(parents=True, exist_ok=True)
    np.save(record, rows.numpy())
    return rows


def _spare(model: Any, shared: torch.Tensor | None) -> int:
    """Parameters in rows that are there several times, which export stores once."""
    if shared is None:
        return 0
    return (len(shared) - len(shared.unique())) * model.get_input_embeddings().embedding_dim  # type: ignore[no-any-return]


def train_student(options: StudentOptions) -> Manifest:
    """Distil a teacher into a student and publish it.

    The teacher runs only for texts whose logits are not kept yet, and never while the student trains.

    Returns:
        The manifest, as it stands in the output folder.

    Raises:
        DistillError: for anything wrong with teacher, data, checkpoint or options, before training starts.
    """
    started = time.monotonic()
    if sharded():
        raise DistillError(f"{ASKED}: a student fits every GPU; leave --use_fsdp out")
    join(options.device)
    fitted = _fit(options)
    data, tokenizer, trained = fitted.data, fitted.tokenizer, fitted.trained
    predictions = {
        split: predict_logits(trained.model, tokenizer, data.splits[split], trained.device, trained.precision)
        for split in EVALUATED
    }
    rows = len(tokenizer) if fitted.shared is None else len(fitted.shared.unique())
    manifest = Manifest(
        stage="train-student",
        labels=data.labels,
        options={k: str(v) if isinstance(v, Path) else v for k, v in options.recipe().items()},
        seed=options.seed,
        data={**data.manifest(), **fitted.made},
        parents=[{"path": str(options.teacher), "manifest_sha256": fitted.parent}],
        metrics=score_splits(data.splits, predictions, len(data.labels)),
        problem_type=data.problem_type,
        long_texts=way_of(tokenizer),
        max_length=tokenizer.model_max_length,
        parameters=count_parameters(trained.model) - _spare(trained.model, fitted.shared),
        device=trained.device,
        precision=trained.precision,
        wall_seconds=round(time.monotonic() - started, 1),
        details={
            "layers": depth(trained.model),
            **{name: kept for name, kept in asdict(fitted.shape).items() if name != "layers" and kept},
            "vocabulary": rows,
            **({"bigrams": trained.model.config.bigrams} if is_layerless(trained.model) else {}),
            "teacher_temperature": fitted.teacher_temperature,
            "steps": trained.steps(),
            **trained.long,
        },
    )

    def finish() -> Manifest:
        with publish(options.output, manifest, options.overwrite) as folder:
            trained.model.to("cpu").save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
            write_predictions(folder, data.splits, {"student": predictions})
        discard_checkpoints(options)
        return manifest

    return once(finish)
