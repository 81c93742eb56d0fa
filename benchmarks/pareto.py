"""Quality against latency and size, over several labelled sets and against what else one might use.

For every set, with one recipe: the teacher is fine-tuned once; students of several shapes learn from it, with
three seeds, and without it; each is exported to INT8. Validation text says which shape one would take. Peers
are trained on the same split. All are timed in one process, one text at a time on one thread. A teacher,
student or SetFit that is there already is not trained again, and a run goes on where it stopped. Writes
benchmarks/results/pareto/SET.json; pareto_page.py makes a table and a plot of all sets.

Usage: python benchmarks/pareto.py DATA --teacher all-mpnet-base-v2 --student all-MiniLM-L6-v2 --set banking77

DATA holds a folder for every set, as `distill train-teacher --data` takes it. The sets' licences and sources
stand beside them; none is part of this repository.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import peers
import torch
from distill.student import command
from distill.student.losses import distillation_loss
from transformers import pipeline

from distill import Classifier
from distill.artifact import Manifest, manifest_hash, read_manifest
from distill.data import Data, reload_data, texts_of
from distill.latency import cpu_name, measure
from distill.metrics import score
from distill.models import load_model, load_tokenizer
from distill.predictions import read_predictions
from distill.significance import interval, paired_bootstrap

RESULTS = Path(__file__).resolve().parent / "results" / "pareto"
SETS = ("banking77", "clinc150", "snips", "ag_news_small", "goemotions_sentiment3", "sst2_sentences")
SEEDS = (1, 2, 3)
BATCH = ("--batch-size", "64")
FAST = ("--learning-rate", "3e-4", *BATCH)
AUGMENT, EPOCHS = 40_000, 5
RECIPE = ("--augment", str(AUGMENT), "--epochs", str(EPOCHS), *FAST)
# With layers: the teacher's hidden states first, then labels at a lower rate, without dropout.
DEEP = (
    "--augment", str(AUGMENT), "--hidden-epochs", "2", "--epochs", str(EPOCHS),
    "--learning-rate", "2e-4", "--dropout", "0", *BATCH,
)  # fmt: skip
SEEDED, LAYERS, THIN = (0,), (), (3,)  # layers of the students
NARROW = ("--intermediate-size", "192", "--attention-heads", "6")  # of 1,536 and 12 of MiniLM-L6
BESIDE = 2  # students that train at the same time
LAST = f"_seed{SEEDS[-1]}"  # of a student whose shape has all seeds
TIMED = 60
INT8 = "onnx/model_quantized.onnx"


def _run(*arguments: str | Path, beside: int = 1) -> None:
    """Run `distill`, on its share of the cores, and let what it says pass."""
    command = [str(Path(sys.executable).with_name("distill")), *map(str, arguments)]
    click.echo(f"$ distill {' '.join(command[1:])}")
    cores = {} if beside == 1 else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // beside))}
    subprocess.run(command, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive", **cores})


def _recipe(layers: int) -> tuple[str, ...]:
    return DEEP if layers else RECIPE


def _alone() -> tuple[str, ...]:
    """Options of a student without a teacher: as many steps on labels as with one, the best of its epochs."""
    rows = read_manifest(Path("runs/teacher"), "train-teacher").data["rows"]["train"]
    epochs = str(round(EPOCHS * (1 + AUGMENT / rows)))
    # Stopped early it would not have had the end of the schedule, where the learning rate goes to zero.
    return ("--alpha", "0", "--epochs", epochs, "--patience", epochs, *FAST)


def _students(
    checkpoints: tuple[str, str],
    seeded: Sequence[int],
    depths: Mapping[int, int],
    narrow: Sequence[int],
    vocabulary: int | None,
) -> dict[str, tuple[str, ...]]:
    """Folder of every student, and the options that make it; of narrow ones there are all seeds.

    Without layers it starts from the teacher; if it has none, from the checkpoint that the teacher was.
    """
    found: dict[str, tuple[str, ...]] = {}
    teacher, student = checkpoints

    def shape(layers: int, seed: int, alone: bool = False) -> tuple[str, ...]:
        begun = () if not (layers or alone) else ("--student", student if layers else teacher)
        return (*begun, "--layers", str(layers), "--seed", str(seed))

    for layers in seeded:
        for seed in SEEDS:
            found[f"{layers}_layers_seed{seed}"] = (*shape(layers, seed), *_recipe(layers))
            found[f"{layers}_layers_alone_seed{seed}"] = (*shape(layers, seed, alone=True), *_alone())
    for layers, seeds in depths.items():
        for seed in SEEDS[:seeds]:
            found[f"{layers}_layers_seed{seed}"] = (*shape(layers, seed), *DEEP)
            if vocabulary is not None:
                rows = ("--vocabulary", str(vocabulary))
                found[f"{layers}_layers_{vocabulary}_rows_seed{seed}"] = (
                    *shape(layers, seed),
                    *rows,
                    *DEEP,
                )
    for layers in narrow:
        for seed in SEEDS:
            found[f"{layers}_layers_narrow_seed{seed}"] = (*shape(layers, seed), *NARROW, *DEEP)
    return found


def _has_recipe(name: str, options: tuple[str, ...]) -> bool:
    """Whether a student was trained with today's options, by the teacher that is there."""
    wanted = command.train_student.make_context("train-student", list(options)).params
    manifest = read_manifest(Path("runs", name), "train-student")
    before = manifest.options
    # Where it lies is this run's own, as is where its checkpoint lies; the least steps follow from the rest.
    own = {"output", "student", "min_steps"}
    begun = [str(one["student"]).rpartition("/")[2] for one in (before, wanted)]
    same = all(str(before[key]) == str(wanted.get(key)) for key in before.keys() - own)
    return same and begun[0] == begun[1] and _is_child(manifest, Path("runs/teacher"))


def _is_child(manifest: Manifest, parent: Path) -> bool:
    return bool(manifest.parents[0]["manifest_sha256"] == manifest_hash(parent))


def _is_exported(name: str) -> bool:
    folder = Path("runs", f"{name}_int8")
    return folder.is_dir() and _is_child(read_manifest(folder, "export"), Path("runs", name))


def train_teacher(data: Path, model: str) -> None:
    """Train the teacher if it is not there yet; how long students train depends on its data."""
    if not Path("runs/teacher").is_dir():
        _run("train-teacher", "--data", data, "--model", model, "--resume")


def train_students(students: dict[str, tuple[str, ...]]) -> None:
    """Train and export whatever is not there yet."""
    for name, options in students.items():
        if Path("runs", name).is_dir() and not _has_recipe(name, options):
            shutil.rmtree(Path("runs", name))

    def learn(name: str, beside: int) -> None:
        _run("train-student", "--output", f"runs/{name}", "--resume", *students[name], beside=beside)

    # The first leaves the soft labels of all, and the first with hidden states these. A small student keeps
    # few cores busy, so the rest go in pairs.
    missing = [name for name in students if not Path("runs", name).is_dir()]
    first = {"--hidden-epochs" in students[name]: name for name in reversed(students)}
    leading = [name for name in missing if name in first.values()]
    for name in leading:
        learn(name, 1)
    with ThreadPoolExecutor(BESIDE) as pool:
        list(pool.map(partial(learn, beside=BESIDE), (name for name in missing if name not in leading)))
    for name in students:
        if not _is_exported(name):
            output = ("--output", f"runs/{name}_int8", "--overwrite")
            _run("export", "--int8", "--max-drop", "100", "--student", f"runs/{name}", *output)


def _peers(data: Data, student: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train every peer: how it classifies, and its row of the table."""
    makers = {
        "TF-IDF + logistic regression": lambda: peers.tfidf(data),
        "model2vec + logistic regression": lambda: peers.model2vec(data, student),
        "SetFit": lambda: peers.setfit(data, student, Path("runs/setfit")),
        "Optimum INT8 of the teacher": lambda: peers.teacher_int8(
            data, Path("runs/teacher"), Path("runs/teacher_int8")
        ),
    }
    classify, rows = {}, {}
    for name, make in makers.items():
        click.echo(f"Peer: {name}")
        classify[name], size = make()
        rows[name] = {"bytes": size}
    return classify, rows


def evaluate(student: str, students: Sequence[str]) -> dict[str, Any]:
    """Test scores, sizes and latencies of all versions of one set."""
    manifest = read_manifest(Path("runs/teacher"), "train-teacher")
    data = reload_data(manifest.data, manifest.labels)
    classes = len(data.labels)
    texts, truth = texts_of(data.splits["test"]), np.asarray(data.splits["test"]["label"])
    classify: dict[str, Any] = {
        "teacher": pipeline(
            "text-classification",
            model=load_model("runs/teacher", data.labels).eval(),
            tokenizer=load_tokenizer("runs/teacher", manifest.max_length),
            device="cpu",
            truncation=True,
        )
    }
    rows: dict[str, dict[str, Any]] = {"teacher": {}}
    predicted = {"teacher": read_predictions(Path("runs/teacher"), "test")["teacher"].logits.argmax(axis=1)}
    rows["teacher"]["bytes"] = Path("runs/teacher/model.safetensors").stat().st_size
    for name in students:
        folder = Path("runs", f"{name}_int8")
        predicted[name] = read_predictions(folder, "test")["int8"].logits.argmax(axis=1)
        unquantized = read_predictions(Path("runs", name), "test")["student"].logits.argmax(axis=1)
        rows[name] = {
            "bytes": (folder / INT8).stat().st_size,
            "macro_f1_pytorch": score(truth, unquantized, classes).macro_f1,
            **({} if "alone" in name else _on_validation(name, classes)),
        }
        if "seed1" in name and "alone" not in name:
            classify[name] = Classifier(folder, provider="cpu", threads=1)
    others, their_rows = _peers(data, student)
    for name, run in others.items():
        predicted[name] = run(texts)
        rows[name] = their_rows[name]
        classify[name] = lambda text, run=run: run([text])
    sample = texts[:: max(1, len(texts) // TIMED)][:TIMED]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    latency = measure(classify, sample, rounds=3)
    torch.set_num_threads(threads)
    for name, row in rows.items():
        row["macro_f1"] = score(truth, predicted[name], classes).macro_f1
        row["kept"] = row["macro_f1"] / score(truth, predicted["teacher"], classes).macro_f1
        if name in latency:
            row["latency_ms"] = latency[name]
            row["speed_up"] = latency["teacher"] / latency[name]
    return {
        "cpu": cpu_name(),
        "teacher": Path(manifest.options["model"]).name,
        "student": Path(student).name,
        "versions": read_manifest(Path("runs", f"{students[-1]}_int8"), "export").versions,
        "recipe": " ".join(RECIPE),
        "recipe_with_layers": " ".join(DEEP),
        "recipe_alone": " ".join(_alone()),
        **({"narrow": " ".join(NARROW)} if any("_narrow" in name for name in students) else {}),
        "rows": data.manifest()["rows"],
        "classes": classes,
        "results": rows,
        "seeded": {
            shape: _over_seeds(shape, truth, predicted, rows, classes)
            for shape in (name.removesuffix(LAST) for name in students if name.endswith(LAST))
            if not shape.endswith("_alone")
        },
    }


def _on_validation(name: str, classes: int) -> dict[str, float]:
    """The loss that a student's best epoch had the lowest of, and macro-F1, of its INT8 version."""
    manifest = read_manifest(Path("runs", name), "train-student")
    answers = read_predictions(Path("runs", f"{name}_int8"), "validation")["int8"]
    teacher = read_predictions(Path("runs/teacher"), "validation")["teacher"].logits
    loss = distillation_loss(
        torch.from_numpy(answers.logits).float(),
        torch.from_numpy(teacher / manifest.details["teacher_temperature"]).float(),
        torch.from_numpy(answers.labels),
        manifest.options["temperature"],
        manifest.options["alpha"],
    )
    found = score(answers.labels, answers.logits.argmax(axis=1), classes)
    return {"validation_loss": float(loss), "validation_macro_f1": found.macro_f1}


def _over_seeds(
    shape: str, truth: Any, predicted: dict[str, Any], rows: dict[str, Any], classes: int
) -> dict[str, Any]:
    """Mean and spread over seeds of students of a shape, and what they gain over any without a teacher."""
    with_teacher = [f"{shape}_seed{seed}" for seed in SEEDS]
    found = [rows[name]["macro_f1"] for name in with_teacher]
    over = {
        "mean": float(np.mean(found)),
        "deviation": float(np.std(found, ddof=1)),
        **{
            measure: float(np.mean([rows[name][measure] for name in with_teacher]))
            for measure in ("validation_loss", "validation_macro_f1")
        },
    }
    alone = [f"{shape}_alone_seed{seed}" for seed in SEEDS]
    if alone[0] not in rows:
        return over
    samples = paired_bootstrap(truth, [predicted[name] for name in with_teacher + alone], classes).macro_f1
    scores = found + [rows[name]["macro_f1"] for name in alone]
    half = len(SEEDS)
    # Each resample draws texts, and seeds too: both are what another run would have other ones of.
    drawn = np.random.default_rng(0).integers(half, size=(2, len(samples), half))
    sides = [
        np.take_along_axis(part, pick, axis=1).mean(axis=1)
        for part, pick in zip((samples[:, :half], samples[:, half:]), drawn, strict=True)
    ]
    gain = interval(float(np.mean(scores[:half]) - np.mean(scores[half:])), sides[0] - sides[1])
    return over | {"gain_over_no_teacher": {"value": gain.value, "low": gain.low, "high": gain.high}}


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--teacher", default="sentence-transformers/all-mpnet-base-v2", help="Checkpoint.")
@click.option("--student", default="sentence-transformers/all-MiniLM-L6-v2", help="Checkpoint.")
@click.option("--set", "names", multiple=True, default=SETS, help="Sets to run; all when left out.")
@click.option(
    "--seeded",
    type=int,
    multiple=True,
    default=SEEDED,
    help="Depths of students of all seeds, with the teacher and without.",
)
@click.option(
    "--layers", "depths", type=int, multiple=True, default=LAYERS, help="Other depths, with the teacher."
)
@click.option(
    "--seeds",
    type=click.IntRange(1, len(SEEDS)),
    default=len(SEEDS),
    help="How many seeds the other depths have.",
)
@click.option(
    "--narrow",
    type=click.IntRange(1),
    multiple=True,
    default=THIN,
    help="Depths of narrow students, with the teacher.",
)
@click.option("--vocabulary", type=click.IntRange(1), help="Rows of the other depths' students, beside all.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("pareto"), help="Folder for the runs.")
def main(
    data: Path,
    teacher: str,
    student: str,
    names: tuple[str, ...],
    seeded: tuple[int, ...],
    depths: tuple[int, ...],
    seeds: int,
    narrow: tuple[int, ...],
    vocabulary: int | None,
    work: Path,
) -> None:
    """Run the benchmark, set by set."""
    if vocabulary is not None and not depths:
        raise click.UsageError("--vocabulary: of the students of --layers, and there are none; give --layers")
    RESULTS.mkdir(parents=True, exist_ok=True)
    # The runs have a working folder of their own, so that the chain's default paths serve.
    teacher, student = (str(Path(one).resolve()) if Path(one).is_dir() else one for one in (teacher, student))
    data, work = data.resolve(), work.resolve()
    for name in names:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        train_teacher(data / name, teacher)
        shapes = seeded, dict.fromkeys(depths, seeds), narrow, vocabulary
        students = _students((teacher, student), *shapes)
        train_students(students)
        result = evaluate(student, list(students))
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
