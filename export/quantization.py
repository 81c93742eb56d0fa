"""INT8 for the CPU provider: several settings are tried, the fastest that keeps accuracy is kept."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.latency import cpu_has_vnni

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """One way to quantize. Weights INT8; activations are quantized dynamically to UINT8."""

    fused: bool = False
    per_channel: bool = True
    weight_type: str = "QInt8"
    reduce_range: bool = False
    attention: bool = False
    """Quantize the products of activations in attention too, not only those with constant weights."""

    def __str__(self) -> str:
        parts = [self.weight_type, "per channel" if self.per_channel else "per tensor"]
        parts += [name for name in ("fused", "reduce_range", "attention") if getattr(self, name)]
        return ", ".join(parts)


def settings(fusion: bool, vnni: bool | None = None) -> list[Setting]:
    """List the settings worth trying on this CPU.

    Without VNNI, UINT8 x INT8 products are summed in pairs in 16 bits and may saturate, so weights of 7 bits
    (`reduce_range`) come in (onnxruntime#6545).
    """
    vnni = cpu_has_vnni() if vnni is None else vnni
    found = []
    for fused in (False, True) if fusion else (False,):
        for reduce_range in (False,) if vnni else (True, False):
            found += [
                Setting(fused, True, "QInt8", reduce_range),
                Setting(fused, False, "QInt8", reduce_range),
                Setting(fused, False, "QUInt8", reduce_range),
            ]
        found.append(Setting(fused, True, "QInt8", not vnni, attention=True))
    return found


def quantize(model: Path, target: Path, setting: Setting) -> None:
    """Write `model` with dynamic INT8: matrix products and the embedding table (Gather)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Gather", "Attention", "EmbedLayerNormalization"],
            per_channel=setting.per_channel,
            reduce_range=setting.reduce_range,
            weight_type=QuantType[setting.weight_type],
            extra_options={
                "MatMulConstBOnly": not setting.attention,
                # After fusion the quantizer cannot infer types by itself (optimum#2186).
                "DefaultTensorType": onnx.TensorProto.FLOAT,
            },
        )
    finally:
        logging.disable(logging.NOTSET)
    _keep_layer_norm_apart(target)


def _keep_layer_norm_apart(path: Path) -> None:
    """Let no runtime fuse LayerNormalization with the addition before it.

    ONNX Runtime's fused CPU kernel is slower than the two plain ones, and it rounds differently, which
    dynamic quantization then magnifies. Its fusion looks for Add, so the addition is spelt as a Sum of two.
    Optimum and transformers, which open the file with every fusion on, then compute what `Classifier` does.
    """
    import onnx

    model = onnx.load(path)
    normalized = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    for node in model.graph.node:
        if node.op_type == "Add" and node.output[0] in normalized:
            node.op_type = "Sum"
    onnx.save(model, path)


@dataclass(frozen=True)
class Trial:
    """What a setting gave: median milliseconds, validation macro-F1, bytes, or why it failed."""

    setting: Setting
    latency_ms: float = float("inf")
    macro_f1: float | None = None
    size: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {k: v for k, v in asdict(self).items() if v != float("inf")}


def choose(
    candidates: dict[Setting, Path],
    latency_of: Callable[[dict[Setting, Path]], dict[Setting, float]],
    macro_f1_of: Callable[[Path], float],
    reference: float,
    max_drop: float,
) -> tuple[Setting, list[Trial]]:
    """Keep the fastest setting whose validation macro-F1 is at most `max_drop` points below the reference.

    Args:
        candidates: setting -> quantized file.
        latency_of: measures all candidates side by side, in milliseconds.
        macro_f1_of: scores a file on validation, 0 to 1.
        reference: macro-F1 of the fp32 graph on validation, 0 to 1.
        max_drop: in points of macro-F1 (hundredths).

    Returns:
        The chosen setting and every trial, fastest first. Settings slower than the chosen one are not scored.

    Raises:
        DistillError: if no setting keeps accuracy; it says how far the best one falls short.
    """
    latencies = latency_of(candidates)
    trials = []
    chosen: Setting | None = None
    for setting in sorted(candidates, key=latencies.__getitem__):
        path = candidates[setting]
        scored = None
        if chosen is None:
            scored = macro_f1_of(path)
            drop = 100 * (reference - scored)
            logger.info(
                "INT8 (%s): %.2f ms, macro-F1 %.4f (%+.2f points)", setting, latencies[setting], scored, -drop
            )
            if drop <= max_drop:
                chosen = setting
        trials.append(Trial(setting, latencies[setting], scored, path.stat().st_size))
    if chosen is None:
        best = max(trial.macro_f1 or 0.0 for trial in trials)
        raise DistillError(
            f"--max-drop {max_drop:g}: no INT8 setting of {len(trials)} keeps it; the best loses "
            f"{100 * (reference - best):.2f} points of validation macro-F1 ({reference:.4f} to {best:.4f}); "
            "allow that much, or train the student longer"
        )
    return chosen, trials
