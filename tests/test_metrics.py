import numpy as np
import pytest
from scipy.special import softmax as scipy_softmax
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from distill.decision import softmax
from distill.metrics import score


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


def test_scores_of_several_labels_equal_scikit_learns_also_when_labels_are_absent():
    generator = np.random.default_rng(3)
    labels = generator.random((400, 6)) < [0.5, 0.3, 0.1, 0.02, 0.0, 0.0]
    predictions = labels ^ (generator.random((400, 6)) < [0.1, 0.2, 0.1, 0.05, 0.01, 0.0])
    found = score(labels, predictions, 6)
    each = precision_recall_fscore_support(labels, predictions, zero_division=0)
    for mine, theirs in zip((found.precision, found.recall, found.f1, found.support), each, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
    assert found.accuracy == pytest.approx(accuracy_score(labels, predictions))
    assert found.micro_f1 == pytest.approx(f1_score(labels, predictions, average="micro"))
    # Over the labels that occur, as for classes.
    occurring = f1_score(labels[:, :5], predictions[:, :5], average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(occurring)
    np.testing.assert_array_equal(found.confusion, multilabel_confusion_matrix(labels, predictions))
    assert found.summary().keys() == {"accuracy", "macro_f1", "micro_f1"}


def test_micro_f1_is_the_accuracy_where_a_text_has_one_label():
    found = score(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 1]), 3)
    assert found.micro_f1 == found.accuracy == 0.5
