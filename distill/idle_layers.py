"""Layers that add nothing.

None of transformers' encoders can have no layers at all and pool by the mean, so a student of that kind is
written as a ModernBERT with one layer whose weights are all zero: what it adds to its input is zero too. Here
that layer is told from others, and left out where a model runs; export/idle_layers.py does so in the graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def depth(model: Any) -> int:
    """How many layers a sequence classifier has, without those that add nothing."""
    return 0 if _is_idle(model) else int(model.config.num_hidden_layers)


@contextmanager
def idle_layers_left_out(model: Any) -> Iterator[None]:
    """Within it, a sequence classifier does not run layers that add nothing; the logits stay the same."""
    if not _is_idle(model):
        yield
        return
    encoder = model.base_model
    layers, encoder.layers = encoder.layers, torch.nn.ModuleList()
    try:
        yield
    finally:
        encoder.layers = layers


def _is_idle(model: Any) -> bool:
    layers = (weight for name, weight in model.named_parameters() if ".layers." in name)
    return model.config.model_type == "modernbert" and not any(bool(weight.any()) for weight in layers)
