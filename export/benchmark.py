"""Every version of a classifier side by side in one run: latency, throughput, cold start, memory, size.

The versions take turns in every round, in another order each time, so that whatever else the machine does
hits all alike; two versions count as different only if the same one is faster in every round.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from distill.export.benchmark_rendering import draw, render
from distill.export.cold_start import cold_start
from numpy.typing import NDArray

from distill.artifact import Manifest, check_output, manifest_hash, publish, read_manifest
from distill.bundle import second_column
from distill.engine import Text, choose_provider
from distill.errors import DistillError
from distill.files import read_rows
from distill.latency import cpu_name
from distill.prediction import texts_of_rows
from distill.runtime import Classifier, cores

logger = logging.getLogger(__name__)
MIN_ROUNDS = 6  # the same version first in all of them has a chance of 1 in 32, if both are equal
WARM_UP = 5
READ_ROWS = 100_000  # of a file, to take texts from
# A version as functions of one text and of many.
Runs = tuple[Callable[[Text], object], Callable[[list[Text]], object]]
MEMORY_TEXTS = 50
PROBES = 3  # processes of each version


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of `distill benchmark`.

    Attributes:
        source: file with texts; the test texts of the bundle's own data when left out.
        text_column: of the file; found by its usual names when left out.
        text_pair_column: of the file, for pairs.
        export: folder of `distill export`.
        teacher: folder of `distill train-teacher`; left out if it or the student's is not there.
        student: folder of `distill train-student`; left out if it is not there.
        output: folder to write.
        provider: for the bundle's files, "cpu" or "cuda".
        texts: how many to take.
        rounds: how often each version takes all texts, at least 6.
        threads: for throughput; the number of cores when left out.
        overwrite: replace an existing output folder.
    """

    source: Path | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    export: Path = Path("runs/export")
    teacher: Path = Path("runs/teacher")
    student: Path = Path("runs/student")
    output: Path = Path("runs/benchmark")
    provider: str = "cpu"
    texts: int = 200
    rounds: int = 7
    threads: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Subject:
    """One version: where it is, and how it is run.

    Attributes:
        name: teacher, student, onnx-fp32, int8, fp16 or int8-cuda.
        folder: of the stage that wrote it.
        file: with its weights, relative to the folder.
        provider: "cpu" or "cuda" for ONNX Runtime, "pytorch" otherwise.
        max_length: longest text, in tokens.
        long_texts: how longer ones are read.
    """

    name: str
    folder: Path
    file: str
    provider: str
    max_length: int
    long_texts: str

    @property
    def size(self) -> int:
        """Bytes of the weights, in one file or in several."""
        path = self.folder / self.file
        weights = [path, path.with_name(f"{path.name}_data"), *self.folder.glob("model-*.safetensors")]
        return sum(path.stat().st_size for path in weights if path.is_file())

    def open(self, labels: list[str], threads: int | None) -> Runs:
        """Functions of one text and of many."""
        if self.provider != "pytorch":
            # One with a single thread, as a service would use it, and one that takes all cores.
            one = Classifier(self.folder, provider=self.provider, file=self.file, threads=1)
            many = Classifier(self.folder, provider=self.provider, file=self.file, threads=threads)
            return one.logits, many.predict_logits
        from distill.models import open_pytorch

        option = f"--{self.name}"
        return open_pytorch(self.folder, labels, self.max_length, self.long_texts, option, threads)


def subjects(options: BenchmarkOptions) -> list[Subject]:
    """List the versions that there are, the largest first.

    Raises:
        DistillError: if the bundle is missing.
    """
    manifest = read_manifest(options.export, "export", "--export")
    found: list[Subject] = []
    child, made_of = options.export, manifest.parents[0]["manifest_sha256"]
    for name, folder in (("student", options.student), ("teacher", options.teacher)):
        if not folder.is_dir():
            left = "student and teacher are" if name == "student" else "the teacher is"
            logger.info("No folder %s: %s left out", folder, left)
            break
        stage = read_manifest(folder, f"train-{name}", f"--{name}")
        if manifest_hash(folder) != made_of:
            raise DistillError(
                f"--{name} {folder}: {child} was not made from the one of now; name the right folder, or one "
                "that does not exist to leave it out"
            )
        how = (stage.max_length, stage.long_texts)
        found.insert(0, Subject(name, folder, "model.safetensors", "pytorch", *how))
        child, made_of = folder, stage.parents[0]["manifest_sha256"] if stage.parents else ""
    files: dict[str, str] = {"onnx-fp32": manifest.details["files"]["fp32"]}
    if options.provider == "cpu":
        files["int8"] = manifest.details["files"]["cpu"]
    for name, entry in manifest.details.get("cuda", {}).items():
        if options.provider == "cuda" and isinstance(entry, dict) and "file" in entry:
            files[{"int8": "int8-cuda"}.get(name, name)] = entry["file"]
    seen: set[str] = set()
    for name, file in files.items():
        if file not in seen:  # without --int8, both are the same file
            how = (manifest.max_length, manifest.long_texts)
            found.append(Subject(name, options.export, file, options.provider, *how))
            seen.add(file)
    return found


def _texts(options: BenchmarkOptions, bundle: Manifest) -> list[Text]:
    if options.source is None:
        from distill.data import reload_data, texts_of

        data = reload_data(bundle.data, bundle.labels, remedy="name a file with texts")
        texts: list[Text] = list(texts_of(data.splits["test"]))
        return _spread(texts, options.texts)
    rows = islice(read_rows(options.source), READ_ROWS)
    pair = options.text_pair_column or second_column(bundle.data)
    found = list(texts_of_rows(rows, str(options.source), options.text_column, pair))
    if not found:
        raise DistillError(f"{options.source}: no text in it; give a file with at least one")
    return _spread(found, options.texts)


def _spread(texts: list[Text], count: int) -> list[Text]:
    """`count` of the texts, evenly from beginning to end."""
    return [texts[len(texts) * number // count] for number in range(count)] if len(texts) > count else texts


def measure_rounds(
    runs: dict[str, Runs], texts: list[Text], rounds: int
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Run all versions in turns.

    Args:
        runs: name -> functions of one text and of many.
        texts: n of them.
        rounds: how often.

    Returns:
        name -> milliseconds of each text, shape (rounds, n), and texts a second, shape (rounds,).
    """
    names = list(runs)
    times = {name: np.empty((rounds, len(texts))) for name in names}
    speeds = {name: np.empty(rounds) for name in names}
    for name in names:
        one, many = runs[name]
        for text in texts[:WARM_UP]:
            one(text)
        many(texts[:WARM_UP])
    for number in range(rounds):
        logger.info("Round %d of %d", number + 1, rounds)
        start = number % len(names)
        order = names[start:] + names[:start]
        for name in order if number % 2 else order[::-1]:
            one, many = runs[name]
            for index, text in enumerate(texts):
                started = time.perf_counter()
                one(text)
                times[name][number, index] = 1000 * (time.perf_counter() - started)
            started = time.perf_counter()
            many(texts)
            speeds[name][number] = len(texts) / (time.perf_counter() - started)
    return {name: (times[name], speeds[name]) for name in names}


def told_apart(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether the same of two versions is faster in every round; each gives its medians, shape (rounds,)."""
    return bool((first < second).all() or (first > second).all())


def _not_told_apart(by_round: dict[str, NDArray[np.float64]]) -> list[list[str]]:
    """Neighbours in the order of their medians; each version gives an array of shape (rounds,)."""
    order = sorted(by_round, key=lambda name: float(np.median(by_round[name])))
    return [list(pair) for pair in pairwise(order) if not told_apart(*(by_round[name] for name in pair))]


def _spread_of(values: NDArray[np.float64]) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}


def _probe(found: list[Subject], texts: list[Text]) -> dict[str, NDArray[np.float64]]:
    """Seconds of a cold start and MB of memory of processes of each version, in turns: shape (PROBES, 2)."""
    taken: dict[str, list[tuple[float, float]]] = {subject.name: [] for subject in found}
    for number in range(PROBES + 1):
        logger.info("Cold starts: %d of %d", number + 1, PROBES + 1)
        for subject in found if number % 2 else found[::-1]:
            taken[subject.name].append(cold_start(subject.folder, subject.file, subject.provider, texts))
    # The first run reads from the disk.
    return {name: np.array(rows[1:]) for name, rows in taken.items()}


def run_benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure every version and publish benchmark.json, benchmark.txt and benchmark.svg.

    Returns:
        The content of benchmark.json.

    Raises:
        DistillError: if the bundle or the texts cannot be read, or a version cannot be run.
    """
    if options.rounds < MIN_ROUNDS:
        raise DistillError(
            f"--rounds {options.rounds}: at least {MIN_ROUNDS} are needed to tell two versions apart"
        )
    check_output(options.output, options.overwrite, "benchmark")
    found = subjects(options)
    bundle = read_manifest(options.export, "export", "--export")
    choose_provider(options.provider, bundle.details["files"])
    texts = _texts(options, bundle)
    probes = _probe(found, texts[:MEMORY_TEXTS])
    runs = {subject.name: subject.open(bundle.labels, options.threads) for subject in found}
    measured = measure_rounds(runs, texts, options.rounds)
    medians = {name: np.median(times, axis=1) for name, (times, _) in measured.items()}
    base = medians[found[0].name]
    rows = []
    for subject in found:
        times, speeds = measured[subject.name]
        ratios = base / medians[subject.name]
        p50, p95, p99 = np.percentile(times, [50, 95, 99])
        rows.append(
            {
                "version": subject.name,
                "file": f"{subject.folder.name}/{subject.file}",
                "runs_on": subject.provider,
                "bytes": subject.size,
                "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
                "median_by_round_ms": medians[subject.name].tolist(),
                "speedup": _spread_of(ratios),
                "texts_per_second": _spread_of(speeds),
                "cold_start_s": _spread_of(probes[subject.name][:, 0]),
                "peak_memory_mb": _spread_of(probes[subject.name][:, 1]),
            }
        )
    result = {
        "cpu": cpu_name(),
        "texts": len(texts),
        "rounds": options.rounds,
        "threads": options.threads or cores(),
        "versions": rows,
        "not_told_apart": {
            "latency": _not_told_apart(medians),
            "texts_per_second": _not_told_apart({name: speeds for name, (_, speeds) in measured.items()}),
        },
    }
    manifest = Manifest(
        stage="benchmark",
        labels=bundle.labels,
        options={
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()
        },
        seed=bundle.seed,
        data={} if options.source else bundle.data,
        parents=[{"path": str(options.export), "manifest_sha256": manifest_hash(options.export)}],
    )
    with publish(options.output, manifest, options.overwrite) as folder:
        (folder / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (folder / "benchmark.txt").write_text(render(result), encoding="utf-8")
        draw(result, folder / "benchmark.svg")
    return result
