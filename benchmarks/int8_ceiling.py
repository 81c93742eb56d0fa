"""How close a 2-layer, 384-wide INT8 student comes to the core's own INT8 speed, and where the rest goes.

The ceiling is what ONNX Runtime's MatMulInteger reaches alone, on one thread: with the matrices of the
student's layers, and with the fastest of larger ones; MatMul in fp32 stands beside it. The student has random
weights, which its speed does not depend on. "as exported" is the same student before export leaves the other
tokens out of its last layer, quantized in the same way. The other variants are what was tried and not taken:
static ranges of activations in place of dynamic ones, cheaper forms of GELU, addition and LayerNormalization
in one kernel. Writes benchmarks/results/int8_ceiling.json, or the file that --output names.

Usage: python benchmarks/int8_ceiling.py [TOKENS]
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from distill.export.onnx import export_fp32, fuse, shorten
from distill.export.quantization import Setting, quantize
from onnx import TensorProto, helper, numpy_helper

from distill.engine import SLOW_FUSIONS
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS, WIDTH, INNER, HEADS = 2, 384, 1536, 12
LAYER = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH)]


def _session(model: Path | bytes, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS["cpu"]
    )


def _seconds(run: Callable[[], Any], repeats: int = 300) -> float:
    """Median of one run."""
    times = []
    for _ in range(repeats + 20):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times[20:]))


def _product(rows: int, inner: int, columns: int, integer: bool = True) -> Callable[[], Any]:
    """One product of rows x inner by inner x columns: MatMulInteger, UINT8 x INT8, or MatMul in fp32."""
    generator = np.random.default_rng(0)
    weights = generator.integers(-127, 127, (inner, columns)).astype(np.int8 if integer else np.float32)
    zero = numpy_helper.from_array(np.uint8(128), "zero")
    kind, given_type, found_type = (
        ("MatMulInteger", TensorProto.UINT8, TensorProto.INT32)
        if integer
        else ("MatMul", TensorProto.FLOAT, TensorProto.FLOAT)
    )
    graph = helper.make_graph(
        [helper.make_node(kind, ["a", "weights", *(["zero"] if integer else [])], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", given_type, [rows, inner])],
        [helper.make_tensor_value_info("c", found_type, [rows, columns])],
        [numpy_helper.from_array(weights, "weights"), *([zero] if integer else [])],
    )
    opset = [helper.make_opsetid("", 17)]
    session = _session(helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())
    given = {"a": generator.integers(0, 255, (rows, inner)).astype(np.uint8 if integer else np.float32)}
    return lambda: session.run(None, given)


def _student(folder: Path) -> dict[str, Path]:
    """The student's INT8 files: of Optimum's graph, of what export makes of it, and variants."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(30_000))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "student")
    config = BertConfig(
        vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "student")
    exported = export_fp32(folder / "student", folder / "onnx")
    fuse(exported, folder / "whole.onnx", config)
    shorten(folder / "whole.onnx", folder / "short.onnx")
    files = {"as exported": folder / "whole.int8.onnx", "distill": folder / "short.int8.onnx"}
    for name, path in zip(("whole", "short"), files.values(), strict=True):
        quantize(folder / f"{name}.onnx", path, Setting(fused=True))
    distilled = onnx.load(files["distill"])
    for name, change in VARIANTS.items():
        files[name] = folder / f"{name.replace(' ', '_')}.onnx"
        model = onnx.ModelProto()
        model.CopyFrom(distilled)
        change(model.graph)
        onnx.save(model, files[name])
    return files


def _static_ranges(graph: onnx.GraphProto) -> None:
    """Quantize activations with constants, as calibration finds them; their values change no speed."""
    scale, zero = (
        numpy_helper.from_array(np.float32(0.02), "scale"),
        numpy_helper.from_array(np.uint8(128), "zero"),
    )
    graph.initializer.extend([scale, zero])
    names = {}
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            names.update({node.output[1]: scale.name, node.output[2]: zero.name})
            quantized = helper.make_node(
                "QuantizeLinear", [node.input[0], scale.name, zero.name], node.output[:1]
            )
            node.CopyFrom(quantized)
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)


def _gelu(kind: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Gelu":
                node.op_type = kind

    return change


def _addition_in_the_same_kernel(graph: onnx.GraphProto) -> None:
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        added = makers.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if added is not None and added.op_type == "Sum" and len(node.input) == 3:
            fused = helper.make_node(
                "SkipLayerNormalization",
                [*added.input, *node.input[1:]],
                node.output[:1],
                domain="com.microsoft",
            )
            node.CopyFrom(fused)


VARIANTS = {
    "static ranges": _static_ranges,
    "FastGelu": _gelu("FastGelu"),
    "QuickGelu": _gelu("QuickGelu"),
    "SkipLayerNormalization": _addition_in_the_same_kernel,
}


def _computed(tokens: int) -> int:
    """Operations that are left: in the last layer one row, and its scores and mixture of the tokens."""
    layer = sum(inner * columns for inner, columns in LAYER)
    return 2 * (tokens * ((LAYERS - 1) * layer + 2 * HEADS * WIDTH) + layer)


def _profile(path: Path, feeds: dict[str, Any], folder: Path, runs: int = 200) -> dict[str, float]:
    """Microseconds of each operator in one run, under the profiler, which adds about 2 a node."""
    session = _session(path, folder / "profile")
    for _ in range(runs):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: round(total / runs, 1) for name, total in spent.most_common()}


@click.command()
@click.argument("tokens", type=int, default=32)
@click.option("--rounds", default=5, help="Students and ceiling take turns; the best round counts for each.")
@click.option("--output", type=click.Path(path_type=Path, resolve_path=True), help="File to write.")
def main(tokens: int, rounds: int, output: Path | None) -> None:
    """Measure the student and its ceiling in turns."""
    RESULTS.mkdir(exist_ok=True)
    operations = 2 * tokens * LAYERS * sum(inner * columns for inner, columns in LAYER)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = _student(folder)
        generator = np.random.default_rng(0)
        feeds = {
            "input_ids": generator.integers(5, 30_000, (1, tokens)),
            "attention_mask": np.ones((1, tokens), dtype=np.int64),
            "token_type_ids": np.zeros((1, tokens), dtype=np.int64),
        }
        sessions = {name: _session(path) for name, path in files.items()}
        sides: dict[str, tuple[Callable[[], Any], int]] = {
            name: (partial(session.run, None, feeds), operations) for name, session in sessions.items()
        }
        for inner, columns in LAYER:
            name = f"MatMulInteger {tokens} x {inner} x {columns}"
            sides[name] = (_product(tokens, inner, columns), 2 * tokens * inner * columns)
        large = (512, 384, 1536)
        sides["MatMulInteger 512 x 384 x 1536"] = (_product(*large), 2 * 512 * 384 * 1536)
        sides["fp32 MatMul 512 x 384 x 1536"] = (_product(*large, integer=False), 2 * 512 * 384 * 1536)
        best = {name: float("inf") for name in sides}
        for _ in range(rounds):
            for name, (run, _) in sides.items():
                best[name] = min(best[name], _seconds(run))
        kept = ("as exported", "distill")
        profiles = {name: _profile(files[name], feeds, folder) for name in kept}
    own = LAYERS * sum(best[f"MatMulInteger {tokens} x {inner} x {columns}"] for inner, columns in LAYER)
    speed = {name: sides[name][1] / seconds / 1e9 for name, seconds in best.items()}
    ceiling = max(value for name, value in speed.items() if name.startswith("MatMulInteger"))
    result = {
        "cpu": cpu_name(),
        "onnxruntime": onnxruntime.__version__,
        "tokens": tokens,
        "operations": operations,
        "operations_computed": {"as exported": operations, "distill": _computed(tokens)},
        "of_highest_ceiling_by_operations_computed": _computed(tokens) / best["distill"] / 1e9 / ceiling,
        "time_over_distill": {name: best[name] / best["distill"] for name in VARIANTS},
        "microseconds": {name: round(1e6 * seconds, 1) for name, seconds in best.items()},
        "gops": {name: round(value) for name, value in speed.items()},
        "of_ceiling_with_its_own_matrices": {name: own / best[name] for name in kept},
        "of_highest_ceiling": {name: speed[name] / ceiling for name in kept},
        "profile_microseconds": profiles,
    }
    output = output or RESULTS / "int8_ceiling.json"
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
