"""What is read two thirds up the layers is what the whole model has there."""

import pytest
import torch
from conftest import make_configs
from distill.student.states import FAMILIES, states_of
from torch import nn
from transformers import AutoModelForSequenceClassification

BATCH = {
    "input_ids": torch.tensor([[2, 7, 8, 9, 3], [2, 9, 5, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("family", make_configs(1))
def test_they_are_those_of_the_whole_model_and_no_layer_above_is_computed(family, layers):
    model = AutoModelForSequenceClassification.from_config(make_configs(layers)[family]).eval()
    number, computed = round(2 * layers / 3), []
    for stack in (one for one in model.base_model.modules() if isinstance(one, nn.ModuleList)):
        for layer in stack if len(stack) == layers else ():
            layer.register_forward_hook(lambda *_: computed.append(1))
    with torch.no_grad():
        expected = model.base_model(**BATCH, output_hidden_states=True).hidden_states[number]
        computed.clear()
        for _ in range(2):
            torch.testing.assert_close(states_of(model, **BATCH), expected, atol=0, rtol=0)
    assert family in FAMILIES
    assert len(computed) == 2 * (number if number < layers else layers)
