"""A student's attention: the heads that add most."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from distill.student.architecture import with_weights
from distill.student.neurons import activation_norms

from distill.averaging import is_layerless
from distill.errors import DistillError

BERT = ("attention.self.value", "attention.output.dense")
# Of a layer of each family whose attention export fuses, without which no head could be left out: what makes
# the values of all heads, and what reads what the heads make of them.
PROJECTIONS = {
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta"), BERT),
    "distilbert": ("attention.v_lin", "attention.out_lin"),
}


def keep_heads(model: Any, keep: int, texts: Sequence[Any], tokenizer: Any) -> Any:
    """Copy a sequence classifier of which `keep` heads of every attention add something.

    Those stay that add most to the hidden states of `texts`, as for `keep_neurons`: the norm over a head's
    features of their activations times their outgoing weights. Of the others the values are zero, and the
    weights that read them, so their gradients are zero too, and they stay so in training. transformers has no
    configuration for fewer heads of the same size; export leaves them out (export/idle_heads.py).

    Args:
        model: on the CPU.
        keep: heads of each attention.
        texts: what it will learn on; some of them are read, as for `keep_neurons`.
        tokenizer: its tokenizer, as `load_tokenizer` gives it.

    Raises:
        DistillError: if it has fewer heads, or is of another family than `PROJECTIONS`.
    """
    if is_layerless(model):
        raise DistillError(f"--attention-heads {keep}: the student's checkpoint has no layers; leave it out")
    config = copy.deepcopy(model.config)
    unknown = DistillError(
        f"--attention-heads {keep}: export leaves no heads out of a {config.model_type}; leave the option out"
    )
    values_of, reader_of = PROJECTIONS.get(config.model_type, ("", ""))
    if not values_of:
        raise unknown
    total = config.num_attention_heads
    if keep > total:
        raise DistillError(
            f"--attention-heads {keep}: the student's checkpoint has only {total} heads in each attention; "
            "give at most that many"
        )
    if keep == total:
        return model
    readers = [(name, part) for name, part in model.named_modules() if name.endswith(f".{reader_of}")]
    norms = activation_norms(model, [part for _, part in readers], texts, tokenizer)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for (name, part), norm in zip(readers, norms, strict=True):
        features = norm * part.weight.detach().norm(dim=0)
        by_head = features.unflatten(0, (total, -1))
        kept = by_head.norm(dim=1).topk(keep).indices
        idle = torch.ones_like(by_head, dtype=torch.bool).index_fill(0, kept, False).flatten()
        values = f"{name.removesuffix(reader_of)}{values_of}"
        weights[f"{name}.weight"][:, idle] = 0
        weights[f"{values}.weight"][idle] = 0
        weights[f"{values}.bias"][idle] = 0
    return with_weights(config, weights, unknown)
