"""`QuantizedTensor`: what every rounding returns, and every exporter and kernel consumes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.numerics.codebook import entries_of
from bitfold.numerics.quantize import (
    code_dtype,
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

    codes: [out, in] int8 (uint8 indices for nf4, float8 for fp8); of a codebook [out, in / dim] uint8 indices.
    scale: [out, groups] ([1, 1] per tensor), in the floating point dtype it is stored in.
    zero:  [out, groups] int8, or None for symmetric grids.
    codebook: [books, entries, dim] int8, where the grid is one.
    kept: [out, n], columns that are only rounded to the dtype of the scales, and columns: their places [n] int32, where
    the scheme has some. Their codes stand for nothing.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: TensorScheme
    codebook: Tensor | None = None
    kept: Tensor | None = None
    columns: Tensor | None = None

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

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> "QuantizedTensor":
        """Room for a weight [out, in]: the shapes and dtypes of its parts."""
        weight = torch.empty(shape, device=device)
        per_group = to_groups(weight, scheme)[..., :1].flatten(1).shape
        scale = weight.new_empty(per_group, dtype=scale_dtype)
        codes = weight.new_empty(
            (shape[0], shape[1] // scheme.values_per_code), dtype=code_dtype(scheme)
        )
        zero = None if scheme.symmetric else weight.new_empty(per_group, dtype=torch.int8)
        book, codebook = scheme.codebook, None
        if book is not None:
            size = (book.books, book.entries, book.dim)
            codebook = weight.new_empty(size, dtype=torch.int8)
        kept = weight.new_empty((shape[0], scheme.kept), dtype=scale_dtype)
        places = weight.new_empty(scheme.kept, dtype=torch.int32)
        beside = (kept, places) if scheme.kept else (None, None)
        return cls(codes, scale, zero, scheme, codebook, *beside)

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        rows, codes = self.codes.shape
        return torch.Size((rows, codes * self.scheme.values_per_code))

    @property
    def units(self) -> Tensor:
        """What is multiplied by the scales, [out, in]: the codes, or the entries of a codebook that they stand for."""
        return self.codes if self.codebook is None else entries_of(self.codes, self.codebook)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, [out, in], computed in `dtype`."""
        units = to_groups(self.units, self.scheme)
        per_group = (*units.shape[:-1], 1)
        scale = self.scale.to(dtype).reshape(per_group)
        zero = None if self.zero is None else self.zero.reshape(per_group)
        values = from_groups(dequantize(units, scale, zero, self.scheme), self.shape)
        if self.kept is not None and self.columns is not None:
            values[:, self.columns.long()] = self.kept.to(dtype)
        return values

    @property
    def bits(self) -> int:
        """Bits that the tensor's information takes: codes, scales, zero-points, codebooks, columns that are kept."""
        zero_bits = 0 if self.zero is None else self.zero.numel() * self.scheme.bits
        scale_bits = self.scale.numel() * self.scale.element_size() * 8
        others = (self.codebook, self.kept, self.columns)
        other_bits = sum(8 * part.nbytes for part in others if part is not None)
        return self.codes.numel() * self.scheme.code_bits + scale_bits + zero_bits + other_bits

    @property
    def bits_per_weight(self) -> float:
        """`bits` over the number of weights."""
        return self.bits / self.shape.numel()
