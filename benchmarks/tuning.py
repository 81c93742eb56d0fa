"""`distill tune` against today's settings, and two workers on one study against one, each on one thread.

Some texts a class are drawn from the training split, and scores are of the validation split. `--layers 2`
keeps two layers of the checkpoint, so that a search takes minutes. Writes benchmarks/results/tuning.json.

Usage: python benchmarks/tuning.py DATA --model all-MiniLM-L6-v2 [--set snips] [--trials 20] [--layers 2]

DATA holds a folder for every set, with train.csv, validation.csv and test.csv.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import optuna
from few_shot import draw

from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"


def _search(data: Path, model: str, trials: int, workers: int, folder: Path) -> dict[str, Any]:
    """Search with so many workers, and give what they found and how long it took."""
    command = [
        sys.executable,
        "-m",
        "distill",
        "tune",
        "train-teacher",
        "--data",
        str(data),
        "--model",
        model,
    ]
    command += ["--trials", str(trials), "--max-length", "64", "--output", "tune", "--json"]
    folder.mkdir()
    started = time.monotonic()
    running = [
        subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for _ in range(workers)
    ]
    answers = [process.communicate()[0] for process in running]
    if failed := [process.returncode for process in running if process.returncode]:
        raise click.ClickException(f"tune ended with {failed[0]}")
    seconds = time.monotonic() - started
    found = max((json.loads(answer.splitlines()[-1]) for answer in answers), key=lambda one: one["trials"])
    study = optuna.load_study(study_name="train-teacher", storage=f"sqlite:///{folder}/tune/study.db")
    busy = sum(one.duration.total_seconds() for one in study.trials if one.duration)
    return {"seconds": round(seconds, 1), "seconds of trials": round(busy, 1), **found}


def _shallow(model: str, layers: int, target: Path) -> str:
    """Write a checkpoint with so many layers of another one."""
    from distill.student.architecture import keep_layers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(1)  # its head, which a set with two labels keeps
    keep_layers(AutoModelForSequenceClassification.from_pretrained(model), layers).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return str(target)


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Checkpoint.")
@click.option("--set", "names", multiple=True, default=("snips", "sst2_sentences"), help="Sets to run.")
@click.option("--shots", default=64, help="Texts a class.")
@click.option("--trials", default=20, help="Of each search.")
@click.option("--layers", type=int, help="Of the checkpoint's; all when left out.")
def main(data: Path, model: str, names: tuple[str, ...], shots: int, trials: int, layers: int | None) -> None:
    """Search with one worker and with two."""
    rows = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            drawn = Path(scratch) / "data"
            draw(data / name, drawn, shots, seed=1)
            checkpoint = str(Path(model).resolve()) if Path(model).is_dir() else model
            if layers:
                checkpoint = _shallow(checkpoint, layers, Path(scratch) / "model")
            one, two = (
                _search(drawn, checkpoint, trials, workers, Path(scratch) / f"{workers}")
                for workers in (1, 2)
            )
        rows[name] = {"one worker": one, "two workers": two, "time": two["seconds"] / one["seconds"]}
        click.echo(f"{name}: {json.dumps(rows[name])}")
        result = {
            "cpu": cpu_name(),
            "model": Path(model).name,
            "layers": layers,
            "texts a class": shots,
            "sets": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "tuning.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
