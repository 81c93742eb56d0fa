"""The bundle's INT8 file for the CPU: every setting is tried on the student's own text, the best is kept."""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from distill.export.draft import FP32, INT8, Draft
from distill.export.onnx import fuse, shorten
from distill.export.quantization import ABOUT_AS_FAST, Setting, Trial, choose, quantize, settings
from distill.export.smoothing import channel_ranges, smooth
from numpy.typing import NDArray

from distill.errors import DistillError

logger = logging.getLogger(__name__)
COMPARED = 200  # texts of validation that a setting's distance from fp32 is measured on, or somewhat more


def write_int8(
    draft: Draft, exported: Path, config: Any, reference: NDArray[np.float32], max_drop: float
) -> dict[str, Any]:
    """Quantize in every setting and leave the chosen one as `onnx/model_quantized.onnx`.

    Args:
        draft: the bundle; its fp32 file is in place.
        exported: the fp32 graph as Optimum wrote it.
        config: of the student's architecture.
        reference: fp32 logits on validation text, shape (n, classes).
        max_drop: points of validation macro-F1 that it may lose.

    Returns:
        What the manifest keeps: the chosen setting and all trials.

    Raises:
        DistillError: if no setting can quantize the graph, or none keeps `max_drop`.
    """
    scratch = draft.folder / "onnx" / "trials"
    scratch.mkdir()
    graphs = _graphs(draft, exported, config, scratch)
    every = settings(fusion=True in graphs)
    candidates: dict[Setting, Path] = {}
    failed: list[Trial] = []

    def attempt(setting: Setting, graph: Path) -> None:
        path = scratch / f"{every.index(setting)}.onnx"
        try:
            quantize(graph, path, setting)
            draft.open(path).logits(draft.texts["validation"][0])
        except Exception as error:  # a setting that does not suit this graph is not an error of the export
            failed.append(Trial(setting, error=(str(error).splitlines() or [type(error).__name__])[0]))
        else:
            candidates[setting] = path

    # One setting each tells whether fusion makes INT8 faster here; then the others of the faster order.
    firsts = [next(one for one in every if one.fused is fused) for fused in graphs]
    for setting in firsts:
        attempt(setting, graphs[setting.fused])
    times = draft.latency(candidates)
    slower = {one.fused for one in times if times[one] > ABOUT_AS_FAST * min(times.values())}
    smoothed = {fused: _smoothed(draft, path) for fused, path in graphs.items() if fused not in slower}
    for setting in every:
        graph = (smoothed if setting.smooth else graphs).get(setting.fused)
        if setting not in firsts and setting.fused not in slower and graph:
            attempt(setting, graph)
    if not candidates:
        raise DistillError(f"--int8: no setting could quantize this graph: {failed[0].error}")

    sample = slice(None, None, max(1, len(reference) // COMPARED))
    texts = draft.texts["validation"][sample]

    def difference_of(path: Path) -> float:
        return float(np.abs(draft.open(path).predict_logits(texts) - reference[sample]).mean())

    def macro_f1_of(path: Path) -> float:
        return draft.macro_f1(draft.logits(path, "validation"))

    wanted = draft.macro_f1(reference)
    times = draft.latency(candidates)
    chosen, trials = choose(candidates, times, difference_of, macro_f1_of, wanted, max_drop)
    logger.info("%s: %s", INT8, chosen)
    shutil.move(candidates[chosen], draft.folder / INT8)
    shutil.rmtree(scratch)
    return {"setting": asdict(chosen), "trials": [trial.as_dict() for trial in trials + failed]}


def _graphs(draft: Draft, exported: Path, config: Any, scratch: Path) -> dict[bool, Path]:
    """The fp32 graphs to quantize, by whether they are fused; those that there are."""
    fused = scratch / "fused.onnx"
    if not fuse(exported, fused, config):
        return {False: draft.folder / FP32}
    shorten(fused, fused)
    return {False: draft.folder / FP32, True: fused}


def _smoothed(draft: Draft, graph: Path) -> Path | None:
    """A graph with the outlier channels of its activations smoothed, beside it; None where it has none."""
    if (draft.folder / f"{FP32}_data").exists():  # more than 2 GB
        return None
    model = onnx.load(graph)
    changed = smooth(model, channel_ranges(draft, model))
    if changed is None:
        return None
    path = draft.folder / "onnx" / "trials" / f"smooth_{graph.name}"
    onnx.save(changed, path)
    return path
