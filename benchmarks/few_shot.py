"""A teacher with few texts: as many epochs as with thousands, at least 200 steps, and augmented text besides.

Texts are drawn from the training split, scores are of the whole validation split; the test split is not
looked at. Prints a table and keeps benchmarks/results/few_shot.json.

Usage: python benchmarks/few_shot.py DATA --model all-MiniLM-L6-v2 [--set snips] [--shots 8]

DATA holds a folder for every set, with train.csv, validation.csv and test.csv.
"""

import json
import random
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow
import pyarrow.csv

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (1, 2, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "3 epochs": {},
    "at least 200 steps": {"min_steps": 200},
    "at least 200 steps, --augment 4x": {"min_steps": 200, "augment": "4x"},
}


def draw(source: Path, target: Path, shots: int, seed: int) -> None:
    """Write a data set with so many training texts a class, and the validation text as it is."""
    table = pyarrow.csv.read_csv(source / "train.csv")
    rows = defaultdict(list)
    for row, label in enumerate(table["label"].to_pylist()):
        rows[label].append(row)
    generator = random.Random(seed)
    taken = [
        row for label in sorted(rows) for row in generator.sample(rows[label], min(shots, len(rows[label])))
    ]
    target.mkdir()
    pyarrow.csv.write_csv(table.take(pyarrow.array(taken)), target / "train.csv")
    for split in ("validation", "test"):
        shutil.copy(source / f"{split}.csv", target / f"{split}.csv")


def _train(data: Path, model: str, seed: int, options: dict[str, Any]) -> float:
    from distill.teacher.training import tune_teacher

    with tempfile.TemporaryDirectory() as scratch:
        return tune_teacher(output=Path(scratch) / "run", data=str(data), model=model, seed=seed, **options)


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Checkpoint.")
@click.option("--set", "names", multiple=True, default=("snips", "sst2_sentences"), help="Sets to run.")
@click.option("--shots", multiple=True, type=int, default=(8, 64), help="Texts a class.")
def main(data: Path, model: str, names: tuple[str, ...], shots: tuple[int, ...]) -> None:
    """Train all variants on all sets."""
    from distill.latency import cpu_name

    rows = []
    for name in names:
        for count in shots:
            scores = defaultdict(list)
            for seed in SEEDS:
                with tempfile.TemporaryDirectory() as scratch:
                    drawn = Path(scratch) / "data"
                    draw(data / name, drawn, count, seed)
                    for variant, options in VARIANTS.items():
                        scores[variant].append(_train(drawn, model, seed, options))
            for variant, found in scores.items():
                mean, spread = float(np.mean(found)), float(np.std(found, ddof=1))
                rows.append({"set": name, "shots": count, "variant": variant, "macro_f1": found})
                click.echo(f"{name:16} {count:3} a class  {variant:34} {mean:.4f} ± {spread:.4f}")
        result = {
            "cpu": cpu_name(),
            "model": Path(model).name,
            "seeds": SEEDS,
            "split": "validation",
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "few_shot.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
