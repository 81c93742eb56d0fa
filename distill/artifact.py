"""A stage's folder on disk: its manifest, the hashes of its files, and publication in one step.

A folder is complete or absent: it is written beside its place, the manifest last, and then renamed.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from distill.bundle import MANIFEST, seal_manifest
from distill.decision import SINGLE_LABEL
from distill.errors import DistillError
from distill.long_texts import HEAD

SCHEMA_VERSION = 1
PACKAGES = (
    "distill-onnx",
    "torch",
    "transformers",
    "datasets",
    "optimum-onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tokenizers",
)


@dataclass
class Manifest:
    """What a stage did, with what, and what it left behind; the content of `distill.json`.

    `sha256` is of all the rest, so that `Classifier` can tell an edited manifest.
    """

    stage: str
    labels: list[str]
    options: dict[str, Any]
    seed: int
    data: dict[str, Any]
    parents: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    max_length: int = 0
    parameters: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    wall_seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    created: str = ""
    problem_type: str = SINGLE_LABEL
    long_texts: str = HEAD
    schema_version: int = SCHEMA_VERSION
    sha256: str = ""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_hash(folder: Path) -> str:
    """SHA-256 of a folder's manifest, which itself holds the SHA-256 of every file: the folder's identity."""
    return sha256(folder / MANIFEST)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_output(output: Path, overwrite: bool, stage: str) -> None:
    """Refuse, before any work is done, an output folder that must not be replaced.

    Args:
        output: where the stage will write.
        overwrite: replace what an earlier run of the same stage wrote.
        stage: the stage.
    """
    if not output.exists():
        place = next(parent for parent in output.absolute().parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise DistillError(f"--output {output}: cannot be made in {place}; choose another --output")
        return
    if not output.is_dir():
        raise DistillError(f"--output {output}: this is a file; name a folder")
    if not overwrite:
        raise DistillError(
            f"{output}: already there; add --overwrite to replace it, or choose another --output"
        )
    if any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise DistillError(f"--output {output}: not a folder that distill wrote; choose another --output")
    try:
        written = json.loads((output / MANIFEST).read_text(encoding="utf-8")).get("stage")
    except (OSError, ValueError):
        written = stage
    if written != stage:
        raise DistillError(
            f"--output {output}: `distill {written}` wrote this folder; choose another --output for {stage}"
        )


@contextmanager
def publish(output: Path, manifest: Manifest, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write in; when the block ends without an error, it becomes `output`.

    The manifest is completed (versions, file hashes, time) and written last. After an error nothing is left.

    Raises:
        DistillError: if `output` exists and `overwrite` is false.
    """
    check_output(output, overwrite, manifest.stage)
    manifest.versions = _versions()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        manifest.created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        (partial / MANIFEST).unlink(missing_ok=True)
        manifest.files = {
            path.relative_to(partial).as_posix(): sha256(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        manifest.sha256 = seal_manifest(asdict(manifest))
        content = json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"
        (partial / MANIFEST).write_text(content, encoding="utf-8")
        check_output(output, overwrite, manifest.stage)
        old = output.parent / f".{output.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            os.replace(output, old)
        try:
            os.replace(partial, output)
        except BaseException:
            if old.exists() and not output.exists():
                os.replace(old, output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_manifest(folder: Path, stage: str, option: str = "") -> Manifest:
    """Read the manifest of a finished folder.

    Args:
        folder: a folder written by `publish`.
        stage: the stage that must have written it, e.g. "train-teacher".
        option: the option the user gave the folder with, for the error message.

    Raises:
        DistillError: if the folder is absent, unfinished, of another stage, damaged or too new.
    """
    place = f"{option} {folder}".strip()
    if not folder.is_dir():
        raise DistillError(
            f"{place}: no such folder; run `distill {stage}` first, or name the folder it wrote"
        )
    path = folder / MANIFEST
    if not path.is_file():
        raise DistillError(
            f"{place}: no {MANIFEST} in it; run `distill {stage}` first, or name the folder it wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version > SCHEMA_VERSION:
            raise DistillError(f"{path}: written by a newer distill (schema {version}); upgrade distill-onnx")
        manifest = Manifest(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise DistillError(f"{path}: damaged manifest ({error}); run `distill {stage}` again") from error
    if manifest.stage != stage:
        raise DistillError(
            f"{place}: written by `distill {manifest.stage}`, but one written by `distill {stage}` is needed"
        )
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the SHA-256 in the manifest.

    Raises:
        DistillError: naming the first file that is missing or differs.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DistillError(
                f"{path}: missing, though {MANIFEST} lists it; run `distill {manifest.stage}` again"
            )
        if sha256(path) != expected:
            raise DistillError(f"{path}: changed since it was written; run `distill {manifest.stage}` again")
