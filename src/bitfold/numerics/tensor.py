"""`QuantizedTensor`: what every rounding returns, and every exporter and kernel consumes."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from bitfold.numerics.codebook import entries_of
from bitfold.numerics.fp4 import scale_dtype_of, scale_parts
from bitfold.numerics.quantize import (
    code_dtype,
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

    codes: [out, in] int8 (float8 for fp8; uint8 for shifted, and uint8 indices for nf4, mxfp4 and nvfp4); of a codebook
    [out, in / dim] uint8 indices.
    scale: [out, groups] ([1, 1] per tensor), in the floating point dtype it is stored in.
    zero:  [out, groups] int8, or None for symmetric grids.
    global_scale: [1] float32, a power of two by which all scales are divided; None but for nvfp4.
    codebook: [books, entries, dim] int8, where the grid is one.
    shift: [out, groups] in the dtype of the scales, what is added to code · scale; None but for the grid shifted.
    kept: [out, n], columns that are only rounded to the dtype of the scales, and columns: their places [n] int32, where
    the scheme has some. Their codes stand for nothing.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: TensorScheme
    _: KW_ONLY
    global_scale: Tensor | None = None
    codebook: Tensor | None = None
    kept: Tensor | None = None
    columns: Tensor | None = None
    shift: Tensor | None = None

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
        stored, global_scale = scale_parts(scale.flatten(1), scheme, scale_dtype)
        zero = None if zero is None else zero.flatten(1).to(torch.int8)
        return cls(codes, stored, zero, scheme, global_scale=global_scale)

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
        room, book = weight.new_empty, scheme.codebook
        in_all = (shape[0], shape[1] // scheme.values_per_code)
        return cls(
            codes=room(in_all, dtype=code_dtype(scheme)),
            scale=room(per_group, dtype=scale_dtype_of(scheme, scale_dtype)),
            zero=None if scheme.symmetric else room(per_group, dtype=torch.int8),
            scheme=scheme,
            global_scale=room(1, dtype=torch.float32) if scheme.grid == "nvfp4" else None,
            codebook=None if book is None else room(book.shape, dtype=torch.int8),
            kept=room((shape[0], scheme.kept), dtype=scale_dtype) if scheme.kept else None,
            columns=room(scheme.kept, dtype=torch.int32) if scheme.kept else None,
            shift=room(per_group, dtype=scale_dtype) if scheme.grid == "shifted" else None,
        )

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
        """The values the codes stand for, [out, in], computed in `dtype`; those of fp4 grids, which are exact in
        bfloat16, only rounded to it."""
        units = to_groups(self.units, self.scheme)
        per_group = (*units.shape[:-1], 1)
        computed_in = torch.float32 if self.scheme.fp4 else dtype
        scale = self.scale.to(computed_in).reshape(per_group)
        if self.global_scale is not None:
            scale = scale / self.global_scale
        zero = None if self.zero is None else self.zero.reshape(per_group)
        grouped = dequantize(units, scale, zero, self.scheme)
        if self.shift is not None:
            grouped += self.shift.to(computed_in).reshape(per_group)
        values = from_groups(grouped, self.shape).to(dtype)
        if self.kept is not None and self.columns is not None:
            values[:, self.columns.long()] = self.kept.to(dtype)
        return values

    @property
    def bits(self) -> int:
        """Bits of the tensor's information: codes, scales, zero-points or shifts, codebooks, columns that are kept."""
        zero_bits = 0 if self.zero is None else self.zero.numel() * self.scheme.bits
        beside = (self.global_scale, self.codebook, self.kept, self.columns, self.shift)
        parts = (self.scale, *beside)
        other_bits = sum(8 * part.nbytes for part in parts if part is not None)
        return self.codes.numel() * self.scheme.code_bits + zero_bits + other_bits

    @property
    def bits_per_weight(self) -> float:
        """`bits` over the number of weights."""
        return self.bits / self.shape.numel()

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
