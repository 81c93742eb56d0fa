"""The report: teacher, student and exported versions side by side, as text, Markdown and JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.explain.versions import Version, read_versions, runners

from distill.artifact import Manifest, check_output, publish
from distill.data import reload_data
from distill.errors import DistillError
from distill.latency import cpu_name, measure
from distill.metrics import Scores, score


@dataclass(frozen=True)
class ReportOptions:
    """Options of `distill report`."""

    teacher: Path = Path("runs/teacher")
    student: Path = Path("runs/student")
    export: Path = Path("runs/export")
    output: Path = Path("runs/report")
    data: str | None = None
    texts: int = 200
    overwrite: bool = False


def _latency(versions: list[Version], bundle: Manifest, options: ReportOptions) -> dict[str, float]:
    """Median milliseconds a text, one text at a time, one thread each, in one run."""
    import torch

    data = reload_data(bundle.data, bundle.labels, options.data)
    test = data.splits["test"]
    sample = test.select(range(0, len(test), max(1, len(test) // options.texts))).select(
        range(min(options.texts, len(test)))
    )
    pairs = "text_pair" in test.column_names
    texts: list[Any] = (
        list(zip(sample["text"], sample["text_pair"], strict=True)) if pairs else list(sample["text"])
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(runners(versions, bundle), texts)
    finally:
        torch.set_num_threads(before)


def compile_report(options: ReportOptions) -> tuple[dict[str, Any], Manifest]:
    """Compute everything the report says, as one JSON-ready dictionary; also gives the bundle's manifest."""
    versions, bundle = read_versions(options.teacher, options.student, options.export)
    latency = _latency(versions, bundle, options)
    scores = {v.name: score(v.labels, v.logits.argmax(1), len(bundle.labels)) for v in versions}
    teacher = versions[0]
    rows = []
    for version in versions:
        own: Scores = scores[version.name]
        rows.append(
            {
                "version": version.name,
                "file": f"{version.folder.name}/{version.file}",
                "parameters": version.parameters,
                "bytes": version.size,
                "latency_ms": latency[version.name],
                "speedup": latency[teacher.name] / latency[version.name],
                "macro_f1_kept": own.macro_f1 / scores[teacher.name].macro_f1
                if scores[teacher.name].macro_f1
                else 0.0,
                "agreement_with_teacher": float(
                    (version.logits.argmax(1) == teacher.logits.argmax(1)).mean()
                ),
                "scores": own.as_dict(),
            }
        )
    report = {
        "schema_version": 1,
        "split": "test",
        "texts": len(teacher.labels),
        "labels": bundle.labels,
        "cpu": cpu_name(),
        "latency_texts": min(options.texts, len(teacher.labels)),
        "versions": rows,
    }
    return report, bundle


def write_report(options: ReportOptions) -> dict[str, Any]:
    """Compile the report and publish report.txt, report.md and report.json.

    Returns:
        The report's content.

    Raises:
        DistillError: if a stage is missing, or the stages do not belong together.
    """
    if options.texts < 1:
        raise DistillError(f"--texts {options.texts}: must be at least 1")
    check_output(options.output, options.overwrite)
    report, bundle = compile_report(options)
    manifest = Manifest(
        stage="report",
        labels=bundle.labels,
        options={"texts": options.texts},
        seed=bundle.seed,
        data=bundle.data,
        metrics={row["version"]: {"macro_f1": row["scores"]["macro_f1"]} for row in report["versions"]},
    )
    with publish(options.output, manifest, options.overwrite) as folder:
        (folder / "report.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (folder / "report.md").write_text(render(report, markdown=True), encoding="utf-8")
        (folder / "report.txt").write_text(render(report, markdown=False), encoding="utf-8")
    return report


def render(report: dict[str, Any], markdown: bool) -> str:
    """The report as Markdown or as plain text for a terminal."""
    parts = [
        _heading("Teacher, student and exported versions", 1, markdown),
        _verdict(report),
        _versions_table(report, markdown),
    ]
    parts.append(
        f"Latency: median of {report['latency_texts']} test texts, one at a time, one thread, all versions "
        f"in one run, on {report['cpu']}. Teacher and student run in PyTorch, the others in "
        "ONNX Runtime; tokenization included."
    )
    parts += [_heading("Per class", 2, markdown), _class_table(report, markdown)]
    for row in report["versions"]:
        parts += [_heading(f"Confusion: {row['version']} (rows: true, columns: predicted)", 2, markdown)]
        parts.append(_confusion(report["labels"], row["scores"]["confusion"], markdown))
    return "\n\n".join(parts) + "\n"


def _verdict(report: dict[str, Any]) -> str:
    first, last = report["versions"][0], report["versions"][-1]
    return (
        f"On {report['texts']:,} test texts the {last['version']} version keeps "
        f"{100 * last['macro_f1_kept']:.1f} % of the teacher's macro-F1 ({last['scores']['macro_f1']:.4f} of "
        f"{first['scores']['macro_f1']:.4f}), "
        f"answers {last['speedup']:.1f} times as fast and "
        f"is {first['bytes'] / last['bytes']:.1f} times smaller."
    )


def _heading(text: str, level: int, markdown: bool) -> str:
    return f"{'#' * level} {text}" if markdown else f"{text}\n{('=' if level == 1 else '-') * len(text)}"


def _table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """A table whose first column is text and whose other columns are figures."""
    if markdown:
        header, *rows = [
            [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]
        ]
        rule = ["---", *["---:"] * (len(header) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _versions_table(report: dict[str, Any], markdown: bool) -> str:
    header = [
        "version",
        "macro-F1",
        "kept",
        "weighted F1",
        "accuracy",
        "agrees",
        "parameters",
        "file",
        "latency",
        "speed-up",
    ]
    rows = []
    for row in report["versions"]:
        scores = row["scores"]
        rows.append(
            [
                row["version"],
                f"{scores['macro_f1']:.4f}",
                f"{100 * row['macro_f1_kept']:.1f} %",
                f"{scores['weighted_f1']:.4f}",
                f"{scores['accuracy']:.4f}",
                f"{100 * row['agreement_with_teacher']:.1f} %",
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['bytes'] / 1e6:.1f} MB",
                f"{row['latency_ms']:.2f} ms",
                f"{row['speedup']:.1f}",
            ]
        )
    return _table(header, rows, markdown)


def _class_table(report: dict[str, Any], markdown: bool) -> str:
    versions = report["versions"]
    header = ["class", "support"]
    for row in versions:
        header += [f"{row['version']} P", "R", "F1"]
    lines = []
    for index, label in enumerate(report["labels"]):
        line = [label, str(versions[0]["scores"]["support"][index])]
        for row in versions:
            line += [f"{row['scores'][name][index]:.3f}" for name in ("precision", "recall", "f1")]
        lines.append(line)
    for average in ("macro", "weighted"):
        line = [f"{average} average", str(report["texts"])]
        for row in versions:
            line += [f"{row['scores'][f'{average}_{name}']:.3f}" for name in ("precision", "recall", "f1")]
        lines.append(line)
    return _table(header, lines, markdown)


def _confusion(labels: list[str], matrix: list[list[int]], markdown: bool) -> str:
    """The matrix, or, with many classes, its largest confusions."""
    if len(labels) <= 12:
        return _table(
            ["", *labels],
            [[label, *map(str, row)] for label, row in zip(labels, matrix, strict=True)],
            markdown,
        )
    pairs = [
        (count, labels[i], labels[j])
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [[f"{true} → {predicted}", str(count)] for count, true, predicted in pairs[:20]]
    return _table(
        ["most frequent of all confusions (the whole matrix is in report.json)", "texts"], rows, markdown
    )
