"""What INT8 on a CPU takes from a student's answers: this export's way against the usual ones.

The demo's student in INT8 by Optimum's preset for this CPU, by the same with signed weights of 8 bits and of
7 (`reduce_range`), and as `distill export --int8` wrote it. All are held against the fp32 graph on the test
split, and timed in turns, one text at a time on one thread. Writes benchmarks/results/int8_accuracy.json, or
the file that --output names.

Usage: python benchmarks/int8_accuracy.py [DEMO_FOLDER], after `make demo`.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import peers
import pyarrow.csv

from distill import Classifier
from distill.bundle import open_bundle
from distill.latency import cpu_name, measure
from distill.metrics import score

RESULTS = Path(__file__).resolve().parent / "results"
FP32, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
OTHERS = {"Optimum's preset": None, "the same, signed 8-bit weights": 8, "the same, signed 7-bit weights": 7}
TIMED = 100


def with_optimum(model: Path, target: Path, bits: int | None) -> None:
    """Quantize with Optimum's dynamic preset, per channel, or with signed weights of `bits` in its place."""
    from onnxruntime.quantization import QuantType
    from optimum.onnxruntime import ORTQuantizer

    setting = peers.optimums_preset()
    if bits:
        setting.weights_dtype, setting.reduce_range = QuantType.QInt8, bits == 7
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        shutil.copy(model, source / "model.onnx")
        shutil.copy(model.parents[1] / "config.json", source / "config.json")
        quantizer = ORTQuantizer.from_pretrained(source, file_name="model.onnx")
        quantizer.quantize(save_dir=source / "int8", quantization_config=setting)
        onnx.save(onnx.load(next((source / "int8").glob("*.onnx"))), target)


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--bundle", "folder", default="runs/export", help="Bundle, from the demo's folder.")
@click.option("--file", "test", default="sentiment/test.csv", help="Labelled text, from the demo's folder.")
@click.option(
    "--output", default=RESULTS / "int8_accuracy.json", type=click.Path(path_type=Path), help="File to write."
)
def main(demo: Path, folder: str, test: str, output: Path) -> None:
    """Compare INT8 files of one student."""
    if not (demo / folder / INT8).is_file():
        raise click.ClickException(f"{demo}: no finished demo in it; run `make demo` first")
    table = pyarrow.csv.read_csv(demo / test)
    texts = table["text"].to_pylist()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        shutil.copytree(demo / folder, bundle)
        files = {"fp32": FP32, "distill export --int8": INT8}
        for name, bits in OTHERS.items():
            files[name] = f"onnx/optimum_{bits}.onnx"
            with_optimum(bundle / FP32, bundle / files[name], bits)
        opened = {
            name: Classifier(open_bundle(bundle, sealed=False), provider="cpu", file=file, threads=1)
            for name, file in files.items()
        }
        labels = opened["fp32"].labels
        truth = np.array([labels.index(label) for label in table["label"].to_pylist()])
        logits = {name: one.predict_logits(texts) for name, one in opened.items()}
        times = measure({name: one.logits for name, one in opened.items()}, texts[:TIMED], rounds=7)
        sizes = {name: (bundle / file).stat().st_size for name, file in files.items()}
    answers = {name: found.argmax(axis=1) for name, found in logits.items()}
    result: dict[str, Any] = {"cpu": cpu_name(), "texts": len(texts)}
    for name in files:
        result[name] = {
            "mean_logit_difference": float(np.abs(logits[name] - logits["fp32"]).mean()),
            "other_labels": int((answers[name] != answers["fp32"]).sum()),
            "macro_f1": score(truth, answers[name], len(labels)).macro_f1,
            "latency_ms": times[name],
            "megabytes": sizes[name] / 1e6,
        }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
