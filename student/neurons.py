"""A student's feed-forward networks: the neurons that add most."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from distill.student.architecture import LAYER, with_weights

from distill.averaging import is_layerless
from distill.encoding import encode
from distill.errors import DistillError
from distill.first_token import first_token_only

WIDTHS = ("intermediate_size", "hidden_dim")  # what configurations call the number of neurons
TEXTS, TOKENS = 300, 10_000  # at most, to tell which neurons matter


def keep_neurons(model: Any, keep: int, texts: Sequence[Any], tokenizer: Any) -> Any:
    """Copy a sequence classifier with `keep` neurons in every feed-forward network, and all other weights.

    Those stay that add most to the hidden states of `texts`: the norm of a neuron's activations times that of
    its outgoing weights, which is the norm, over a column, of the scores of Wanda (Sun et al. 2023, arXiv
    2306.11695). It needs no labels and no trained head. Where the last layer computes the first token alone
    (`first_token_only`), that token alone counts there.

    Args:
        model: on the CPU.
        keep: neurons of each network; of a gated one, a neuron is both halves.
        texts: what it will learn on; up to `TEXTS` of them, or `TOKENS` tokens, are read.
        tokenizer: its tokenizer, as `load_tokenizer` gives it.

    Raises:
        DistillError: if the networks are narrower, or cannot be told from the rest.
    """
    if is_layerless(model):
        raise DistillError(
            f"--intermediate-size {keep}: the student's checkpoint has no layers; leave it out"
        )
    config = copy.deepcopy(model.config)
    width, total = width_of(config)
    alike = total == getattr(config, "hidden_size", None)
    unknown = DistillError(
        f"--intermediate-size {keep}: cannot tell the feed-forward networks of a {config.model_type} "
        f"apart{', which are as narrow as its hidden states' if alike else ''}; leave it out"
    )
    if total and keep > total:
        raise DistillError(
            f"--intermediate-size {keep}: the student's checkpoint has only {total} neurons in each "
            "feed-forward network; give at most that many"
        )
    if keep == total:
        return model
    linear = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    ends = [name for name, part in linear.items() if LAYER.search(name) and part.in_features == total]
    if len(ends) != config.num_hidden_layers:
        raise unknown
    weights = model.state_dict()
    norms = activation_norms(model, [linear[end] for end in ends], texts, tokenizer)
    for end, norm in zip(ends, norms, strict=True):
        importance = norm * linear[end].weight.detach().norm(dim=0)
        kept = importance.topk(keep).indices.sort().values
        weights[f"{end}.weight"] = weights[f"{end}.weight"][:, kept]
        for start in _starts(linear, end, total):
            # Of a gate and what it gates in one matrix, the same rows of both.
            rows = torch.cat([kept + part for part in range(0, linear[start].out_features, total)])
            for name in (f"{start}.weight", f"{start}.bias"):
                if name in weights:
                    weights[name] = weights[name][rows]
    setattr(config, width, keep)
    return with_weights(config, weights, unknown)


def width_of(config: Any) -> tuple[str, int]:
    """What a configuration calls the number of neurons, and how many there are; 0 where it does not say."""
    found = [(name, getattr(config, name, None)) for name in WIDTHS]
    return next(((name, count) for name, count in found if isinstance(count, int)), ("", 0))


def _starts(linear: dict[str, Any], end: str, total: int) -> list[str]:
    """What leads into the neurons of `end`: as many outputs, or, beside it, twice as many with a gate."""
    layer = end[: LAYER.search(end).end()]  # type: ignore[union-attr]
    inside = [name for name in linear if name.startswith(layer)]
    beside = [name for name in inside if name.rpartition(".")[0] == end.rpartition(".")[0]]
    single = [name for name in inside if linear[name].out_features == total]
    return single or [name for name in beside if linear[name].out_features == 2 * total]


def activation_norms(
    model: Any, modules: Sequence[torch.nn.Module], texts: Sequence[Any], tokenizer: Any
) -> list[torch.Tensor]:
    """Norm of each feature that a module is given, over the tokens of a sample of texts.

    Texts are read one by one, without padding.

    Returns:
        For each module, shape (in_features,).
    """
    sums = [torch.zeros(()) for _ in modules]

    def adding(place: int) -> Callable[..., None]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[place] = sums[place] + inputs[0].flatten(end_dim=-2).square().sum(dim=0)

        return add

    order = np.random.default_rng(0).permutation(len(texts))[:TEXTS]
    encoded = encode([texts[place] for place in order], tokenizer)
    names = [name for name in tokenizer.model_input_names if name in encoded.columns]
    # Within `first_token_only`, which runs the model itself before it begins.
    with first_token_only(model.eval()), torch.no_grad(), ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(adding(place)).remove)
        read = 0
        for row, length in enumerate(encoded.lengths):
            if length:
                model(**{name: torch.tensor([encoded.columns[name][row]]) for name in names})
            read += length
            if read >= TOKENS:
                break
    return [total.sqrt() for total in sums]
