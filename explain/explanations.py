"""`distill explain`: why each version answers as it does, for given texts or a sample of the test split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distill.explain.attribution import METHODS, Attribution, attribute_all
from distill.explain.reasons import progress
from distill.explain.versions import (
    OPTIONS,
    STAGES,
    Version,
    as_student,
    check_parents,
    open_for_explanation,
    read_stage,
)
from distill.explain.words import Text
from numpy.typing import NDArray

from distill.artifact import Manifest
from distill.bundle import second_column
from distill.data import reload_data, texts_of
from distill.errors import DistillError
from distill.files import SURROGATE

VERSIONS = ("teacher", "student", "onnx-fp32", "int8")
SHOWN_WORDS = 12
LONGEST_WORD = 40
STUDENT = Path("runs/student")


@dataclass(frozen=True)
class ExplainOptions:
    """Options of `distill explain`.

    Attributes:
        texts: what to explain; with none, `sample` texts of the test split.
        versions: which; with none, teacher, student and, if it was exported, int8.
    """

    texts: Sequence[Text] = ()
    sample: int = 5
    versions: Sequence[str] = ()
    method: str = "shap"
    teacher: Path = Path("runs/teacher")
    student: Path = STUDENT
    export: Path = Path("runs/export")
    data: str | None = None
    device: str = "auto"
    seed: int = 42


def _read(options: ExplainOptions) -> tuple[list[Version], Manifest]:
    """The wanted versions, reading only the folders that they need."""
    folders = dict(zip(STAGES, (options.teacher, options.student, options.export), strict=True))
    wanted = list(options.versions) or ["teacher", "student", "int8"]
    # A bundle holds the student as an fp32 graph: without the student's folder, that is the student.
    bundle_alone = options.export.is_dir() and options.student == STUDENT and not STUDENT.is_dir()
    needed = {
        "train-teacher": "teacher" in wanted,
        "train-student": "student" in wanted and not bundle_alone,
        "export": bool({"onnx-fp32", "int8"} & set(options.versions)) or options.export.is_dir(),
    }
    needed["export"] &= bool({"student", "onnx-fp32", "int8"} & set(wanted))
    found: dict[str, Version] = {}
    manifests: dict[Path, Manifest] = {}
    for (stage, folder), option in zip(folders.items(), OPTIONS, strict=True):
        if needed[stage]:
            versions, manifests[folder] = read_stage(folder, stage, option)
            found |= {version.name: version for version in versions}
    check_parents(folders, manifests)
    if "onnx-fp32" in found:
        found["student"] = as_student(found["onnx-fp32"])
    (first, manifest), *others = manifests.items()
    for folder, other in others:
        if other.labels != manifest.labels:
            raise DistillError(
                f"{folder}: its labels are not {first}'s; export the student of this teacher again"
            )
    missing = [name for name in options.versions if name not in found]
    if missing:
        raise DistillError(
            f"--version {missing[0]}: {options.export} has none; run `distill export --int8` first"
        )
    return [found[name] for name in wanted if name in found], manifest


def _sample(options: ExplainOptions, manifest: Manifest) -> list[Text]:
    test = reload_data(manifest.data, manifest.labels, options.data).splits["test"]
    rows = np.random.default_rng(options.seed).choice(
        len(test), min(options.sample, len(test)), replace=False
    )
    return texts_of(test.select(np.sort(rows)))


def explain_texts(options: ExplainOptions) -> list[dict[str, Any]]:
    """Explain texts; one entry a text, ready for JSON.

    Each entry has the text, the words and, by version, `probabilities`, `base` and `values` (one number a
    word) by label, and `residual`: how far the values are from summing to probability less base.

    Raises:
        DistillError: if a version is not there.
    """
    if options.method not in METHODS:
        raise DistillError(f"--method {options.method}: unknown; use {' or '.join(METHODS)}")
    unknown = [name for name in options.versions if name not in VERSIONS]
    if unknown:
        raise DistillError(f"--version {unknown[0]}: unknown; use {', '.join(VERSIONS)}")
    if isinstance(options.texts, str):
        raise DistillError("texts: a single string; give a list of strings, as in texts=[text]")
    broken = [index for index, text in enumerate(options.texts, start=1) if SURROGATE.search("".join(text))]
    if broken:
        raise DistillError(f"text {broken[0]}: not valid UTF-8; write it in the terminal's encoding")
    empty = [index for index, text in enumerate(options.texts, start=1) if not "".join(text).strip()]
    if empty:
        raise DistillError(f"text {empty[0]}: empty; there is nothing to explain")
    versions, manifest = _read(options)
    pairs = second_column(manifest.data) is not None
    if any(isinstance(text, tuple) != pairs for text in options.texts):
        kind = "pairs of texts; take some with --sample" if pairs else "single texts"
        raise DistillError(f"texts: these versions were trained on {kind}")
    texts = list(options.texts) or _sample(options, manifest)
    models = {
        version.name: open_for_explanation(version, manifest.labels, options.device) for version in versions
    }
    thresholds = {version.name: version.decision.probability_thresholds for version in versions}
    found = progress(attribute_all(texts, models, options.method, options.seed), len(texts), "Explanations")
    return [
        _entry(text, one, manifest.labels, options.method, thresholds)
        for text, one in zip(texts, found, strict=True)
    ]


def _answer(
    found: Attribution, labels: Sequence[str], thresholds: NDArray[np.float64] | None
) -> str | list[str]:
    if thresholds is None:
        return labels[found.predicted]
    return [label for label, given in zip(labels, found.output >= thresholds, strict=True) if given]


def _entry(
    text: Text,
    found: dict[str, Attribution],
    labels: Sequence[str],
    method: str,
    thresholds: Mapping[str, NDArray[np.float64] | None],
) -> dict[str, Any]:
    first = next(iter(found.values()))
    return {
        "text": text,
        "method": method,
        "words": first.words.words,
        "versions": {
            name: {
                "prediction": _answer(one, labels, thresholds[name]),
                "most_probable": labels[one.predicted],
                "probabilities": dict(zip(labels, one.output.tolist(), strict=True)),
                "base": dict(zip(labels, one.base.tolist(), strict=True)),
                "values": dict(zip(labels, one.values.T.tolist(), strict=True)),
                "residual": one.residual if method == "shap" else None,
            }
            for name, one in found.items()
        },
    }


def show(entry: dict[str, Any]) -> str:
    """One explained text for a terminal: what its words add to the class that the first version chose."""
    versions = entry["versions"]
    label = next(iter(versions.values()))["most_probable"]
    text = entry["text"] if isinstance(entry["text"], str) else " | ".join(entry["text"])
    lines = [text, ""]
    for name, one in versions.items():
        chosen = one["most_probable"]
        line = f"  {name:10} {chosen} {one['probabilities'][chosen]:.3f}"
        lines.append(
            line + (f", values sum up within {one['residual']:.0e}" if one["residual"] is not None else "")
        )
    title = f"adds to {label!r}"
    words = [word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}…" for word in entry["words"]]
    width = max(map(len, [*words, title]))
    lines += ["", f"  {title:{width}}  " + "  ".join(f"{name:>10}" for name in versions)]
    values = np.array([one["values"][label] for one in versions.values()])
    order = np.argsort(-np.abs(values).max(axis=0), kind="stable")
    nothing = "(no words)" if entry["method"] == "shap" else "(intercept)"
    lines.append(
        f"  {nothing:{width}}  " + "  ".join(f"{one['base'][label]:10.3f}" for one in versions.values())
    )
    for row in order[:SHOWN_WORDS]:
        lines.append(f"  {words[row]:{width}}  " + "  ".join(f"{value:+10.3f}" for value in values[:, row]))
    if len(order) > SHOWN_WORDS:
        rest = values[:, order[SHOWN_WORDS:]].sum(axis=1)
        name = f"others ({len(order) - SHOWN_WORDS})"
        lines.append(f"  {name:{width}}  " + "  ".join(f"{value:+10.3f}" for value in rest))
    return "\n".join(lines)
