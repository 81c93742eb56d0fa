"""A model of which every process holds a part: FSDP, as `accelerate launch --use_fsdp` sets it up."""

import os
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from distill.devices import choose_device
from distill.errors import DistillError

ASKED = "accelerate launch --use_fsdp"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def sharded() -> bool:
    """Whether the launcher asks for it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_sharding(device: str) -> None:
    """Refuse what the launcher asks for where it would not be what it seems.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        DistillError: on a CPU, where accelerate would do without FSDP; or if it is the first version of FSDP,
            which renames parameters.
    """
    if not sharded():
        return
    if choose_device(device) != "cuda":
        raise DistillError(f"{ASKED}: accelerate cuts a model into parts on several GPUs alone; leave it out")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise DistillError(f"{ASKED}: this is FSDP's first version; add --fsdp_version 2")


def prepare_sharding(trainer: Any) -> None:
    """Where FSDP is asked for, set it up.

    Every layer is put together when it is its turn, unless the launcher names other modules. Gradients are
    summed over the processes in fp32, and at every micro-batch, so that no process ever holds all of them.

    Args:
        trainer: a `Trainer` that has not trained yet.

    Raises:
        DistillError: if accelerate does without FSDP after all, or for a mixture of experts, of which the
            processes would put together different ones at a time.
    """
    if not sharded():
        return
    plugin, model = getattr(trainer.accelerator.state, "fsdp_plugin", None), trainer.model
    if plugin is None:
        raise DistillError(f"{ASKED}: accelerate does without it; leave it out")
    if any(getattr(model.config, name, None) for name in EXPERTS):
        raise DistillError(f"{ASKED}: not for a mixture of experts; take --qlora instead")
    # transformers 5 makes a new head in the first process alone. accelerate tells parameters apart by where
    # they lie, which is nowhere for these, and would train one of them alone.
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                module.register_parameter(name, torch.nn.Parameter(empty, parameter.requires_grad))
    trainer.accelerator.no_sync = lambda model: nullcontext()
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if plugin.transformer_cls_names_to_wrap is None:
        stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        longest: Any = max(stacks, key=len, default=())
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in longest})


def whole(model: Any, kind: type[Any]) -> Any:
    """Put a model together again, on every process' CPU, and empty its parts; all processes must call this.

    Args:
        model: as FSDP has cut it.
        kind: its class before that.

    Returns:
        A model of that class with the same weights.
    """
    weights = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        weights[name] = value.detach().to("cpu", copy=True)
    for parameter in model.parameters():
        parameter.grad = None
        if isinstance(parameter, DTensor):
            parameter.to_local().untyped_storage().resize_(0)
    with init_empty_weights(include_buffers=False):
        found = kind(model.config)
    found.load_state_dict(weights, assign=True)
    found.tie_weights()
    return found
