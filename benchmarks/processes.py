"""One process against two that train together under torchrun, over seeds: the same scores, and what it saves.

A step takes as many texts on both sides. Writes benchmarks/results/processes.json.

Usage: python benchmarks/processes.py DATA --model CHECKPOINT [--epochs 1]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (1, 2, 3)
BATCH = 32


def _train(processes: int, seed: int, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "teacher"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [
            sys.executable, *launcher, "-m", "distill", "train-teacher", *options, "--output", str(output),
            "--seed", str(seed), "--batch-size", str(BATCH // processes),
        ]  # fmt: skip
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        manifest = json.loads((output / "distill.json").read_text())
    return {**manifest["metrics"]["validation"], "seconds": manifest["wall_seconds"]}


@click.command()
@click.argument("data")
@click.option("--model", required=True, help="Checkpoint to fine-tune.")
@click.option("--epochs", default=1.0)
@click.option("--max-length", default=64)
def main(data: str, model: str, epochs: float, max_length: int) -> None:
    """Train with one process and with two, in turns."""
    # Made splits have the run's seed: for scores on the same texts the data has to bring its own.
    options = ["--data", data, "--model", model, "--epochs", str(epochs), "--max-length", str(max_length)]
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for seed in SEEDS:
        for processes, found in runs.items():
            found.append(_train(processes, seed, options))
    result: dict[str, Any] = {"cpu": cpu_name(), "data": Path(data).name, "model": Path(model).name}
    for processes, found in runs.items():
        scores = np.array([run["macro_f1"] for run in found])
        result[f"{processes} processes"] = {
            "validation_macro_f1": [round(float(score), 4) for score in scores],
            "mean": round(float(scores.mean()), 4),
            "deviation": round(float(scores.std(ddof=1)), 4),
            "seconds": round(float(np.median([run["seconds"] for run in found])), 1),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "processes.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
