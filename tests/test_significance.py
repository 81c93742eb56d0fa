import math
import time

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score

from distill.significance import (
    Interval,
    difference_interval,
    interval,
    mcnemar,
    non_inferior,
    paired_bootstrap,
    undetected,
    undetected_macro,
)


def _answers(labels, accuracy, classes, generator):
    """Predictions that are right with probability `accuracy[class]`, else any other class."""
    wrong = (labels + generator.integers(1, classes, size=len(labels))) % classes
    return np.where(generator.random(len(labels)) < np.asarray(accuracy)[labels], labels, wrong)


@pytest.fixture
def two_versions():
    generator = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [150, 100, 50])
    first = _answers(labels, [0.9, 0.8, 0.7], 3, generator)
    second = np.where(generator.random(300) < 0.85, first, _answers(labels, [0.8, 0.7, 0.6], 3, generator))
    return labels, first, second


def test_intervals_are_those_of_scipys_bootstrap_within_strata(two_versions):
    labels, first, second = two_versions
    boot = paired_bootstrap(labels, [first, second], 3, seed=0)

    def f1_of(answers, rows):
        truth, answered = labels[rows], answers[rows]
        scores = [
            2 * ((truth == c) & (answered == c)).sum(-1) / ((truth == c).sum(-1) + (answered == c).sum(-1))
            for c in range(3)
        ]
        return np.stack(scores, axis=-1)

    def of_rows(score):
        return lambda *strata, axis: score(np.concatenate(strata, axis=-1))

    mine = [
        (lambda rows: (labels[rows] == first[rows]).mean(-1), boot.accuracy[:, 0]),
        (lambda rows: f1_of(first, rows).mean(-1), boot.macro_f1[:, 0]),
        (
            lambda rows: f1_of(first, rows).mean(-1) - f1_of(second, rows).mean(-1),
            boot.macro_f1[:, 0] - boot.macro_f1[:, 1],
        ),
        (lambda rows: f1_of(second, rows)[..., 1], boot.f1[:, 1, 1]),
    ]
    strata = [np.flatnonzero(labels == label) for label in range(3)]
    for score, samples in mine:
        theirs = scipy.stats.bootstrap(
            strata, of_rows(score), n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
        )
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        found = interval(0.0, samples)
        assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.08 * width)
        assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.08 * width)
        assert samples.std() == pytest.approx(theirs.standard_error, rel=0.05)


def test_resamples_are_paired():
    labels = np.repeat([0, 1], 50)
    same = np.roll(labels, 3)
    boot = paired_bootstrap(labels, [same, same], 2, resamples=200)
    np.testing.assert_array_equal(boot.macro_f1[:, 0], boot.macro_f1[:, 1])
    assert boot.macro_f1[:, 0].std() > 0


def test_the_same_seed_gives_the_same_interval_and_chunks_do_not_matter(two_versions, monkeypatch):
    labels, first, second = two_versions
    once = paired_bootstrap(labels, [first, second], 3, resamples=500, seed=7)
    again = paired_bootstrap(labels, [first, second], 3, resamples=500, seed=7)
    np.testing.assert_array_equal(once.f1, again.f1)
    monkeypatch.setattr("distill.significance.CHUNK", 1000)
    chunked = paired_bootstrap(labels, [first, second], 3, resamples=500, seed=7)
    assert chunked.macro_f1.mean() == pytest.approx(once.macro_f1.mean(), abs=0.005)


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    """Nominal 95 %, 93 to 97 observed, over test sets drawn from known classifiers."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [200, 150, 100])
    confusions = np.array(
        [
            [[0.85, 0.10, 0.05], [0.15, 0.75, 0.10], [0.05, 0.15, 0.80]],
            [[0.80, 0.12, 0.08], [0.18, 0.72, 0.10], [0.05, 0.20, 0.75]],
        ]
    )
    support = np.bincount(labels)
    expected = confusions * support[:, None]
    f1 = 2 * np.diagonal(expected, axis1=1, axis2=2) / (support + expected.sum(axis=1))
    accuracy = np.diagonal(expected, axis1=1, axis2=2).sum(axis=1) / len(labels)
    truth = {
        "accuracy": accuracy[0],
        "macro_f1": f1[0].mean(),
        "class f1": f1[1, 2],
        "macro_f1 difference": f1[1].mean() - f1[0].mean(),
        "accuracy difference": accuracy[1] - accuracy[0],
    }
    covered = dict.fromkeys(truth, 0)
    rounds = 1500
    for seed in range(rounds):
        uniform = generator.random(len(labels))
        # Both versions use the same draw for half of the texts, so that their errors are correlated.
        other = np.where(generator.random(len(labels)) < 0.5, uniform, generator.random(len(labels)))
        answers = [
            (draw[:, None] > confusion[labels].cumsum(axis=1)).sum(axis=1).clip(max=2)
            for draw, confusion in zip((uniform, other), confusions, strict=True)
        ]
        boot = paired_bootstrap(labels, answers, 3, resamples=600, seed=seed)
        samples = {
            "accuracy": boot.accuracy[:, 0],
            "macro_f1": boot.macro_f1[:, 0],
            "class f1": boot.f1[:, 1, 2],
            "macro_f1 difference": boot.macro_f1[:, 1] - boot.macro_f1[:, 0],
            "accuracy difference": boot.accuracy[:, 1] - boot.accuracy[:, 0],
        }
        for name, values in samples.items():
            found = interval(truth[name], values)
            covered[name] += found.low <= truth[name] <= found.high
    for name, count in covered.items():
        assert 0.93 <= count / rounds <= 0.97, (name, count / rounds)


@pytest.mark.slow
def test_ten_thousand_resamples_of_twelve_thousand_rows_take_seconds():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 28, size=12_000)
    versions = [_answers(labels, [accuracy] * 28, 28, generator) for accuracy in (0.9, 0.85, 0.85, 0.84)]
    started = time.perf_counter()
    paired_bootstrap(labels, versions, 28)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 0), (8, 2), (5, 5), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    labels = np.zeros(200, dtype=np.int64)
    reference, other = labels.copy(), labels.copy()
    other[:lost] = 1
    reference[lost : lost + gained] = 1
    reference[150:170] = other[150:170] = 1
    found = mcnemar(labels, reference, other)
    n, k = lost + gained, min(lost, gained)
    closed = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert (found.lost, found.gained) == (lost, gained)
    assert found.p_value == pytest.approx(closed)


def test_non_inferiority_looks_at_the_lower_end():
    assert non_inferior(Interval(-0.005, -0.0099, 0.0), 0.01)
    assert not non_inferior(Interval(0.001, -0.0101, 0.01), 0.01)


def test_macro_f1_of_resamples_ignores_classes_that_never_occur():
    labels = np.array([0, 0, 1, 1])
    boot = paired_bootstrap(labels, [labels], classes=5, resamples=10)
    np.testing.assert_array_equal(boot.macro_f1, 1.0)


def test_a_difference_is_never_surer_than_the_number_of_texts_allows():
    nothing = np.zeros(100)
    assert difference_interval(0.0, nothing, undetected(5)).low == pytest.approx(-(1 - 0.025 ** (1 / 5)))
    found = difference_interval(0.0, nothing, undetected(1000))
    # Clopper and Pearson's upper end for no loss in 1000 texts
    exact = scipy.stats.binomtest(0, 1000).proportion_ci(method="exact").high
    assert (found.low, found.high) == pytest.approx((-exact, exact))
    wide = np.linspace(-0.2, 0.1, 1000)
    assert difference_interval(-0.05, wide, undetected(1000)) == interval(-0.05, wide)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("support", "lost", "margin"),
    [((500, 500, 5), 0.3, 0.03), ((900, 90, 10), 0.3, 0.03), ((500, 500, 20), 0.1, 0.01)],
)
def test_a_rare_class_cannot_hide_a_loss_from_the_gate(support, lost, margin):
    """A version that loses more macro-F1 than the margin passes in at most 2.5 % of test sets."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], support)
    rare, first = support[2], support[0]
    true = 2 * (1 - lost) / (2 - lost) - 1 + 2 * first / (2 * first + rare * lost) - 1
    assert true / 3 < -margin
    passed = 0
    for seed in range(200):
        answers = np.where((labels == 2) & (generator.random(len(labels)) < lost), 0, labels)
        boot = paired_bootstrap(labels, [labels, answers], 3, resamples=400, seed=seed)
        change = boot.macro_f1[:, 1] - boot.macro_f1[:, 0]
        value = f1_score(labels, answers, average="macro") - 1
        passed += non_inferior(difference_interval(value, change, undetected_macro(support)), margin)
    assert passed <= 5


def test_intervals_of_several_labels_are_those_of_resampled_rows():
    generator = np.random.default_rng(5)
    labels = generator.random((200, 4)) < [0.5, 0.3, 0.2, 0.1]
    versions = [labels ^ (generator.random(labels.shape) < rate) for rate in (0.1, 0.2)]
    boot = paired_bootstrap(labels, versions, 4, resamples=4000)
    rows = generator.integers(0, 200, size=(4000, 200))
    for version, answers in enumerate(versions):
        truth, answered = labels[rows], answers[rows]
        f1 = 2 * (truth & answered).sum(1) / (truth.sum(1) + answered.sum(1))
        for mine, theirs in (
            (boot.macro_f1[:, version], f1.mean(axis=1)),
            (boot.f1[:, version, 3], f1[:, 3]),
            (boot.accuracy[:, version], (truth == answered).all(-1).mean(1)),
        ):
            assert mine.mean() == pytest.approx(theirs.mean(), abs=0.004)
            assert np.quantile(mine, [0.025, 0.975]) == pytest.approx(
                np.quantile(theirs, [0.025, 0.975]), abs=0.015
            )
    tested = mcnemar(labels, *versions)
    right = [(one == labels).all(axis=1) for one in versions]
    assert (tested.lost, tested.gained) == ((right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum())
