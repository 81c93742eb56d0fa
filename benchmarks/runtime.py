"""`Classifier` against Optimum and `transformers.pipeline` on one INT8 file, and against its bare parts.

Latency of one text (one thread each), bulk throughput on all cores (the pipeline with its best batch size),
and the time from starting Python to the first answer. Writes benchmarks/results/runtime.json, with another
bundle runtime_NAME.json, or the file that --output names: the fewer layers, the more of the time is overhead.

Usage: python benchmarks/runtime.py [DEMO_FOLDER] [--bundle runs/two_layers] [--file test.csv]
"""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pyarrow.csv
from distill.export.cold_start import cold_start
from tokenizers import Tokenizer

from distill import Classifier
from distill.latency import cpu_name, measure

RESULTS = Path(__file__).resolve().parent / "results"
BUNDLE = Path("runs/export")
FILE = "model_quantized.onnx"
BATCH_SIZES = (1, 8, 32)


def _pipeline(bundle: Path, threads: int | None) -> Callable[..., Any]:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    model = ORTModelForSequenceClassification.from_pretrained(
        bundle, subfolder="onnx", file_name=FILE, session_options=options
    )
    parts = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(bundle)}
    found: Callable[..., Any] = pipeline("text-classification", **parts, truncation=True)
    return found


def _bare(bundle: Path) -> Callable[[str], Any]:
    """Tokenizers and `session.run`, with nothing around them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        bundle / "onnx" / FILE, options, providers=["CPUExecutionProvider"]
    )
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.no_padding()
    names = {
        "input_ids": "ids",
        "attention_mask": "attention_mask",
        "token_type_ids": "type_ids",
    }
    inputs = {node.name: names[node.name] for node in session.get_inputs()}

    def run(text: str) -> Any:
        encoding = tokenizer.encode(text)
        feeds = {
            name: np.array([getattr(encoding, column)], dtype=np.int64) for name, column in inputs.items()
        }
        return session.run(None, feeds)[0].argmax()

    return run


def _texts_per_second(run: Callable[[list[str]], Any], texts: list[str]) -> float:
    run(texts[:200])  # the other side's threads come to rest meanwhile
    started = time.perf_counter()
    run(texts)
    return len(texts) / (time.perf_counter() - started)


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--texts", "count", default=300, help="Test texts for latency; throughput takes all of them.")
@click.option("--bundle", type=click.Path(path_type=Path), default=BUNDLE, help="In the demo's folder.")
@click.option("--file", default="sentiment/test.csv", help="CSV with the texts, in the demo's folder.")
@click.option("--repeats", default=5, help="Of throughput and of the cold start.")
@click.option("--output", type=click.Path(path_type=Path, resolve_path=True), help="File to write.")
def main(demo: Path, count: int, bundle: Path, file: str, repeats: int, output: Path | None) -> None:
    """Measure the runtime on the demo's bundle."""
    if not (demo / bundle).is_dir():
        raise click.ClickException(f"{demo}: no {bundle} in it; run `make demo` first")
    RESULTS.mkdir(exist_ok=True)
    os.chdir(demo)
    texts = pyarrow.csv.read_csv(file)["text"].to_pylist()
    one = Classifier(bundle, provider="cpu", threads=1)
    pipeline = _pipeline(bundle, 1)
    sides: dict[str, Callable[[str], Any]] = {
        "bare": _bare(bundle),
        "distill": lambda text: one.predict([text]),
        "distill, as a pipeline": one,
        "pipeline": pipeline,
    }
    latency = measure(sides, texts[:: max(1, len(texts) // count)][:count], rounds=5)
    every = Classifier(bundle, provider="cpu")
    parallel = _pipeline(bundle, None)
    runs: dict[str, list[float]] = {}
    for _ in range(repeats):
        runs.setdefault("distill", []).append(_texts_per_second(every.predict, texts))
        for size in BATCH_SIZES:
            speed = _texts_per_second(partial(parallel, batch_size=size), texts)
            runs.setdefault(f"pipeline, batches of {size}", []).append(speed)
    speeds = {name: float(np.median(values)) for name, values in runs.items()}
    # The first warms the file cache, and writes bytecode where there is none.
    cold = [cold_start(bundle, f"onnx/{FILE}", "cpu", texts[:1])[0] for _ in range(repeats + 1)][1:]
    name = "runtime.json" if bundle == BUNDLE else f"runtime_{bundle.name}.json"
    result = {
        "cpu": cpu_name(),
        "latency_ms": latency,
        "latency_over_pipeline": latency["distill, as a pipeline"] / latency["pipeline"],
        "overhead_over_bare": latency["distill"] / latency["bare"] - 1,
        "texts_per_second": speeds,
        "spread": {name: [min(values), max(values)] for name, values in runs.items()},
        "throughput_over_pipeline": speeds["distill"] / max(v for k, v in speeds.items() if k != "distill"),
        "cold_start_s": float(np.median(cold)),
    }
    (output or RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
