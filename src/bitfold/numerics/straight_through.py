"""Fake quantization that can be trained through: the straight-through estimator, with exact gradients of the range.

A group's limits are lo = ρ_lo · min and hi = ρ_hi · max of its values, for ratios ρ that may be learned (1 without).
With u = x/s + z and r = round(u) − u (the rounding, in steps):

    inside the range:   dx̂/dx = 1      dx̂/ds = r        (the codes' own rounding is passed straight through)
    below, above it:    dx̂/dx = 0      x̂ follows the lower, or upper, limit

s = (hi − lo)/(qmax − qmin) carries dx̂/ds on to the limits, and they to the ratios and to the extreme values. It is
LSQ's gradient (arXiv 1902.08153) with two ends.

Masks are made by PyTorch's own backward kernels of hardtanh and threshold, one vectorised pass each; on a CPU
comparisons to booleans and `where` take five to thirty times as long (docs/performance.md).
"""

from typing import Any

import torch
from torch import Tensor

from bitfold.numerics.quantize import fake_quantize, from_groups, scale_and_zero, to_groups
from bitfold.numerics.scheme import TensorScheme

__all__ = ["fake_quantize_trainable", "onto_larger", "steps_of"]

Ratios = tuple[Tensor, Tensor]

# A value this many steps beyond the last code counts as inside: the extremes themselves must not be lost to rounding.
_EDGE = 1e-4


def fake_quantize_trainable(
    x: Tensor, scheme: TensorScheme, ratios: Ratios | None = None
) -> Tensor:
    """Fake quantization in the range of each group's own values; shape and dtype of x,
    computed in float32 at least.

    ratios: of the groups' lower and upper limit to their min and max, [..., 1] each, as in `to_groups`; differentiable.
    """
    groups = to_groups(x if x.dtype == torch.float64 else x.float(), scheme)
    if scheme.grid == "int":
        lower, upper = ratios or (None, None)
        rounded: Tensor = _Through.apply(groups, lower, upper, scheme)
    else:
        rounded = _through_other_grids(groups, ratios, scheme)
    return from_groups(rounded, x.shape).to(x.dtype)


def _through_other_grids(groups: Tensor, ratios: Ratios | None, scheme: TensorScheme) -> Tensor:
    """fp8, nf4, mxfp4 and nvfp4: no gradient through the range."""
    values = groups.detach()
    minimum, maximum = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    if ratios is not None:
        minimum, maximum = minimum * ratios[0].detach(), maximum * ratios[1].detach()
    scale, _ = scale_and_zero(minimum, maximum, scheme)
    return groups + (fake_quantize(values, scale, None, scheme) - values)


class _Through(torch.autograd.Function):
    """See the module's docstring; `lower` and `upper` are the ratios, or None."""

    @staticmethod
    def forward(
        ctx: Any, groups: Tensor, lower: Tensor | None, upper: Tensor | None, scheme: TensorScheme
    ) -> Tensor:
        minimum, maximum = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
        low = (minimum if lower is None else minimum * lower).clamp(max=0)
        high = (maximum if upper is None else maximum * upper).clamp(min=0)
        if scheme.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / steps_of(scheme)).clamp_(min=1e-12)
        u = groups / scale
        zero = None
        if not scheme.symmetric:
            zero = (scheme.qmin - torch.round(low / scale)).clamp_(scheme.qmin, scheme.qmax)
            u += zero
        codes = u.clamp(scheme.qmin, scheme.qmax).round_()
        ctx.scheme = scheme
        inside = None if lower is None else u
        ctx.save_for_backward(groups, minimum, maximum, codes - u, inside, lower, upper)
        if zero is not None:
            codes -= zero
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        groups, minimum, maximum, difference, u, lower, upper = ctx.saved_tensors
        scheme: TensorScheme = ctx.scheme
        passed = gradient
        on_low = on_high = torch.zeros_like(minimum)
        if u is not None:
            bottom, top = scheme.qmin - _EDGE, scheme.qmax + _EDGE
            passed = torch.ops.aten.hardtanh_backward(gradient, u, bottom, top)
            above = torch.ops.aten.threshold_backward(gradient, u, top)
            on_high = above.sum(dim=-1, keepdim=True)
            on_low = (gradient - passed).sum(dim=-1, keepdim=True) - on_high
        # dx̂/ds of what is inside, spread on both ends; what is clipped follows its own end.
        rounding = (difference * passed).sum(dim=-1, keepdim=True) / steps_of(scheme)
        on_low, on_high = on_low - rounding, on_high + rounding
        low = minimum if lower is None else minimum * lower
        high = maximum if upper is None else maximum * upper
        if scheme.symmetric:
            on_low, on_high = onto_larger(on_low, on_high, low, high)
        on_low, on_high = on_low * (low <= 0), on_high * (high >= 0)
        on_minimum = on_low if lower is None else on_low * lower
        on_maximum = on_high if upper is None else on_high * upper
        on_groups = passed + _where_zero(groups - minimum, on_minimum)
        on_groups += _where_zero(maximum - groups, on_maximum)
        return (
            on_groups,
            None if lower is None else on_low * minimum,
            None if upper is None else on_high * maximum,
            None,
        )


def _where_zero(distance: Tensor, value: Tensor) -> Tensor:
    """The value, broadcast, where a distance ≥ 0 is 0; zero elsewhere."""
    smallest = -torch.finfo(distance.dtype).smallest_normal
    found: Tensor = torch.ops.aten.threshold_backward(
        value.expand_as(distance), distance.neg_(), smallest
    )
    return found


def onto_larger(
    on_low: Tensor, on_high: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients on the limits of a symmetric range: both ends are ± the larger, which takes the gradient of both."""
    both = on_high - on_low
    share = (high + low).sign()  # −1: the lower end is the larger one, 0: they are equal
    return both * (share - 1) / 2, both * (share + 1) / 2


def steps_of(scheme: TensorScheme) -> float:
    """Width of the grid in scales, between −limit and limit where it is symmetric."""
    if scheme.symmetric and scheme.narrow:
        return 2.0 * scheme.qmax
    return float(scheme.qmax - scheme.qmin)
