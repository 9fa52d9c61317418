"""What stands outside the blocks and is not quantized: a head and an embedding that keep 16 bits where the model runs
in float32.

PyTorch's product of a single row in bfloat16 leaves half of the memory's speed unused. FBGEMM's takes float32 by
float16 and gives float32, at the speed of the memory: a weight in bfloat16 has 8 bits of precision and fits into
float16's 11 once a power of two has brought its largest value near the end of float16's range.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CastEmbedding", "HalfLinear", "no_half"]

ROWS = 4096
"""Rows packed at a time: they must be float32 for that."""
_LARGEST = 2.0**15


def no_half(weight: Tensor) -> str | None:
    """Why a weight [out, in] cannot be run so; None if it can."""
    if not hasattr(torch.ops.quantized, "linear_prepack_fp16"):
        return "this PyTorch has no products with float16 for this processor"
    for rows in weight.split(ROWS):
        if not torch.isfinite(rows).all():
            return "its values are not all finite"
        if not torch.equal(rows.bfloat16().to(rows.dtype), rows) and not torch.equal(
            rows.half().to(rows.dtype), rows
        ):
            return "its values take more than 16 bits"
    return None


class HalfLinear(nn.Module):
    """The product with a weight [out, in] that `no_half` has nothing against, in float32.

    Values of bfloat16 below 2^−30 of the weight's largest are rounded, to multiples of 2^−39 of it; all others are
    exact.
    What is packed is FBGEMM's own, and travels with no state dict.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out, in], bias: [out], in any dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach()
        largest = float(weight.abs().amax())
        exponent = math.floor(math.log2(_LARGEST / largest)) if largest > 0 else 0
        self.factor = 2.0**exponent
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._weights: list[Any] = [
            torch.ops.quantized.linear_prepack_fp16(rows.float() * self.factor, None)
            for rows in weight.split(ROWS)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of x."""
        rows = x.reshape(-1, self.in_features).float()
        # The factor comes off behind the sum: it could take an input out of float32's range.
        parts = [torch.ops.quantized.linear_dynamic_fp16(rows, part) for part in self._weights]
        found = torch.cat(parts, dim=1).div_(self.factor)
        if self.bias is not None:
            found += self.bias
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class CastEmbedding(nn.Module):
    """`nn.Embedding` whose table [entries, width] keeps its dtype, while what it gives is in another."""

    weight: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # No parameter: a model's dtype is that of its first one.
        self.register_buffer("weight", weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., width]"""
        return F.embedding(ids, self.weight).to(self.dtype)
