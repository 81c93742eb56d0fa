"""`distill export`."""

from pathlib import Path
from typing import Any

import click

from distill.options import POSITIVE, output_options, say_loading, show_stage


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
    help="Points of validation macro-F1 that INT8, or FP16, may lose to the fp32 file.",
)
@click.option(
    "--exporter",
    type=click.Choice(["optimum", "transformers"]),
    help="What writes the graph [Optimum; transformers' own exporter with transformers 5].",
)
@click.option(
    "--single-file",
    is_flag=True,
    help="Add classifier.onnx: the bundle in one file, with the model for the CPU (or CUDA, if alone).",
)
@click.option("--data", help="The data, if it has moved [where the earlier stages read it].")
@output_options("runs/export")
def export(as_json: bool, output: Path, **options: Any) -> None:
    """Write the student as an ONNX bundle, checked against PyTorch on validation text.

    With --int8 several quantization settings are tried; of those that lose at most --max-drop and are about
    as fast as the fastest, the one nearest to fp32 is kept.
    """
    from distill.artifact import check_output, read_manifest

    # Before the seconds that torch takes to load.
    check_output(output, options["overwrite"], "export")
    read_manifest(options["student"], "train-student", "--student")

    say_loading()
    from distill.export.bundle import ExportOptions, export_student

    show_stage(export_student(ExportOptions(output=output, **options)), output, as_json)


@click.command("benchmark")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("--text-column", help="Column with the text [found by its usual names].")
@click.option("--text-pair-column", help="Column with a second text, for pairs.")
@click.option(
    "--export", type=click.Path(path_type=Path), default=Path("runs/export"), help="Folder of export."
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    default=Path("runs/teacher"),
    help="Folder of train-teacher; left out if it or the student is not there.",
)
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    default=Path("runs/student"),
    help="Folder of train-student; left out if it is not there.",
)
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where the bundle's files run."
)
@click.option("--texts", type=POSITIVE, default=200, help="How many texts to take.")
@click.option(
    "--rounds",
    type=click.IntRange(min=6),
    default=7,
    help="How often each version takes all of them; fewer than 6 cannot tell two apart.",
)
@click.option("--threads", type=POSITIVE, help="For throughput [one a core].")
@output_options("runs/benchmark")
def benchmark(as_json: bool, **options: Any) -> None:
    """Measure latency, throughput, cold start, memory and size of every version, in one run.

    SOURCE is a file with your own texts (CSV, TSV, JSONL or Parquet); without it the test texts are taken
    that the bundle was made with. The versions take turns, and the table says which the machine cannot tell
    apart.
    """
    import json

    from distill.export.benchmark import BenchmarkOptions, run_benchmark
    from distill.export.benchmark_rendering import render

    result = run_benchmark(BenchmarkOptions(**options))
    click.echo(json.dumps(result) if as_json else render(result), nl=as_json)
    if not as_json:
        click.echo(f"{options['output']}: benchmark.json, benchmark.txt, benchmark.svg")
