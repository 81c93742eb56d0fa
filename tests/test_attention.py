"""A training in bf16 computes its attention in fp32 on a CPU, and gives what bf16 would, more exactly."""

import pytest
import torch
from torch.nn import functional as F

from distill.attention import attention_in_fp32


def _inputs(kind=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 5, 8).to(kind).requires_grad_() for _ in range(3)]


MASKS = {
    "none": None,
    "of truth": torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None],
    "added": torch.tensor([[0.0] * 5, [0.0] * 3 + [torch.finfo(torch.bfloat16).min] * 2])[:, None, None],
}


@pytest.mark.parametrize("mask", MASKS)
def test_it_is_fp32s_attention_of_the_same_numbers(mask):
    mask, inputs = MASKS[mask], _inputs()
    exact = [one.detach().float().requires_grad_() for one in inputs]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    expected.pow(2).sum().backward()
    added = mask if mask is None or mask.dtype == torch.bool else mask.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), attention_in_fp32("cpu", "bf16"):
        found = F.scaled_dot_product_attention(*inputs, added)
        found.float().pow(2).sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), atol=0, rtol=0)
    for own, one in zip(inputs, exact, strict=True):
        torch.testing.assert_close(own.grad.float(), one.grad, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_elsewhere_nothing_changes(device, precision):
    inputs = _inputs()
    with attention_in_fp32(device, precision):
        found = F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*inputs), atol=0, rtol=0)


def test_dropout_and_other_precisions_stay_as_they_are():
    inputs = _inputs(torch.float32)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    torch.manual_seed(1)
    with attention_in_fp32("cpu", "bf16"):
        found = F.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert found.dtype == torch.float32
