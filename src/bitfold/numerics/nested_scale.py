"""Double quantization: the scales of a weight are themselves stored in 8 bits.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3): scales are positive, so their mean is taken off; what is left
is quantized in blocks of 256 that share a scale of their own,

    s ≈ mean + outer[block] · level[code]

A group of 64 weights then has 8 + 32/256 bits of scale, 0.127 bits a weight in place of 0.5. The levels here are those
of a symmetric integer of 8 bits; bitsandbytes' are floating point numbers of 8 bits, and those of its files are taken
as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.numerics.quantize import quantize, scale_and_zero, to_groups
from bitfold.numerics.scheme import TensorScheme
from bitfold.numerics.tensor import QuantizedTensor

__all__ = ["NestedScale", "nested_nearest"]

_BLOCK = 256
_MOST = 127


@dataclass(frozen=True)
class NestedScale:
    """Scales [out, groups] in 8 bits.

    codes: [out, groups] uint8, indices of levels: [256] float32. outer: [⌈out·groups / block⌉] float32.
    mean: [] float32. block: how many scales, in order, share an outer one.
    """

    codes: Tensor
    levels: Tensor
    outer: Tensor
    mean: Tensor
    block: int = _BLOCK

    @classmethod
    def of(cls, scale: Tensor) -> "NestedScale":
        """Scales [out, groups] > 0, each to the nearest that its block has."""
        flat = scale.detach().float().flatten()
        mean = flat.mean()
        around = flat - mean
        blocks = torch.nn.functional.pad(around, (0, -len(around) % _BLOCK)).view(-1, _BLOCK)
        # A block of equal scales has nothing around the mean, and any outer scale will do.
        outer = blocks.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (blocks / outer[:, None] * _MOST).round_() + _MOST
        levels = (torch.arange(256, device=scale.device, dtype=torch.float32) - _MOST) / _MOST
        stored = codes.to(torch.uint8).flatten()[: len(flat)].reshape(scale.shape)
        return cls(stored, levels, outer, mean)

    def values(self) -> Tensor:
        """The scales [out, groups], float32; none is below the smallest positive number."""
        outer = self.outer.repeat_interleave(self.block)[: self.codes.numel()]
        values = self.levels[self.codes.int()] * outer.view(self.codes.shape) + self.mean
        return values.clamp_(min=torch.finfo(torch.float32).tiny)

    @property
    def bits(self) -> int:
        """Bits of the scales; the levels are the same for all weights."""
        return 8 * self.codes.numel() + 32 * (self.outer.numel() + 1)


def nested_nearest(
    weight: Tensor, scheme: TensorScheme
) -> tuple[QuantizedTensor, NestedScale | None]:
    """Round a weight [out, in] to nearest in the range of each group, its scales by double quantization first.

    Codes and zero-points are made with the scales as they are stored. The scales come back in float32 in the
    QuantizedTensor, and as they are stored beside it; None for grids whose scales have 8 bits anyway (mxfp4, nvfp4).

    Raises RecipeError when the group size does not divide the inputs.
    """
    groups = to_groups(weight.float(), scheme)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    if scheme.fp4:
        return QuantizedTensor.from_limits(weight.float(), low, high, scheme, torch.float32), None
    scale, _ = scale_and_zero(low, high, scheme)
    nested = NestedScale.of(scale.flatten(1))
    stored = nested.values().view(scale.shape)
    zero = None
    if not scheme.symmetric:
        least = low.clamp(max=0)
        zero = (scheme.qmin - torch.round(least / stored)).clamp(scheme.qmin, scheme.qmax)
    codes = quantize(groups, stored, zero, scheme).reshape(weight.shape)
    return QuantizedTensor.from_codes(codes, stored, zero, scheme, torch.float32), nested
