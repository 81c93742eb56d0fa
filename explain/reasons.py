"""Explanations of all versions on test text: agreement, faithfulness, and the words that matter most."""

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from distill.explain.agreement import OTHER_REASONS, RANDOM_ORDERS, SHARES, TOP, compare, faithfulness
from distill.explain.attribution import EXACT_WORDS, PERMUTATIONS, Attribution, Probabilities, attribute_all
from distill.explain.versions import Version
from distill.explain.words import Text
from numpy.typing import NDArray

from distill.decision import Labels, classes_in, same

logger = logging.getLogger(__name__)
TOP_WORDS = 10
LEAST_OCCURRENCES = 2
FEW_TEXTS = 20


@dataclass(frozen=True)
class Reasons:
    """Explained texts.

    Attributes:
        rows: row numbers in the test split.
        sampled: how many of them, from the first, are a random sample; the others are disagreements.
        attributions: one dictionary a text, by version.
    """

    rows: list[int]
    sampled: int
    attributions: list[dict[str, Attribution]]


def choose_rows(versions: Sequence[Version], count: int, seed: int) -> tuple[list[int], int]:
    """A random sample of `count` test texts, then up to half as many on which the versions disagree.

    The disagreements are those about which the versions were most certain.
    """
    total = len(versions[0].test.labels)
    generator = np.random.default_rng(seed)
    sample = np.sort(generator.choice(total, min(count, total), replace=False))
    first, *others = (version.answers for version in versions)
    certainty = np.min([version.certainty for version in versions], axis=0)
    disputed = np.flatnonzero(~np.all([same(first, other) for other in others], axis=0))
    disputed = disputed[~np.isin(disputed, sample)]
    disputed = disputed[np.argsort(-certainty[disputed], kind="stable")][: count // 2]
    return [*sample.tolist(), *disputed.tolist()], len(sample)


def progress(items: Iterator[Any], total: int, title: str) -> Iterator[Any]:
    """Pass items on, with time left: a bar on a terminal, a line every fifth of the way elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, title, total, console=Console(stderr=True), transient=True)
        return
    started, shown = time.monotonic(), 0
    for number, item in enumerate(items, start=1):
        yield item
        if number * 5 // max(total, 1) > shown:
            shown = number * 5 // total
            left = (time.monotonic() - started) / number * (total - number)
            logger.info("%s: %d of %d, %d s left", title, number, total, left)


def explain_rows(
    texts: Sequence[Text],
    rows: list[int],
    sampled: int,
    models: Mapping[str, Probabilities],
    method: str,
    seed: int,
) -> Reasons:
    """Explain some test texts for every version, with progress."""
    chosen = [texts[row] for row in rows]
    found = list(progress(attribute_all(chosen, models, method, seed), len(rows), "Explanations"))
    return Reasons(rows, sampled, found)


def summarize(
    reasons: Reasons,
    texts: Sequence[Text],
    labels: Sequence[str],
    truth: Labels,
    models: Mapping[str, Probabilities],
    method: str,
    seed: int,
) -> dict[str, Any]:
    """What the report says of reasons; the statistics are over the random sample alone.

    Agreement is about the class that the first version of each pair holds to be most probable; the reference
    is the first of all. `truth` holds the true classes, or labels, of the whole test split.
    """
    names = list(models)
    sample = reasons.attributions[: reasons.sampled]
    by_version = {}
    for name in progress(iter(names), len(names), "Faithfulness"):
        explained, random = faithfulness(
            [
                (texts[row], found[name].words, found[name].values)
                for row, found in zip(reasons.rows, sample, strict=False)
            ],
            models[name],
            seed,
        )
        by_version[name] = {
            "largest_residual": (
                max((found[name].residual for found in reasons.attributions), default=0.0)
                if method == "shap"
                else None
            ),
            "faithfulness": asdict(explained),
            "random_faithfulness": asdict(random),
            "agreement": _agreement(sample, names[0], name) if name != names[0] else None,
            "agreement_by_class": {
                label: _agreement(sample, names[0], name, index) for index, label in enumerate(labels)
            }
            if name != names[0]
            else None,
            "top_words": _top_words(reasons.attributions, name, labels),
        }
    return {
        "method": method,
        "texts": len(reasons.rows),
        "sampled": reasons.sampled,
        "exact_words": EXACT_WORDS,
        "permutations": PERMUTATIONS,
        "top": TOP,
        "shares": list(SHARES),
        "random_orders": RANDOM_ORDERS,
        "other_reasons_below": OTHER_REASONS,
        "reference": names[0],
        "versions": by_version,
        "between": [
            {"versions": [first, second], **_agreement(sample, first, second)}
            for first, second in combinations(names, 2)
        ],
        "single_texts": [
            _single_text(row, number < reasons.sampled, classes_in(truth[row]), found, labels)
            for number, (row, found) in enumerate(zip(reasons.rows, reasons.attributions, strict=True))
        ],
    }


def _single_text(
    row: int, sampled: bool, truth: list[int], found: dict[str, Attribution], labels: Sequence[str]
) -> dict[str, Any]:
    """Agreement of every pair of versions on one text, about its classes and each that a version chose."""
    classes = list(dict.fromkeys([*truth, *(one.predicted for one in found.values())]))
    pairs = []
    for (first, one), (second, other) in combinations(found.items(), 2):
        for label in classes:
            agreement = compare(one, other, label)
            other_reasons = bool(agreement.rank_correlation < OTHER_REASONS)
            pairs.append(
                {
                    "versions": [first, second],
                    "class": labels[label],
                    **asdict(agreement),
                    "other_reasons": other_reasons,
                }
            )
    return {
        "text": row + 1,
        "sampled": sampled,
        "true_classes": [labels[label] for label in truth],
        "answers": {name: labels[one.predicted] for name, one in found.items()},
        "pairs": pairs,
    }


def _agreement(
    sample: Sequence[dict[str, Attribution]], reference: str, name: str, label: int | None = None
) -> dict[str, float]:
    """Means over the texts where a figure is defined, about the class that the reference chose or `label`."""
    found = [
        compare(pair[reference], pair[name], pair[reference].predicted if label is None else label)
        for pair in sample
    ]

    def mean(values: list[float]) -> float:
        defined = [value for value in values if not np.isnan(value)]
        return float(np.mean(defined)) if defined else float("nan")

    correlations = [one.rank_correlation for one in found]
    return {
        "rank_correlation": mean(correlations),
        "top_overlap": mean([one.top_overlap for one in found]),
        "sign_flips": mean([one.sign_flips for one in found]),
        "other_reasons": sum(value < OTHER_REASONS for value in correlations) / max(len(found), 1),
    }


def _top_words(
    found: Sequence[dict[str, Attribution]], name: str, labels: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """For each class, the words that add most to its probability, summed over the texts.

    A segment of several words, as long texts have, shares its value among them.
    """
    values: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for pair in found:
        for segment, row in zip(pair[name].words.words, pair[name].values, strict=True):
            words = segment.split()
            for word in words:
                if any(letter.isalnum() for letter in word):
                    values[word.lower()].append(row / len(words))
    frequent = {word: np.array(rows) for word, rows in values.items() if len(rows) >= LEAST_OCCURRENCES}
    top = {}
    for index, label in enumerate(labels):
        sums = sorted(((rows[:, index].sum(), word) for word, rows in frequent.items()), reverse=True)
        top[label] = [
            {"word": word, "mean": float(total / len(frequent[word])), "texts": len(frequent[word])}
            for total, word in sums[:TOP_WORDS]
            if total > 0
        ]
    return top


def reasons_answer(summary: dict[str, Any], version: str) -> str:
    """One sentence: whether `version` answers for the reference's reasons."""
    # The student is explained through its fp32 graph.
    name = {"onnx-fp32": "student"}.get(version, version)
    found = summary["versions"][name]["agreement"]
    faith, chance = (
        summary["versions"][name][key]["comprehensiveness"] for key in ("faithfulness", "random_faithfulness")
    )
    correlation = found["rank_correlation"]
    if np.isnan(correlation):
        return f"Not known: in {summary['sampled']} texts no word counts for anything."
    if summary["sampled"] < FEW_TEXTS:
        return (
            f"Not known: only {summary['sampled']} random texts were explained (order of words correlates "
            f"with the teacher's at {correlation:.2f})."
        )
    answer = "Mostly." if correlation >= 0.8 else "In part." if correlation >= OTHER_REASONS else "No."
    return (
        f"{answer} In the order of their weight its words correlate with the teacher's at "
        f"{correlation:.2f} on average (1: the same order); {100 * found['top_overlap']:.0f} % of the "
        f"{summary['top']} weightiest are the same; for {100 * found['other_reasons']:.0f} % of "
        f"{summary['sampled']} texts the reasons are others. Taking its weightiest words out costs its "
        f"answer {100 * faith:.0f} points of probability, random words {100 * chance:.0f}."
    )
