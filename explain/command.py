"""`distill report`."""

import json
from pathlib import Path
from typing import Any

import click

from distill.options import POSITIVE, output_options


@click.command("report")
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    default=Path("runs/teacher"),
    help="Folder of train-teacher.",
)
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    default=Path("runs/student"),
    help="Folder of train-student.",
)
@click.option(
    "--export", type=click.Path(path_type=Path), default=Path("runs/export"), help="Folder of export."
)
@click.option("--data", help="The data, if it has moved [where the earlier stages read it].")
@click.option("--texts", type=POSITIVE, default=200, help="Test texts that latency is measured on.")
@output_options("runs/report")
def report(as_json: bool, output: Path, **options: Any) -> None:
    """Compare teacher, student and exported versions on the test split.

    Scores come from the saved predictions; latency is measured now, all versions in one run.
    """
    from distill.explain.report import ReportOptions, render, write_report

    content = write_report(ReportOptions(output=output, **options))
    click.echo(
        json.dumps(content, ensure_ascii=False) if as_json else render(content, markdown=False), nl=as_json
    )
    if not as_json:
        click.echo(f"\n{output}: report.txt, report.md, report.json")
