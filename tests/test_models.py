import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer

from distill import models
from distill.data import load_data
from distill.errors import DistillError
from distill.models import BATCH_TOKENS, choose_precision, load_model, load_tokenizer
from distill.training import predict_logits


def test_bf16_is_chosen_on_a_cpu_only_with_the_instructions(monkeypatch):
    monkeypatch.setattr(models, "cpu_has_bf16", lambda: False)
    assert choose_precision("cpu") == "fp32"
    with pytest.raises(DistillError, match="use fp32"):
        choose_precision("cpu", "bf16")
    monkeypatch.setattr(models, "cpu_has_bf16", lambda: True)
    assert choose_precision("cpu") == "bf16"


def test_pytorchs_own_ceiling_is_honoured(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not models.cpu_has_bf16()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_t4_trains_in_fp16_and_newer_gpus_in_bf16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision("cuda") == expected


def test_bf16_on_a_t4_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(DistillError, match="use fp16"):
        choose_precision("cuda", "bf16")


@pytest.mark.parametrize(("family", "limit"), [("Roberta", 38), ("MPNet", 38), ("Bert", 40)])
def test_texts_are_cut_at_what_the_models_positions_hold(tmp_path, family, limit):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=0 if family == "Bert" else 1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), 256)
    assert tokenizer.model_max_length == limit
    assert load_tokenizer(str(tmp_path), 16).model_max_length == 16
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    ids = tokenizer("lovely " * 100, truncation=True, return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 2)


def test_logits_in_batches_equal_those_of_single_texts(chain, monkeypatch):
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 50)
    data = load_data(str(chain.data), quiet=True)
    model, tokenizer = load_model(str(chain.teacher), data.labels), load_tokenizer(str(chain.teacher), 64)
    found = predict_logits(model, tokenizer, data.splits["test"], "cpu", "fp32")
    for row, text in zip(found, data.splits["test"]["text"], strict=True):
        with torch.no_grad():
            single = model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
        np.testing.assert_allclose(row, single, atol=1e-5)
