import numpy as np
import pytest
from scipy.special import softmax as scipy_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from distill.metrics import score, softmax


@pytest.mark.parametrize("classes", [2, 3, 7, 150])
@pytest.mark.parametrize("used", [1.0, 0.6])
def test_scores_equal_scikit_learns_also_when_classes_are_absent(classes, used):
    generator = np.random.default_rng(classes)
    top = max(2, int(classes * used))
    labels = generator.integers(0, top, 500)
    predictions = np.where(generator.random(500) < 0.7, labels, generator.integers(0, top, 500))
    found = score(labels, predictions, classes)
    each = precision_recall_fscore_support(labels, predictions, labels=range(classes), zero_division=0)
    for mine, theirs in zip((found.precision, found.recall, found.f1, found.support), each, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
    for average in ("macro", "weighted"):
        theirs = precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)
        mine = [getattr(found, f"{average}_{name}") for name in ("precision", "recall", "f1")]
        np.testing.assert_allclose(mine, theirs[:3], atol=1e-12)
    assert found.accuracy == pytest.approx(accuracy_score(labels, predictions))
    np.testing.assert_array_equal(
        found.confusion, confusion_matrix(labels, predictions, labels=range(classes))
    )


def test_a_class_that_is_never_predicted_scores_zero_and_still_counts_in_the_macro_average():
    found = score(np.array([0, 0, 1]), np.array([0, 0, 0]), 2)
    assert found.f1 == [0.8, 0.0]
    assert found.macro_f1 == pytest.approx(0.4)


def test_softmax_equals_scipys_for_large_logits():
    logits = np.array([[1000.0, 999.0, -1000.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(softmax(logits), scipy_softmax(logits, axis=1))
