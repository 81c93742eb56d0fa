"""`distill train-teacher`."""

from pathlib import Path
from typing import Any

import click

from distill.options import (
    POSITIVE,
    column_options,
    enough_steps,
    output_options,
    say_loading,
    show_stage,
    training_options,
)


@click.command("train-teacher")
@click.option("--data", required=True, help="CSV, TSV, JSONL or Parquet file, folder with splits, or Hub id.")
@click.option("--model", required=True, help="Any sequence-classification checkpoint: Hub id or folder.")
@column_options
@click.option("--class-weights", is_flag=True, help="Weigh rare classes up (n / (classes * count)).")
@click.option(
    "--label-smoothing", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Label smoothing."
)
@click.option(
    "--focal-gamma",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Focal loss with this exponent, which turns from texts that are already right; 0: cross-entropy.",
)
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    help="Also train this many teachers, each to label, for students, the part of the training text that it "
    "has not seen; and cross-validate.",
)
@click.option(
    "--augment",
    metavar="4x",
    help="Make four texts for every training text, or a number of them, by leaving out words, putting others "
    "in their place and mixing two texts with one label, which is kept: for few texts.",
)
@click.option(
    "--long-texts",
    type=click.Choice(["head", "head-tail", "windows"]),
    default="head",
    help="What is read of texts longer than --max-length: their beginning, a quarter from there and the rest "
    "from the end, or all of it, in windows whose logits are averaged.",
)
@click.option("--lora", is_flag=True, help="Train adapters beside frozen weights, and merge them.")
@click.option("--qlora", is_flag=True, help="The same, with the frozen weights in 4 bits.")
@click.option("--lora-rank", type=POSITIVE, default=16, help="Rank of the adapters.")
@training_options(epochs=3, learning_rate=5e-5)
@output_options("runs/teacher")
def train_teacher(as_json: bool, output: Path, **options: Any) -> None:
    """Fine-tune a large classifier on labelled text.

    Splits that the data lacks are made: a stratified tenth for validation and for test. The weights with the
    best validation macro-F1 are kept.
    """
    from distill.artifact import check_output

    options["min_steps"] = enough_steps(options["min_steps"])
    check_output(output, options["overwrite"], "train-teacher")  # before the seconds that torch takes to load
    say_loading()

    from distill.teacher.training import teacher_options
    from distill.teacher.training import train_teacher as run

    show_stage(run(teacher_options(output=output, **options)), output, as_json)
