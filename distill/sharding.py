"""A model of which every process holds a part: FSDP, as `accelerate launch --use_fsdp` sets it up."""

import os
from typing import Any

import torch
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from distill.errors import DistillError

ASKED = "accelerate launch --use_fsdp"


def sharded() -> bool:
    """Whether the launcher asks for it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def prepare_sharding(trainer: Any) -> None:
    """Where FSDP is asked for, have every layer put together when it is its turn, unless others are named.

    Args:
        trainer: a `Trainer` that has not trained yet.

    Raises:
        DistillError: if accelerate does without FSDP here, as it does on CPUs, so that every process would
            hold the whole model; or if it is FSDP's first version, which renames parameters.
    """
    if not sharded():
        return
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise DistillError(f"{ASKED}: accelerate cuts a model into parts on several GPUs alone; leave it out")
    if plugin.fsdp_version != 2:
        raise DistillError(f"{ASKED}: this is FSDP's first version; add --fsdp_version 2")
    # transformers 5 makes a new head in the first process alone. accelerate tells parameters apart by where
    # they lie, which is nowhere for these, and would train one of them alone.
    for module in trainer.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                module.register_parameter(name, torch.nn.Parameter(empty, parameter.requires_grad))
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if plugin.transformer_cls_names_to_wrap is None:
        stacks = [module for module in trainer.model.modules() if isinstance(module, torch.nn.ModuleList)]
        longest: Any = max(stacks, key=len, default=())
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in longest})


def whole(model: Any, kind: type[Any]) -> Any:
    """Put a model together again, on every process' CPU; all processes must call this.

    Args:
        model: as FSDP has cut it.
        kind: its class before that.

    Returns:
        A model of that class with the same weights.
    """
    weights = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value
        weights[name] = value.to("cpu", copy=True)
        del value
    found = kind(model.config)
    found.load_state_dict(weights, assign=True)
    return found
