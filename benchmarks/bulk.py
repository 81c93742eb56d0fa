"""`distill predict --engine ray` over many texts, killed half-way and called again.

Texts of a file are repeated, each with a number of its own, in 50 Parquet files. Writes
benchmarks/results/bulk.json.

Usage: python benchmarks/bulk.py TEXTS.csv --bundle runs/export [--rows 1000000]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil
import pyarrow
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet

from distill import Classifier
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
SHARDS = 50
CHECKED = 2_000  # answers that are held against the classifier's


def _write(folder: Path, texts: list[str], rows: int) -> None:
    folder.mkdir()
    size = rows // SHARDS
    for shard in range(SHARDS):
        numbers = range(shard * size, (shard + 1) * size)
        part = {"number": list(numbers), "text": [texts[number % len(texts)] for number in numbers]}
        pyarrow.parquet.write_table(pyarrow.table(part), folder / f"{shard:03}.parquet")


def _workers_memory() -> dict[str, float]:
    """How many processes Ray has, and the MB of their own that all of them and those of the workers hold."""
    found = {"processes": 0, "all": 0.0, "workers": 0.0}
    for process in psutil.process_iter(["cmdline"]):
        name = (process.info["cmdline"] or [""])[0]
        if name.startswith("ray::"):
            try:
                own = process.memory_full_info().uss / 1e6
            except psutil.Error:
                continue
            found["processes"] += 1
            found["all"] += own
            found["workers"] += own if "MapWorker" in name else 0.0
    return found


def _committed(output: Path) -> int:
    notes = output.with_name(f"{output.name}.checkpoint")
    done = [path for path in notes.glob("*.parquet") if ".pending" not in path.name]
    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in done)


def _run(source: Path, output: Path, bundle: Path, kill_at: int | None) -> dict[str, Any]:
    """Predict; with `kill_at`, kill every process of it once so many rows are written."""
    started, samples = time.monotonic(), []
    command = ["-m", "distill", "predict", source, "--engine", "ray", "--output", output, "--bundle", bundle]
    process = subprocess.Popen([sys.executable, *map(str, command)], start_new_session=True)
    while process.poll() is None:
        time.sleep(5)
        samples.append(_workers_memory())
        if kill_at is not None and _committed(output) >= kill_at:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                child.kill()
            psutil.wait_procs(children)
            process.wait()
            break
    if process.returncode and kill_at is None:
        raise click.ClickException(f"predict ended with {process.returncode}")
    return {"seconds": time.monotonic() - started, "committed": _committed(output), "memory": samples}


def _tenths(samples: list[dict[str, float]]) -> list[dict[str, int]]:
    """Ten of the samples, evenly spread."""
    chosen = [samples[round(part * (len(samples) - 1) / 9)] for part in range(10)]
    return [{name: round(value) for name, value in sample.items()} for sample in chosen]


@click.command()
@click.argument("texts_file", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--bundle", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of export."
)
@click.option("--rows", default=1_000_000, help="How many rows to label.")
def main(texts_file: Path, bundle: Path, rows: int) -> None:
    """Label, kill, go on, and count."""
    texts = pyarrow.csv.read_csv(texts_file)["text"].to_pylist()
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "in", Path(scratch) / "out"
        _write(source, texts, rows)
        first = _run(source, output, bundle, kill_at=rows // 2)
        second = _run(source, output, bundle, kill_at=None)
        table = pyarrow.dataset.dataset(output, format="parquet").to_table(["number", "prediction"])
        table = table.sort_by("number")
    numbers = table["number"].to_pylist()
    expected = Classifier(bundle, provider="cpu").predict(texts[:CHECKED])
    right = sum(a == b for a, b in zip(table["prediction"].to_pylist(), expected, strict=False))
    result = {
        "cpu": cpu_name(),
        "rows": rows,
        "rows_written": len(numbers),
        "each_once": numbers == list(range(rows)),
        "same_answers_as_the_classifier": f"{right} of {len(expected)}",
        "killed_after_rows": first["committed"],
        "seconds": [round(first["seconds"], 1), round(second["seconds"], 1)],
        "rows_per_second_after_the_restart": round((rows - first["committed"]) / second["seconds"]),
        "memory_mb": {"first": _tenths(first["memory"]), "second": _tenths(second["memory"])},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bulk.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
