"""A student's feed-forward networks: the neurons that add most."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from distill.student.architecture import LAYER
from transformers import AutoModelForSequenceClassification

from distill.errors import DistillError
from distill.models import text_logits

WIDTHS = ("intermediate_size", "hidden_dim")  # what configurations call the number of neurons
READ = 300  # texts that tell which neurons matter


def keep_neurons(model: Any, keep: int, texts: Sequence[Any], tokenizer: Any) -> Any:
    """Copy a sequence classifier with `keep` neurons in every feed-forward network, and all other weights.

    Those stay that add most to the hidden states of `texts`: the norm of a neuron's activations times that of
    its outgoing weights, which is Wanda (Sun et al. 2023, arXiv 2306.11695) summed over a column. It needs no
    labels and no trained head. In a last layer that is read at its first token, only that token counts.

    Args:
        model: on the CPU.
        keep: neurons of each network; of a gated one, a neuron is both halves.
        texts: what it will learn on; `READ` of them are read, evenly spaced.
        tokenizer: its tokenizer, as `load_tokenizer` gives it.

    Raises:
        DistillError: if the networks are narrower, or cannot be told from the rest.
    """
    width = next((name for name in WIDTHS if isinstance(getattr(model.config, name, None), int)), "")
    total = getattr(model.config, width, 0)
    unknown = DistillError(
        f"--intermediate-size {keep}: cannot tell the feed-forward networks of a {model.config.model_type} "
        "apart; leave it out"
    )
    if not total:
        raise unknown
    if keep > total:
        raise DistillError(
            f"--intermediate-size {keep}: the student's checkpoint has only {total} neurons in each "
            "feed-forward network; give at most that many"
        )
    if keep == total:
        return model
    linear = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    ends = [name for name, part in linear.items() if LAYER.search(name) and part.in_features == total]
    if len(ends) != model.config.num_hidden_layers:
        raise unknown
    weights = model.state_dict()
    with _norms([linear[end] for end in ends]) as norms:
        sample = texts[:: max(1, len(texts) // READ)][:READ]
        text_logits(model.eval(), tokenizer, sample, "cpu", "fp32", batch_tokens=1)
    for end, norm in zip(ends, norms, strict=True):
        importance = norm.sqrt() * linear[end].weight.detach().norm(dim=0)
        kept = importance.topk(keep).indices.sort().values
        weights[f"{end}.weight"] = weights[f"{end}.weight"][:, kept]
        for start in _starts(linear, end, total):
            # Of a gate and what it gates in one matrix, the same rows of both.
            rows = torch.cat([kept + part for part in range(0, linear[start].out_features, total)])
            for name in (f"{start}.weight", f"{start}.bias"):
                if name in weights:
                    weights[name] = weights[name][rows]
    config = copy.deepcopy(model.config)
    setattr(config, width, keep)
    student = AutoModelForSequenceClassification.from_config(config)
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise unknown from error
    return student


def _starts(linear: dict[str, Any], end: str, total: int) -> list[str]:
    """What leads into the neurons of `end`: as many outputs, or, beside it, twice as many with a gate."""
    layer = end[: LAYER.search(end).end()]  # type: ignore[union-attr]
    inside = [name for name in linear if name.startswith(layer)]
    beside = [name for name in inside if name.rpartition(".")[0] == end.rpartition(".")[0]]
    single = [name for name in inside if linear[name].out_features == total]
    return single or [name for name in beside if linear[name].out_features == 2 * total]


@contextmanager
def _norms(modules: Sequence[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Within it, sums up the squares of what each module is given, by feature: over texts and tokens."""
    sums = [torch.zeros(()) for _ in modules]

    def adding(place: int) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[place] = sums[place] + inputs[0].detach().flatten(end_dim=-2).square().sum(dim=0)

        return add

    hooks = [module.register_forward_pre_hook(adding(place)) for place, module in enumerate(modules)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
