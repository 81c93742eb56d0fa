"""The bundle's INT8 file for the CPU: every setting is tried on the student's own text, the best is kept."""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from distill.export.draft import FP32, INT8, Draft
from distill.export.observation import channel_ranges, dynamic_uint8, moments, observe, products
from distill.export.onnx import fuse, shorten
from distill.export.quantization import (
    ABOUT_AS_FAST,
    Setting,
    Trial,
    choose,
    quantize,
    settings,
    spell_products,
)
from distill.export.rounding import Moments, round_weights
from distill.export.smoothing import smooth
from numpy.typing import NDArray

from distill.errors import DistillError

logger = logging.getLogger(__name__)
COMPARED = 200  # texts of validation, at most, that a setting's distance from fp32 is measured on


def write_int8(
    draft: Draft, exported: Path, config: Any, reference: NDArray[np.float32], max_drop: float
) -> dict[str, Any]:
    """Quantize in several settings and leave the chosen one as `onnx/model_quantized.onnx`.

    One setting each tells whether fusion makes INT8 faster on this CPU; the others of the slower order are
    made only if none of the faster one keeps `max_drop`. A setting that may be kept has its weights rounded
    together first (`rounding`), and keeps them so if that brings it nearer to fp32.

    Args:
        draft: the bundle; its fp32 file is in place.
        exported: the fp32 graph as Optimum wrote it.
        config: of the student's architecture.
        reference: fp32 logits on validation text, shape (n, classes).
        max_drop: points of validation macro-F1 that it may lose.

    Returns:
        What the manifest keeps: the chosen setting, its distance from fp32 if rounding together brought it
        nearer (on text that it was fitted to in part), and all trials.

    Raises:
        DistillError: if no setting can quantize the graph, or none keeps `max_drop`.
    """
    scratch = draft.folder / "onnx" / "trials"
    scratch.mkdir()
    trials = _Trials(draft, _graphs(draft, exported, config, scratch), scratch, reference)
    slower = trials.slower_order()
    for fused in trials.graphs.keys() - slower:
        trials.make(fused)
    try:
        chosen, tried = trials.choose(max_drop)
    except DistillError:
        if not slower:
            raise
        for fused in slower:
            trials.make(fused)
        chosen, tried = trials.choose(max_drop)
    logger.info("%s: %s", INT8, chosen)
    shutil.move(trials.candidates[chosen], draft.folder / INT8)
    shutil.rmtree(scratch)
    tried += [Trial(setting, error=error) for setting, error in trials.failed.items()]
    return {
        "setting": asdict(chosen),
        "rounded_logit_difference": trials.rounded.get(chosen),
        "trials": [trial.as_dict() for trial in tried],
    }


class _Trials:
    """The files of the settings that were tried.

    Attributes:
        graphs: the fp32 graphs to quantize, by whether they are fused.
        candidates: the file of each setting that worked.
        failed: why others did not.
        rounded: mean difference from the fp32 logits of those whose weights were rounded together; None where
            that brought them no nearer.
    """

    def __init__(
        self, draft: Draft, graphs: dict[bool, Path], scratch: Path, reference: NDArray[np.float32]
    ) -> None:
        self.draft, self.graphs, self.scratch = draft, graphs, scratch
        self.reference, self.wanted = reference, draft.macro_f1(reference)
        self.settings = settings(fusion=True in graphs)
        self.candidates: dict[Setting, Path] = {}
        self.failed: dict[Setting, str] = {}
        self.rounded: dict[Setting, float | None] = {}
        self.source: dict[Setting, Path] = {}
        self.moments: dict[Path, dict[str, Moments]] = {}

    def slower_order(self) -> set[bool]:
        """Whether graphs with fusion, or those without, are slower by a tenth, by a setting each."""
        for fused, graph in self.graphs.items():
            self._attempt(next(one for one in self.settings if one.fused is fused), graph)
        times = self.draft.latency(self.candidates)
        return {one.fused for one in times if times[one] > ABOUT_AS_FAST * min(times.values())}

    def make(self, fused: bool) -> None:
        """Quantize a graph in the settings that are left."""
        smoothed = _smoothed(self.draft, self.graphs[fused], self.scratch)
        for setting in self.settings:
            graph = smoothed if setting.smooth else self.graphs[fused]
            tried = setting in self.candidates or setting in self.failed
            if setting.fused is fused and graph and not tried:
                self._attempt(setting, graph)

    def _attempt(self, setting: Setting, graph: Path) -> None:
        path = self.scratch / f"{self.settings.index(setting)}.onnx"
        try:
            quantize(graph, path, setting)
            self.draft.open(path).logits(self.draft.texts["validation"][0])
        except Exception as error:  # a setting that does not suit this graph is not an error of the export
            self.failed[setting] = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            self.candidates[setting], self.source[setting] = path, graph

    def choose(self, max_drop: float) -> tuple[Setting, list[Trial]]:
        """The setting to keep, and all that were made."""
        if not self.candidates:
            reason = next(iter(self.failed.values()))
            raise DistillError(f"--int8: no setting could quantize this graph: {reason}")
        times = self.draft.latency(self.candidates)
        return choose(self.candidates, times, self.difference, self.macro_f1, self.wanted, max_drop)

    def difference(self, path: Path) -> float:
        """A file's mean difference from the fp32 logits, on some of the validation texts."""
        count = len(self.reference)
        rows = np.unique(np.linspace(0, count - 1, min(COMPARED, count)).astype(int))
        texts = [self.draft.texts["validation"][row] for row in rows]
        return float(np.abs(self.draft.open(path).predict_logits(texts) - self.reference[rows]).mean())

    def macro_f1(self, path: Path) -> float:
        """Macro-F1 of a setting's file on validation text, with its weights rounded together."""
        self._round(next(setting for setting, one in self.candidates.items() if one == path))
        return self.draft.macro_f1(self.draft.logits(path, "validation"))

    def _round(self, setting: Setting) -> None:
        """Round a file's weights together, if that brings it nearer to fp32."""
        if _is_large(self.draft) or setting in self.rounded:
            return
        path, source = self.candidates[setting], self.source[setting]
        graph, quantized = onnx.load(source), onnx.load(path)
        if source not in self.moments:  # those of one graph alone: of wide layers they are large
            self.moments = {source: moments(observe(self.draft, graph), dynamic_uint8)}
        round_weights(quantized, products(graph), self.moments[source])
        trial = path.with_suffix(".rounded.onnx")
        onnx.save(quantized, trial)
        before, after = self.difference(path), self.difference(trial)
        nearer = after < before
        kept = "" if nearer else ": not kept"
        logger.info("INT8 (%s): logits off by %.3f with weights rounded together%s", setting, after, kept)
        self.rounded[setting] = after if nearer else None
        if nearer:
            trial.replace(path)


def _graphs(draft: Draft, exported: Path, config: Any, scratch: Path) -> dict[bool, Path]:
    """The fp32 graphs to quantize, by whether they are fused; those that there are."""
    if _is_large(draft):
        return {False: draft.folder / FP32}
    found = {False: scratch / "plain.onnx"}
    shutil.copy(draft.folder / FP32, found[False])
    fused = scratch / "fused.onnx"
    if fuse(exported, fused, config):
        shorten(fused, fused)
        found[True] = fused
    for path in found.values():
        graph = onnx.load(path)
        spell_products(graph)
        onnx.save(graph, path)
    return found


def _is_large(draft: Draft) -> bool:
    """Whether the graph has more than the 2 GB that fit one file: it is quantized as it is."""
    return (draft.folder / f"{FP32}_data").exists()


def _smoothed(draft: Draft, graph: Path, scratch: Path) -> Path | None:
    """A graph with the outlier channels of its activations smoothed; None where it has none."""
    if _is_large(draft):
        return None
    model = onnx.load(graph)
    changed = smooth(model, channel_ranges(observe(draft, model)))
    if changed is None:
        return None
    path = scratch / f"smooth_{graph.name}"
    onnx.save(changed, path)
    return path
