"""The report as one self-contained HTML page: no network, no file beside it."""

from typing import Any

import numpy as np
from distill.explain import figures
from distill.explain.browser import embedded
from distill.explain.rendering import truncation
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

FEW_CLASSES = 12
MOST_CONFUSIONS = 20


def _confusions(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each version's confusion matrix with differences to the reference's, or its largest confusions."""
    labels = report["labels"]
    if report["multi_label"]:
        return []
    reference = np.array(report["versions"][0]["scores"]["confusion"])
    found = []
    for row in report["versions"]:
        matrix = np.array(row["scores"]["confusion"])
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        off = matrix * (1 - np.eye(len(labels), dtype=int))
        pairs = sorted(zip(*np.nonzero(off), strict=True), key=lambda pair: -off[pair])
        found.append(
            {
                "version": row["version"],
                "matrix": matrix.tolist(),
                "change": (matrix - reference).tolist(),
                "shares": shares.round(3).tolist(),
                "pairs": [
                    (
                        labels[true],
                        labels[answer],
                        int(matrix[true, answer]),
                        int((matrix - reference)[true, answer]),
                    )
                    for true, answer in pairs[:MOST_CONFUSIONS]
                ],
            }
        )
    return found


def _telling(report: dict[str, Any]) -> list[str]:
    """Labels for which some version has words that count."""
    explained = report["reasons"]["versions"].values() if report["reasons"] else []
    return [label for label in report["labels"] if any(one["top_words"][label] for one in explained)]


def render_page(report: dict[str, Any], browsed: dict[str, Any]) -> str:
    """Render the page.

    Args:
        report: the content of report.json.
        browsed: the texts that can be searched, as `browser.browse` gives them.
    """
    environment = Environment(
        loader=PackageLoader("distill.explain", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.3f}"
    versions = report["versions"]
    shipped = next(row for row in versions if row["version"] == report["verdict"]["version"])
    changes = [change for row in versions[1:] for change in row["difference"]["f1"]]
    scale = max(0.02, max(abs(change[end]) for change in changes for end in ("low", "high")))
    return environment.get_template("report.html").render(
        report=report,
        versions=versions,
        truncation=truncation(report),
        reference=versions[0],
        shipped=shipped,
        telling=_telling(report),
        confusions=_confusions(report),
        few_classes=len(report["labels"]) <= FEW_CLASSES,
        scatter=figures.accuracy_against_latency(versions),
        risk=None if report["multi_label"] else figures.risk_against_coverage(versions),
        line_key=figures.line_key,
        reliability=figures.reliability,
        difference=figures.difference,
        scale=min(scale, 0.5),
        payload=Markup(embedded(browsed)),
        browsed=browsed,
    )
