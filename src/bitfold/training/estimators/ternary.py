"""Weights of −α, 0 and α: TWN, and with a threshold that is learned.

TWN (Li et al. 2016, arXiv 1605.04711): Δ = 0.7 · mean|w|, α = mean|w| of those with |w| > Δ; the gradient passes
    straight through to every weight.
Learned: α and Δ of each group are parameters, after TTQ (Zhu et al. 2017, arXiv 1612.01064, which learns the scales):
    ŵ = α t, t = round(clamp(w/2Δ, −1, 1)); straight through the rounding and inside the clamp
    dL/dα = Σ g t,   dL/dΔ = −Σ g α w/2Δ²,   dL/dw = g α/2Δ.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.numerics import QuantizedTensor, TensorScheme, from_groups, to_groups
from bitfold.numerics.trainable_scale import as_stored
from bitfold.training.estimators.estimator import WeightEstimator

__all__ = ["LearnedTernaryWeight", "TwnWeight", "ternary_scheme"]

_LEAST = 1e-8
_THRESHOLD = 0.7


def ternary_scheme(granularity: str = "channel", group_size: int | None = None) -> TensorScheme:
    """Integers −1, 0 and 1."""
    fields = {"bits": 2, "narrow": True, "granularity": granularity, "group_size": group_size}
    return TensorScheme.model_validate(fields)


class TwnWeight(WeightEstimator):
    """Threshold and scale are found anew from the weight whenever it is used."""

    def forward(self, weight: Tensor) -> Tensor:
        """See `WeightEstimator.forward`."""
        rounded: Tensor = _Twn.apply(to_groups(weight, self.scheme), self.storage)
        return from_groups(rounded, weight.shape)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """See `WeightEstimator.quantized`."""
        codes, scale = _ternary(to_groups(weight, self.scheme), self.storage)
        codes = from_groups(codes, weight.shape).to(torch.int8)
        return QuantizedTensor.from_codes(codes, scale, None, self.scheme, self.storage)


class LearnedTernaryWeight(WeightEstimator):
    """size: α, threshold: Δ; [out, groups, 1] each. They begin as TWN's."""

    def __init__(
        self, weight: Tensor, scheme: TensorScheme, storage: torch.dtype = torch.float32
    ) -> None:
        """weight: [out, in]."""
        super().__init__(scheme, storage)
        groups = to_groups(weight.detach().float(), scheme)
        self.size = nn.Parameter(_ternary(groups, torch.float32)[1])
        self.threshold = nn.Parameter(_thresholds(groups).clamp(min=_LEAST))
        # As LSQ scales the gradient of a step that so many numbers share, whose largest code is 1.
        self._factor = 1 / math.sqrt(groups.shape[-1])

    def forward(self, weight: Tensor) -> Tensor:
        """See `WeightEstimator.forward`."""
        groups, size = to_groups(weight, self.scheme), as_stored(self.size, self.storage)
        rounded: Tensor = _Learned.apply(groups, size, self.threshold, self._factor)
        return from_groups(rounded, weight.shape)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """See `WeightEstimator.quantized`."""
        u = to_groups(weight, self.scheme) / (2 * self.threshold)
        codes = from_groups(u.clamp(-1, 1).round(), weight.shape).to(torch.int8)
        size = as_stored(self.size, self.storage)
        return QuantizedTensor.from_codes(codes, size, None, self.scheme, self.storage)

    @torch.no_grad()
    def bound(self, weight: Tensor) -> None:
        """Scales and thresholds stay positive."""
        self.size.clamp_(min=_LEAST)
        self.threshold.clamp_(min=_LEAST)


def _thresholds(groups: Tensor) -> Tensor:
    return _THRESHOLD * groups.abs().mean(dim=-1, keepdim=True)


def _ternary(groups: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes −1, 0, 1 of grouped weights, and the scale [..., 1], as stored."""
    size = groups.abs()
    kept = (size > _thresholds(groups)).to(groups.dtype)
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    scale = ((size * kept).sum(dim=-1, keepdim=True) / count).clamp(min=_LEAST)
    return groups.sign() * kept, scale.to(storage).to(groups.dtype)


class _Twn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, storage: torch.dtype) -> Tensor:
        codes, scale = _ternary(groups, storage)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, size: Tensor, threshold: Tensor, factor: float) -> Tensor:
        u = groups / (2 * threshold)
        codes = u.clamp(-1, 1).round_()
        ctx.save_for_backward(groups, u, codes, size, threshold)
        ctx.factor = factor
        return codes * size

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        groups, u, codes, size, threshold = ctx.saved_tensors
        inside = gradient * (u.abs() < 1) * size / (2 * threshold)
        on_size = (gradient * codes).sum(dim=-1, keepdim=True) * ctx.factor
        on_threshold = -(inside * groups / threshold).sum(dim=-1, keepdim=True) * ctx.factor
        return inside, on_size, on_threshold, None
