"""Click options that several commands share, and how a finished stage is shown."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from distill import processes
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.artifact import Manifest

logger = logging.getLogger(__name__)
POSITIVE = click.IntRange(min=1)
MIN_STEPS = 200  # a few texts a class need many passes: Mosbach et al. (2021), arXiv 2006.04884
RATE = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(0, 1)
FEWEST = 20  # augmented texts that somebody may have meant
SEED = click.IntRange(0, 2**32 - 1)


def _apply(function: Callable, options: list[Callable]) -> Callable:
    for option in reversed(options):
        function = option(function)
    return function


def column_options(function: Callable) -> Callable:
    """Columns of the data files."""
    return _apply(
        function,
        [
            click.option("--text-column", help="Column with the text [found by its usual names]."),
            click.option("--text-pair-column", help="Column with a second text, for pairs."),
            click.option("--label-column", help="Column with the label [found by its usual names]."),
            click.option("--multi-label", is_flag=True, help="A text may have several labels, or none."),
            click.option(
                "--label-separator", default="|", help="What stands between the labels of a text in CSV."
            ),
        ],
    )


def output_options(default: str) -> Callable[[Callable], Callable]:
    """Where a stage writes, and whether it may replace what is there."""

    def decorate(function: Callable) -> Callable:
        return _apply(
            function,
            [
                click.option(
                    "--output",
                    type=click.Path(path_type=Path),
                    default=Path(default),
                    help="Folder to write.",
                ),
                click.option("--overwrite", is_flag=True, help="Replace an existing output folder."),
                click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
            ],
        )

    return decorate


def enough_steps(min_steps: int) -> int:
    """`--min-steps` as it counts: not where somebody has said how many epochs, and nothing of steps."""
    context, unsaid = click.get_current_context(), (None, ParameterSource.DEFAULT)
    epochs, steps = map(context.get_parameter_source, ("epochs", "min_steps"))
    return min_steps if epochs in unsaid or steps not in unsaid else 0


def _installed(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if find_spec(name) is None:
            raise DistillError(f"--report-to {name}: needs the package {name}: pip install {name}")
    return names


def training_options(epochs: float, learning_rate: float) -> Callable[[Callable], Callable]:
    """Everything about optimisation that teacher and student share."""

    def decorate(function: Callable) -> Callable:
        return _apply(
            function,
            [
                click.option("--epochs", type=RATE, default=epochs, help="Passes over the training text."),
                click.option(
                    "--max-steps", type=int, default=-1, help="Stop after this many steps; -1: no limit."
                ),
                click.option(
                    "--min-steps",
                    type=click.IntRange(min=0),
                    default=MIN_STEPS,
                    help="At least as many; left out beside --epochs, there is no such limit.",
                ),
                click.option("--batch-size", type=POSITIVE, default=32, help="Texts a step, per device."),
                click.option(
                    "--gradient-accumulation", type=POSITIVE, default=1, help="Batches per optimiser step."
                ),
                click.option("--gradient-checkpointing", is_flag=True, help="Trade time for memory."),
                click.option("--learning-rate", type=RATE, default=learning_rate, help="Peak learning rate."),
                click.option(
                    "--head-learning-rate",
                    type=RATE,
                    help="Of what is new, head and adapters [ten times --learning-rate].",
                ),
                click.option("--warmup-ratio", type=SHARE, default=0.06, help="Share of steps that warm up."),
                click.option(
                    "--weight-decay", type=click.FloatRange(min=0), default=0.01, help="AdamW's weight decay."
                ),
                click.option(
                    "--dropout",
                    type=click.FloatRange(0, 1, max_open=True),
                    help="While training [the checkpoint's own; 0.2 with --layers 0].",
                ),
                click.option(
                    "--freeze-embeddings",
                    is_flag=True,
                    help="Leave the word embeddings as they are: less memory and time.",
                ),
                click.option("--max-grad-norm", type=RATE, default=1.0, help="Clip gradients to this norm."),
                click.option(
                    "--scheduler", type=click.Choice(["linear", "cosine"]), default="linear", help="Decay."
                ),
                click.option(
                    "--patience", type=POSITIVE, default=3, help="Evaluations without gain before stopping."
                ),
                click.option(
                    "--max-length", type=click.IntRange(min=8), default=256, help="Longest text, in tokens."
                ),
                click.option(
                    "--device",
                    type=click.Choice(["auto", "cpu", "cuda"]),
                    default="auto",
                    help="Where to run.",
                ),
                click.option(
                    "--precision",
                    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
                    default="auto",
                    help="auto: the fastest that the device computes natively.",
                ),
                click.option("--seed", type=SEED, default=42, help="Of splits, heads and order."),
                click.option(
                    "--report-to",
                    type=click.Choice(["tensorboard", "mlflow", "wandb"]),
                    multiple=True,
                    callback=_installed,
                    help="Also tell a tracker of loss and scores; its package must be installed.",
                ),
                click.option("--resume", is_flag=True, help="Go on from the last checkpoint."),
            ],
        )

    return decorate


def budget_of(augmentation: str, labelled: int) -> int:
    """How many texts "10x" (for every labelled one) or "50000" asks for.

    Raises:
        DistillError: if it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x|(\d+)", augmentation)
    budget = match and (round(float(match[1]) * labelled) if match[1] else int(match[2]))
    if not budget:
        raise DistillError(
            f"--augment {augmentation}: give how many texts to make, as 10x (ten for every training text) or "
            "as 50000"
        )
    if match and match[2] and budget < FEWEST:
        raise DistillError(
            f"--augment {augmentation}: {budget} texts in all; to make {budget} of each write {budget}x"
        )
    return budget


def show_stage(manifest: "Manifest", output: Path, as_json: bool) -> None:
    """Print what a finished stage reached."""
    if processes.rank():
        return
    if as_json:
        click.echo(json.dumps(asdict(manifest), ensure_ascii=False))
        return
    for split, metrics in manifest.metrics.items():
        figures = ", ".join(f"{name.replace('_', '-')} {value:.4f}" for name, value in metrics.items())
        click.echo(f"{split}: {figures}")
    if files := manifest.details.get("files"):
        made = "; ".join(
            f"{name}: {file}, {(output / file).stat().st_size / 1e6:.1f} MB" for name, file in files.items()
        )
    else:
        made = f"on {manifest.device}, {manifest.precision}"
    click.echo(f"{output}: {manifest.parameters:,} parameters, {manifest.wall_seconds:.0f} s; {made}")


def say_loading() -> None:
    """Tell what the next seconds go to."""
    logger.info("Loading PyTorch and transformers")
