"""The report: teacher, student and exported versions side by side, as a page, Markdown, text and JSON."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.explain.comparison import QUESTIONS, at_most, compare_versions, only_guesses, verdict
from distill.explain.rendering import render
from distill.explain.versions import (
    Version,
    as_student,
    open_for_explanation,
    open_for_latency,
    read_versions,
    truncated_share,
)
from distill.explain.words import Text

from distill.artifact import Manifest, check_output, manifest_hash, publish, read_manifest
from distill.data import reload_data, texts_of
from distill.decision import MULTI_LABEL
from distill.errors import DistillError
from distill.latency import cpu_name, measure
from distill.significance import Interval, non_inferior

SCHEMA_VERSION = 3
DEFAULT_MARGIN = 3.0


@dataclass(frozen=True)
class ReportOptions:
    """Options of `distill report`.

    Attributes:
        texts: test texts that latency is measured on.
        explain: test texts to explain, besides up to half as many disagreements; 0 for none.
        method: "shap" or "lime".
        max_drop: margin of non-inferiority, in points of macro-F1; `require_quality` enforces it.
        target_precision: precision that an abstention threshold is chosen for.
    """

    teacher: Path = Path("runs/teacher")
    student: Path = Path("runs/student")
    export: Path = Path("runs/export")
    output: Path = Path("runs/report")
    data: str | None = None
    texts: int = 200
    explain: int = 40
    method: str = "shap"
    max_drop: float | None = None
    target_precision: float = 0.9
    device: str = "auto"
    overwrite: bool = False


def _latency(versions: list[Version], labels: list[str], texts: list[Text], count: int) -> dict[str, float]:
    """Median milliseconds a text, one text at a time, one thread each, in one run."""
    import torch

    sample = texts[:: max(1, len(texts) // count)][:count]
    before = torch.get_num_threads()  # a PyTorch version sets its own number of them
    try:
        return measure({version.name: open_for_latency(version, labels) for version in versions}, sample)
    finally:
        torch.set_num_threads(before)


def explained_versions(versions: list[Version]) -> list[Version]:
    """The versions whose answers to single texts are worth telling apart."""
    by_name = {version.name: version for version in versions}
    by_name["student"] = as_student(by_name["onnx-fp32"])
    return [by_name[name] for name in ("teacher", "student", "int8") if name in by_name]


def compile_report(options: ReportOptions) -> tuple[dict[str, Any], dict[str, Any], Manifest]:
    """Compute everything the report says.

    Returns:
        The content of report.json; what the page shows of single texts; the bundle's manifest.
    """
    from distill.explain.browser import browse

    versions, bundle = read_versions(options.teacher, options.student, options.export)
    texts = texts_of(reload_data(bundle.data, bundle.labels, options.data).splits["test"])
    # What was exported reads as the student does.
    truncated = {version.name: truncated_share(version, texts) for version in versions[:2]}
    latency = _latency(versions, bundle.labels, texts, options.texts)
    rows = compare_versions(versions, len(bundle.labels), options.target_precision, bundle.seed)
    for row, version in zip(rows, versions, strict=True):
        row["file"] = f"{version.folder.name}/{version.file}"
        row["parameters"] = version.parameters
        row["bytes"] = version.size
        row["latency_ms"] = latency[version.name]
        row["truncated_share"] = truncated["teacher" if version is versions[0] else "student"]
        row["speedup"] = latency[versions[0].name] / latency[version.name]
    margin = DEFAULT_MARGIN if options.max_drop is None else options.max_drop
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": time.strftime("%Y-%m-%d", time.gmtime()),
        "data": _short(options.data or bundle.data["source"]),
        "model": _short(read_manifest(options.teacher, "train-teacher", "--teacher").options["model"]),
        "split": "test",
        "texts": len(texts),
        "labels": bundle.labels,
        "multi_label": bundle.problem_type == MULTI_LABEL,
        "cpu": cpu_name(),
        "latency_texts": min(options.texts, len(texts)),
        "verdict": verdict(rows, bundle.labels, margin, options.max_drop is None),
        "versions": rows,
        "reasons": None,
    }
    shown = explained_versions(versions)
    reasons = None
    if options.explain:
        from distill.explain.reasons import choose_rows, explain_rows, reasons_answer, summarize

        models = {
            version.name: open_for_explanation(version, bundle.labels, options.device) for version in shown
        }
        chosen, sampled = choose_rows(shown, options.explain, bundle.seed)
        reasons = explain_rows(texts, chosen, sampled, models, options.method, bundle.seed)
        report["reasons"] = summarize(
            reasons, texts, bundle.labels, shown[0].test.labels, models, options.method, bundle.seed
        )
        answers = report["verdict"]["answers"]
        answers[QUESTIONS[2]] = reasons_answer(report["reasons"], report["verdict"]["version"])
        report["verdict"]["answers"] = {question: answers[question] for question in QUESTIONS}
    return _without_nan(report), browse(shown, texts, bundle.labels, reasons), bundle


def _short(source: str) -> str:
    """A Hub id as it is; of a path, its last part."""
    return Path(source).resolve().name if Path(source).exists() else source


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(options: ReportOptions) -> dict[str, Any]:
    """Compile the report and publish report.html, report.md, report.txt and report.json.

    Returns:
        The content of report.json.

    Raises:
        DistillError: if a stage is missing, or if the stages do not belong together.
    """
    from distill.explain.page import render_page

    if options.texts < 1:
        raise DistillError(f"--texts {options.texts}: must be at least 1")
    if options.max_drop is not None and not math.isfinite(options.max_drop):
        raise DistillError(f"--max-drop {options.max_drop}: must be a number of points")
    if options.explain < 0:
        raise DistillError(f"--explain {options.explain}: must be at least 0")
    check_output(options.output, options.overwrite, "report")
    report, browsed, bundle = compile_report(options)
    manifest = Manifest(
        stage="report",
        labels=bundle.labels,
        options={
            name: getattr(options, name)
            for name in ("texts", "explain", "method", "max_drop", "target_precision")
        },
        seed=bundle.seed,
        data=bundle.data,
        parents=[
            {"path": str(folder), "manifest_sha256": manifest_hash(folder)}
            for folder in (options.teacher, options.student, options.export)
        ],
        metrics={row["version"]: {"macro_f1": row["scores"]["macro_f1"]} for row in report["versions"]},
    )
    with publish(options.output, manifest, options.overwrite) as folder:
        (folder / "report.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (folder / "report.html").write_text(render_page(report, browsed), encoding="utf-8")
        (folder / "report.md").write_text(render(report, markdown=True), encoding="utf-8")
        (folder / "report.txt").write_text(render(report, markdown=False), encoding="utf-8")
    return report


def require_quality(report: dict[str, Any], output: Path) -> None:
    """Fail, so that a pipeline stops, where the bundle's version for the CPU may lose more than the margin.

    Raises:
        DistillError: naming the loss that cannot be excluded.
    """
    found, row = report["verdict"], report["versions"][-1]
    change = Interval(**row["difference"]["macro_f1"])
    if only_guesses(report["versions"][0]):
        raise DistillError(
            f"--max-drop {found['margin']:g}: the teacher is not shown to do better than guessing: keeping "
            f"its quality proves nothing; see {output}, then train it longer"
        )
    if non_inferior(change, found["margin"] / 100):
        return
    raise DistillError(
        f"--max-drop {found['margin']:g}: {row['version']} may lose {at_most(asdict(change))} points of "
        f"macro-F1 (measured {100 * change.value:+.2f}, {100 * found['confidence']:.0f} % interval "
        f"-{at_most(asdict(change))} to {100 * change.high:+.2f}); see {output}, then train "
        "longer, give more test text, or allow more"
    )
