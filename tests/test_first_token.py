"""The last layer computes the first token alone, and nothing else changes."""

import pytest
import torch
from conftest import make_configs
from transformers import AutoModelForSequenceClassification

from distill.first_token import first_token_only

BATCH = {
    "input_ids": torch.tensor([[2, 7, 8, 9, 3, 11, 12], [2, 9, 5, 3, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]),
}


def tiny_model(family, attention=None, **settings):
    """A tiny classifier of a family."""
    torch.manual_seed(0)
    config = make_configs(2)[family]
    config.update(settings)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)


def _gradients(model, batch):
    model.zero_grad()
    model(**batch).logits.pow(2).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("bert", "sdpa"), ("bert", "eager"), ("roberta", "sdpa"), ("roberta", "eager"), ("electra", "eager")],
)
def test_logits_and_gradients_are_those_of_the_whole_model(family, implementation):
    model = tiny_model(family, attention=implementation).eval()
    seen = []
    model.base_model.encoder.layer[-1].output.register_forward_hook(
        lambda *call: seen.append(call[2].shape[1])
    )
    for batch in (BATCH, {"input_ids": BATCH["input_ids"]}):
        expected, gradients = model(**batch).logits, _gradients(model, batch)
        with first_token_only(model) as first:
            assert first
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
            assert seen[-1] == 1
            for name, gradient in _gradients(model, batch).items():
                torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(model(**batch).logits, expected, atol=0, rtol=0)
        assert seen[-1] == batch["input_ids"].shape[1]


def _pooled_by_the_mean():
    model = tiny_model("bert")
    pooler = model.bert.pooler
    pooler.forward = lambda states: torch.tanh(pooler.dense(states.mean(dim=1)))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("mpnet"),
        lambda: tiny_model("distilbert"),
        lambda: tiny_model("bert", is_decoder=True),
        lambda: tiny_model("bert", position_embedding_type="relative_key"),
        _pooled_by_the_mean,
    ],
    ids=["mpnet", "distilbert", "decoder", "relative", "mean"],
)
def test_other_models_are_left_as_they_are(make):
    model = make().eval()
    expected = model(**BATCH).logits
    with first_token_only(model) as first:
        assert not first
        torch.testing.assert_close(model(**BATCH).logits, expected, atol=0, rtol=0)


def test_the_model_trains_on_after_an_error():
    model = tiny_model("bert").train()
    with pytest.raises(KeyboardInterrupt), first_token_only(model):
        assert model.training
        raise KeyboardInterrupt
    assert not model.bert.encoder.layer[-1].attention._forward_pre_hooks
