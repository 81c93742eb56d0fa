"""Low-rank adapters: new weights beside a large teacher's frozen ones, merged into them when training ends.

In place of a frozen matrix W the sum W + 2 B A is used, where A has `rank` rows and B as many columns, and
these two alone are trained: Hu et al. (2021), arXiv 2106.09685. QLoRA keeps W in 4 bits meanwhile: Dettmers
et al. (2023), arXiv 2305.14314. Every linear layer below the head gets such a pair; the head is all trained.
"""

from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from distill.devices import PRECISIONS
from distill.errors import DistillError
from distill.trainer import is_new

SCALE = 2


def _linear_layers(model: Any) -> list[str]:
    """Names of all linear layers below the head; GPT-2's are called Conv1D."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_new(name, model.base_model_prefix)
    ]


def _heads(model: Any) -> list[str]:
    """Names of the modules that make up the head."""
    prefix = model.base_model_prefix
    modules = {**dict(model.named_children()), f"{prefix}.pooler": getattr(model.base_model, "pooler", None)}
    return [
        name
        for name, module in modules.items()
        if name != prefix and module is not None and any(True for _ in module.parameters())
    ]


def add_adapters(model: Any, rank: int) -> Any:
    """Freeze a classifier below its head and give each linear layer there an adapter.

    Args:
        model: a sequence classifier.
        rank: of the adapters.

    Returns:
        The classifier, wrapped by PEFT; its logits are what they were until it is trained.

    Raises:
        DistillError: if the model has no linear layer to adapt.
    """
    layers = _linear_layers(model)
    if not layers:
        kind = model.config.model_type
        raise DistillError(f"--lora: a model of type {kind} has no linear layer to adapt; leave it out")
    turned = any(isinstance(module, Conv1D) for module in model.modules())
    for module in model.modules():
        # On a CPU with AVX512-BF16 bitsandbytes would pack 4-bit weights at the first evaluation, into a form
        # that only widths divisible by 64 have, and that is not merged with adapters.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=SCALE * rank,
            target_modules=layers,
            modules_to_save=_heads(model),
            fan_in_fan_out=turned,
        ),
    )


def merge_adapters(model: Any) -> Any:
    """Give the plain classifier that computes what the adapted one does, in fp32.

    4-bit weights are first turned into the fp32 numbers that they stand for, which are what the adapters were
    trained beside; the checkpoint's own weights would be others. They go to the CPU, where there is room.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and hasattr(module.get_base_layer().weight, "quant_state"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _merged_from_four_bits(module))
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    if getattr(merged, "is_quantized", False):
        merged.hf_quantizer.remove_quantization_config(merged)
        merged = merged.to("cpu")
    return merged


@torch.no_grad()
def _merged_from_four_bits(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    base = layer.get_base_layer()
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float().cpu()
    for adapter in layer.active_adapters:
        weight += layer.get_delta_weight(adapter).float().cpu()
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device=weight.device)
    plain.weight.copy_(weight)
    if base.bias is not None:
        plain.bias.copy_(base.bias)
    return plain


def check_four_bits() -> None:
    """Refuse `--qlora` where it cannot be had.

    Raises:
        DistillError: if bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise DistillError("--qlora: needs the package bitsandbytes: pip install 'distill-onnx[qlora]'")


def in_four_bits(config: Any, device: str, precision: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load all linear layers below the head in 4 bits (NF4).

    Args:
        config: the classifier's configuration.
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16", to compute in.

    Raises:
        DistillError: if the model's layers are of another kind, as GPT-2's.
    """
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(config)
    if any(isinstance(module, Conv1D) for module in skeleton.modules()):
        raise DistillError(f"--qlora: the layers of a {config.model_type} have no 4-bit form; use --lora")
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=PRECISIONS[precision],
            llm_int8_skip_modules=_heads(skeleton),
        ),
        # The number of the GPU, which differs between processes that train together.
        "device_map": {"": torch.cuda.current_device() if device == "cuda" else device},
    }
