"""Attention written out is PyTorch's, values and gradients, with every kind of mask and shared heads."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitfold.runtime.short_attention import short_attention

TOKENS = 12


def _mask(kind: str) -> Tensor | None:
    window = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-4).view(1, 1, TOKENS, TOKENS)
    if kind == "boolean":
        return window
    if kind == "additive":
        return torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~window, -torch.inf)
    return None


@pytest.mark.parametrize("kind", ["causal", "none", "boolean", "additive"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_the_librarys(kind: str, scaling: float | None) -> None:
    torch.manual_seed(0)
    shapes = [(2, 4, TOKENS, 8), (2, 2, TOKENS, 8), (2, 2, TOKENS, 8)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    found = short_attention(*ours, _mask(kind), scaling, causal=kind == "causal")
    expected = scaled_dot_product_attention(
        *theirs, attn_mask=_mask(kind), is_causal=kind == "causal", scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
