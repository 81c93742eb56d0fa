"""INT8 for the CPU provider: the settings to try, and which of them to keep."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from distill.export.equal_rows import ROW
from distill.export.observation import products
from distill.export.onnx import quiet
from distill.export.rounding import bound_pairs
from distill.export.surgery import attributes, replace_nodes
from onnx import TensorProto, helper, numpy_helper

from distill.errors import DistillError

logger = logging.getLogger(__name__)
MIN_ROWS = 1000  # of an embedding table worth quantizing
ABOUT_AS_FAST = 1.1  # a tenth of the time is not worth a multiple of the error


@dataclass(frozen=True)
class Setting:
    """One way to quantize. Weights INT8; activations are quantized dynamically to UINT8.

    Signed weights are bounded in pairs (`rounding`), so that a file answers the same on every CPU.
    """

    fused: bool = False
    per_channel: bool = True
    weight_type: str = "QInt8"
    attention: bool = False
    """Quantize the products of activations in attention too, not only those with constant weights."""
    smooth: bool = False
    """Divide the outlier channels of activations first, and multiply the weights by as much."""

    def __str__(self) -> str:
        parts = [self.weight_type, "per channel" if self.per_channel else "per tensor"]
        parts += [name for name in ("fused", "attention", "smooth") if getattr(self, name)]
        return ", ".join(parts)


def settings(fusion: bool) -> list[Setting]:
    """List the settings worth trying."""
    return [
        setting
        for fused in ((False, True) if fusion else (False,))
        for setting in (
            Setting(fused),
            Setting(fused, smooth=True),
            Setting(fused, per_channel=False, weight_type="QUInt8"),
            Setting(fused, attention=True),
        )
    ]


def spell_products(model: onnx.ModelProto) -> None:
    """Write each Gemm that adds a row to a product as just that, in place."""
    constants = {entry.name: entry for entry in model.graph.initializer}
    turned: dict[str, Any] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, **attributes(node)}
        transposed = plain.pop("transB", 0)
        known = node.op_type == "Gemm" and len(node.input) == 3 and node.input[1] in constants
        if not known or plain != {"alpha": 1.0, "beta": 1.0, "transA": 0}:
            nodes.append(node)
            continue
        weight = node.input[1]
        if transposed:
            weight = f"{weight}_transposed"
            turned[weight] = np.ascontiguousarray(numpy_helper.to_array(constants[node.input[1]]).T)
        product = f"{node.output[0]}_product"
        name = node.name or node.output[0]
        nodes += [
            helper.make_node("MatMul", [node.input[0], weight], [product], name=f"{name}_MatMul"),
            helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{name}_Add"),
        ]
    replace_nodes(model.graph, nodes, turned)


def quantize(model: Path, target: Path, setting: Setting) -> None:
    """Write `model` with dynamic INT8 matrix products, and INT8 embedding tables."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    signed = setting.weight_type == "QInt8"
    with quiet():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Attention"],
            nodes_to_exclude=[node.name for node in _by_head(onnx.load(model, load_external_data=False))],
            per_channel=setting.per_channel,
            reduce_range=signed,  # 7 bits for what `bound_pairs` does not know
            weight_type=QuantType[setting.weight_type],
            extra_options={
                "MatMulConstBOnly": not setting.attention,
                # After fusion the quantizer cannot infer types by itself (optimum#2186).
                "DefaultTensorType": onnx.TensorProto.FLOAT,
            },
        )
    quantized = onnx.load(target)
    if signed:
        bound_pairs(quantized, products(onnx.load(model)))
    _quantize_tables(quantized)
    _store_heads(quantized)
    _keep_layer_norm_apart(quantized)
    onnx.save(quantized, target)


def _by_head(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with one constant matrix a head, which `one_query` names."""
    matrices = {
        entry.name
        for entry in model.graph.initializer
        if len(entry.dims) == 3 and entry.data_type == TensorProto.FLOAT
    }
    return [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and node.name and node.input[1] in matrices
    ]


def _store_heads(model: onnx.ModelProto) -> None:
    """Store the matrices of `_by_head` in INT8 with a scale for every row.

    They multiply one row a text, for which ONNX Runtime's INT8 kernels of several matrices are slower than
    those of fp32. It computes the constants of that once, when the file is opened.
    """
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Any] = {}
    values = {entry.name: entry for entry in model.graph.initializer}
    for node in _by_head(model):
        name = node.input[1]
        node.input[1] = f"{name}_fp32"
        if f"{name}_int8" in constants:
            continue
        matrices = numpy_helper.to_array(values[name])
        scales = np.maximum(np.abs(matrices).max(axis=-1, keepdims=True), 1e-12) / 127
        constants[f"{name}_int8"] = np.rint(matrices / scales).astype(np.int8)
        constants[f"{name}_scale"] = scales.astype(np.float32)
        nodes += [
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_steps"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_steps", f"{name}_scale"], [f"{name}_fp32"]),
        ]
    replace_nodes(model.graph, [*nodes, *model.graph.node], constants)


def _quantize_tables(model: onnx.ModelProto) -> None:
    """Store embedding tables in INT8 with a scale for every row.

    Short tables (positions, token types) stay as they are: they take little room, and their lookup is faster.
    A short table of tokens that share rows (export/equal_rows.py) is taken: its ids are looked up themselves.
    """
    constants = {entry.name: entry for entry in model.graph.initializer}
    looked_up = {node.output[0] for node in model.graph.node if node.input and node.input[0].endswith(ROW)}
    nodes: list[Any] = []
    tables: dict[str, Any] = {}
    for node in model.graph.node:
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        if (
            table is None
            or table.data_type != TensorProto.FLOAT
            or len(table.dims) != 2
            or (table.dims[0] < MIN_ROWS and node.input[1] not in looked_up)
            or attributes(node).get("axis", 0) != 0
        ):
            nodes.append(node)
            continue
        name, ids, found = table.name, node.input[1], node.output[0]
        values = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-12) / 127
        tables[f"{name}_int8"] = np.rint(values / scales).astype(np.int8)
        tables[f"{name}_scale"] = scales.astype(np.float32)
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", ids], [f"{found}_int8"]),
            helper.make_node("Gather", [f"{name}_scale", ids], [f"{found}_scale"]),
            helper.make_node("Cast", [f"{found}_int8"], [f"{found}_steps"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{found}_steps", f"{found}_scale"], [found]),
        ]
    replace_nodes(model.graph, nodes, tables)


def _keep_layer_norm_apart(model: onnx.ModelProto) -> None:
    """Let no runtime fuse LayerNormalization with the addition before it.

    ONNX Runtime's fused CPU kernel is slower than the two plain ones, and it rounds differently, which
    dynamic quantization then magnifies. Its fusion looks for Add, so the addition is spelt as a Sum of two.
    Optimum and transformers, which open the file with every fusion on, then compute what `Classifier` does.
    """
    normalized = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    for node in model.graph.node:
        if node.op_type == "Add" and node.output[0] in normalized:
            node.op_type = "Sum"


@dataclass(frozen=True)
class Trial:
    """What a setting gave, or why it failed.

    Attributes:
        latency_ms: median of a validation text.
        macro_f1: on validation, where it was needed to choose.
        mean_logit_difference: from fp32 on a sample of validation text, where it is about as fast as others.
        size: bytes.
    """

    setting: Setting
    latency_ms: float = float("inf")
    macro_f1: float | None = None
    mean_logit_difference: float | None = None
    size: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {k: v for k, v in asdict(self).items() if v != float("inf")}


def choose(
    candidates: Mapping[Setting, Path],
    latencies: Mapping[Setting, float],
    difference_of: Callable[[Path], float],
    macro_f1_of: Callable[[Path], float],
    reference: float,
    max_drop: float,
) -> tuple[Setting, list[Trial]]:
    """Keep the setting nearest to fp32 of those that hold `max_drop` and are about as fast as the fastest.

    Those about as fast as each other are scored from the nearest to fp32 on, until one holds; only if none
    does, those that are slower.

    Args:
        candidates: setting -> quantized file.
        latencies: of each, in milliseconds.
        difference_of: a file's mean difference from the fp32 logits.
        macro_f1_of: a file's macro-F1 on validation, 0 to 1.
        reference: macro-F1 of the fp32 graph on validation, 0 to 1.
        max_drop: in points of macro-F1 (hundredths).

    Returns:
        The chosen setting and every trial, fastest first, with what was found out about it.

    Raises:
        DistillError: if no setting keeps accuracy; it says how far the best one falls short.
    """
    order = sorted(candidates, key=latencies.__getitem__)
    trials = {name: Trial(name, latencies[name], size=candidates[name].stat().st_size) for name in order}
    left = list(order)
    while left:
        equals = [name for name in left if latencies[name] <= latencies[left[0]] * ABOUT_AS_FAST]
        differences = {name: difference_of(candidates[name]) for name in equals}
        for name, difference in differences.items():
            trials[name] = replace(trials[name], mean_logit_difference=difference)
            logger.info(
                "INT8 (%s): %.2f ms, logits off by %.3f on average", name, latencies[name], difference
            )
        for name in sorted(equals, key=differences.__getitem__):
            macro_f1 = macro_f1_of(candidates[name])
            trials[name] = replace(trials[name], macro_f1=macro_f1)
            points = 100 * (macro_f1 - reference)
            logger.info("INT8 (%s): macro-F1 %.4f (%+.2f points)", name, macro_f1, points)
            if points >= -max_drop:
                return name, list(trials.values())
        left = left[len(equals) :]
    best = max(trial.macro_f1 or 0.0 for trial in trials.values())
    raise DistillError(
        f"--max-drop {max_drop:g}: no INT8 setting of {len(trials)} keeps it; the best loses "
        f"{100 * (reference - best):.2f} points of validation macro-F1 ({reference:.4f} to {best:.4f}); "
        "allow that much, or train the student longer"
    )
