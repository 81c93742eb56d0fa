"""What a teacher makes of tokens, two thirds up its layers; all kinds of students learn from it."""

from typing import Any

import torch
from torch import nn

from distill.averaging import depth

# Encoders that hand each of their layers the states of those below as they are.
FAMILIES = (
    "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta",
)  # fmt: skip


class _ReachedError(Exception):
    """The layers below are computed."""


def states_of(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """States two thirds up the layers, shape (texts, tokens, width).

    Of `FAMILIES` the layers above are not computed.

    Args:
        model: a sequence classifier.
        inputs: what it reads, of shape (texts, tokens).
    """
    total = depth(model)
    number = round(2 * total / 3)
    stacks = [
        one for one in model.base_model.modules() if isinstance(one, nn.ModuleList) and len(one) == total
    ]
    if model.config.model_type not in FAMILIES or number == total or len(stacks) != 1:
        states: torch.Tensor = model.base_model(**inputs, output_hidden_states=True).hidden_states[number]
        return states
    found = []

    def stop(_: nn.Module, positional: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        found.append(positional[0] if positional else named["hidden_states"])
        raise _ReachedError

    hook = stacks[0][number].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(**inputs)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]
