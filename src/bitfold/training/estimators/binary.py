"""Weights of one bit: BinaryConnect, BNN, XNOR-Net; and inputs of one bit.

    BinaryConnect (Courbariaux et al. 2015, arXiv 1511.00363): sign(w), or in training +1 with probability
        σ(w) = clamp((w + 1)/2, 0, 1); weights stay in [−1, 1], and the gradient passes straight through.
    BNN (Hubara et al. 2016, arXiv 1602.02830): sign(w) and sign(x); the gradient of x passes where |x| ≤ 1.
    XNOR-Net (Rastegari et al. 2016, arXiv 1603.05279): α sign(w) with α = mean|w| of a filter, and
        dL/dw_i = (sign(w_i)/n) Σ_j dL/dŵ_j sign(w_j) + α · 1[|w_i| ≤ 1] · dL/dŵ_i, equation 11's gradient written out
        with α's dependence on all n weights of the filter.

sign(0) = +1.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme, from_groups, to_groups
from bitfold.training.estimators.estimator import InputEstimator, WeightEstimator
from bitfold.training.estimators.through import sign_through

__all__ = ["BinaryConnectWeight", "SignInput", "XnorWeight", "binary_scheme", "signs"]


def binary_scheme(granularity: str = "channel", group_size: int | None = None) -> TensorScheme:
    """Of weights ± a scale: codes 0 and 1, a scale of twice that size, and a shift by minus it."""
    fields = {"grid": "shifted", "bits": 1, "granularity": granularity, "group_size": group_size}
    return TensorScheme.model_validate(fields)


def signs(x: Tensor) -> Tensor:
    """±1 in the dtype of x, sign(0) = +1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class BinaryConnectWeight(WeightEstimator):
    """±size, where size is fixed: 1 as in the papers."""

    def __init__(
        self,
        weight: Tensor,
        scheme: TensorScheme,
        storage: torch.dtype = torch.float32,
        *,
        stochastic: bool = False,
        masked: bool = False,
    ) -> None:
        """stochastic: drawn, in training. masked: no gradient where |w| > 1, as BNN has it; BinaryConnect, which clips
        weights too, has none to mask."""
        super().__init__(scheme, storage)
        self._stochastic, self._masked = stochastic, masked

    def forward(self, weight: Tensor) -> Tensor:
        """See `WeightEstimator.forward`."""
        if self._masked:
            return sign_through(weight)
        rounded: Tensor = _Binary.apply(weight, self._stochastic and self.training)
        return rounded

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """See `WeightEstimator.quantized`."""
        groups = to_groups(weight, self.scheme)
        return _binary(weight, torch.ones_like(groups[..., :1]), self.scheme, self.storage)

    @torch.no_grad()
    def bound(self, weight: Tensor) -> None:
        """Weights stay in [−1, 1]."""
        weight.clamp_(-1, 1)


class XnorWeight(WeightEstimator):
    """α sign(w), α = mean|w| of each group: of a filter, or fewer."""

    def forward(self, weight: Tensor) -> Tensor:
        """See `WeightEstimator.forward`."""
        rounded: Tensor = _Xnor.apply(to_groups(weight, self.scheme), self.storage)
        return from_groups(rounded, weight.shape)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """See `WeightEstimator.quantized`."""
        size = _mean_size(to_groups(weight, self.scheme), self.storage)
        return _binary(weight, size, self.scheme, self.storage)


class SignInput(InputEstimator):
    """sign(x), and what the layer then multiplies its output by: K, mean|x| of what each output sees, if `scaled`."""

    def __init__(self, scheme: TensorScheme, *, scaled: bool = False) -> None:
        super().__init__(scheme)
        self.scaled = scaled
        self._looked = False

    def forward(self, x: Tensor) -> Tensor:
        """See `InputEstimator.forward`. Warns where the first inputs have one sign."""
        if not self._looked:
            self._looked = True
            if bool((x >= 0).all()):
                warnings.warn(
                    "The inputs of a layer are never negative, as behind a ReLU: their signs say nothing. XNOR-Net and "
                    "BNN have a batch norm, or a Hardtanh, before such a layer.",
                    stacklevel=2,
                )
        return sign_through(x)

    @property
    def activation(self) -> TensorScheme:
        """Nothing that a layer of integers could do: `bitfold.runtime.xnor` has the layers."""
        return self.scheme

    def stored(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


def _mean_size(groups: Tensor, storage: torch.dtype) -> Tensor:
    return groups.abs().mean(dim=-1, keepdim=True).to(storage).to(groups.dtype)


def _binary(
    weight: Tensor, size: Tensor, scheme: TensorScheme, storage: torch.dtype
) -> QuantizedTensor:
    codes = (weight >= 0).to(torch.uint8)
    per_group = size.flatten(1).to(storage)
    return QuantizedTensor(codes, 2 * per_group, None, scheme, shift=-per_group)


class _Binary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, drawn: bool) -> Tensor:
        if not drawn:
            return signs(weight)
        share = ((weight + 1) / 2).clamp_(0, 1)
        return torch.where(torch.rand_like(share) < share, 1.0, -1.0).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Xnor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, storage: torch.dtype) -> Tensor:
        size = _mean_size(groups, storage)
        ctx.save_for_backward(groups, size)
        return signs(groups) * size

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        groups, size = ctx.saved_tensors
        sign = signs(groups)
        on_size = (gradient * sign).mean(dim=-1, keepdim=True)
        return sign * on_size + gradient * size * (groups.abs() <= 1), None
