"""Layers that add nothing.

None of transformers' encoders can have no layers at all and pool by the mean, so a student of that kind is
written as a ModernBERT with one layer whose weights are all zero: what it adds to its input is zero too, and
so are its gradients. Its configuration says so. Here that layer is left out where a model runs;
export/idle_layers.py does so in the graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distill.errors import DistillError


def depth(model: Any) -> int:
    """How many layers a sequence classifier has, without those that add nothing."""
    return 0 if is_layerless(model) else int(getattr(model.config, "num_hidden_layers", 0))


def refuse_pairs(layerless: bool, pairs: bool) -> None:
    """Refuse to classify pairs of texts without layers."""
    if layerless and pairs:
        raise DistillError(
            "without layers a model is a mean of tokens, which cannot tell the two texts of a pair apart; "
            "keep at least one layer, of a checkpoint that has some"
        )


@contextmanager
def idle_layers_left_out(model: Any) -> Iterator[None]:
    """Within it, a sequence classifier does not run layers that add nothing; the logits stay the same."""
    if not is_layerless(model):
        yield
        return
    encoder = model.base_model
    layers, encoder.layers = encoder.layers, torch.nn.ModuleList()
    try:
        yield
    finally:
        encoder.layers = layers


def is_layerless(model: Any) -> bool:
    """Say whether none of a sequence classifier's layers adds anything."""
    return bool(getattr(model.config, "layerless", False))
