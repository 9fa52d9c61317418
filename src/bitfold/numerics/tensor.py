"""`QuantizedTensor`: what every rounding returns, and every exporter and kernel consumes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.numerics.quantize import (
    dequantize,
    from_groups,
    quantize,
    scale_and_zero,
    to_groups,
)
from bitfold.numerics.scheme import TensorScheme

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [out, in] in few bits.

    codes: [out, in] int8 (uint8 indices for nf4, float8 for fp8).
    scale: [out, groups] ([1, 1] per tensor), in the floating point dtype it is stored in.
    zero:  [out, groups] int8, or None for symmetric grids.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: TensorScheme

    @classmethod
    def from_limits(
        cls,
        weight: Tensor,
        minimum: Tensor,
        maximum: Tensor,
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
    ) -> "QuantizedTensor":
        """Round `weight` [out, in] to nearest within the limits, shapes [..., 1] of its groups."""
        scale, zero = scale_and_zero(minimum, maximum, scheme, scale_dtype)
        codes = quantize(to_groups(weight, scheme), scale, zero, scheme)
        return cls(
            codes=from_groups(codes, weight.shape),
            scale=scale.flatten(1).to(scale_dtype),
            zero=None if zero is None else zero.flatten(1).to(torch.int8),
            scheme=scheme,
        )

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, [out, in], computed in `dtype`."""
        codes = to_groups(self.codes, self.scheme)
        per_group = (*codes.shape[:-1], 1)
        scale = self.scale.to(dtype).reshape(per_group)
        zero = None if self.zero is None else self.zero.reshape(per_group)
        return from_groups(dequantize(codes, scale, zero, self.scheme), self.shape)

    @property
    def bits(self) -> int:
        """Bits that the tensor's information takes: codes, scales and zero-points."""
        zero_bits = 0 if self.zero is None else self.zero.numel() * self.scheme.bits
        scale_bits = self.scale.numel() * self.scale.element_size() * 8
        return self.codes.numel() * self.scheme.bits + scale_bits + zero_bits

    @property
    def bits_per_weight(self) -> float:
        """`bits` over the number of weights."""
        return self.bits / self.codes.numel()
