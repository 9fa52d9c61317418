"""SignRound (Cheng et al. 2023, arXiv 2309.05516): rounding offsets and clipping learned by the signs of gradients.

    Ŵ = s · (clamp(round(W/s + z + V), qmin, qmax) − z)        s, z of the range [ρ_lo · lo, ρ_hi · hi]

V in [−½, ½] decides up or down, ρ in [0, 1] shrinks the range; each step moves every one of them by the same falling
amount against the sign of its gradient on the block's output. The best state seen is kept.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import (
    QuantizedTensor,
    TensorScheme,
    from_groups,
    scale_and_zero,
    to_groups,
)
from bitfold.numerics.straight_through import onto_larger, steps_of
from bitfold.part import Need
from bitfold.rounding.block_rounding import BlockLoss, BlockRounding
from bitfold.rounding.rounding import Layer, Rounded

__all__ = ["Signround"]

_CHECK_WINDOWS = 16
_CHECKS = 5
_LARGEST_CHANGE = 0.02


class Signround(BlockRounding):
    """steps: of the descent. batch: windows in a step. rate: of the first step; 0 is 1/steps, with which V can just
    cross its range. clipping: learn the range too."""

    needs = frozenset[Need]({"loss"})

    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=4, ge=1)
    rate: float = Field(default=0.0, ge=0)
    clipping: bool = True

    def solve_block(
        self, layers: Mapping[str, Layer], scale_dtype: torch.dtype, block: BlockLoss
    ) -> Rounded:
        """See `BlockRounding.solve_block`."""
        for name, layer in layers.items():
            if layer.scheme.grid != "int":
                raise RecipeError(
                    f"signround learns between neighbouring integers, and {name} has the grid {layer.scheme.grid}: "
                    "choose another rounding for it."
                )
        learned = {name: _Offsets(layer, self.clipping) for name, layer in layers.items()}
        notes = _descend(self, learned, block)
        return Rounded({name: one.tensor(scale_dtype) for name, one in learned.items()}, notes)


class _Offsets:
    """V and ρ of one layer."""

    def __init__(self, layer: Layer, clipping: bool) -> None:
        self.layer = layer
        self.groups = to_groups(layer.weight, layer.scheme)
        self.offset = torch.zeros_like(self.groups).requires_grad_()
        ratios = [torch.ones_like(limit).requires_grad_(clipping) for limit in layer.limits]
        self.lower, self.upper = ratios

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.offset, self.lower, self.upper) if p.requires_grad]

    def limits(self) -> tuple[Tensor, Tensor]:
        low, high = self.layer.limits
        return low * self.lower, high * self.upper

    def weight(self) -> Tensor:
        """The rounded weight [out, in]; differentiable in V and ρ."""
        rounded: Tensor = _Rounded.apply(
            self.groups, self.offset, *self.limits(), self.layer.scheme
        )
        return from_groups(rounded, self.layer.weight.shape)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter -= rate * parameter.grad.sign()
            parameter.grad = None
        self.offset.clamp_(-0.5, 0.5)
        self.lower.clamp_(0, 1)
        self.upper.clamp_(0, 1)

    @torch.no_grad()
    def tensor(self, scale_dtype: torch.dtype) -> QuantizedTensor:
        scheme = self.layer.scheme
        scale, zero = scale_and_zero(*self.limits(), scheme, scale_dtype)
        codes = self.groups / scale + self.offset
        if zero is not None:
            codes += zero
        codes = codes.clamp_(scheme.qmin, scheme.qmax).round_().to(torch.int8)
        codes = from_groups(codes, self.layer.weight.shape)
        return QuantizedTensor.from_codes(codes, scale, zero, scheme, scale_dtype)


class _Rounded(torch.autograd.Function):
    """Ŵ of the module's docstring; the gradient passes the rounding straight through, in V and in the range."""

    @staticmethod
    def forward(
        ctx: Any, groups: Tensor, offset: Tensor, low: Tensor, high: Tensor, scheme: TensorScheme
    ) -> Tensor:
        scale, zero = scale_and_zero(low, high, scheme)
        u = groups / scale + offset
        if zero is not None:
            u += zero
        codes = u.clamp(scheme.qmin, scheme.qmax).round_()
        ctx.scheme = scheme
        ctx.save_for_backward(u, codes - u + offset, scale, low, high)
        if zero is not None:
            codes -= zero
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        u, difference, scale, low, high = ctx.saved_tensors
        scheme: TensorScheme = ctx.scheme
        bottom, top = scheme.qmin - 0.5, scheme.qmax + 0.5
        passed = torch.ops.aten.hardtanh_backward(gradient, u, bottom, top)
        above = torch.ops.aten.threshold_backward(gradient, u, top).sum(dim=-1, keepdim=True)
        below = (gradient - passed).sum(dim=-1, keepdim=True) - above
        inside = (difference * passed).sum(dim=-1, keepdim=True) / steps_of(scheme)
        on_low, on_high = below - inside, above + inside
        if scheme.symmetric:
            on_low, on_high = onto_larger(on_low, on_high, low, high)
        return None, passed * scale, on_low, on_high, None


def _descend(options: Signround, learned: Mapping[str, _Offsets], block: BlockLoss) -> list[str]:
    """Leave every layer at the best state seen; nearest is the first."""
    generator = torch.Generator().manual_seed(block.seed)
    check = torch.randperm(block.windows, generator=generator)[:_CHECK_WINDOWS]
    parameters = [p for one in learned.values() for p in one.parameters]

    def weights() -> dict[str, Tensor]:
        return {name: one.weight() for name, one in learned.items()}

    @torch.no_grad()
    def checked(low: bool) -> float:
        rounded, parts = weights(), check.split(options.batch)
        return sum(float(block.loss(rounded, part, low)) * len(part) for part in parts) / len(check)

    best_loss, low = checked(low=False), False
    if block.low_is_quick:
        exact, in_low = best_loss, checked(low=True)
        low = abs(in_low - exact) <= _LARGEST_CHANGE * exact
        best_loss = in_low if low else exact
    best = [p.detach().clone() for p in parameters]
    notes: list[str] = []
    every = max(1, options.steps // _CHECKS)
    for step in range(options.steps):
        rate = (options.rate or 1 / options.steps) * (1 - step / options.steps)
        windows = torch.randperm(block.windows, generator=generator)[: options.batch]
        with torch.enable_grad():
            loss = block.loss(weights(), windows, low)
            if not torch.isfinite(loss):
                notes.append(
                    f"the loss of step {step + 1} was not finite: kept the best state before"
                )
                break
            loss.backward()
        for one in learned.values():
            one.step(rate)
        block.report(step + 1, options.steps, "rounding")
        if (step + 1) % every == 0 or step + 1 == options.steps:
            now = checked(low)
            if now < best_loss:
                best_loss, best = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return notes
