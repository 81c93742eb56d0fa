import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss

from distill.calibration import (
    BINS,
    calibration,
    fit_decision,
    fit_temperature,
    nll,
    risk_coverage,
    select,
    threshold_for,
)
from distill.decision import softmax


def _sample(rows=4000, classes=4, scale=1.0, seed=0):
    """Logits, and labels drawn from softmax(logits): perfectly calibrated where scale is 1."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, size=(rows, classes))
    labels = (
        (generator.random(rows)[:, None] > softmax(logits).cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    )
    return (logits * scale).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
def test_nll_and_brier_are_scikit_learns(temperature):
    logits, labels = _sample()
    found = calibration(logits, labels, temperature)
    probabilities = softmax(logits.astype(np.float64) / temperature)
    assert found.nll == pytest.approx(log_loss(labels, probabilities), rel=1e-9)
    # scikit-learn's multi-class Brier score, unscaled
    expected = brier_score_loss(labels, probabilities, labels=range(4), scale_by_half=False)
    assert found.brier == pytest.approx(expected, rel=1e-9)


def test_ece_is_the_papers_formula_bin_by_bin():
    logits, labels = _sample(scale=2.0)
    probabilities = softmax(logits)
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for edge in np.linspace(0, 1, BINS + 1)[:-1]:
        inside = (top > edge) & (top <= edge + 1 / BINS)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    found = calibration(logits, labels)
    assert found.ece == pytest.approx(expected, rel=1e-9)
    assert sum(found.count) == len(labels)
    assert len(found.count) == len(found.confidence) == len(found.accuracy)


def test_ece_tells_calibrated_from_overconfident():
    assert calibration(*_sample(rows=50_000)).ece < 0.01
    assert calibration(*_sample(rows=50_000, scale=3.0)).ece > 0.1


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 6.0])
def test_the_temperature_undoes_a_known_scale(scale):
    logits, labels = _sample(rows=50_000, scale=scale)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(scale, rel=0.03)
    assert nll(logits, labels, temperature) <= nll(logits, labels) + 1e-9
    np.testing.assert_array_equal((logits / temperature).argmax(1), logits.argmax(1))


@pytest.mark.parametrize("rows", [3, 30, 300])
def test_the_temperature_stays_sober_where_every_answer_is_right_or_wrong(rows):
    logits = 3 * np.eye(3, dtype=np.float32)[np.arange(rows) % 3]
    assert 0.3 < fit_temperature(logits, np.arange(rows) % 3) < 2
    assert fit_temperature(logits, (np.arange(rows) + 1) % 3) <= 20


def test_a_threshold_that_nothing_reaches_has_no_precision():
    found = select(np.array([0.5, 0.6]), np.array([True, True]), 0.9)
    assert found.coverage == 0 and np.isnan(found.precision)


def test_coverage_and_precision_of_every_threshold():
    confidence = np.array([0.9, 0.8, 0.8, 0.5])
    right = np.array([True, True, False, False])
    curve = [(s.threshold, s.coverage, s.precision) for s in risk_coverage(confidence, right)]
    assert curve == [(0.9, 0.25, 1.0), (0.8, 0.75, 2 / 3), (0.5, 1.0, 0.5)]


def test_the_threshold_keeps_the_precision_asked_for_with_the_largest_coverage():
    logits, labels = _sample()
    probabilities = softmax(logits)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    found = threshold_for(confidence, right, 0.9)
    assert found is not None and found.precision >= 0.9
    assert select(confidence, right, found.threshold) == found
    looser = [t for t in np.unique(confidence) if t < found.threshold]
    assert all(select(confidence, right, t).precision < 0.9 for t in looser)


def test_a_precision_that_no_threshold_gives_is_said_to_be_out_of_reach():
    assert threshold_for(np.array([0.9, 0.8]), np.array([False, True]), 0.99) is None


def test_several_labels_are_calibrated_as_questions_with_two_answers():
    generator = np.random.default_rng(0)
    logits = 3 * generator.normal(size=(500, 4))
    labels = generator.random((500, 4)) < expit(logits / 2)
    assert nll(logits, labels, 2.0) == pytest.approx(log_loss(labels.ravel(), expit(logits.ravel() / 2)))
    assert fit_temperature(logits, labels) == pytest.approx(2.0, rel=0.15)
    found = calibration(logits, labels, 2.0)
    assert sum(found.count) == 2000 and found.ece < 0.03 < calibration(logits, labels, 0.5).ece
    decision = fit_decision(logits, labels)
    assert decision.temperature == fit_temperature(logits, labels) and len(decision.thresholds) == 4
