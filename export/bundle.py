"""Assemble the bundle: fp32 and INT8 ONNX files, tokenizer, labels, model card, manifest, predictions."""

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from distill.export.cpu import write_int8
from distill.export.cuda import write_cuda
from distill.export.draft import FP32, INT8, Draft
from distill.export.equal_rows import store_equal_rows_once
from distill.export.onnx import export_fp32, shorten
from distill.export.placement import off_cuda
from distill.export.verification import require_parity

from distill.artifact import Manifest, check_output, manifest_hash, publish, read_manifest, verify
from distill.averaging import AveragingConfig
from distill.bundle import MANIFEST, TOKENIZER, TOKENIZER_SETTINGS, second_column, write_single_file
from distill.calibration import fit_decision
from distill.data import Data, reload_data
from distill.decision import MULTI_LABEL, Decision
from distill.errors import DistillError
from distill.latency import cpu_name
from distill.long_texts import HEAD
from distill.metrics import score
from distill.models import load_model, load_tokenizer
from distill.predictions import EVALUATED, write_predictions
from distill.training import predict_logits

logger = logging.getLogger(__name__)
SINGLE = "classifier.onnx"
LARGEST = 2**31  # bytes of a graph in one file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")


@dataclass(frozen=True)
class ExportOptions:
    """Options of `distill export`.

    Attributes:
        student: folder of `distill train-student`.
        output: folder to write.
        provider: "cpu", "cuda" or both: what to write optimised files for.
        int8: add an INT8 file for each.
        max_drop: points of validation macro-F1 that FP16 and INT8 may lose.
        exporter: "optimum" or "transformers"; the one that the installed transformers allows when left out.
        single_file: add `classifier.onnx`, which holds the whole bundle, with the CPU's file (with that of
            CUDA, where it is the only provider).
        data: the data, if it has moved.
        overwrite: replace an existing output folder.
    """

    student: Path = Path("runs/student")
    output: Path = Path("runs/export")
    provider: tuple[str, ...] = ("cpu",)
    int8: bool = False
    max_drop: float = 1.0
    exporter: str | None = None
    single_file: bool = False
    data: str | None = None
    overwrite: bool = False


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
        problem_type=student.problem_type,
        long_texts=student.long_texts,
        details={"files": {"fp32": FP32, "cpu": FP32}},
    )
    with publish(options.output, manifest, options.overwrite) as folder, TemporaryDirectory() as scratch:
        exported = export_fp32(options.student, Path(scratch), options.exporter)
        _fill(folder, exported, options, manifest, data)
        manifest.wall_seconds = round(time.monotonic() - started, 1)
    return manifest


def _write_config(student: Path, folder: Path, max_length: int) -> None:
    """Say what Optimum and transformers.js go by when they run a graph: the kind of model, and its labels.

    They do not know a student without layers; the graph of a DistilBERT has the same inputs and output.
    """
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == AveragingConfig.model_type:
        config |= {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"]}
        config["max_position_embeddings"] = max_length
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _fill(folder: Path, exported: Path, options: ExportOptions, manifest: Manifest, data: Data) -> None:
    _place(exported, folder, manifest)
    tokenizer = load_tokenizer(str(options.student), manifest.max_length, "--student", manifest.long_texts)
    tokenizer.save_pretrained(folder)
    _write_config(options.student, folder, manifest.max_length)
    for path in folder.iterdir():
        if path.is_file() and path.name not in TOKENIZER_FILES:
            path.unlink()
    # A first manifest lets Classifier open the draft; publish() replaces it.
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))
    draft = Draft(folder, manifest, data)
    model = load_model(str(options.student), manifest.labels, "--student")
    pytorch = predict_logits(model, tokenizer, data.splits["validation"], "cpu", "fp32")
    fp32 = {split: draft.logits(FP32, split) for split in EVALUATED}
    parity = draft.compare(pytorch, fp32["validation"])
    logger.info("fp32 ONNX against PyTorch: %s", parity)
    require_parity(parity)
    manifest.details["parity"] = asdict(parity)
    manifest.details["cpu"] = cpu_name()
    versions = {"onnx-fp32": fp32}
    if options.int8 and "cpu" in options.provider:
        found = write_int8(draft, exported, model.config, fp32["validation"], options.max_drop)
        versions["int8"] = {split: draft.logits(INT8, split) for split in EVALUATED}
        agreement = draft.compare(fp32["validation"], versions["int8"]["validation"])
        sizes = {name: (folder / file).stat().st_size for name, file in (("fp32", FP32), ("int8", INT8))}
        manifest.details["int8"] = {
            **found,
            "label_agreement": agreement.label_agreement,
            "size_ratio": sizes["int8"] / sizes["fp32"],
        }
        manifest.details["files"]["cpu"] = INT8
    # Every node of these has been held against the CUDA provider's kernels.
    on_cuda = [FP32] if manifest.details["files"].get("cuda") else []
    if "cuda" in options.provider:
        _add_cuda(draft, exported, model.config, options, versions)
        found = manifest.details["cuda"]
        on_cuda += [found[name]["file"] for name in ("fp16", "int8") if name in found]
    manifest.details["on_cuda"] = on_cuda
    files = {"onnx-fp32": FP32, "int8": INT8}
    final = "int8" if "int8" in versions else "onnx-fp32"
    for name in versions:
        # On validation text alone.
        decision = fit_decision(versions[name]["validation"], draft.labels["validation"])
        _record(manifest, files[name], decision)
        if name == final:
            manifest.metrics = {
                split: score(
                    draft.labels[split], decision.answers(versions[name][split]), len(data.labels)
                ).summary()
                for split in EVALUATED
            }
    write_predictions(folder, data.splits, versions)
    if options.single_file:
        _write_single_file(folder, manifest, "cpu" if "cpu" in options.provider else "cuda")
    (folder / "README.md").write_text(_model_card(manifest), encoding="utf-8")


def _place(exported: Path, folder: Path, manifest: Manifest) -> None:
    """Put the fp32 graph into the bundle, and find out whether CUDA has kernels for all of it."""
    (folder / "onnx").mkdir()
    external = exported.with_name(f"{exported.name}_data")
    if external.exists():
        graph = onnx.load(exported)
        if store_equal_rows_once(graph) and graph.ByteSize() < LARGEST:
            onnx.save(graph, exported)
            external.unlink()
    if external.exists():  # more than 2 GB: left as it is
        for path in (exported, external):
            shutil.copy(path, folder / "onnx" / path.name)
    else:
        manifest.details["first_token_only"] = shorten(exported, folder / FP32)
    off = off_cuda(onnx.load(folder / FP32, load_external_data=False))
    if off:
        logger.info("%s is not for CUDA: %s", FP32, off[0])
    else:
        manifest.details["files"]["cuda"] = FP32


def _record(manifest: Manifest, file: str, decision: Decision) -> None:
    """Tell `Classifier` what the logits of a file mean."""
    manifest.details.setdefault("temperature", {})[file] = decision.temperature
    if decision.thresholds is not None:
        manifest.details.setdefault("thresholds", {})[file] = list(decision.thresholds)


def _add_cuda(
    draft: Draft, exported: Path, config: Any, options: ExportOptions, versions: dict[str, Any]
) -> None:
    """Add the files for CUDA, and to the manifest what they are worth."""
    validation = {name: logits["validation"] for name, logits in versions.items()}
    found = write_cuda(draft, exported, config, options.int8, validation, options.max_drop)
    details = draft.manifest.details
    details["cuda"], details["files"]["cuda"] = found, found["file"]
    for name in ("fp16", "int8"):
        if name in found:
            entry = found[name]
            _record(draft.manifest, entry["file"], Decision(entry["temperature"], entry["thresholds"]))


def _write_single_file(folder: Path, manifest: Manifest, provider: str) -> None:
    """Write a provider's file with all that `Classifier` needs beside it."""
    files = manifest.details["files"]
    file = files[provider]
    if (folder / f"{file}_data").exists():
        raise DistillError(
            "--single-file: an ONNX file holds at most 2 GB, and this model has more; leave it out"
        )
    details = {**manifest.details, "files": {name: path for name, path in files.items() if path == file}}
    parts = {MANIFEST: json.dumps({**asdict(manifest), "details": details}, ensure_ascii=False)}
    for name in (TOKENIZER, TOKENIZER_SETTINGS):
        parts[name] = (folder / name).read_text(encoding="utf-8")
    write_single_file(folder / SINGLE, (folder / file).read_bytes(), parts)


def _model_card(manifest: Manifest) -> str:
    test = manifest.metrics["test"]
    several = ""
    if manifest.problem_type == MULTI_LABEL:
        several = " A text has any number of them: those whose logit reaches its threshold in `distill.json`."
    if manifest.long_texts != HEAD:
        several += (
            f"\n\nOf texts longer than {manifest.max_length} tokens `Classifier` reads more than the "
            f"beginning ({manifest.long_texts}); other runtimes read that alone, and answer differently."
        )
    files = manifest.details["files"]
    cuda = f"| file for CUDA | `{files['cuda']}` |\n" if "cuda" in files else ""
    example = '("a text", "another one")' if second_column(manifest.data) else '"a text"'
    return f"""---
pipeline_tag: text-classification
library_name: onnx
---
# Text classifier

Distilled and exported with [distill](https://pypi.org/project/distill-onnx/).

Labels: {", ".join(manifest.labels)}.{several}

| | |
|---|---|
| test macro-F1 | {test["macro_f1"]:.4f} |
| test accuracy | {test["accuracy"]:.4f} |
| parameters | {manifest.parameters:,} |
| file for the CPU | `{files["cpu"]}` |
{cuda}
```python
from distill import Classifier

classifier = Classifier("this/folder")
classifier.predict([{example}])
```

Everything about how it was made, with the SHA-256 of every file, is in `distill.json`.
"""
