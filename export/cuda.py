"""The bundle's files for the CUDA provider: which are written, how they are checked, which one is taken."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from distill.export.cuda_graphs import (
    quantize_static,
    quantize_weights,
    separate_attention,
    static_grids,
    to_fp16,
)
from distill.export.draft import FP32, Draft
from distill.export.observation import channel_ranges, moments, observe
from distill.export.onnx import fuse, shorten
from distill.export.placement import require_cuda
from numpy.typing import NDArray

from distill.calibration import fit_decision
from distill.engine import PROVIDERS
from distill.errors import DistillError

logger = logging.getLogger(__name__)
FP16 = "onnx/model_fp16.onnx"
INT8_CUDA = "onnx/model_int8_cuda.onnx"
Logits = Mapping[str, NDArray[np.float32]]


def write_cuda(
    draft: Draft, exported: Path, config: Any, int8: bool, versions: Logits, max_drop: float
) -> dict[str, Any]:
    """Write FP16, and INT8 on request, and take the fastest where there is a GPU to measure on, else FP16.

    Every node is held against the CUDA provider's kernels; the numbers are checked on validation text on the
    CPU provider, which computes FP16 in fp32 between the roundings.

    Args:
        draft: the bundle; its fp32 file is in place.
        exported: the fp32 graph as Optimum wrote it.
        config: of the student's architecture.
        int8: write an INT8 file too.
        versions: logits on validation text, shape (n, classes), of "onnx-fp32", and of any "int8".
        max_drop: points of validation macro-F1 that a file may lose.

    Returns:
        What the manifest keeps: "file" (the one that CUDA gets) and each file's figures.

    Raises:
        DistillError: if a node would run on the CPU, or a file loses more than `max_drop`.
    """
    fused = draft.folder / "onnx" / "fused.onnx"
    if fuse(exported, fused, config, provider="cuda"):
        shorten(fused, fused, provider="cuda")
        graph = onnx.load(fused)
        fused.unlink()
    else:
        graph = onnx.load(draft.folder / FP32)
    onnx.save(to_fp16(graph), draft.folder / FP16)
    attentions = sum(node.op_type in ("Attention", "MultiHeadAttention") for node in graph.graph.node)
    if not attentions:
        logger.info("ONNX Runtime fuses no attention of %s: it runs as single operators", config.model_type)
    found: dict[str, Any] = {"fused_attentions": attentions, "fp16": _checked(draft, FP16, versions, "FP16")}
    _require_accuracy(found["fp16"], FP16, draft.macro_f1(versions["onnx-fp32"]), max_drop)
    if int8:
        found["int8"] = _quantized(draft, graph, versions, max_drop)
    files = [entry["file"] for entry in (found["fp16"], found.get("int8")) if entry]
    found["measured_ms"] = _latency(draft, files)
    found["file"] = min(files, key=found["measured_ms"].__getitem__) if found["measured_ms"] else FP16
    logger.info("CUDA gets %s%s", found["file"], "" if found["measured_ms"] else "; no GPU to measure on")
    return found


def _checked(draft: Draft, file: str, versions: Logits, name: str) -> dict[str, Any]:
    """Hold a file against the kernels and against fp32."""
    require_cuda(onnx.load(draft.folder / file), file)
    logits = draft.logits(file, "validation")
    parity = draft.compare(versions["onnx-fp32"], logits)
    logger.info("CUDA, %s against fp32: %s", name, parity)
    figures = {
        "file": file,
        **asdict(parity),
        "macro_f1": draft.macro_f1(logits),
        **asdict(fit_decision(logits, draft.labels["validation"])),
    }
    if "int8" in versions:
        figures["agreement_with_cpu_int8"] = draft.compare(versions["int8"], logits).label_agreement
    return figures


def _require_accuracy(figures: dict[str, Any], file: str, reference: float, max_drop: float) -> None:
    drop = 100 * (reference - figures["macro_f1"])
    if not drop <= max_drop:
        raise DistillError(
            f"--max-drop {max_drop:g}: {file} loses {drop:.2f} points of validation macro-F1 "
            f"({reference:.4f} to {figures['macro_f1']:.4f}); allow that much, or train the student longer"
        )


def _quantized(draft: Draft, fused: onnx.ModelProto, versions: Logits, max_drop: float) -> dict[str, Any]:
    """Leave the INT8 form within `max_drop` that is faster on a GPU, or without one nearer to fp32."""
    separated = separate_attention(fused)
    grids = static_grids(separated, channel_ranges(observe(draft, separated)))
    observed = moments(observe(draft, separated), lambda name, rows: grids[name].values(rows))
    forms = {
        "static": quantize_static(separated, grids, observed),
        "weights": quantize_weights(separated),
    }
    wanted = draft.macro_f1(versions["onnx-fp32"])
    trials = []
    for form, model in forms.items():
        file = f"onnx/{form}.onnx"
        onnx.save(model, draft.folder / file)
        trials.append({"form": form, **_checked(draft, file, versions, f"INT8 {form}")})
    measured = _latency(draft, [trial["file"] for trial in trials])
    held = [trial for trial in trials if 100 * (wanted - trial["macro_f1"]) <= max_drop]
    if not held:
        _require_accuracy(max(trials, key=lambda trial: trial["macro_f1"]), INT8_CUDA, wanted, max_drop)
    best = min(held, key=lambda trial: measured.get(trial["file"], trial["mean_logit_difference"]))
    (draft.folder / best["file"]).rename(draft.folder / INT8_CUDA)
    for trial in trials:
        (draft.folder / trial["file"]).unlink(missing_ok=True)
        trial["latency_ms"] = measured.get(trial["file"])
        del trial["file"]
    logger.info("%s: INT8 %s", INT8_CUDA, best["form"])
    return {**best, "file": INT8_CUDA, "trials": trials}


def _latency(draft: Draft, files: list[str]) -> dict[str, float]:
    """Median milliseconds of one text on the GPU; empty where there is none."""
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return {}
    try:
        return draft.latency({file: file for file in files}, provider="cuda")
    except DistillError as error:  # the package for GPUs on a machine without one
        logger.warning("%s; the CUDA files are not measured", error)
        return {}
