"""Variants of the recipe for students, for ablations.py: what is changed in its options, or in the code.

Losses that were tried and are not in the package stand here, so that their rows can be repeated.

Usage: python benchmarks/ablations.py DATA --only "T = 1"
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from distill.student import architecture, building, soft_labels, training
from distill.student.average import start_from
from distill.student.losses import distillation_loss, hard_label_loss
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn import functional as F

from distill import augmentation
from distill import training as fitting
from distill.artifact import read_manifest
from distill.calibration import fit_temperature
from distill.devices import choose_precision
from distill.models import load_model, load_tokenizer
from distill.predictions import read_predictions
from distill.trainer import LossTrainer
from distill.training import fit, predict_logits

BUDGET, EPOCHS = 2, 3  # texts made for each training text; passes over them all
RELATION_HEADS = 12
RANK = 128  # of factorised embeddings


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


def _kept(chosen: Callable[[int, int], range]) -> Callable[[], AbstractContextManager[Any]]:
    """Other layers of the checkpoint than evenly spaced ones, by their number and how many are kept."""
    return partial(
        mock.patch.object, architecture, "evenly_spaced", lambda total, keep, *_: list(chosen(total, keep))
    )


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
def _built(change: Callable[[Any], Any]) -> Iterator[None]:
    """Another student than `train-student` builds, made out of that one."""

    def built(*given: Any) -> Any:
        model, *rest = build(*given)
        return change(model), *rest

    build = building.build_student
    with (
        mock.patch.object(training, "build_student", built),
        mock.patch.object(fitting, "used_tokens_only", lambda *_, **__: nullcontext()),
    ):
        yield


def _from_scratch(model: Any) -> Any:
    """The same configuration with weights that are drawn."""
    return type(model)(model.config)


def _factorised(model: Any) -> Any:
    """Word embeddings of `RANK` and a matrix to the width: Lan et al. (2020), arXiv 1909.11942.

    They start as the table's truncated singular value decomposition, as in Acharya et al. (2019), arXiv
    1811.00641.
    """
    old = model.get_input_embeddings()
    left, sizes, right = torch.linalg.svd(old.weight.detach(), full_matrices=False)
    rows = nn.Embedding(old.num_embeddings, RANK, padding_idx=old.padding_idx)
    out = nn.Linear(RANK, old.embedding_dim, bias=False)
    with torch.no_grad():
        rows.weight.copy_(left[:, :RANK] * sizes[:RANK].sqrt())
        out.weight.copy_((sizes[:RANK].sqrt()[:, None] * right[:RANK]).T)
    model.set_input_embeddings(nn.Sequential(rows, out))
    return model


@contextmanager
def _with_features() -> Iterator[None]:
    """Beside the loss the cosine distance of what the last linear layers read, as PKD has it for all layers.

    Sun et al. (2019), arXiv 1908.09355. A wider teacher's features are taken in their main directions.
    """
    student: dict[str, Any] = {}

    def built(*given: Any) -> Any:
        model, *rest = build(*given)
        head = getattr(model.classifier, "out_proj", model.classifier)
        head.register_forward_pre_hook(lambda _, inputs: student.update(features=inputs[0]))
        student["width"] = head.in_features
        return model, *rest

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

    build, one_teacher = building.build_student, soft_labels.teacher_logits
    with (
        mock.patch.object(training, "build_student", built),
        mock.patch.object(training, "teacher_logits", labelled),
        mock.patch.object(training, "distillation_loss", both),
    ):
        yield


@contextmanager
def _with_relations() -> Iterator[None]:
    """Beside the loss the KL of the last layers' value relations: Wang et al. (2020), arXiv 2002.10957.

    softmax(V V^T / sqrt(d)) of each of `RELATION_HEADS` parts of the values, over a text's tokens. Widths may
    differ, tokenizers not, since the teacher reads the student's tokens.
    """
    teacher: dict[str, Any] = {}
    student: dict[str, Any] = {}

    def values(of: dict[str, Any], model: Any) -> None:
        last = model.base_model.encoder.layer[-1].attention.self.value
        last.register_forward_hook(lambda _module, _inputs, found: of.update(values=found))

    def built(options: Any, manifest: Any, *rest: Any) -> Any:
        model, *others = build(options, manifest, *rest)
        values(student, model)
        model.register_forward_pre_hook(lambda _, __, inputs: student.update(inputs=inputs), with_kwargs=True)
        teacher["model"] = load_model(str(options.teacher), manifest.labels).eval()
        values(teacher, teacher["model"])
        return model, *others

    def both(logits: Tensor, *rest: Any) -> Tensor:
        loss = distillation_loss(logits, *rest)
        if not logits.requires_grad:  # validation text
            return loss
        read = {name: student["inputs"][name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            teacher["model"](**read)
        return loss + _relation_divergence(student["values"], teacher["values"], read["attention_mask"])

    build = building.build_student
    with (
        mock.patch.object(training, "build_student", built),
        mock.patch.object(training, "distillation_loss", both),
        mock.patch.object(fitting, "used_tokens_only", lambda *_, **__: nullcontext()),
    ):
        yield


def _relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean KL over heads and tokens that are no padding, of values of shape (texts, tokens, width)."""
    own, theirs = (_relations(values.float(), mask) for values in (student, teacher))
    apart = (theirs.exp() * (theirs - own)).sum(dim=-1).mean(dim=1)
    return (apart * mask).sum() / mask.sum()


def _relations(values: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities, shape (texts, heads, tokens, tokens)."""
    heads = values.unflatten(-1, (RELATION_HEADS, -1)).transpose(1, 2)
    products = heads @ heads.transpose(-1, -2) / heads.shape[-1] ** 0.5
    return F.log_softmax(products.masked_fill(mask[:, None, None, :] == 0, -1e4), dim=-1)


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


@contextmanager
def _embeddings_at_the_heads_rate() -> Iterator[None]:
    """All of a student without layers at one rate."""

    def created(self: LossTrainer, *given: Any) -> Any:
        optimizer = create(self, *given)
        for group in optimizer.param_groups:
            group["lr"] = self.head_learning_rate
        return optimizer

    create = LossTrainer.create_optimizer
    with mock.patch.object(LossTrainer, "create_optimizer", created):
        yield


def _bigrams_from_zero() -> AbstractContextManager[Any]:
    """Tokens alone start from the teacher."""

    def started(student: Any, tokens: NDArray[np.float32], _: Any) -> None:
        start_from(student, tokens, np.zeros((0, 0), dtype=np.float32))

    return mock.patch.object(training, "start_from", started)


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
    "T = 1": ({"temperature": 1.0}, nullcontext),
    "T = 4": ({"temperature": 4.0}, nullcontext),
    "T from 4 to 1": ({}, _annealed),
    "squared difference of logits": ({}, _loss(logit_mse)),
    "decoupled KL": ({}, _loss(decoupled)),
    "KL of standardised logits": ({}, _loss(standardised)),
    "no hard labels": ({"alpha": 1.0}, nullcontext),
    "no dropout": ({"dropout": 0.0}, nullcontext),
    **{f"{rows:,} rows of tokens": ({"vocabulary": rows}, nullcontext) for rows in (1000, 2000, 3000)},
    "learning rate of 1e-4": ({"learning_rate": 1e-4}, nullcontext),
    "the teacher's hidden states first": ({"hidden_epochs": 2.0, "learning_rate": 1e-4}, nullcontext),
    "two teachers": ({}, _two_teachers),
    "the teacher's features too": ({}, _with_features),
    "the teacher's relations too": ({}, _with_relations),
    "the first layers": ({}, _kept(lambda _, keep: range(keep))),
    "the last layers": ({}, _kept(lambda total, keep: range(total - keep, total))),
    "two layers of 192 neurons and 6 heads": (
        {"layers": 2, "intermediate_size": 192, "attention_heads": 6},
        nullcontext,
    ),
    "half of the heads": ({"attention_heads": 6}, nullcontext),
    "weights that are drawn": ({}, partial(_built, _from_scratch)),
    f"embeddings of rank {RANK}": ({}, partial(_built, _factorised)),
    "three layers of 384 neurons": ({"layers": 3, "intermediate_size": 384}, nullcontext),
    "no layers": ({"layers": 0, "student": None}, nullcontext),
    "the checkpoint's embeddings": ({}, partial(mock.patch.object, training, "start_from", lambda *_: None)),
    "embeddings at the head's rate": ({}, _embeddings_at_the_heads_rate),
    "no bigrams": ({"bigrams": 0}, nullcontext),
    "bigrams from zero": ({}, _bigrams_from_zero),
}
# Those of students without layers alone, and of those with layers.
LAYERLESS = (
    "the checkpoint's embeddings", "embeddings at the head's rate", "no bigrams", "bigrams from zero",
)  # fmt: skip
WITH_LAYERS = (
    "the first layers", "the last layers", "half of the heads", "two layers of 192 neurons and 6 heads",
    "three layers of 384 neurons", "no layers", f"embeddings of rank {RANK}", "weights that are drawn",
    "the teacher's relations too",
)  # fmt: skip
