import math

import numpy as np
import pytest
import scipy.stats
from distill.explain.agreement import SHARES, faithfulness, rank_correlation, sign_flips, top_overlap
from distill.explain.words import split_words


def test_rank_correlation_is_scipys():
    generator = np.random.default_rng(0)
    for _ in range(20):
        first, second = generator.integers(-5, 6, size=(2, 12)).astype(float)
        assert rank_correlation(first, second) == pytest.approx(
            scipy.stats.spearmanr(first, second).statistic
        )
    assert math.isnan(rank_correlation(np.zeros(4), np.arange(4.0)))


def test_top_overlap_counts_the_largest_absolute_values():
    first, second = np.array([0.5, -0.4, 0.1, 0.0]), np.array([-0.5, 0.0, 0.4, 0.3])
    assert top_overlap(first, second, top=2) == 0.5
    assert math.isnan(top_overlap(first, first, top=4))
    assert math.isnan(top_overlap(np.zeros(0), np.zeros(0)))


def test_sign_flips_leave_out_words_without_weight():
    assert sign_flips(np.array([0.5, 0.3, 0.001]), np.array([-0.5, 0.2, -0.001])) == 0.5
    assert math.isnan(sign_flips(np.array([0.001]), np.array([-0.001])))


def _one_word_decides(texts):
    right = np.array([0.9 if "key" in text else 0.2 for text in texts])
    return np.stack([right, 1 - right], axis=1)


def test_true_explanations_beat_random_ones_and_false_ones_do_not():
    text = "a b c d key e f g h i"
    words = split_words(text)
    true = np.zeros((10, 2))
    true[4, 0] = 0.7
    found, random = faithfulness([(text, words, true)] * 20, _one_word_decides)
    # Taking out the one word that counts costs 0.7 at every share; leaving it alone costs nothing.
    assert found.comprehensiveness == pytest.approx(0.7)
    assert found.sufficiency == pytest.approx(0.0)
    # A random order holds the word among its first 1, 2 and 5 of 10 with these probabilities.
    expected = 0.7 * np.mean(SHARES)
    assert random.comprehensiveness == pytest.approx(expected, abs=0.08)
    assert random.sufficiency == pytest.approx(0.7 - expected, abs=0.08)
    false, _ = faithfulness([(text, words, -true)], _one_word_decides)
    assert false.comprehensiveness == 0.0


def test_no_texts_give_no_figure():
    found, random = faithfulness([], _one_word_decides)
    assert math.isnan(found.comprehensiveness) and math.isnan(random.sufficiency)
