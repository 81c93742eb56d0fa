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
from distill.export.quantization import Setting, Trial, choose, quantize, settings
from distill.export.smoothing import channel_ranges, smooth
from numpy.typing import NDArray

from distill.errors import DistillError

logger = logging.getLogger(__name__)


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
    candidates: dict[Setting, Path] = {}
    failed: list[Trial] = []
    for number, setting in enumerate(settings(fusion=(True, False) in graphs)):
        path = scratch / f"{number}.onnx"
        graph = graphs.get((setting.fused, setting.smooth))
        if graph is None:  # no outliers to smooth
            continue
        try:
            quantize(graph, path, setting)
            draft.open(path).logits(draft.texts["validation"][0])
        except Exception as error:  # a setting that does not suit this graph is not an error of the export
            failed.append(Trial(setting, error=(str(error).splitlines() or [type(error).__name__])[0]))
        else:
            candidates[setting] = path
    if not candidates:
        raise DistillError(f"--int8: no setting could quantize this graph: {failed[0].error}")

    def scores_of(path: Path) -> tuple[float, float]:
        logits = draft.logits(path, "validation")
        return draft.macro_f1(logits), draft.compare(reference, logits).mean_logit_difference

    wanted = draft.macro_f1(reference)
    chosen, trials = choose(candidates, draft.latency(candidates), scores_of, wanted, max_drop)
    logger.info("%s: %s", INT8, chosen)
    shutil.move(candidates[chosen], draft.folder / INT8)
    shutil.rmtree(scratch)
    return {"setting": asdict(chosen), "trials": [trial.as_dict() for trial in trials + failed]}


def _graphs(draft: Draft, exported: Path, config: Any, scratch: Path) -> dict[tuple[bool, bool], Path]:
    """The fp32 graphs to quantize, by whether they are fused and smoothed; those that there are."""
    graphs = {(False, False): draft.folder / FP32}
    fused = scratch / "fused.onnx"
    if fuse(exported, fused, config):
        shorten(fused, fused)
        graphs[True, False] = fused
    if (draft.folder / f"{FP32}_data").exists():
        return graphs
    for (is_fused, _), path in list(graphs.items()):
        model = onnx.load(path)
        smoothed = smooth(model, channel_ranges(draft, model))
        if smoothed is not None:
            graphs[is_fused, True] = scratch / f"smooth_{path.name}"
            onnx.save(smoothed, graphs[is_fused, True])
    return graphs
