"""The report as Markdown, for a pull request, and as plain text, for a terminal."""

from typing import Any


def render(report: dict[str, Any], markdown: bool) -> str:
    """The report as Markdown or as plain text for a terminal."""
    found = report["verdict"]
    questions = [f"{_strong(question, markdown)} {text}" for question, text in found["answers"].items()]
    parts = [
        _heading(found["headline"], 1, markdown),
        found["summary"],
        f"{report['created']}: {report['texts']:,} test texts of {report['data']}; "
        f"teacher made from {report['model']}.",
        *questions,
        _versions_table(report, markdown),
        f"Latency: median of {report['latency_texts']} test texts, one at a time, one thread, all versions "
        f"in one run, on {report['cpu']}. Teacher and student run in PyTorch, the others in "
        f"ONNX Runtime; tokenization included. {truncation(report)}",
        _heading("Against the teacher", 2, markdown),
        _significance_table(report, markdown),
        f"Differences in points, with {100 * found['confidence']:.0f} % intervals of a paired bootstrap "
        f"({found['resamples']:,} resamples{'' if report['multi_label'] else ' inside each class'}); "
        "p of McNemar's exact test.",
        _heading("Confidence", 2, markdown),
        _calibration_table(report, markdown),
        f"ECE: expected calibration error, 15 equal-width bins of {_binned(report)}; before "
        "and after temperature scaling fitted on validation text.",
    ]
    if report["reasons"]:
        parts += [_heading("Reasons", 2, markdown), _reasons_table(report["reasons"], markdown)]
    parts += [_heading("Per class", 2, markdown), _class_table(report, markdown)]
    if report["multi_label"]:
        parts += [_heading("Label by label", 2, markdown), _label_table(report, markdown), LABEL_NOTE]
        return "\n\n".join(parts) + "\n"
    for row in report["versions"]:
        parts += [_heading(f"Confusion: {row['version']} (rows: true, columns: predicted)", 2, markdown)]
        parts.append(_confusion(report["labels"], row["scores"]["confusion"], markdown))
    return "\n\n".join(parts) + "\n"


LABEL_NOTE = (
    "Threshold: the probability from which on the label is given, chosen on validation text for its F1. "
    "Missed: texts that have the label and are not given it. Wrong: texts given it without having it."
)


def truncation(report: dict[str, Any]) -> str:
    """How many test texts are longer than what is read."""
    teacher, student = (100 * row["truncated_share"] for row in report["versions"][:2])
    if not teacher and not student:
        return "All test texts are read to their end."
    return (
        f"Longer than what is read: {teacher:.1f} % of the test texts for the teacher, {student:.1f} % for "
        "the student and its ONNX versions."
    )


def _binned(report: dict[str, Any]) -> str:
    if report["multi_label"]:
        return "the probability of what is said of every label of every text"
    return "the top label's probability"


def _label_table(report: dict[str, Any], markdown: bool) -> str:
    """Thresholds and errors of every label, where a text may have several."""
    header = ["label"]
    for row in report["versions"]:
        header += [f"{row['version']} threshold", "missed", "wrong"]
    lines = []
    for index, label in enumerate(report["labels"]):
        line = [label]
        for row in report["versions"]:
            (_, wrong), (missed, _) = row["scores"]["confusion"][index]
            line += [f"{row['thresholds'][index]:.3f}", str(missed), str(wrong)]
        lines.append(line)
    return _table(header, lines, markdown)


def _strong(text: str, markdown: bool) -> str:
    return f"**{text}**" if markdown else text


def _points(change: dict[str, float]) -> str:
    return f"{100 * change['value']:+.2f} ({100 * change['low']:+.2f} to {100 * change['high']:+.2f})"


def _significance_table(report: dict[str, Any], markdown: bool) -> str:
    rows = [
        [
            row["version"],
            _points(row["difference"]["macro_f1"]),
            _points(row["difference"]["accuracy"]),
            str(row["mcnemar"]["lost"]),
            str(row["mcnemar"]["gained"]),
            f"{row['mcnemar']['p_value']:.3g}",
        ]
        for row in report["versions"][1:]
    ]
    return _table(
        ["version", "macro-F1", "accuracy", "teacher alone right", "version alone right", "p"], rows, markdown
    )


def _calibration_table(report: dict[str, Any], markdown: bool) -> str:
    header = [
        "version",
        "temperature",
        "ECE",
        "was",
        "Brier",
        "was",
        "NLL",
        "was",
        *([] if report["multi_label"] else ["answers at", "covers", "right"]),
    ]
    rows = []
    for row in report["versions"]:
        found, abstention = row["calibration"], row["abstention"]
        line = [row["version"], f"{found['temperature']:.3f}"]
        for name in ("ece", "brier", "nll"):
            line += [f"{found['calibrated'][name]:.4f}", f"{found['uncalibrated'][name]:.4f}"]
        if abstention and (test := abstention["test"]):
            line += [str(test["threshold"]), *(_percent(test[name]) for name in ("coverage", "precision"))]
        elif abstention:
            line += ["–", "–", "–"]
        rows.append(line)
    return _table(header, rows, markdown)


def _reasons_table(reasons: dict[str, Any], markdown: bool) -> str:
    header = ["version", "rank correlation", f"top {reasons['top']}", "signs flipped", "other reasons",
              "comprehensiveness", "random", "sufficiency", "random"]  # fmt: skip
    rows = []
    for name, one in reasons["versions"].items():
        agreement = one["agreement"]
        line = [name]
        line += (
            [
                _figure(agreement["rank_correlation"]),
                *(_figure(agreement[key]) for key in ("top_overlap", "sign_flips", "other_reasons")),
            ]
            if agreement
            else ["–"] * 4
        )
        for key in ("comprehensiveness", "sufficiency"):
            line += [_figure(one["faithfulness"][key]), _figure(one["random_faithfulness"][key])]
        rows.append(line)
    return _table(header, rows, markdown)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


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
        "micro-F1" if report["multi_label"] else "weighted F1",
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
                f"{scores['micro_f1' if report['multi_label'] else 'weighted_f1']:.4f}",
                f"{scores['accuracy']:.4f}",
                f"{100 * row['agreement_with_reference']:.1f} %",
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
