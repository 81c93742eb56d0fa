"""Assemble the bundle: fp32 and INT8 ONNX files, tokenizer, labels, model card, manifest, predictions."""

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from distill.export.onnx import export_fp32, fuse, shorten
from distill.export.quantization import Setting, Trial, choose, quantize, settings
from distill.export.verification import compare, require_parity
from numpy.typing import NDArray

from distill.artifact import Manifest, check_output, manifest_hash, publish, read_manifest, verify
from distill.bundle import MANIFEST, TOKENIZER, TOKENIZER_SETTINGS, write_single_file
from distill.calibration import fit_temperature
from distill.data import Data, reload_data, texts_of
from distill.errors import DistillError
from distill.latency import cpu_name, measure
from distill.metrics import score
from distill.models import load_model, load_tokenizer
from distill.predictions import EVALUATED, write_predictions
from distill.runtime import Classifier
from distill.trainer import predict_logits

logger = logging.getLogger(__name__)
FP32 = "onnx/model.onnx"
INT8 = "onnx/model_quantized.onnx"
SINGLE = "classifier.onnx"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
LATENCY_TEXTS = 60


@dataclass(frozen=True)
class ExportOptions:
    """Options of `distill export`.

    Attributes:
        student: folder of `distill train-student`.
        output: folder to write.
        int8: add an INT8 file.
        max_drop: points of validation macro-F1 that INT8 may lose.
        single_file: add `classifier.onnx`, which holds the whole bundle.
        data: the data, if it has moved.
        overwrite: replace an existing output folder.
    """

    student: Path = Path("runs/student")
    output: Path = Path("runs/export")
    int8: bool = False
    max_drop: float = 1.0
    single_file: bool = False
    data: str | None = None
    overwrite: bool = False


class _Draft:
    """A bundle under construction: it can already be opened by `Classifier`."""

    def __init__(self, folder: Path, student: Path, manifest: Manifest, data: Data) -> None:
        self.folder, self.manifest, self.data = folder, manifest, data
        self.texts = {split: texts_of(data.splits[split]) for split in EVALUATED}
        self.labels = {split: np.asarray(data.splits[split]["label"], dtype=np.int64) for split in EVALUATED}
        self.student = student

    def open(self, file: str, threads: int | None = None) -> Classifier:
        return Classifier(self.folder, provider="cpu", file=file, threads=threads)

    def logits(self, file: str, split: str) -> NDArray[np.float32]:
        return self.open(file).predict_logits(self.texts[split])

    def macro_f1(self, logits: NDArray[np.float32], split: str) -> float:
        return score(self.labels[split], logits.argmax(1), len(self.data.labels)).macro_f1

    def latency(self, candidates: dict[Setting, Path]) -> dict[Setting, float]:
        """Median latency of each candidate on validation texts, one thread."""
        texts = self.texts["validation"]
        sample = texts[:: max(1, len(texts) // LATENCY_TEXTS)][:LATENCY_TEXTS]
        opened = {
            str(setting): self.open(path.relative_to(self.folder).as_posix(), threads=1).logits
            for setting, path in candidates.items()
        }
        measured = measure(opened, sample)
        return {setting: measured[str(setting)] for setting in candidates}


def _quantized(
    draft: _Draft, exported: Path, config: Any, reference: float, max_drop: float
) -> tuple[Setting, list[Trial]]:
    """Try every setting and leave the chosen one as `onnx/model_quantized.onnx`."""
    scratch = draft.folder / "onnx" / "trials"
    scratch.mkdir()
    fused = scratch / "fused.onnx"
    fusion = fuse(exported, fused, config)
    if fusion:
        shorten(fused, fused)
    candidates: dict[Setting, Path] = {}
    failed: list[Trial] = []
    for number, setting in enumerate(settings(fusion)):
        path = scratch / f"{number}.onnx"
        try:
            quantize(fused if setting.fused else draft.folder / FP32, path, setting)
            draft.open(path.relative_to(draft.folder).as_posix()).logits(draft.texts["validation"][0])
        except Exception as error:  # a setting that does not suit this graph is not an error of the export
            failed.append(Trial(setting, error=(str(error).splitlines() or [type(error).__name__])[0]))
        else:
            candidates[setting] = path
    if not candidates:
        raise DistillError(f"--int8: no setting could quantize this graph: {failed[0].error}")

    def macro_f1_of(path: Path) -> float:
        return draft.macro_f1(
            draft.logits(path.relative_to(draft.folder).as_posix(), "validation"), "validation"
        )

    chosen, trials = choose(candidates, draft.latency, macro_f1_of, reference, max_drop)
    shutil.move(candidates[chosen], draft.folder / INT8)
    shutil.rmtree(scratch)
    return chosen, trials + failed


def export_student(options: ExportOptions) -> Manifest:
    """Export a student to ONNX, check it against PyTorch, quantize it on request, and publish the bundle.

    Returns:
        The manifest, as it stands in the output folder.

    Raises:
        DistillError: if the graph differs from PyTorch, or no INT8 setting stays within `max_drop`.
    """
    started = time.monotonic()
    check_output(options.output, options.overwrite, "export")
    student = read_manifest(options.student, "train-student", "--student")
    verify(options.student, student)
    data = reload_data(student.data, student.labels, options.data)
    manifest = Manifest(
        stage="export",
        labels=student.labels,
        options={k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        seed=student.seed,
        # The findings quote training text, which must not travel with a bundle.
        data={key: value for key, value in student.data.items() if key != "findings"},
        parents=[{"path": str(options.student), "manifest_sha256": manifest_hash(options.student)}],
        max_length=student.max_length,
        parameters=student.parameters,
        details={"files": {"fp32": FP32, "cpu": INT8 if options.int8 else FP32, "cuda": FP32}},
    )
    with publish(options.output, manifest, options.overwrite) as folder, TemporaryDirectory() as scratch:
        exported = export_fp32(options.student, Path(scratch))
        _fill(folder, exported, options, manifest, data)
        manifest.wall_seconds = round(time.monotonic() - started, 1)
    return manifest


def _fill(folder: Path, exported: Path, options: ExportOptions, manifest: Manifest, data: Data) -> None:
    (folder / "onnx").mkdir()
    external = exported.with_name(f"{exported.name}_data")
    if external.exists():  # more than 2 GB: left as it is
        for path in (exported, external):
            shutil.copy(path, folder / "onnx" / path.name)
    else:
        manifest.details["first_token_only"] = shorten(exported, folder / FP32)
    tokenizer = load_tokenizer(str(options.student), manifest.max_length, "--student")
    tokenizer.save_pretrained(folder)
    shutil.copy(options.student / "config.json", folder / "config.json")
    for path in folder.iterdir():
        if path.is_file() and path.name not in TOKENIZER_FILES:
            path.unlink()
    # A first manifest lets Classifier open the draft; publish() replaces it.
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))
    draft = _Draft(folder, options.student, manifest, data)
    model = load_model(str(options.student), manifest.labels, "--student")
    pytorch = predict_logits(model, tokenizer, data.splits["validation"], "cpu", "fp32")
    fp32 = {split: draft.logits(FP32, split) for split in EVALUATED}
    parity = compare(pytorch, fp32["validation"])
    logger.info("fp32 ONNX against PyTorch: %s", parity)
    require_parity(parity)
    manifest.details["parity"] = asdict(parity)
    manifest.details["cpu"] = cpu_name()
    versions = {"onnx-fp32": fp32}
    if options.int8:
        reference = draft.macro_f1(fp32["validation"], "validation")
        chosen, trials = _quantized(draft, exported, model.config, reference, options.max_drop)
        versions["int8"] = {split: draft.logits(INT8, split) for split in EVALUATED}
        agreement = compare(fp32["validation"], versions["int8"]["validation"])
        sizes = {name: (folder / file).stat().st_size for name, file in (("fp32", FP32), ("int8", INT8))}
        manifest.details["int8"] = {
            "setting": asdict(chosen),
            "trials": [trial.as_dict() for trial in trials],
            "label_agreement": agreement.label_agreement,
            "size_ratio": sizes["int8"] / sizes["fp32"],
        }
    # Fitted on validation text alone; `Classifier` divides the logits of each file by its temperature.
    manifest.details["temperature"] = {
        file: fit_temperature(versions[name]["validation"], draft.labels["validation"])
        for name, file in (("onnx-fp32", FP32), ("int8", INT8))
        if name in versions
    }
    final = "int8" if options.int8 else "onnx-fp32"
    manifest.metrics = {
        split: score(draft.labels[split], versions[final][split].argmax(1), len(data.labels)).summary()
        for split in EVALUATED
    }
    write_predictions(folder, data.splits, versions)
    if options.single_file:
        _write_single_file(folder, manifest)
    (folder / "README.md").write_text(_model_card(manifest), encoding="utf-8")


def _write_single_file(folder: Path, manifest: Manifest) -> None:
    """Write the CPU provider's file with all that `Classifier` needs beside it."""
    file = manifest.details["files"]["cpu"]
    if (folder / f"{file}_data").exists():
        raise DistillError(
            "--single-file: an ONNX file holds at most 2 GB, and this model has more; leave it out"
        )
    details = {**manifest.details, "files": {"cpu": file}}
    parts = {MANIFEST: json.dumps({**asdict(manifest), "details": details}, ensure_ascii=False)}
    for name in (TOKENIZER, TOKENIZER_SETTINGS):
        parts[name] = (folder / name).read_text(encoding="utf-8")
    write_single_file(folder / SINGLE, (folder / file).read_bytes(), parts)


def _model_card(manifest: Manifest) -> str:
    test = manifest.metrics["test"]
    return f"""---
pipeline_tag: text-classification
library_name: onnx
---
# Text classifier

Distilled and exported with [distill](https://pypi.org/project/distill-onnx/).

Labels: {", ".join(manifest.labels)}.

| | |
|---|---|
| test macro-F1 | {test["macro_f1"]:.4f} |
| test accuracy | {test["accuracy"]:.4f} |
| parameters | {manifest.parameters:,} |
| file for the CPU | `{manifest.details["files"]["cpu"]}` |

```python
from distill import Classifier

classifier = Classifier("this/folder")
classifier.predict(["a text"])
```

Everything about how it was made, with the SHA-256 of every file, is in `distill.json`.
"""
