"""The versions of one classifier that a report compares, read from the folders of the three stages."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.artifact import Manifest, manifest_hash, read_manifest
from distill.errors import DistillError
from distill.predictions import read_predictions


@dataclass
class Version:
    """One version: its saved logits, shape (n, classes), and the file that holds its weights."""

    name: str
    folder: Path
    file: str
    parameters: int
    ids: list[str]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    @property
    def size(self) -> int:
        """Bytes of the file with the weights."""
        return (self.folder / self.file).stat().st_size


def read_versions(
    teacher: Path, student: Path, export: Path, split: str = "test"
) -> tuple[list[Version], Manifest]:
    """Read every version's predictions; also gives the bundle's manifest.

    Raises:
        DistillError: if a folder is missing, or if they do not belong together.
    """
    stages = [
        ("train-teacher", teacher, "--teacher"),
        ("train-student", student, "--student"),
        ("export", export, "--export"),
    ]
    manifests = [read_manifest(folder, stage, option) for stage, folder, option in stages]
    for (_, parent, _), (stage, folder, option), child in zip(
        stages, stages[1:], manifests[1:], strict=False
    ):
        if child.parents[0]["manifest_sha256"] != manifest_hash(parent):
            raise DistillError(f"{option} {folder}: was not made from the {parent} of now; "
                               f"run `distill {stage} --overwrite` again")  # fmt: skip
    bundle = manifests[-1]
    weights = "model.safetensors"
    onnx = bundle.details["files"]
    files = {"teacher": weights, "student": weights, "onnx-fp32": onnx["fp32"], "int8": onnx["cpu"]}
    versions = []
    for (_, folder, _), manifest in zip(stages, manifests, strict=True):
        for name, saved in read_predictions(folder, split).items():
            versions.append(Version(name, folder, files[name], manifest.parameters, **saved))
    first = versions[0]
    for version in versions[1:]:
        if version.ids != first.ids or not np.array_equal(version.labels, first.labels):
            raise DistillError(f"{version.folder}: its {split} texts are not {first.folder}'s; "
                               "train teacher and student on the same data")  # fmt: skip
    return versions, bundle


def runners(versions: list[Version], bundle: Manifest) -> dict[str, Callable[[Any], object]]:
    """Open every version as a function of one text; teacher and student in PyTorch, in fp32."""
    import torch

    from distill.models import load_model, load_tokenizer
    from distill.runtime import Classifier

    found: dict[str, Callable[[Any], object]] = {}
    for version in versions:
        if version.name in ("teacher", "student"):
            stage_length = read_manifest(version.folder, f"train-{version.name}").max_length
            model = load_model(str(version.folder), bundle.labels, f"--{version.name}").eval()
            tokenizer = load_tokenizer(str(version.folder), stage_length, f"--{version.name}")

            def run(text: Any, model: Any = model, tokenizer: Any = tokenizer) -> object:
                parts = text if isinstance(text, tuple) else (text,)
                with torch.inference_mode():
                    return model(**tokenizer(*parts, truncation=True, return_tensors="pt")).logits

            found[version.name] = run
        else:
            found[version.name] = Classifier(
                version.folder, provider="cpu", file=version.file, threads=1
            ).logits
    return found
