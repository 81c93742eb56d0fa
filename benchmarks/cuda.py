"""The files for CUDA against those for the CPU: labels, accuracy, and where there is a GPU, speed.

The demo's student is exported for both providers. Every node is held against the CUDA provider's kernels;
labels and macro-F1 on the test split are computed on the CPU provider, or on the GPU where there is one.
There each file, and the student in PyTorch in FP16, is timed too, and a profile says what ran on which
provider. Writes benchmarks/results/cuda.json, with a GPU cuda_NAME.json, or the file
that --output names.

Usage: python benchmarks/cuda.py [DEMO_FOLDER], after `make demo`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import pyarrow.csv
import torch
from distill.export.placement import off_cuda

from distill import Classifier
from distill.latency import cpu_name, measure
from distill.metrics import score

RESULTS = Path(__file__).resolve().parent / "results"
FILES = {
    "fp32": "onnx/model.onnx",
    "int8, CPU": "onnx/model_quantized.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8, CUDA": "onnx/model_int8_cuda.onnx",
}


def profile(path: Path, provider: str) -> dict[str, int]:
    """Operators that one text of 32 tokens runs, by the provider that ran each, copies among them."""
    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
        shape = (1, 32)
        columns = {
            "input_ids": np.full(shape, 5),
            "attention_mask": np.ones(shape),
            "token_type_ids": np.zeros(shape),
        }
        session.run(None, {node.name: columns[node.name].astype(np.int64) for node in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = (event["args"] for event in events if event["name"].endswith("_kernel_time"))
    return dict(
        Counter(f"{entry['provider'].removesuffix('ExecutionProvider')} {entry['op_name']}" for entry in ran)
    )


def _speeds(bundle: Path, texts: list[str]) -> dict[str, Any]:
    """Milliseconds of one text and texts a second on the GPU; labels of PyTorch in FP16 there."""
    names = [name for name in FILES if name != "int8, CPU"]
    opened = {name: Classifier(bundle, provider="cuda", file=FILES[name]) for name in names}
    speeds = {}
    for name, classifier in opened.items():
        classifier.predict(texts)
        started = time.perf_counter()
        for _ in range(5):
            classifier.predict(texts)
        speeds[name] = 5 * len(texts) / (time.perf_counter() - started)
    from distill.artifact import read_manifest
    from distill.models import batched_logits, load_model, load_tokenizer

    manifest = read_manifest(Path("runs/student"), "train-student")
    model = load_model("runs/student", manifest.labels).eval().half().cuda()
    tokenizer = load_tokenizer("runs/student", manifest.max_length)

    def pytorch(texts: list[str]) -> Any:
        columns = tokenizer(texts, truncation=True)
        lengths = np.array([len(ids) for ids in columns["input_ids"]])
        return batched_logits(
            model,
            tokenizer,
            lambda rows: {k: [v[row] for row in rows] for k, v in columns.items()},
            lengths,
            "cuda",
            "fp32",  # the weights are FP16 already
        )

    labels = pytorch(texts).argmax(axis=1).tolist()
    started = time.perf_counter()
    for _ in range(5):
        pytorch(texts)
    speeds["PyTorch fp16"] = 5 * len(texts) / (time.perf_counter() - started)
    sides: dict[str, Any] = {name: one.logits for name, one in opened.items()}
    sides["PyTorch fp16"] = lambda text: pytorch([text])
    latency = measure(sides, texts[:200], rounds=5)
    return {"latency_ms": latency, "texts_per_second": speeds, "labels_of_pytorch": labels}


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--output", type=click.Path(path_type=Path, resolve_path=True), help="File to write.")
def main(demo: Path, output: Path | None) -> None:
    """Compare the files for CUDA with those for the CPU."""
    if not (demo / "runs" / "student").is_dir():
        raise click.ClickException(f"{demo}: no finished demo in it; run `make demo` first")
    RESULTS.mkdir(exist_ok=True)
    os.chdir(demo)
    table = pyarrow.csv.read_csv("sentiment/test.csv")
    texts = table["text"].to_pylist()
    on_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
    result: dict[str, Any] = {"cpu": cpu_name(), "gpu": torch.cuda.get_device_name() if on_gpu else None}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        providers = ["--provider", "cpu", "--provider", "cuda"]
        command = [
            sys.executable,
            "-m",
            "distill.cli",
            "export",
            "--int8",
            *providers,
            "--output",
            str(bundle),
        ]
        subprocess.run(command, check=True)
        details = json.loads((bundle / "distill.json").read_text(encoding="utf-8"))["details"]
        result["int8_form"] = details["cuda"]["int8"]["form"]
        # Both forms side by side on validation text, whichever was kept; timed where there is a GPU.
        result["int8_forms"] = {trial.pop("form"): trial for trial in details["cuda"]["int8"]["trials"]}
        labels: dict[str, Any] = {}
        logits: dict[str, Any] = {}
        for name, file in FILES.items():
            provider = "cuda" if on_gpu and name != "int8, CPU" else "cpu"
            classifier = Classifier(bundle, provider=provider, file=file)
            truth = np.array([classifier.labels.index(label) for label in table["label"].to_pylist()])
            logits[name] = classifier.predict_logits(texts)
            labels[name] = logits[name].argmax(axis=1)
            graph = onnx.load(bundle / file)
            result[name] = {
                "nodes": len(graph.graph.node),
                "off_cuda": dict(Counter(entry.split()[0] for entry in off_cuda(graph))),
                "macro_f1": score(truth, labels[name], len(classifier.labels)).macro_f1,
                "same_label_as_fp32": float((labels[name] == labels["fp32"]).mean()),
                "mean_logit_difference": float(np.abs(logits[name] - logits["fp32"]).mean()),
                "megabytes": (bundle / file).stat().st_size / 1e6,
            }
        agreement = (labels["int8, CUDA"] == labels["int8, CPU"]).mean()
        result["int8_same_label_on_both"] = float(agreement)
        if on_gpu:
            result["speed"] = _speeds(bundle, texts)
            pytorch = np.array(result["speed"].pop("labels_of_pytorch"))
            result["PyTorch fp16"] = {
                "macro_f1": score(truth, pytorch, len(classifier.labels)).macro_f1,
                "same_label_as_fp32": float((pytorch == labels["fp32"]).mean()),
            }
            result["profile"] = {
                name: profile(bundle / FILES[name], "CUDAExecutionProvider")
                for name in ("fp16", "int8, CUDA")
            }
    gpu = f"_{result['gpu'].replace(' ', '_')}" if on_gpu else ""
    (output or RESULTS / f"cuda{gpu}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
