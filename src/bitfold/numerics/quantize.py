"""Quantize and dequantize: pure functions on tensors, in compressed-tensors' order of operations.

    q = clamp(round(x / s + z), qmin, qmax)        x̂ = s · (q − z)        z = qmin − round(min / s)

The zero-point is added *before* rounding: adding an odd z after rounding to even would flip ties. The range
always contains 0, a group of equal values is exact, nothing divides by zero.

All functions work on *grouped* tensors of shape [..., g], where the last axis shares one scale; scales and
zero-points have shape [..., 1]. `to_groups` makes the view.
"""

import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics.clusters import channel_clusters, over_clusters
from bitfold.numerics.fp4 import (
    fp4_codes,
    fp4_scale,
    fp4_scale_dynamic,
    fp4_values,
    round_to_fp4,
)
from bitfold.numerics.scheme import TensorScheme
from bitfold.numerics.stored_scale import storable_scale

__all__ = [
    "NF4_LEVELS",
    "code_dtype",
    "dequantize",
    "dynamic_scale_and_zero",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_static",
    "from_groups",
    "quantize",
    "scale_and_zero",
    "to_groups",
]

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

NF4_LEVELS = (
    # Dettmers et al. 2023, QLoRA (arXiv 2305.14314), appendix E.
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def to_groups(x: Tensor, scheme: TensorScheme) -> Tensor:
    """View x so that its last axis shares one scale.

    [out, in] → [out, 1, in] (channel), [out, in/g, g] (group), [1, numel] (tensor); [..., d] → [..., 1, d] (token).

    Raises RecipeError when the group size does not divide the last axis.
    """
    if scheme.granularity == "tensor":
        return x.reshape(1, -1)
    if scheme.granularity == "group":
        assert scheme.group_size is not None
        if x.shape[-1] % scheme.group_size:
            raise RecipeError(
                f"Group size {scheme.group_size} does not divide {x.shape[-1]} inputs: choose a divisor."
            )
        return x.unflatten(-1, (-1, scheme.group_size))
    return x.unsqueeze(-2)


def from_groups(groups: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `to_groups`."""
    return groups.reshape(shape)


def scale_and_zero(
    minimum: Tensor,
    maximum: Tensor,
    scheme: TensorScheme,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of a range, shapes [..., 1] like the limits.

    The range is widened to contain 0. `scale_dtype` rounds the scale to the precision in which it will be
    stored, *before* the zero-point and the codes are made, so that nothing is lost in storage. The grids mxfp4 and
    nvfp4 have a precision of their own; nvfp4's hangs together, and those in blocks, so the limits have to be all of a
    tensor's.
    The zero-point is None for symmetric grids, else integer values in floating point.
    """
    constant = (minimum == maximum) & (minimum != 0)
    value = minimum.abs()
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    if scheme.fp4:
        return fp4_scale(torch.maximum(-minimum, maximum), scheme), None
    if scheme.grid == "nf4":
        scale = torch.maximum(-minimum, maximum)
    elif scheme.grid == "fp8_e4m3":
        scale = torch.maximum(-minimum, maximum) / FP8_MAX
    elif scheme.symmetric:
        half = scheme.qmax if scheme.narrow else (scheme.qmax - scheme.qmin) / 2
        scale = torch.maximum(-minimum, maximum) / half
    else:
        scale = (maximum - minimum) / (scheme.qmax - scheme.qmin)
    # A constant group c is exact as c = ±1 · |c|, whatever the grid's own step would have been.
    # Not where scales hang together, which so large a one would coarsen.
    if scheme.scales != "blocks":
        scale = torch.where(constant, value, scale)
    scale = storable_scale(scale, scale_dtype, scheme)
    if scheme.symmetric:
        return scale, None
    zero = (scheme.qmin - torch.round(minimum / scale)).clamp(scheme.qmin, scheme.qmax)
    return scale, torch.where(constant, torch.zeros_like(zero), zero)


def code_dtype(scheme: TensorScheme) -> torch.dtype:
    """dtype in which codes are held in memory: int8, float8 for fp8, uint8 indices for all other grids."""
    return {"int": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}.get(scheme.grid, torch.uint8)


def quantize(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme) -> Tensor:
    """Codes of grouped values, dtype `code_dtype(scheme)`, shape of `groups`."""
    scaled = groups / scale
    if scheme.fp4:
        return fp4_codes(scaled)
    if scheme.grid == "nf4":
        levels = torch.tensor(NF4_LEVELS, dtype=scaled.dtype, device=scaled.device)
        return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    if scheme.grid == "fp8_e4m3":
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if zero is not None:
        scaled += zero
    return scaled.clamp_(scheme.qmin, scheme.qmax).round_().to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme) -> Tensor:
    """Values of grouped codes in the dtype of `scale`."""
    if scheme.fp4:
        return fp4_values(codes, scale.dtype).mul_(scale)
    if scheme.grid == "nf4":
        return torch.tensor(NF4_LEVELS, dtype=scale.dtype, device=scale.device)[codes.int()] * scale
    values = codes.to(scale.dtype)
    if zero is not None:
        values -= zero.to(scale.dtype)
    return values.mul_(scale)


def fake_quantize(
    groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme
) -> Tensor:
    """Quantize and dequantize without leaving floating point; same shape and dtype as `groups`."""
    if scheme.fp4:
        return round_to_fp4(groups / scale).mul_(scale).to(groups.dtype)
    if scheme.grid != "int":
        return dequantize(quantize(groups, scale, zero, scheme), scale, None, scheme)
    values = groups / scale
    if zero is not None:
        values += zero
    values.clamp_(scheme.qmin, scheme.qmax).round_()
    if zero is not None:
        values -= zero
    return values.mul_(scale)


def fake_quantize_dynamic(
    x: Tensor,
    scheme: TensorScheme,
    global_scale: Tensor | None = None,
    clusters: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Fake quantization with the min-max range of what it is given; same shape and dtype as x.

    global_scale: [1], float32, of the grid nvfp4; None: that of x itself, which is no longer what runs.
    clusters: of x's channels [n], uint8; None: those of x itself, likewise. share: [1], of the range that it is
    clipped to; None: all of it.

    What compressed-tensors computes at run time, to the bit and in every dtype, so that an artifact
    gives the logits of the simulation: here, unlike in a weight, a constant group is not special.
    """
    if scheme.clusters is not None:
        return _in_clusters(x, scheme, clusters)
    groups = to_groups(x, scheme)
    if scheme.fp4:
        largest = groups.abs().amax(dim=-1, keepdim=True)
        scale = fp4_scale_dynamic(largest, scheme, global_scale)
        return from_groups(fake_quantize(groups, scale, None, scheme), x.shape)
    scale, zero = dynamic_scale_and_zero(groups, scheme, share)
    return from_groups(fake_quantize(groups, scale, zero, scheme), x.shape)


def _in_clusters(x: Tensor, scheme: TensorScheme, clusters: Tensor | None) -> Tensor:
    """Each cluster of channels in the range of its own values: of a token, or where static of all tokens."""
    assert scheme.clusters is not None
    rows = x.flatten(0, -2)
    lows = highs = rows
    if scheme.static:
        lows, highs = rows.amin(dim=0, keepdim=True), rows.amax(dim=0, keepdim=True)
    if clusters is None:
        clusters = channel_clusters(lows.amin(dim=0), highs.amax(dim=0), scheme.clusters)
    scale, zero = _scale_and_zero_between(
        over_clusters(lows, clusters, scheme.clusters, "amin"),
        over_clusters(highs, clusters, scheme.clusters, "amax"),
        scheme,
    )
    at = clusters.long()
    of_channel = None if zero is None else zero[:, at]
    return fake_quantize(rows, scale[:, at], of_channel, scheme).view(x.shape)


def fake_quantize_static(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme
) -> Tensor:
    """Fake quantization with a known scale and zero-point that broadcast over x; same shape and dtype as x.

    Gradients pass the rounding straight through; of what the range clips there are none.
    """
    scale, zero = scale.to(x.dtype), None if zero is None else zero.to(x.dtype)
    rounded = fake_quantize(x.detach(), scale, zero, scheme)
    if not x.requires_grad:
        return rounded
    largest = torch.finfo(x.dtype).max
    low, high = (
        fake_quantize(torch.full_like(scale, end), scale, zero, scheme)
        for end in (-largest, largest)
    )
    clipped = torch.clamp(x, low, high)
    return clipped + (rounded - clipped).detach()


def dynamic_scale_and_zero(
    groups: Tensor, scheme: TensorScheme, share: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of the groups' min-max ranges, or of a share of them, [..., 1], computed in their dtype:
    those of `fake_quantize_dynamic` (not for fp4)."""
    # Not torch.aminmax, which takes over four times as long as both of these on a CPU.
    minimum, maximum = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    if share is not None:
        minimum, maximum = minimum * share.to(groups.dtype), maximum * share.to(groups.dtype)
    return _scale_and_zero_between(minimum, maximum, scheme)


def _scale_and_zero_between(
    minimum: Tensor, maximum: Tensor, scheme: TensorScheme
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of min-max ranges, in their shape, computed in their dtype."""
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    # Tensors, because CUDA turns a division by a Python number into a product with its inverse.
    steps = torch.tensor(_steps(scheme), dtype=minimum.dtype, device=minimum.device)
    if scheme.symmetric:
        scale = torch.maximum(-minimum, maximum) / (steps / 2)
        return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale), None
    scale = (maximum - minimum) / steps
    # qmin − min/s is rounded as a whole: in half precision the subtraction already rounds.
    zero = torch.round((scheme.qmin - minimum / scale).clamp(scheme.qmin, scheme.qmax))
    nothing = scale == 0  # a group of zeros, whose zero-point came out as 0/0
    return torch.where(nothing, torch.finfo(scale.dtype).eps, scale), zero.masked_fill(nothing, 0)


def _steps(scheme: TensorScheme) -> float:
    """Width of the grid in scales."""
    if scheme.grid == "nf4":
        return 2.0
    if scheme.grid == "fp8_e4m3":
        return 2 * FP8_MAX
    return 2.0 * scheme.qmax if scheme.narrow else float(scheme.qmax - scheme.qmin)
