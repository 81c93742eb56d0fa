"""`distill train-student`."""

from pathlib import Path
from typing import Any

import click

from distill.options import (
    POSITIVE,
    RATE,
    SHARE,
    enough_steps,
    output_options,
    say_loading,
    show_stage,
    training_options,
)


class Milliseconds(click.ParamType):
    """A time such as 0.5ms, or 0.5."""

    name = "milliseconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse it."""
        try:
            found = float(str(value).strip().lower().removesuffix("ms"))
        except ValueError:
            found = 0.0
        if not 0 < found < float("inf"):
            self.fail(f"{value!r} is not a time above 0 in milliseconds; give one as 0.5ms", param, ctx)
        return found


@click.command("train-student")
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    default=Path("runs/teacher"),
    help="Folder of train-teacher.",
)
@click.option("--data", help="The teacher's data, if it has moved [where the teacher read it].")
@click.option(
    "--student",
    help="Pre-trained checkpoint to start from [the teacher's own base checkpoint, or with --layers 0 the "
    "teacher].",
)
@click.option(
    "--layers",
    type=click.IntRange(min=0),
    help="Keep this many layers, evenly spaced, or the last alone; 0 for the mean of embeddings "
    "[half, without --student].",
)
@click.option(
    "--intermediate-size",
    type=POSITIVE,
    help="Keep this many neurons in every feed-forward network, those that add most [the checkpoint's].",
)
@click.option(
    "--attention-heads",
    type=POSITIVE,
    help="Keep this many heads in every attention, those that add most [the checkpoint's].",
)
@click.option(
    "--speedup",
    type=RATE,
    help="Keep as much of the checkpoint (layers, neurons, heads) as is this many times as fast as the "
    "teacher: INT8 against its pipeline in PyTorch, one text at a time on one thread, measured here before "
    "training.",
)
@click.option(
    "--latency-budget",
    type=Milliseconds(),
    metavar="0.5ms",
    help="The same, by the median time of a validation text.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(min=0),
    help="Keep this many rows of the embedding table: of the most frequent tokens in what the student learns "
    "on, then the checkpoint's first; special ones come on top. Others read the nearest. 0 for all that "
    "occur [the checkpoint's].",
)
@click.option(
    "--bigrams",
    type=click.IntRange(min=0),
    help="Without layers: give this many pairs of neighbouring tokens an embedding too, of those that occur "
    "twice in training and unlabelled text, the most frequent first [16384].",
)
@click.option("--unlabeled", help="File, folder or address with more texts, which only the teacher labels.")
@click.option(
    "--augment",
    metavar="10x",
    help="Make ten texts for every training text, or a number of them, which only the teacher labels.",
)
@click.option(
    "--hidden-epochs",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Epochs in which the student learns the teacher's hidden states, token by token, before its labels.",
)
@click.option("--temperature", type=RATE, default=2.0, help="Softens teacher and student alike.")
@click.option("--alpha", type=SHARE, default=0.9, help="Share of the soft labels in the loss.")
@click.option("--text-column", help="Column with the text in --unlabeled [as in the teacher's data].")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="ray: the teacher labels over Ray Data, on all cores or GPUs of one machine or many.",
)
@click.option("--workers", type=POSITIVE, help="With --engine ray [one a core, or a GPU].")
@training_options(epochs=5, learning_rate=1e-4)
@output_options("runs/student")
def train_student(as_json: bool, output: Path, **options: Any) -> None:
    """Distil the teacher into a small student.

    The teacher labels every text once; its logits are kept beside it and never computed again.
    """
    from distill.student.checks import check_options

    from distill.artifact import check_output, read_manifest

    options["min_steps"] = enough_steps(options["min_steps"])
    # Before the seconds that torch takes to load.
    check_options(options)
    check_output(output, options["overwrite"], "train-student")
    read_manifest(options["teacher"], "train-teacher", "--teacher")
    say_loading()

    from distill.student.options import StudentOptions
    from distill.student.training import train_student as run

    show_stage(run(StudentOptions(output=output, **options)), output, as_json)
