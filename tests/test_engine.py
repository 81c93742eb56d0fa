import numpy as np
import pytest
from conftest import make_rows

from distill import Classifier, engine
from distill.bundle import open_bundle
from distill.engine import Engine

SINGLE = [text for text, _ in make_rows(40, seed=4)] + ["", "lovely"]
TEXTS = [*SINGLE, ("a phone", "a bad one")]


@pytest.fixture(scope="module")
def fp32(chain):
    return Engine(open_bundle(chain.export), "cpu", "onnx/model.onnx")


@pytest.mark.parametrize("tokens", [16, 64, 16_384])
def test_batches_answer_as_single_texts_do_in_their_order(fp32, monkeypatch, tokens):
    monkeypatch.setattr(engine, "BATCH_TOKENS", tokens)
    expected = np.stack([fp32.logits(text) for text in TEXTS])
    np.testing.assert_allclose(fp32.batched_logits(TEXTS), expected, atol=1e-5)


def test_batches_hold_the_budget_with_padding_counted_and_each_row_once(monkeypatch):
    monkeypatch.setattr(engine, "BATCH_TOKENS", 100)
    lengths = np.array([8, 56, 16, 200, 8, 8, 8, 32, 24])
    batches = list(engine._batches(lengths))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for rows in batches:
        assert lengths[rows].max() * len(rows) <= 100 or len(rows) == 1
    assert [len(rows) for rows in batches] == [1, 1, 3, 4]


def test_a_classifier_on_cuda_runs_lists_and_streams_in_batches(chain, monkeypatch):
    classifier = Classifier(chain.export, file="onnx/model.onnx")
    expected = classifier.predict_logits(SINGLE)
    monkeypatch.setattr(classifier, "provider", "cuda")
    monkeypatch.setattr("distill.runtime.STREAM_BATCH", 7)
    sizes = []
    run = classifier._engine.batched_logits
    monkeypatch.setattr(
        classifier._engine, "batched_logits", lambda texts: sizes.append(len(texts)) or run(texts)
    )
    np.testing.assert_allclose(classifier.predict_logits(SINGLE), expected, atol=1e-5)
    np.testing.assert_allclose(list(classifier.stream_logits(iter(SINGLE))), expected, atol=1e-5)
    assert sizes == [42, 7, 7, 7, 7, 7, 7]
    assert classifier.predict([]) == []


def test_padding_never_exceeds_the_positions_of_the_model(fp32, monkeypatch):
    monkeypatch.setattr(engine, "PADDED_TO", 48)  # 64 positions: 96 would be too many
    long = "lovely " * 200
    np.testing.assert_allclose(fp32.batched_logits([long, "bad"])[0], fp32.logits(long), atol=1e-5)


def test_long_lists_are_encoded_in_blocks(fp32, monkeypatch):
    expected = fp32.batched_logits(TEXTS)
    monkeypatch.setattr(engine, "BLOCK", 10)
    np.testing.assert_allclose(fp32.batched_logits(TEXTS), expected, atol=1e-5)
