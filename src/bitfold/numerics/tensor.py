"""`QuantizedTensor`: what every rounding returns, and every exporter and kernel consumes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitfold.numerics.fp4 import stored_scale
from bitfold.numerics.quantize import (
    dequantize,
    from_groups,
    quantize,
    scale_and_zero,
    to_groups,
)
from bitfold.numerics.scheme import TensorScheme

__all__ = ["QuantizedTensor", "sharing_global_scale"]


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [out, in] in few bits.

    codes: [out, in] int8 (float8 for fp8; uint8 indices for nf4, mxfp4 and nvfp4).
    scale: [out, groups] ([1, 1] per tensor), in the floating point dtype it is stored in.
    zero:  [out, groups] int8, or None for symmetric grids.
    global_scale: [1] float32, a power of two by which all scales are divided; None but for nvfp4.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: TensorScheme
    global_scale: Tensor | None = None

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
        return cls.from_codes(from_groups(codes, weight.shape), scale, zero, scheme, scale_dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
    ) -> "QuantizedTensor":
        """Codes [out, in] with the scales and zero-points [..., 1] that `scale_and_zero(…, scale_dtype)` gave."""
        stored, global_scale = stored_scale(scale.flatten(1), scheme, scale_dtype)
        zero = None if zero is None else zero.flatten(1).to(torch.int8)
        return cls(codes, stored, zero, scheme, global_scale)

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, [out, in], computed in `dtype`; those of fp4 grids, which are exact in
        bfloat16, only rounded to it."""
        codes = to_groups(self.codes, self.scheme)
        per_group = (*codes.shape[:-1], 1)
        computed_in = torch.float32 if self.scheme.fp4 else dtype
        scale = self.scale.to(computed_in).reshape(per_group)
        if self.global_scale is not None:
            scale = scale / self.global_scale
        zero = None if self.zero is None else self.zero.reshape(per_group)
        return from_groups(dequantize(codes, scale, zero, self.scheme), self.shape).to(dtype)

    @property
    def bits(self) -> int:
        """Bits that the tensor's information takes: codes, scales and zero-points."""
        zero_bits = 0 if self.zero is None else self.zero.numel() * self.scheme.bits
        scales = [self.scale] if self.global_scale is None else [self.scale, self.global_scale]
        scale_bits = sum(scale.numel() * scale.element_size() * 8 for scale in scales)
        return self.codes.numel() * self.scheme.bits + scale_bits + zero_bits

    @property
    def bits_per_weight(self) -> float:
        """`bits` over the number of weights."""
        return self.bits / self.codes.numel()

    def with_global_scale(self, wanted: Tensor) -> "QuantizedTensor":
        """The same values said with another global scale, a power of two; itself where E4M3 cannot."""
        assert self.global_scale is not None
        scale = self.scale.float() * (wanted / self.global_scale)
        stored = scale.to(self.scale.dtype)
        if not torch.equal(stored.float(), scale):
            return self
        return replace(self, scale=stored, global_scale=wanted.clone())


def sharing_global_scale(tensors: Mapping[str, QuantizedTensor]) -> dict[str, QuantizedTensor]:
    """Weights that read the same input, the same values, with one global scale: engines fuse such layers (q, k and v)
    and know one of them for all."""
    known = [one.global_scale for one in tensors.values() if one.global_scale is not None]
    if len(known) < 2:
        return dict(tensors)
    least = torch.cat(known).min().reshape(1)
    return {
        name: one if one.global_scale is None else one.with_global_scale(least)
        for name, one in tensors.items()
    }
