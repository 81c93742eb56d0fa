"""`distill export`."""

from pathlib import Path
from typing import Any

import click

from distill.options import output_options, show_stage


@click.command("export")
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    default=Path("runs/student"),
    help="Folder of train-student.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    multiple=True,
    default=("cpu",),
    help="What to optimise for; give it twice for both.",
)
@click.option("--int8", is_flag=True, help="Add an INT8 file for each provider.")
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    default=1.0,
    help="Points of validation macro-F1 that INT8, or FP16, may lose.",
)
@click.option(
    "--single-file", is_flag=True, help="Add classifier.onnx, one file that holds the whole bundle."
)
@click.option("--data", help="The data, if it has moved [where the earlier stages read it].")
@output_options("runs/export")
def export(as_json: bool, output: Path, **options: Any) -> None:
    """Write the student as an ONNX bundle, checked against PyTorch on validation text.

    With --int8 several quantization settings are tried; the fastest that loses at most --max-drop is kept.
    """
    from distill.artifact import check_output, read_manifest

    # Before the seconds that torch takes to load.
    check_output(output, options["overwrite"], "export")
    read_manifest(options["student"], "train-student", "--student")

    from distill.export.bundle import ExportOptions, export_student

    show_stage(export_student(ExportOptions(output=output, **options)), output, as_json)
