"""A stream of a million texts, and eight threads that share one `Classifier`.

Memory and speed are taken along the stream: resident memory must not grow, and the end must not be slower
than the start. Each text has a number of its own, so that there are always words not met before. Then eight
threads classify 100,000 texts through one Classifier, each its own share in lists of another length, and
every logit is held against a serial run. Writes benchmarks/results/streaming.json.

Usage: python benchmarks/streaming.py [DEMO_FOLDER] [--bundle runs/one_layer], after `make demo`.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.csv

from distill import Classifier
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
BUNDLE = Path("runs/export")
THREADS = 8


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def stream(bundle: Path, texts: list[str], count: int, marks: int) -> dict[str, Any]:
    """Classify `count` texts one after the other and look at the process `marks` times."""
    every = count // marks
    seconds, memory = [], []
    started = time.perf_counter()
    warm = 0.0
    numbered = (f"{text} {number}" for number, text in enumerate(islice(cycle(texts), count)))
    for number, _ in enumerate(Classifier(bundle, provider="cpu").stream_proba(numbered), 1):
        if number == 10_000:
            warm = _resident_mb()
        if number % every == 0:
            seconds.append(time.perf_counter() - started)
            memory.append(_resident_mb())
            started = time.perf_counter()
    return {
        "texts": count,
        "resident_mb_after_10000": warm,
        "resident_mb": memory,
        "growth_mb": max(memory) - warm,
        "texts_per_second": [round(every / one) for one in seconds],
        # Each over a quarter of the stream.
        "end_over_start": sum(seconds[: marks // 4]) / sum(seconds[-(marks // 4) :]),
    }


def share(bundle: Path, texts: list[str], count: int) -> dict[str, Any]:
    """Let eight threads use one Classifier at once."""
    work = list(islice(cycle(texts), count))
    serial_of = dict(
        zip(texts, Classifier(bundle, provider="cpu", threads=1).predict_logits(texts), strict=True)
    )
    serial = np.stack([serial_of[text] for text in work])
    classifier = Classifier(bundle, provider="cpu")
    found = np.empty_like(serial)

    def lists(number: int) -> Iterator[slice]:
        random = np.random.default_rng(number)
        start, end = count * number // THREADS, count * (number + 1) // THREADS
        while start < end:
            stop = min(end, start + int(random.integers(1, 200)))
            yield slice(start, stop)
            start = stop

    def run(number: int) -> None:
        for rows in lists(number):
            found[rows] = classifier.predict_logits(work[rows])

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, range(THREADS)))
    seconds = time.perf_counter() - started
    return {
        "texts": count,
        "threads": THREADS,
        "identical_logits": int((found == serial).all(axis=1).sum()),
        "texts_per_second": round(count / seconds),
    }


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--texts", "count", default=1_000_000)
@click.option("--shared", default=100_000)
@click.option("--bundle", type=click.Path(path_type=Path), default=BUNDLE, help="In the demo's folder.")
def main(demo: Path, count: int, shared: int, bundle: Path) -> None:
    """Measure streaming and sharing on the demo's bundle."""
    if not (demo / bundle).is_dir():
        raise click.ClickException(f"{demo}: no {bundle} in it; run `make demo` first")
    RESULTS.mkdir(exist_ok=True)
    os.chdir(demo)
    texts = pyarrow.csv.read_csv("sentiment/test.csv")["text"].to_pylist()
    result = {
        "cpu": cpu_name(),
        "bundle": str(bundle),
        "stream": stream(bundle, texts, count, 20),
        "shared": share(bundle, texts, shared),
    }
    (RESULTS / "streaming.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
