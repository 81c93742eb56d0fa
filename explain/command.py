"""`distill report` and `distill explain`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from distill.files import SUFFIXES
from distill.options import POSITIVE, SEED, output_options


def stage_options(function: Callable) -> Callable:
    """Where the three stages have left their folders, and the data."""
    path = click.Path(path_type=Path)
    options = [
        click.option("--teacher", type=path, default=Path("runs/teacher"), help="Folder of train-teacher."),
        click.option("--student", type=path, default=Path("runs/student"), help="Folder of train-student."),
        click.option("--export", type=path, default=Path("runs/export"), help="Folder of export."),
        click.option("--data", help="The data, if it has moved [where the earlier stages read it]."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command("report")
@stage_options
@click.option("--texts", type=POSITIVE, default=200, help="Test texts that latency is measured on.")
@click.option(
    "--explain",
    type=click.IntRange(min=0),
    default=40,
    help="Test texts to explain, besides half as many disagreements; 0: none.",
)
@click.option("--method", type=click.Choice(["shap", "lime"]), default="shap", help="Of the explanations.")
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    help="Exit with 1 unless the loss is shown to be at most this many points of macro-F1.",
)
@click.option(
    "--target-precision",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    help="Precision to find an abstention threshold for.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="For the teacher.")
@output_options("runs/report")
def report(as_json: bool, output: Path, **options: Any) -> None:
    """Compare teacher, student and exported versions on the test split.

    Scores come from the saved predictions; latency is measured now, all versions in one run. With --max-drop
    the command fails, after the report is written, when the lower end of the 95 % interval of the difference
    between the bundle's version for the CPU and the teacher falls below the margin.
    """
    from distill.artifact import check_output

    check_output(output, options["overwrite"], "report")  # before the seconds that packages take to load

    from distill.explain.rendering import render
    from distill.explain.report import ReportOptions, require_quality, write_report

    content = write_report(ReportOptions(output=output, **options))
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False))
    else:
        click.echo(render(content, markdown=False))
        click.echo(
            f"{output}/report.html: open it in a browser; beside it report.md, report.txt, report.json"
        )
    if options["max_drop"] is not None:
        require_quality(content, output)


@click.command("explain")
@click.argument("texts", nargs=-1)
@click.option("--sample", type=POSITIVE, default=5, help="Without TEXTS: how many texts of the test split.")
@click.option(
    "--version",
    "versions",
    multiple=True,
    type=click.Choice(["teacher", "student", "onnx-fp32", "int8"]),
    help="Which to explain; may be repeated [teacher, student and int8].",
)
@click.option("--method", type=click.Choice(["shap", "lime"]), default="shap", help="Of the explanations.")
@stage_options
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="For the teacher.")
@click.option("--seed", type=SEED, default=42, help="Of the sample and of the masked texts.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a text, with the values of every class."
)
def explain(as_json: bool, **options: Any) -> None:
    """Say what each word of TEXTS adds to the answers of teacher, student and INT8 version.

    All versions are explained on the same words and the same masked texts, so their values can be compared.
    """
    from distill.explain.explanations import ExplainOptions, explain_texts, show

    for text in options["texts"]:
        if Path(text).suffix.lower() in SUFFIXES and " " not in text:
            click.echo(f"{text}: explained as a text, since this command reads no files", err=True)
    for number, entry in enumerate(explain_texts(ExplainOptions(**options))):
        if as_json:
            click.echo(json.dumps(entry, ensure_ascii=False))
        else:
            click.echo(("\n" if number else "") + show(entry))
