"""Attention in fp32 while all else trains in bf16, on a CPU.

PyTorch has one fused kernel for attention on a CPU, whose backward pass takes longer in bf16 than in fp32 for
short texts; benchmarks/training.py measures what that costs a training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class _InFp32(TorchFunctionMode):
    """Attention without dropout is computed in fp32; with dropout PyTorch takes another kernel anyway."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is scaled_dot_product_attention:
            function = _attention
        return function(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **rest: Any,
) -> Tensor:
    if dropout_p or query.dtype != torch.bfloat16:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **rest)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        found = scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask, **rest)
    return found.to(query.dtype)


@contextmanager
def attention_in_fp32(device: str, precision: str) -> Iterator[None]:
    """Within it, a training in bf16 on a CPU computes its attention in fp32; nothing else changes."""
    if (device, precision) != ("cpu", "bf16"):
        yield
        return
    with _InFp32():
        yield
