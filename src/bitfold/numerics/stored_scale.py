"""Scales as they will be stored: in the dtype of the checkpoint, and in the precision of the format that is meant.

`half`: numbers that half precision has as well, which GGUF, GPTQ, AWQ and TensorRT store. `blocks`: llama.cpp's K types
store for 256 inputs one d in half precision, and for each 16 of them a small integer s:

    scale = d · s        1 ≤ s ≤ 15 (2 bits, Q2_K), 31 (3 bits, Q3_K), 127 (6 bits, Q6_K)

d has so few digits that d · s is exact even in bfloat16, whatever the checkpoint is in. Both are rounded to as weights
are quantized, so that an export rounds nothing.
"""

import torch
from torch import Tensor

from bitfold.numerics.scheme import TensorScheme

__all__ = ["block_steps", "could_be_in_blocks", "storable_scale"]

_BLOCK = 256
_MOST = {2: 15, 3: 31, 6: 127}
_DIGITS = 8  # of bfloat16
_LEAST_HALF = 2.0**-24
_LARGEST = 2.0**14  # of which Q2_K stores twice as much, too


def storable_scale(
    scale: Tensor, scale_dtype: torch.dtype | None = None, scheme: TensorScheme | None = None
) -> Tensor:
    """Scales ≥ 0 rounded to the dtype in which they will be stored, and to the scheme's precision, in their own dtype.

    scheme: whose `scales` are meant; with `blocks` [..., groups] or [..., groups, 1], all groups of a row.
    """
    precision = "storage" if scheme is None else scheme.scales
    if scheme is not None and precision == "blocks":
        return _in_blocks(scale, scheme)
    # What does not fit in scale_dtype (or in its own) is clipped: an infinite scale would make NaNs of all values.
    dtypes = [scale.dtype, *([scale_dtype] if scale_dtype else [])]
    dtypes += [torch.float16] if precision == "half" else []
    rounded = scale.clamp(max=min(torch.finfo(dtype).max for dtype in dtypes))
    # Half precision last: below its normal numbers it has only such as bfloat16 has as well.
    for dtype in dtypes[1:]:
        rounded = rounded.to(dtype).to(scale.dtype)
    # Zero (an all-zero group, or an underflow) becomes the smallest scale there is.
    smallest = _LEAST_HALF if torch.float16 in dtypes else torch.finfo(torch.float32).tiny
    return torch.where(rounded == 0, torch.full_like(rounded, smallest), rounded)


def _in_blocks(scale: Tensor, scheme: TensorScheme) -> Tensor:
    """The nearest scales that are d · s, in the same shape."""
    most = _MOST[scheme.bits]
    blocks = scale.reshape(len(scale), -1, _groups(scheme))
    # Upwards, so that s stays within its bits; to the digits that are left beside those of s.
    digits = _DIGITS - most.bit_length()
    mantissa, exponent = torch.frexp(blocks.amax(dim=-1, keepdim=True) / most)
    d = torch.ldexp(torch.ceil(mantissa * 2**digits), exponent - digits)
    d = d.clamp(_LEAST_HALF * 2**digits, _LARGEST)
    return (torch.round(blocks / d).clamp(1, most) * d).reshape(scale.shape)


def block_steps(scale: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor] | None:
    """d [out, blocks, 1], which half precision has, and s [out, blocks, groups of a block] of scales [out, groups];
    None where there are none."""
    most = _MOST[scheme.bits]
    blocks = scale.reshape(len(scale), -1, _groups(scheme)).double()
    peak = blocks.amax(dim=-1, keepdim=True)
    found = torch.zeros_like(peak)
    for s in range(1, most + 1):
        d = peak / s
        steps = blocks / d
        fits = (steps == steps.round()).all(dim=-1, keepdim=True) & (d.half().double() == d)
        found = torch.where(fits, d, found)
    return None if (found == 0).any() else (found, blocks / found)


def could_be_in_blocks(scheme: TensorScheme) -> bool:
    """Whether K types have a place for scales of such weights."""
    of_it = (scheme.grid, scheme.symmetric, scheme.bits in _MOST, scheme.group_size)
    return of_it == ("int", True, True, 16)


def _groups(scheme: TensorScheme) -> int:
    """Groups that share a d."""
    assert scheme.group_size is not None
    return _BLOCK // scheme.group_size
