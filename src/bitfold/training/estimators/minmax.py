"""Ranges of min-max, or any other of `bitfold.ranges`, found anew from a weight whenever it is used."""

import torch
from torch import Tensor

from bitfold.numerics import QuantizedTensor, TensorScheme, from_groups, scale_and_zero, to_groups
from bitfold.ranges import RANGES
from bitfold.training.estimators.estimator import WeightEstimator
from bitfold.training.estimators.through import ALL, round_to_grid

__all__ = ["MinMaxWeight"]


class MinMaxWeight(WeightEstimator):
    """Quantization-aware training as Jacob et al. have it (arXiv 1712.05877): the weight in its own range, and a
    gradient that passes straight through; what a range narrower than min-max clips gets none."""

    def __init__(
        self,
        scheme: TensorScheme,
        storage: torch.dtype = torch.float32,
        *,
        range: str = "minmax",
    ) -> None:
        """range: a name of `bitfold.ranges.RANGES` that needs no calibration text."""
        super().__init__(scheme, storage)
        self._range = RANGES[range]()
        self._edge = ALL if range == "minmax" else 0.0

    def forward(self, weight: Tensor) -> Tensor:
        """See `WeightEstimator.forward`."""
        groups = to_groups(weight, self.scheme)
        scale, zero = self._scale(groups)
        limits = self.scheme.qmin, self.scheme.qmax
        rounded = round_to_grid(groups, scale, zero, limits, edge=self._edge)
        return from_groups(rounded, weight.shape)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """See `WeightEstimator.quantized`."""
        limits = self._range.limits(to_groups(weight, self.scheme), self.scheme)
        return QuantizedTensor.from_limits(weight, *limits, self.scheme, self.storage)

    @torch.no_grad()
    def _scale(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        limits = self._range.limits(groups.detach(), self.scheme)
        return scale_and_zero(*limits, self.scheme, self.storage)
