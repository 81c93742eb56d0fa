"""Quality, significance, calibration and abstention of every version, from its saved predictions."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from distill.explain.versions import Version
from numpy.typing import NDArray

from distill.calibration import calibration, risk_coverage, select, threshold_for
from distill.decision import Decision, Labels, same
from distill.metrics import Scores, score
from distill.predictions import Predictions
from distill.significance import (
    CONFIDENCE,
    RESAMPLES,
    Bootstrap,
    Interval,
    difference_interval,
    interval,
    mcnemar,
    non_inferior,
    paired_bootstrap,
    undetected,
    undetected_macro,
)

CURVE_POINTS = 60
LEAST_DISCORDANT = 6
"""An exact sign test of fewer texts cannot reach 5 %."""
NAMED_CLASSES = 5
QUESTIONS = (
    "Is it as good?",
    "For which classes is it not?",
    "Is it right for the same reasons?",
    "May I trust its confidence?",
)
NAMES = {"int8": "the INT8 version", "onnx-fp32": "the fp32 ONNX version"}


def compare_versions(
    versions: Sequence[Version], classes: int, target_precision: float, seed: int
) -> list[dict[str, Any]]:
    """What the report says of each version besides its size and latency, ready for JSON.

    The first version is the reference: every other one has `difference` (its score less the reference's, with
    an interval) and `mcnemar`. All scores are in 0 to 1.
    """
    labels = versions[0].test.labels
    predictions = [version.answers for version in versions]
    boot = paired_bootstrap(labels, predictions, classes, seed=seed)
    scores = [score(labels, predicted, classes) for predicted in predictions]
    rows = []
    for index, version in enumerate(versions):
        own = scores[index]
        row: dict[str, Any] = {
            "version": version.name,
            "scores": own.as_dict(),
            "macro_f1_kept": own.macro_f1 / scores[0].macro_f1 if scores[0].macro_f1 else 0.0,
            "agreement_with_reference": float(same(predictions[index], predictions[0]).mean()),
            "intervals": _intervals(own, boot, index),
            "difference": None,
            "mcnemar": None,
            "calibration": _calibration(version),
            "abstention": _abstention(version, target_precision) if labels.ndim == 1 else None,
            "thresholds": _thresholds(version),
        }
        if index:
            discordant = _discordant(predictions[index], predictions[0], classes)
            row["difference"] = _differences(own, scores[0], boot, index, discordant, len(labels))
            row["mcnemar"] = asdict(mcnemar(labels, predictions[0], predictions[index]))
        rows.append(row)
    return rows


def _thresholds(version: Version) -> list[float] | None:
    found = version.decision.probability_thresholds
    return None if found is None else found.tolist()


def _discordant(answers: Labels, reference: Labels, classes: int) -> NDArray[np.int64]:
    """Texts that only one of two versions answered with each class, shape (classes,)."""
    if answers.ndim == 2:
        return np.asarray((answers != reference).sum(axis=0))
    apart = answers != reference
    return np.bincount(np.concatenate([answers[apart], reference[apart]]), minlength=classes)


def _intervals(own: Scores, boot: Bootstrap, index: int) -> dict[str, Any]:
    return {
        "accuracy": asdict(interval(own.accuracy, boot.accuracy[:, index])),
        "macro_f1": asdict(interval(own.macro_f1, boot.macro_f1[:, index])),
        "f1": [asdict(interval(f1, boot.f1[:, index, label])) for label, f1 in enumerate(own.f1)],
    }


def _differences(
    own: Scores, reference: Scores, boot: Bootstrap, index: int, discordant: NDArray[np.int64], texts: int
) -> dict[str, Any]:
    """Scores less the reference's, with intervals; macro-F1 over the classes that the test split has.

    A class is called worse or better where its interval at a level corrected for the number of classes
    (Bonferroni) leaves out 0 and at least `LEAST_DISCORDANT` texts are answered with it by one version alone.

    Args:
        own: scores of the version.
        reference: scores of the first version.
        boot: resampled scores of all versions.
        index: number of the version.
        discordant: texts that only one of the two answered with each class, shape (classes,).
        texts: how many there are.
    """
    support = np.array(reference.support)
    present = support > 0
    f1 = np.array(own.f1) - np.array(reference.f1)
    change = boot.f1[:, index] - boot.f1[:, 0]
    tail = (1 - CONFIDENCE) / 2 / max(int(present.sum()), 1)
    low, high = np.quantile(change, [tail, 1 - tail], axis=0)
    told_apart = discordant >= LEAST_DISCORDANT
    calls = np.where(told_apart & (high < 0), "worse", np.where(told_apart & (low > 0), "better", "even"))
    return {
        "accuracy": asdict(
            difference_interval(
                own.accuracy - reference.accuracy,
                boot.accuracy[:, index] - boot.accuracy[:, 0],
                undetected(texts),
            )
        ),
        "macro_f1": asdict(
            difference_interval(
                float(f1[present].mean()),
                change[:, present].mean(axis=1),
                undetected_macro(reference.support),
            )
        ),
        "f1": [
            asdict(difference_interval(value, samples, undetected(count)))
            for value, samples, count in zip(f1.tolist(), change.T, reference.support, strict=True)
        ],
        "calls": calls.tolist(),
    }


def _calibration(version: Version) -> dict[str, Any]:
    logits, labels = version.test.logits, version.test.labels
    return {
        "temperature": version.decision.temperature,
        "uncalibrated": calibration(logits, labels).as_dict(),
        "calibrated": calibration(logits, labels, version.decision.temperature).as_dict(),
    }


def _confidence(answers: Predictions, decision: Decision) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return decision.certainty(answers.logits), same(decision.answers(answers.logits), answers.labels)


def _rounded(
    threshold: float, held_out: tuple[NDArray[np.float64], NDArray[np.bool_]], target_precision: float
) -> float:
    """The shortest threshold that a user can copy, rounded down, that keeps the precision asked for."""
    for digits in range(4, 16):
        shorter = math.floor(threshold * 10**digits) / 10**digits
        if select(*held_out, shorter).precision >= target_precision:
            return shorter
    return threshold


def _abstention(version: Version, target_precision: float) -> dict[str, Any]:
    """The threshold chosen on validation text, what it gives on test text, and the curve on test text."""
    held_out = _confidence(version.validation, version.decision)
    confidence, right = _confidence(version.test, version.decision)
    chosen = threshold_for(*held_out, target_precision)
    if chosen:
        chosen = select(*held_out, _rounded(chosen.threshold, held_out, target_precision))
    curve = risk_coverage(confidence, right)
    shown = np.unique(np.linspace(0, len(curve) - 1, CURVE_POINTS).round().astype(int))
    return {
        "target_precision": target_precision,
        "threshold": chosen.threshold if chosen else None,
        "validation": asdict(chosen) if chosen else None,
        "test": asdict(select(confidence, right, chosen.threshold)) if chosen else None,
        "curve": [{"coverage": curve[i].coverage, "risk": 1 - curve[i].precision} for i in shown],
    }


def only_guesses(row: dict[str, Any]) -> bool:
    """Whether a version is not shown to do better than answers that ignore the text.

    Where a class is a share p of the texts and q of such answers, its F1 is 2pq / (p + q), at most
    (p + q) / 2: they reach a macro-F1 of at most 1 / classes on average. In a multi-label problem a label may
    be given to every text, which makes it 2p / (p + 1).
    """
    present = [support for support in row["scores"]["support"] if support]
    if row["thresholds"] is None:
        reached = 1 / max(len(present), 1)
    else:
        texts = np.array(row["scores"]["confusion"])[0].sum()
        reached = float(np.mean([2 * support / (support + texts) for support in present]))
    return bool(len(present) > 1 and row["intervals"]["macro_f1"]["low"] <= reached)


def verdict(
    rows: Sequence[dict[str, Any]],
    labels: Sequence[str],
    margin: float,
    default_margin: bool = False,
) -> dict[str, Any]:
    """Which version to ship, and what it loses, in words.

    The shipped version is the fastest exported one that is non-inferior to the reference at `margin` points
    of macro-F1; if there is none, the last (the smallest) is judged and not recommended.
    Beside a reference that only guesses, none is.

    Args:
        rows: of `compare_versions`, with `latency_ms`, `speedup` and `bytes` added.
        labels: label names.
        margin: in points of macro-F1 (hundredths).
        default_margin: say that nobody chose the margin.
    """
    reference, exported = rows[0], [row for row in rows[1:] if row["version"] not in ("teacher", "student")]
    fit = [row for row in exported if non_inferior(Interval(**row["difference"]["macro_f1"]), margin / 100)]
    row = min(fit, key=lambda row: row["latency_ms"]) if fit else exported[-1]
    change = row["difference"]["macro_f1"]
    name = NAMES[row["version"]]
    guessing = only_guesses(reference)
    if guessing:
        status, headline = "reject", "Train the teacher first: it is not shown to do better than guessing."
    elif fit:
        status, headline = "ship", f"Ship {name}."
    elif change["high"] < -margin / 100:
        status, headline = "reject", f"Do not ship {name} yet: it loses too much."
    else:
        status = "unsettled"
        headline = f"Ship {name} only if you can accept a loss of up to {at_most(change, 1)} points."
    difference = row["difference"]
    worse = sorted(
        (difference["f1"][index]["value"], labels[index])
        for index, call in enumerate(difference["calls"])
        if call == "worse"
    )
    named = ", ".join(f"{label} ({100 * value:+.1f} points)" for value, label in worse[:NAMED_CLASSES])
    more = f" and {len(worse) - NAMED_CLASSES} more" if len(worse) > NAMED_CLASSES else ""
    refused = [one for one in exported if one not in fit and one is not row]
    loss = _loss(change, margin, default_margin) + "".join(
        f" {one['version']} may lose up to {at_most(one['difference']['macro_f1'])}." for one in refused
    )
    return {
        "status": status,
        "version": row["version"],
        "margin": margin,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "headline": headline,
        "summary": (
            f"{name[0].upper()}{name[1:]} keeps {100 * row['macro_f1_kept']:.1f} % of the teacher's macro-F1 "
            f"(mean F1 of the classes: {row['scores']['macro_f1']:.4f} of "
            f"{reference['scores']['macro_f1']:.4f}), answers {row['speedup']:.1f} times as fast "
            f"({row['latency_ms']:.2f} ms a text), and its file is "
            f"{reference['bytes'] / row['bytes']:.1f} times smaller ({row['bytes'] / 1e6:.1f} MB)."
        ),
        "answers": {
            QUESTIONS[0]: f"Nothing is proved beside a teacher that guesses. {loss}" if guessing else loss,
            QUESTIONS[1]: (
                f"F1 is lower, beyond chance, for {named}{more}." if worse
                else "No class's F1 is shown to be lower than the teacher's; for the least certain class the "
                f"difference lies between {_widest(difference['f1'])} points."
            ),
            QUESTIONS[3]: _trust(row),
        },
    }  # fmt: skip


def at_most(change: dict[str, float], digits: int = 2) -> str:
    """The loss that is not excluded, in points, never rounded to a smaller one."""
    scale = 10**digits
    return f"{math.ceil(round(-100 * change['low'] * scale, 6)) / scale:.{digits}f}"


def _loss(change: dict[str, float], margin: float, default_margin: bool) -> str:
    value, low, high = (100 * change[name] for name in ("value", "low", "high"))
    moved = f"loses {-value:.2f}" if value < 0 else f"gains {value:.2f}"
    within = "within" if low >= -margin else "more than"
    allowed = "allowed by default" if default_margin else "allowed"
    worst = f"may lose up to {at_most(change)}" if low < 0 else f"gains at least {low:.2f}"
    lowest = f"-{at_most(change)}" if low < 0 else f"{low:+.2f}"
    return (
        f"It {moved} points of macro-F1 on these texts ({100 * CONFIDENCE:.0f} % interval {lowest} to "
        f"{high:+.2f}): it {worst}, {within} the {margin:g} points {allowed}."
    )


def _widest(changes: Sequence[dict[str, float]]) -> str:
    widest = max(changes, key=lambda change: change["high"] - change["low"])
    return f"{100 * widest['low']:+.1f} and {100 * widest['high']:+.1f}"


def _trust(row: dict[str, Any]) -> str:
    found, abstention = row["calibration"], row["abstention"]
    calibrated, before = found["calibrated"]["ece"], found["uncalibrated"]["ece"]
    text = (
        f"A stated probability is off by {100 * calibrated:.1f} points on average "
        f"({100 * before:.1f} before temperature scaling)."
    )
    if abstention is None:
        return f"{text} A label is given from the threshold on that was chosen for it on validation text."
    wanted = f"{100 * abstention['target_precision']:g} %"
    if abstention["test"] is None:
        return f"{text} No threshold reached {wanted} precision on validation text."
    test = abstention["test"]
    if not test["coverage"]:
        return f"{text} No test text reaches the threshold for {wanted} precision."
    return (
        f"{text} Answering only at {test['threshold']} and above covers {100 * test['coverage']:.0f} % of "
        f"these texts with {100 * test['precision']:.1f} % right "
        f"(threshold chosen on validation for {wanted})."
    )
