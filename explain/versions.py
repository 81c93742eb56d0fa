"""The versions of one classifier that a report compares, read from the folders of the three stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from distill.explain.words import Text
from numpy.typing import NDArray

from distill.artifact import Manifest, manifest_hash, read_manifest
from distill.calibration import fit_decision
from distill.decision import Decision, Labels
from distill.errors import DistillError
from distill.long_texts import HEAD
from distill.predictions import Predictions, read_predictions

STAGES = ("train-teacher", "train-student", "export")
OPTIONS = ("--teacher", "--student", "--export")


@dataclass(frozen=True)
class Version:
    """One version: what it answered, and the file that holds its weights.

    Attributes:
        name: teacher, student, onnx-fp32 or int8.
        folder: of the stage that wrote it.
        file: with its weights, relative to the folder.
        parameters: how many.
        max_length: longest text, in tokens.
        validation: its saved answers on validation text.
        test: its saved answers on test text.
        decision: what its logits mean; fitted on validation text.
        long_texts: how texts longer than that are read.
    """

    name: str
    folder: Path
    file: str
    parameters: int
    max_length: int
    validation: Predictions
    test: Predictions
    decision: Decision
    long_texts: str = HEAD

    @property
    def in_onnx(self) -> bool:
        """Whether ONNX Runtime runs it, and not PyTorch."""
        return self.file.endswith(".onnx")

    @property
    def size(self) -> int:
        """Bytes of the file with the weights, or of all of them where they are in shards."""
        if (self.folder / self.file).is_file():
            return (self.folder / self.file).stat().st_size
        return sum(path.stat().st_size for path in self.folder.glob("model-*.safetensors"))

    @property
    def answers(self) -> Labels:
        """Answers to the test text: classes, shape (n,), or labels, shape (n, classes)."""
        return self.decision.answers(self.test.logits)

    @property
    def certainty(self) -> NDArray[np.float64]:
        """Probability of those answers, shape (n,)."""
        return self.decision.certainty(self.test.logits)


def read_stage(folder: Path, stage: str, option: str) -> tuple[list[Version], Manifest]:
    """Read the versions that one stage left behind, and its manifest.

    Raises:
        DistillError: if the folder is missing, unfinished or of another stage.
    """
    manifest = read_manifest(folder, stage, option)
    onnx = manifest.details.get("files", {})
    weights = "model.safetensors"
    files = {"teacher": weights, "student": weights, "onnx-fp32": onnx.get("fp32"), "int8": onnx.get("cpu")}
    fitted, thresholds = (manifest.details.get(name, {}) for name in ("temperature", "thresholds"))
    validation, test = (read_predictions(folder, split) for split in ("validation", "test"))
    versions = []
    for name, answers in test.items():
        held_out = validation[name]
        if (file := files[name]) in fitted:
            decision = Decision(fitted[file], tuple(thresholds[file]) if thresholds else None)
        else:
            decision = fit_decision(held_out.logits, held_out.labels)
        versions.append(
            Version(
                name,
                folder,
                file,
                manifest.parameters,
                manifest.max_length,
                held_out,
                answers,
                decision,
                manifest.long_texts,
            )
        )
    return versions, manifest


def check_parents(folders: Mapping[str, Path], manifests: Mapping[Path, Manifest]) -> None:
    """Refuse stages of which one was not made from the other.

    Args:
        folders: of every stage, by its name.
        manifests: of the stages that were read, by folder.

    Raises:
        DistillError: naming the stage to run again.
    """
    for before, stage, option in zip(STAGES, STAGES[1:], OPTIONS[1:], strict=False):
        parent, folder = folders[before], folders[stage]
        if parent not in manifests or folder not in manifests:
            continue
        if manifests[folder].parents[0]["manifest_sha256"] != manifest_hash(parent):
            raise DistillError(f"{option} {folder}: was not made from the {parent} of now; "
                               f"run `distill {stage} --overwrite` again")  # fmt: skip


def read_versions(teacher: Path, student: Path, export: Path) -> tuple[list[Version], Manifest]:
    """Read every version's predictions; also gives the bundle's manifest.

    Raises:
        DistillError: if a folder is missing, or if they do not belong together.
    """
    folders = (teacher, student, export)
    found = [read_stage(*place) for place in zip(folders, STAGES, OPTIONS, strict=True)]
    manifests = [manifest for _, manifest in found]
    check_parents(dict(zip(STAGES, folders, strict=True)), dict(zip(folders, manifests, strict=True)))
    versions = [version for stage_versions, _ in found for version in stage_versions]
    first = versions[0].test
    for version in versions[1:]:
        if version.test.ids != first.ids or not np.array_equal(version.test.labels, first.labels):
            raise DistillError(f"{version.folder}: its test texts are not {versions[0].folder}'s; "
                               "train teacher and student on the same data")  # fmt: skip
    return versions, manifests[-1]


def as_student(version: Version) -> Version:
    """The student through its fp32 graph, which gives the same answers faster."""
    return replace(version, name="student")


def _open_pytorch(version: Version, labels: list[str]) -> tuple[Any, Any]:
    from distill.models import load_model, load_tokenizer

    option = f"--{version.name}"
    model = load_model(str(version.folder), labels, option).eval()
    return model, load_tokenizer(str(version.folder), version.max_length, option, version.long_texts)


def truncated_share(version: Version, texts: Sequence[Text]) -> float:
    """The share of texts that are longer than a teacher or student reads."""
    from distill.encoding import encode
    from distill.models import load_tokenizer

    tokenizer = load_tokenizer(
        str(version.folder), version.max_length, f"--{version.name}", version.long_texts
    )
    encoded = encode(texts, tokenizer)
    return len({text for text, cut in zip(encoded.owners, encoded.cut, strict=True) if cut}) / len(texts)


def open_for_latency(version: Version, labels: list[str]) -> Callable[[Any], object]:
    """Open a version as a function of one text, one thread; teacher and student in PyTorch, in fp32."""
    from distill.models import open_pytorch
    from distill.runtime import Classifier

    if version.in_onnx:
        return Classifier(version.folder, provider="cpu", file=version.file, threads=1).logits
    option = f"--{version.name}"
    return open_pytorch(version.folder, labels, version.max_length, version.long_texts, option)[0]


def open_for_explanation(
    version: Version, labels: list[str], device: str = "auto"
) -> Callable[[Sequence[Text]], NDArray[np.float64]]:
    """Open a version as a fast function from n texts to calibrated probabilities, shape (n, classes).

    Exported versions run in ONNX Runtime, one text at a time on every core; the others in PyTorch, in batches
    of similar length and in the fastest precision that the device computes natively.
    """
    from distill.devices import choose_device, choose_precision, put_on
    from distill.models import text_logits
    from distill.runtime import Classifier

    if version.in_onnx:
        classifier = Classifier(version.folder, provider="cpu", file=version.file)
        return lambda texts: version.decision.probabilities(classifier.predict_logits(texts))
    model, tokenizer = _open_pytorch(version, labels)
    device = choose_device(device)
    precision = choose_precision(device)
    put_on(model, device, precision)
    # Masked texts have all lengths up to the whole text's: on a CPU, padding costs more than small batches
    # do.
    batch_tokens = 512 if device == "cpu" else None

    def probabilities(texts: Sequence[Text]) -> NDArray[np.float64]:
        return version.decision.probabilities(
            text_logits(model, tokenizer, texts, device, precision, batch_tokens)
        )

    return probabilities
