"""Rounding that can be trained through: the straight-through estimator and its clip mask, LSQ's gradient of the step.

With u = x/s + z and c = round(clamp(u, qmin, qmax)) the values are x̂ = (c − z) s, and

    dx̂/dx = 1 where qmin < u < qmax, 0 elsewhere                      (straight through, arXiv 1308.3432, clip mask)
    dx̂/ds = c − u inside, c − z outside                              (LSQ, arXiv 1902.08153, equation 3)
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["round_to_grid", "sign_through"]

ALL = 1e9
"""An edge this far away masks nothing."""


def round_to_grid(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    limits: tuple[int, int],
    *,
    factor: float = 1.0,
    edge: float = 0.0,
) -> Tensor:
    """x [..., g] on the integers between the limits, of a scale and zero-point [..., 1]; differentiable in x
    and scale.

    The values are those that `QuantizedTensor.dequantize` gives for the codes, to the bit. factor: of the scale's
    gradient. edge: codes beyond the last one that still count as inside.
    """
    rounded: Tensor = _Round.apply(x, scale, zero, *limits, factor, edge)
    return rounded


def sign_through(x: Tensor) -> Tensor:
    """±1 with sign(0) = +1; the gradient passes where |x| ≤ 1 (BNN, arXiv 1602.02830, equation 4)."""
    signs: Tensor = _Sign.apply(x)
    return signs


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        qmin: int,
        qmax: int,
        factor: float,
        edge: float,
    ) -> Tensor:
        u = x / scale
        if zero is not None:
            u += zero
        codes = u.clamp(qmin, qmax).round_()
        ctx.save_for_backward(u, codes, zero)
        ctx.shape, ctx.limits, ctx.factor = scale.shape, (qmin - edge, qmax + edge), factor
        values = codes if zero is None else codes - zero
        return values * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        u, codes, zero = ctx.saved_tensors
        # hardtanh's own backward is one vectorised pass; it is 0 at the limits, as the paper has it.
        inside = torch.ops.aten.hardtanh_backward(gradient.to(u.dtype), u, *ctx.limits)
        on_scale = None
        if ctx.needs_input_grad[1]:
            outside = gradient - inside
            values = codes if zero is None else codes - zero
            each = inside * (codes - u) + outside * values
            on_scale = each.sum_to_size(ctx.shape) * ctx.factor
        return inside, on_scale, None, None, None, None, None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (x,) = ctx.saved_tensors
        return (gradients[0] * (x.abs() <= 1),)
