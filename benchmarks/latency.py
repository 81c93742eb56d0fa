"""Latency of every version of the demo's classifier, one thread each, in one run.

Writes benchmarks/results/latency.json.

Usage: python benchmarks/latency.py [DEMO_FOLDER], after `make demo`.
"""

import json
import os
from pathlib import Path
from typing import Any

import click
from distill.explain.report import ReportOptions, compile_report

from distill.errors import DistillError

RESULTS = Path(__file__).resolve().parent / "results"


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--texts", default=300, help="Test texts to measure.")
def main(demo: Path, texts: int) -> None:
    """Measure every version of the demo's classifier."""
    if not (demo / "runs" / "export").is_dir():
        raise click.ClickException(f"{demo}: no finished demo in it; run `make demo` first")
    RESULTS.mkdir(exist_ok=True)
    os.chdir(demo)
    try:
        report, _, _ = compile_report(ReportOptions(texts=texts, explain=0))
    except DistillError as error:
        raise click.ClickException(str(error)) from error
    kept = {key: report[key] for key in ("cpu", "latency_texts")}
    figures = ("version", "file", "parameters", "bytes", "latency_ms", "speedup")
    kept["versions"] = [{name: row[name] for name in figures} for row in report["versions"]]
    (RESULTS / "latency.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    click.echo(render_summary(report))


def render_summary(report: dict[str, Any]) -> str:
    """One line a version."""
    lines = [
        f"{row['version']:10} {row['latency_ms']:8.2f} ms {row['speedup']:6.1f} x"
        for row in report["versions"]
    ]
    return "\n".join([*lines, f"{report['latency_texts']} texts on {report['cpu']}"])


if __name__ == "__main__":
    main()
