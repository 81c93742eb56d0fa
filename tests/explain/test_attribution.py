import itertools
import math

import numpy as np
import pytest
from conftest import make_rows, train_tokenizer
from distill.explain.attribution import EXACT_WORDS, attribute
from distill.explain.words import split_words
from scipy.special import softmax

WEIGHTS = {"lovely": 1.5, "awful": -2.0, "not": -0.7, "great": 1.1, "!!!": 0.4}


def _model(texts):
    """A classifier whose words interact: "not" turns what follows, and everything passes a softmax."""
    rows = []
    for text in texts:
        words = split_words(text).words
        total = sum(WEIGHTS.get(word, 0.05) for word in words)
        total *= -1 if "not" in words and "great" in words else 1
        rows.append([-total, 0.1 * len(words), total])
    return softmax(np.array(rows), axis=1)


def _exact_shapley(text):
    """The definition: the mean gain of a word over all subsets of the others, weighted by size."""
    words = split_words(text)
    count = len(words.segments)
    values = np.zeros((count, 3))
    for word in range(count):
        others = [index for index in range(count) if index != word]
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for subset in itertools.combinations(others, size):
                mask = np.zeros(count, dtype=bool)
                mask[list(subset)] = True
                without = words.keep(mask)
                mask[word] = True
                values[word] += weight * (_model([words.keep(mask)])[0] - _model([without])[0])
    return values


@pytest.mark.parametrize(
    "text", ["lovely", "not great", "it was not great !!!", "the lovely day was not so great !!!"]
)
def test_short_texts_have_their_exact_shapley_values(text):
    assert len(split_words(text).segments) <= EXACT_WORDS
    found = attribute(text, {"one": _model})["one"]
    np.testing.assert_allclose(found.values, _exact_shapley(text), atol=1e-9)
    assert found.residual < 1e-9


def test_longer_texts_come_close_to_their_exact_shapley_values():
    text = "the lovely lovely day was truly not so great !!!"
    found = attribute(text, {"one": _model})["one"]
    assert len(found.words.segments) == 10
    np.testing.assert_allclose(found.values, _exact_shapley(text), atol=0.1)
    assert found.residual < 1e-9


def test_all_versions_see_the_same_masked_texts():
    seen = {"a": [], "b": []}

    def watched(name):
        def model(texts):
            seen[name] += texts
            return _model(texts)

        return model

    text = " ".join(f"word{n}" for n in range(20))
    found = attribute(text, {name: watched(name) for name in seen})
    assert seen["a"] == seen["b"]
    np.testing.assert_array_equal(found["a"].values, found["b"].values)


def test_the_same_seed_gives_the_same_values():
    text = " ".join(["lovely", "not", "great", *(f"word{n}" for n in range(12))])
    first, again = (attribute(text, {"one": _model}, seed=3)["one"].values for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, attribute(text, {"one": _model}, seed=4)["one"].values)


def test_lime_recovers_a_linear_model():
    def linear(texts):
        score = np.array([sum(WEIGHTS.get(word, 0.0) for word in split_words(text).words) for text in texts])
        return np.stack([0.5 - score / 10, 0.5 + score / 10], axis=1)

    found = attribute("the lovely day was not awful !!!", {"one": linear}, method="lime")["one"]
    expected = [WEIGHTS.get(word, 0.0) / 10 for word in found.words.words]
    np.testing.assert_allclose(found.values[:, 1], expected, atol=0.01)


def test_a_text_without_words_has_no_values():
    found = attribute("", {"one": _model})["one"]
    assert found.values.shape == (0, 3)
    assert found.residual == 0


ODD = [
    "good 👍 café naïve",
    "今日はいい天気 great",
    "see https://x.y/z?a=1 “not” great  !!!",
    "don't\t\tlove it\n",
    "👩‍👩‍👧‍👦 lovely",
]


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level bpe", "unigram"])
def test_values_sum_to_the_answer_less_the_base_whatever_the_tokenizer(kind, tmp_path):
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]"]
    corpus = [text for text, _ in make_rows(60)] + ODD
    tokenizer = train_tokenizer(kind, corpus, special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()

    def probabilities(texts):
        rows = []
        for text in texts:
            ids = fast(text)["input_ids"] or [0]
            with torch.no_grad():
                rows.append(model(torch.tensor([ids])).logits[0].softmax(0).numpy())
        return np.array(rows, dtype=np.float64)

    for text in ODD:
        found = attribute(text, {"one": probabilities})["one"]
        assert found.residual < 1e-3
        np.testing.assert_allclose(found.base, probabilities([""])[0], atol=1e-5)
        assert np.abs(found.values).max() > 0.01
