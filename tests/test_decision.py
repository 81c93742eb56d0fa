import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import f1_score

from distill.decision import Decision, classes_in, fit_thresholds, same, sigmoid


def _multi_label(rows=80, labels=5, seed=0):
    generator = np.random.default_rng(seed)
    truth = generator.random((rows, labels)) < np.linspace(0.05, 0.6, labels)
    logits = (generator.normal(size=(rows, labels)) + 2 * truth - 2).astype(np.float32)
    return logits, truth


def test_the_sigmoid_is_scipys_and_does_not_overflow():
    logits = np.array([-1000.0, -3.0, 0.0, 2.0, 1000.0])
    np.testing.assert_allclose(sigmoid(logits, 2.0), expit(logits / 2), atol=1e-15)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_threshold_has_the_highest_f1_of_all_cuts(rounded):
    logits, truth = _multi_label()
    if rounded:  # many texts with one logit
        logits = logits.round()
    answers = Decision(thresholds=fit_thresholds(logits, truth)).answers(logits)
    for label in range(truth.shape[1]):
        cuts = [f1_score(truth[:, label], logits[:, label] >= cut) for cut in np.unique(logits[:, label])]
        assert f1_score(truth[:, label], answers[:, label]) == pytest.approx(max(cuts))


def test_thresholds_lie_between_logits_and_a_label_without_texts_has_one_half():
    logits = np.array([[3.0, 1.0], [1.0, 2.0], [-1.0, 3.0]], dtype=np.float32)
    truth = np.array([[True, False], [True, False], [False, False]])
    assert fit_thresholds(logits, truth) == (0.0, 0.0)
    assert Decision(2.0, (0.0, 1.0)).probability_thresholds.tolist() == [0.5, expit(0.5)]
    assert fit_thresholds(logits, np.array([0, 1, 1])) is None


def test_the_temperature_changes_probabilities_and_no_answer():
    logits, truth = _multi_label()
    thresholds = fit_thresholds(logits, truth)
    plain, soft = Decision(1.0, thresholds), Decision(3.0, thresholds)
    np.testing.assert_array_equal(plain.answers(logits), soft.answers(logits))
    np.testing.assert_allclose(soft.probabilities(logits), expit(logits.astype(float) / 3))
    reached = soft.probabilities(logits) >= soft.probability_thresholds
    np.testing.assert_array_equal(reached, soft.answers(logits))


def test_certainty_is_the_probability_of_the_whole_answer():
    logits = np.array([[1.0, -2.0, 0.5]], dtype=np.float32)
    several, single = Decision(1.0, (0.0, 0.0, 1.0)), Decision(2.0)
    assert several.answers(logits).tolist() == [[True, False, False]]
    p = expit(logits[0].astype(float))
    assert several.certainty(logits)[0] == pytest.approx(p[0] * (1 - p[1]) * (1 - p[2]))
    assert single.answers(logits).tolist() == [0]
    assert single.certainty(logits)[0] == pytest.approx(softmax(logits[0].astype(float) / 2)[0])


def test_two_answers_are_the_same_if_every_label_is():
    first = np.array([[True, False], [True, True]])
    assert same(first, np.array([[True, False], [True, False]])).tolist() == [True, False]
    assert same(np.array([1, 2]), np.array([1, 0])).tolist() == [True, False]
    assert [classes_in(row) for row in first] == [[0], [0, 1]] and classes_in(np.int64(2)) == [2]
