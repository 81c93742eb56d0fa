"""Explained texts a second and their faithfulness: shap's defaults on a pipeline against `distill explain`.

Both explain the same student on the same test texts in one run: shap's the PyTorch folder through
`shap.Explainer(transformers.pipeline(...))`, ours the INT8 file of the bundle, in turns; speeds are medians.
Both are scored on one model, the student that shap explained, over the same words: the values of shap's
tokens are added up within each word.

Writes benchmarks/results/explanations.json.

Usage: python benchmarks/explanations.py [DEMO_FOLDER], after `make demo`.
"""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import shap
from distill.explain.agreement import faithfulness
from distill.explain.attribution import attribute
from distill.explain.versions import Version, open_for_explanation, read_versions
from distill.explain.words import Words, split_words

from distill.data import reload_data
from distill.decision import Decision
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"


def _pipeline(student: Path) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    model = AutoModelForSequenceClassification.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    return pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")


def _by_word(words: Words, tokens: list[str], values: np.ndarray) -> np.ndarray:
    """Add shap's token values up within words, by the middle of each token's place in the text."""
    ends = np.cumsum([len(segment) for segment in words.segments])
    summed = np.zeros((len(words.segments), values.shape[1]))
    position = 0
    for token, value in zip(tokens, values, strict=True):
        row = min(int(np.searchsorted(ends, position + len(token) / 2)), len(ends) - 1)
        summed[row] += value
        position += len(token)
    return summed


def _shap_defaults(texts: list[str], student: Path, labels: list[str]) -> tuple[float, list[np.ndarray]]:
    explainer = shap.Explainer(_pipeline(student))
    explainer(texts[:1], silent=True)  # numba compiles here, outside the measured time
    started = time.perf_counter()
    found = explainer(texts, silent=True)
    seconds = time.perf_counter() - started
    order = [list(found.output_names).index(label) for label in labels]
    rows = zip(texts, found.data, found.values, strict=True)
    return seconds, [_by_word(split_words(text), list(tokens), v[:, order]) for text, tokens, v in rows]


def _ours(texts: list[str], version: Version, labels: list[str]) -> tuple[float, list[np.ndarray]]:
    models = {version.name: open_for_explanation(version, labels)}
    attribute(texts[0], models)
    started = time.perf_counter()
    found = [attribute(text, models)[version.name].values for text in texts]
    return time.perf_counter() - started, found


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--texts", default=40, help="Test texts to explain.")
@click.option("--repeats", default=3, help="Runs of each side.")
def main(demo: Path, texts: int, repeats: int) -> None:
    """Explain the demo's student twice: with shap's defaults, and as `distill explain` does."""
    if not (demo / "runs" / "export").is_dir():
        raise click.ClickException(f"{demo}: no finished demo in it; run `make demo` first")
    RESULTS.mkdir(exist_ok=True)
    os.chdir(demo)
    versions, bundle = read_versions(Path("runs/teacher"), Path("runs/student"), Path("runs/export"))
    by_name = {version.name: version for version in versions}
    test = reload_data(bundle.data, bundle.labels).splits["test"]
    rows = np.random.default_rng(0).choice(len(test), min(texts, len(test)), replace=False)
    sample = list(test.select(np.sort(rows))["text"])
    # shap explains plain probabilities, so faithfulness is measured on plain probabilities.
    student, int8 = (replace(by_name[name], decision=Decision()) for name in ("student", "int8"))
    sides = {
        "shap defaults, PyTorch pipeline": lambda: _shap_defaults(sample, student.folder, bundle.labels),
        "distill, INT8": lambda: _ours(sample, int8, bundle.labels),
    }
    runs = [{name: explain() for name, explain in sides.items()} for _ in range(repeats)]
    result: dict[str, Any] = {"cpu": cpu_name(), "texts": len(sample), "repeats": repeats, "sides": {}}
    model = open_for_explanation(student, bundle.labels)
    for name in sides:
        speeds = [len(sample) / run[name][0] for run in runs]
        values = runs[0][name][1]
        found, random = faithfulness(
            [(text, split_words(text), v) for text, v in zip(sample, values, strict=True)], model
        )
        result["sides"][name] = {
            "texts_per_second": float(np.median(speeds)),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "faithfulness": asdict(found),
            "random": asdict(random),
        }
    first, second = (side["texts_per_second"] for side in result["sides"].values())
    result["ratio"] = second / first
    (RESULTS / "explanations.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, side in result["sides"].items():
        found, random = side["faithfulness"], side["random"]
        click.echo(
            f"{name:32} {side['texts_per_second']:7.2f} texts/s  "
            f"comprehensiveness {found['comprehensiveness']:.3f} (random {random['comprehensiveness']:.3f})  "
            f"sufficiency {found['sufficiency']:.3f} (random {random['sufficiency']:.3f})"
        )
    click.echo(f"{result['ratio']:.1f} times as many texts a second, {len(sample)} texts on {result['cpu']}")


if __name__ == "__main__":
    main()
