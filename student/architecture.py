"""A student's architecture: a pre-trained encoder with some of its layers and positions."""

import copy
import re
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from distill.averaging import depth
from distill.errors import DistillError
from distill.models import OFFSET_POSITIONS

# encoder.layer.3. (BERT, RoBERTa, ELECTRA, MPNet), transformer.layer.3. (DistilBERT), layers.3. (ModernBERT)
LAYER = re.compile(r"(?<=[.])(layers?)\.(\d+)\.")


def evenly_spaced(total: int, keep: int, period: int = 1) -> list[int]:
    """Choose `keep` of `total` layers, evenly spaced, the first and the last among them; the last if but one.

    Where a layer's kind depends on its number, as ModernBERT's global and local attention does, each layer
    keeps its number modulo `period`, and the last one may be up to `period` layers from the end.
    """
    if keep == 1:  # ModernBERT's first layer alone has no norm before its attention, and cannot be another
        return [total - 1 if period == 1 else 0]
    even = np.round(np.linspace(0, total - 1, keep)).astype(int)
    return [new + period * ((int(old) - new) // period) for new, old in enumerate(even)]


def keep_layers(model: Any, keep: int) -> Any:
    """Copy a sequence classifier with `keep` evenly spaced encoder layers; all other weights are the same.

    Works on parameter names: for every encoder that calls its layers `layer.N` or `layers.N`.

    Raises:
        DistillError: if the model has fewer layers, or none that can be found.
    """
    total = depth(model)
    if keep > total:
        raise DistillError(
            f"--layers {keep}: the student's checkpoint has only {total} layers; give at most that many"
        )
    kept = evenly_spaced(total, keep, getattr(model.config, "global_attn_every_n_layers", 1))
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = keep
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    place = {old: new for new, old in enumerate(kept)}
    weights: dict[str, torch.Tensor] = {}
    found = set()
    for name, tensor in model.state_dict().items():
        match = LAYER.search(name)
        if match is None:
            weights[name] = tensor
            continue
        found.add(int(match[2]))
        if int(match[2]) in place:
            weights[f"{name[: match.start(2)]}{place[int(match[2])]}{name[match.end(2) :]}"] = tensor
    unknown = DistillError(
        f"--layers {keep}: cannot tell the layers of a {config.model_type} apart; "
        "name a smaller checkpoint with --student and leave --layers out"
    )
    if len(found) != total:
        raise unknown
    return with_weights(config, weights, unknown)


def with_weights(config: Any, weights: dict[str, torch.Tensor], refusal: DistillError) -> Any:
    """Make a sequence classifier of these weights; `refusal` is raised where they do not fit its `config`."""
    student = AutoModelForSequenceClassification.from_config(config)
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise refusal from error
    return student


def cut_positions(model: Any, length: int) -> Any:
    """Copy a sequence classifier without the position embeddings that texts of `length` tokens never reach.

    The answers stay the same. Unchanged if its positions are of another kind (relative, rotary).
    """
    offset = (model.config.pad_token_id or 0) + 1 if model.config.model_type in OFFSET_POSITIONS else 0
    total, needed = getattr(model.config, "max_position_embeddings", 0), length + offset
    weights = model.state_dict()
    tables = [name for name in weights if name.endswith(("position_embeddings.weight", "wpe.weight"))]
    if total <= needed or [len(weights[name]) for name in tables] != [total]:
        return model
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = needed
    weights[tables[0]] = weights[tables[0]][:needed].clone()
    shorter = AutoModelForSequenceClassification.from_config(config)
    try:
        shorter.load_state_dict(weights, strict=True)
    except RuntimeError:  # other tables count on as many positions, as DeBERTa's relative ones
        return model
    return shorter
