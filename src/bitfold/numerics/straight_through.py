"""Fake quantization that can be trained through: the straight-through estimator, with exact gradients of the range.

Forward is `fake_quantize`'s. Backward, with u = x/s + z and r = round(u) − u (the rounding, in steps):

    inside the range:   dx̂/dx = 1      dx̂/ds = r        (the codes' own rounding is passed straight through)
    below, above it:    dx̂/dx = 0      x̂ follows the lower, or upper, limit

and s = (hi − lo)/(qmax − qmin) carries dx̂/ds on to the limits. It is LSQ's gradient (arXiv 1902.08153) with two ends.
"""

from typing import Any

import torch
from torch import Tensor

from bitfold.numerics.quantize import dequantize as _dequantize
from bitfold.numerics.quantize import from_groups, quantize, scale_and_zero, to_groups
from bitfold.numerics.scheme import TensorScheme

__all__ = ["fake_quantize_trainable", "quantize_through"]


def quantize_through(
    groups: Tensor, minimum: Tensor, maximum: Tensor, scheme: TensorScheme, *, clips: bool = True
) -> Tensor:
    """Fake-quantized groups [..., g] between limits [..., 1]; differentiable in all three.

    clips: whether values may lie outside the limits; False spares the masks where the limits are their own extremes.
    """
    if scheme.grid != "int":
        scale, _ = scale_and_zero(minimum.detach(), maximum.detach(), scheme)
        rounded = _dequantize(quantize(groups.detach(), scale, None, scheme), scale, None, scheme)
        return groups + (rounded - groups).detach()
    if scheme.symmetric:
        largest = torch.maximum(-minimum.clamp(max=0), maximum.clamp(min=0))
        minimum, maximum = -largest, largest
    result: Tensor = _Through.apply(
        groups, minimum.clamp(max=0), maximum.clamp(min=0), scheme, clips
    )
    return result


def fake_quantize_trainable(x: Tensor, scheme: TensorScheme) -> Tensor:
    """Fake quantization with x's own min-max range, differentiable in x and through the range; same shape as x."""
    groups = to_groups(x, scheme)
    minimum, maximum = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    return from_groups(quantize_through(groups, minimum, maximum, scheme, clips=False), x.shape)


class _Through(torch.autograd.Function):
    """See the module's docstring; limits contain 0, and are ± the same where the scheme is symmetric."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor,
        minimum: Tensor,
        maximum: Tensor,
        scheme: TensorScheme,
        clips: bool,
    ) -> Tensor:
        steps = _steps(scheme)
        scale = ((maximum - minimum) / steps).clamp(min=1e-12)
        u = groups / scale
        zero = None
        if not scheme.symmetric:
            zero = (scheme.qmin - torch.round(minimum / scale)).clamp_(scheme.qmin, scheme.qmax)
            u += zero
        ctx.save_for_backward(u)
        ctx.steps, ctx.scheme, ctx.clips = steps, scheme, clips
        codes = u.clamp(scheme.qmin, scheme.qmax).round_()
        if zero is not None:
            codes -= zero
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (u,) = ctx.saved_tensors
        scheme: TensorScheme = ctx.scheme
        clamped = u.clamp(scheme.qmin, scheme.qmax)
        if not ctx.clips:
            rounding = clamped.round_().sub_(u).mul_(gradient).sum(dim=-1, keepdim=True) / ctx.steps
            return gradient, -rounding, rounding, None, None
        # dx̂/ds of what is inside, spread on both ends; what is clipped follows its own end.
        on_groups = torch.where(clamped == u, gradient, 0.0)
        clipped = gradient - on_groups
        rounding = clamped.round_().sub_(u).mul_(on_groups).sum(dim=-1, keepdim=True) / ctx.steps
        above = torch.where(u > 0, clipped, 0.0).sum(dim=-1, keepdim=True)
        below = clipped.sum(dim=-1, keepdim=True) - above
        return on_groups, below - rounding, above + rounding, None, None


def _steps(scheme: TensorScheme) -> float:
    """Width of the grid in scales, between −limit and limit where it is symmetric."""
    if scheme.symmetric and scheme.narrow:
        return 2.0 * scheme.qmax
    return float(scheme.qmax - scheme.qmin)
